"""LoRA as an adapter of PEFT (https://github.com/huggingface/peft), for models of KerasHub, and such an adapter back.

    peft.write("adapter", model, plan)                # then, in PyTorch: PeftModel.from_pretrained(base, "adapter")
    Base(model).use(peft.read("adapter", model))      # see dist_partial.export.delta

PEFT multiplies an adapter's factors as matrices, B [outputs, r] and A [r, inputs]. Keras's factors of a kernel with
several output axes are others: a query's kernel [hidden, heads, size] has A [hidden, heads, r] and B [r, size], so that
each head has an A of its own. As matrices these have the rank heads * r, of which most of B is zero; and where Hugging
Face's module holds query, key and value at once, as GPT-2's does, their factors stand beside each other.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dist_partial import compat
from dist_partial.adapters import layers
from dist_partial.checkpoints import safetensors_file
from dist_partial.checkpoints.fingerprints import model_fingerprints, variables
from dist_partial.distributed import consistency
from dist_partial.errors import UserError, first_line
from dist_partial.export import delta
from dist_partial.export.hub_names import HubNames, Linear, name_in_memory
from dist_partial.files import existing, write_text
from dist_partial.selection.plan import Plan
from dist_partial.validation import nearest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TASKS = {"CausalLM": "CAUSAL_LM", "TextClassifier": "SEQ_CLS"}
_BEFORE = "base_model.model."  # of all names in an adapter's file
_ELSE = "write --format=huggingface or safetensors"


def write(folder: str | Path, model: keras.Model, plan: Plan | None = None) -> str:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    What is trained besides LoRA, such as the head of a classifier, becomes `modules_to_save`.

    Args:
        folder: to write into; it is made if need be.
        model: of `hub_model` or `smollm2`, with LoRA.
        plan: what is trained; None: that of the optimizer from `partial` with which the model is compiled.

    Returns:
        What has been written, in words.

    Raises:
        UserError: names in Hugging Face's models are not known, or something is trained that no adapter of PEFT has:
            rows, embeddings, or what has LoRA in int8 beside it.

    Examples:
        >>> import tempfile
        >>> from dist_partial import Rule, partial
        >>> from dist_partial.adapters import lora
        >>> from dist_partial.models import hub_model
        >>> sizes = {"vocabulary_size": 100, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
        >>> model = hub_model(architecture="GPT2", arguments=sizes)
        >>> _ = lora.enable([Rule(".*/query/kernel", lora=2), ("freeze", ".*")], model)
        >>> model.compile(partial("sgd", [("train", ".*/lora_.*"), ("freeze", ".*")], model), "mse")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(write(folder, model))
        LoRA of 1 module, 128 numbers
    """
    plan = plan or delta.plan_of_fit(model)
    names, adapted = HubNames(model), [one for one in layers.layers(model) if getattr(one, "lora_enabled", False)]
    factors = {id(factor) for layer in adapted for factor in layers.factors(layer)}
    others = [entry for entry in plan.entries if entry.trained and id(entry.variable) not in factors]
    _check(model, plan, adapted, others)
    modules: dict[str, list[tuple[Linear, Any]]] = defaultdict(list)
    for layer in adapted:
        linear = names.linear(layer)
        modules[_module(linear.place.name, names)].append((linear, layer))
    arrays, ranks = {}, {}
    for module, parts in modules.items():
        arrays[f"{_BEFORE}{module}.lora_A.weight"], arrays[f"{_BEFORE}{module}.lora_B.weight"] = _matrices(parts)
        ranks[module] = len(arrays[f"{_BEFORE}{module}.lora_A.weight"])
    whole = _whole(names, [entry.variable for entry in others], modules)
    arrays |= {_BEFORE + name_in_memory(name, names.kind): value for name, value in whole.items()}
    config = _config(names, ranks, sorted({_module(name, names) for name in whole}))
    config["fan_in_fan_out"] = any(linear.transposed for parts in modules.values() for linear, _ in parts)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text(Path(folder, CONFIG), json.dumps(config, indent=2) + "\n")
    safetensors_file.write(Path(folder, WEIGHTS), arrays, {"format": "pt"})
    numbers = sum(array.size for array in arrays.values())
    beside = f", and {', '.join(config['modules_to_save'])} as a whole" if whole else ""
    return f"LoRA of {len(ranks)} module{'s' * (len(ranks) != 1)}{beside}, {numbers:,} numbers"


def read(folder: str | Path, model: keras.Model) -> delta.Delta:
    """Reads an adapter as a delta on a model: `Base(model).use(read(folder, model))`.

    It holds whole kernels, the model's own with the product of the factors added, for Keras's factors cannot hold each
    adapter of PEFT.

    Args:
        folder: of `adapter_config.json` and `adapter_model.safetensors`.
        model: of `hub_model` or `smollm2`, with the values that the adapter was trained on.

    Raises:
        UserError: it is no LoRA adapter, or of another kind (DoRA, with biases), damaged, or of another model.

    Examples:
        >>> import tempfile
        >>> from dist_partial import Rule, partial
        >>> from dist_partial.adapters import lora
        >>> from dist_partial.export.delta import Base
        >>> from dist_partial.models import hub_model
        >>> sizes = {"vocabulary_size": 100, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
        >>> model, other = (hub_model(architecture="GPT2", arguments=sizes) for _ in range(2))
        >>> _ = lora.enable([Rule(".*/query/kernel", lora=2), ("freeze", ".*")], model)
        >>> model.compile(partial("sgd", [("train", ".*/lora_.*"), ("freeze", ".*")], model), "mse")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write(folder, model)
        ...     change = read(folder, other)
        >>> list(change.arrays)
        ['transformer_layer_0/self_attention/query/kernel', ...]
    """
    config, arrays = _files(Path(folder).expanduser())
    names = HubNames(model)
    tensors = {name: names.tensor(name) for name in {_target(key, names, folder) for key in arrays}}
    changed = dict(tensors)
    for key, array in arrays.items():
        name = _target(key, names, folder)
        if ".lora_B." in key:
            continue
        if ".lora_A." not in key:
            changed[name] = _fitting(array, tensors[name].shape, key, folder)
            continue
        other = arrays.get(key.replace(".lora_A.", ".lora_B."))
        if other is None or array.ndim != 2 or other.ndim != 2 or other.shape[1] != len(array):
            raise UserError(f"{folder}: {key!r} has no factor B of its rank beside it; get the adapter again")
        module = _module(name, names)
        product = other.astype(np.float64) @ array.astype(np.float64) * _scale(config, module, len(array))
        linear = names.linear(names.layer(names.variables(name)[0]))
        product = product.T if linear.transposed else product
        changed[name] = tensors[name] + _fitting(product, tensors[name].shape, key, folder)
    paths = {id(variable): path for path, variable in variables(model).items()}
    values = {}
    for name, tensor in changed.items():
        for variable in names.variables(name):
            values[paths[id(variable)]] = tensor.flat[names.place(variable).where].astype(variable.dtype)
    rules = (f"{config['peft_type']} of {folder}",)
    return delta.Delta(values, {}, model_fingerprints(model), rules, 0, consistency.versions(), str(folder))


def _check(model: keras.Model, plan: Plan, adapted: list[Any], others: list[Any]) -> None:
    """Raises UserError for what no adapter of PEFT holds."""
    if not adapted:
        raise UserError(f"no rule of this run has lora, and an adapter of PEFT holds LoRA: {_ELSE}")
    if int8 := [layer for layer in compat.layers(model) if getattr(layer, "quantization_mode", None)]:
        raise UserError(
            f"{int8[0].path!r} is stored in int8, and the model that the adapter would be used with is not: train with "
            f"run.frozen_dtype = 'bfloat16', or {_ELSE.replace('huggingface or ', '')}"
        )
    for layer in adapted:
        if isinstance(layer, keras.layers.Embedding):
            raise UserError(
                f"LoRA of {layers.raw(layer).path!r}: PEFT would leave the output that shares an embedding as it was; "
                f"{_ELSE}"
            )
    embeddings = {id(layers.raw(one)) for one in layers.layers(model) if isinstance(one, keras.layers.Embedding)}
    for entry in others:
        if entry.rule.rows is not None:
            raise UserError(f"rows of {entry.path!r} are trained, and an adapter of PEFT has no rows: {_ELSE}")
        if id(entry.variable) in embeddings:
            raise UserError(f"{entry.path!r} is trained, and PEFT shares no embedding with an output: {_ELSE}")


def _matrices(parts: list[tuple[Linear, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """A [rank, inputs] and B [outputs, rank] of a module, from the factors of all kernels that are parts of it."""
    rows, columns = [], []
    for linear, layer in parts:
        a, b = (keras.ops.convert_to_numpy(factor) for factor in layers.factors(layer))
        rank, size = b.shape
        # [inputs, output axes but the last, rank], as the kernel's own axes are taken.
        axes = linear.input_axes
        if a.ndim - 1 in axes:
            raise UserError(f"{layers.raw(layer).path!r}: its last axis is an input, which no adapter of PEFT has")
        a = np.moveaxis(a, axes, range(len(axes))).reshape(len(linear.inputs), -1, rank)
        inputs, outputs = linear.sizes
        for block, places in enumerate(linear.outputs.reshape(-1, size)):
            row, column = np.zeros([rank, inputs], a.dtype), np.zeros([outputs, rank], b.dtype)
            row[:, linear.inputs] = a[:, block].T
            column[places] = layer.lora_alpha / layer.lora_rank * b.T
            rows.append(row)
            columns.append(column)
    return np.concatenate(rows), np.concatenate(columns, axis=1)


def _whole(names: HubNames, trained: list[Any], adapted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """All tensors of the modules of which a variable is trained."""
    modules = {_module(names.place(variable).name, names): variable for variable in trained}
    for module, variable in modules.items():
        if module in adapted:
            raise UserError(
                f"{variable.path!r} is trained beside LoRA of its kernel, which PEFT does not load: {_ELSE}"
            )
    return {name: names.tensor(name) for name in names.names if _module(name, names) in modules}


def _config(names: HubNames, ranks: Mapping[str, int], whole: list[str]) -> dict[str, Any]:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other = {module: each for module, each in ranks.items() if each != rank}
    task = next((task for task in _TASKS if type(names.origin.task).__name__.endswith(task)), "")
    return {
        "peft_type": "LORA",
        "task_type": _TASKS.get(task),
        "base_model_name_or_path": (names.origin.preset or "").removeprefix("hf://") or None,
        "r": rank,
        "lora_alpha": rank,  # so that the product is added as it is
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
        "modules_to_save": whole or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The configuration and the arrays of an adapter, checked as far as they can be without the model."""
    path = existing("the adapter", folder / CONFIG)
    try:
        config = json.loads(path.read_text())
        arrays, _ = safetensors_file.read(existing("the adapter", folder / WEIGHTS))
    except UserError:
        raise
    except Exception as error:  # the reader raises its own, and NumPy's, and the file system's
        reason = first_line(error)[:200]
        raise UserError(f"{folder} is damaged, or no adapter of PEFT: {reason}; get it again") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{folder} has the peft_type {kind!r}, and only 'LORA' is read")
    beyond = [name for name in ("use_dora", "use_qalora", "megatron_config") if config.get(name)]
    beyond += ["bias"] if config.get("bias", "none") != "none" else []
    if beyond:
        raise UserError(f"{folder}: {beyond[0]} = {config[beyond[0]]!r}, and only plain LoRA is read")
    for key, array in arrays.items():
        if not np.isfinite(array.astype(np.float32)).all():
            raise UserError(f"{folder}: {key!r} is not finite, so no model can use it")
    return config, arrays


def _target(key: str, names: HubNames, folder: Any) -> str:
    """The name of the tensor that an array of an adapter changes."""
    name = key.removeprefix(_BEFORE)
    for part in (".lora_A.", ".lora_B.", ".modules_to_save."):
        name = name.replace(part, ".")
    if ".lora_embedding_" in name:
        raise UserError(f"{folder} holds {key!r}: LoRA of an embedding is not read, for an output may share it")
    # An adapter that was made with transformers 4 has the names that files have.
    known = {name: name for name in names.names} | {name_in_memory(name, names.kind): name for name in names.names}
    if name not in known:
        near = nearest(name, known, always=True)
        raise UserError(f"{folder} holds {key!r}, which is no tensor of this model{near}")
    return known[name]


def _module(name: str, names: HubNames) -> str:
    """The module that has a tensor of a file."""
    return name_in_memory(name, names.kind).rpartition(".")[0]


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """By what the product of the factors is multiplied."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if module == key or module.endswith(f".{key}")), None)
    alpha = config["lora_alpha"] if alpha is None else alpha
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _fitting(array: np.ndarray, shape: tuple[int, ...], key: str, folder: Any) -> np.ndarray:
    if array.shape != shape:
        raise UserError(f"{folder}: {key!r} gives {list(array.shape)}, and this model has {list(shape)} there")
    return array
