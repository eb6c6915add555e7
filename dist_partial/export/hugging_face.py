"""Writes a whole model of KerasHub as a folder that Hugging Face's transformers loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import keras

from dist_partial import compat
from dist_partial.adapters import lora, quantization
from dist_partial.checkpoints import safetensors_file
from dist_partial.errors import UserError
from dist_partial.export.hub_names import HubNames
from dist_partial.files import write_text
from dist_partial.models.hub import hugging_face_config
from dist_partial.selection.plan import Plan

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# The class of transformers that a task's weights are for; a causal language model's is in the configuration.
_ARCHITECTURES = {"TextClassifier": "BertForSequenceClassification", "ImageClassifier": "ViTForImageClassification"}
# What a folder of Hugging Face's has for turning data into a model's inputs, and for generating.
_BESIDE = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)


def write(folder: str | Path, model: keras.Model, plan: Plan | None = None, codec: Any = None) -> str:
    """Writes `config.json`, `model.safetensors` and, where it is at hand, the tokenizer; LoRA is merged.

    Of a model that was read from such a folder configuration and tokenizer are those of the folder. The model is not
    for training any more.

    Args:
        folder: to write into; it is made if need be.
        model: of `hub_model` or `smollm2`.
        plan: what is trained, where the rest may be stored in bfloat16.
        codec: of the data, whose tokenizer is written.

    Returns:
        What else there is to say.

    Raises:
        UserError: names or configuration in Hugging Face's models are not known, or layers are stored in int8.

    Examples:
        >>> import tempfile
        >>> from dist_partial.models import hub_model
        >>> sizes = {"vocabulary_size": 100, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 32}
        >>> model = hub_model(architecture="GPT2", arguments=sizes)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write(folder, model)
        ...     print(sorted(file.name for file in Path(folder).iterdir()))
        ...     again = hub_model(preset=folder)
        ['config.json', 'model.safetensors']
    """
    names = HubNames(model)
    if int8 := [layer for layer in compat.layers(model) if getattr(layer, "quantization_mode", None)]:
        raise UserError(
            f"{int8[0].path!r} is stored in int8, which a model of Hugging Face's cannot have so: train with "
            "run.frozen_dtype = 'bfloat16', or write --format=safetensors"
        )
    config, place = _config(names), Path(folder)
    if plan is not None:
        quantization.widen(plan)  # or else what training has moved would be rounded away in the kernels
    lora.merge(model)
    arrays = {name: names.tensor(name) for name in names.names}
    place.mkdir(parents=True, exist_ok=True)
    write_text(place / CONFIG, json.dumps(config, indent=2) + "\n")
    safetensors_file.write(place / WEIGHTS, arrays, {"format": "pt"})
    return _write_tokenizer(place, names.origin.preset, codec)


def _config(names: HubNames) -> dict[str, Any]:
    """The model's `config.json`; raises UserError unless KerasHub would make the same model of it."""
    task = names.origin.task
    backbone = task.backbone
    config = hugging_face_config(names.origin.preset) or compat.hugging_face_config(backbone)
    if config is None:
        raise UserError(
            f"KerasHub writes no configuration of {names.kind} for Hugging Face: read the model from a folder of "
            "Hugging Face's (hub_model.preset), which has one, or write --format=keras"
        )
    config.setdefault("use_sliding_window", False)  # which KerasHub leaves out for Qwen
    ours, theirs = backbone.get_config(), compat.hub_converter(backbone).convert_backbone_config(config)
    # What a converter leaves at its default, or rounds.
    differ = [name for name in theirs if name in ours and not _same(ours[name], theirs[name])]
    if differ:
        name = differ[0]
        raise UserError(
            f"{names.kind} with {name} = {ours[name]!r} cannot be written for Hugging Face: KerasHub would make "
            f"{theirs[name]!r} of it; write --format=keras"
        )
    if architecture := next((name for kind, name in _ARCHITECTURES.items() if type(task).__name__.endswith(kind)), ""):
        config["architectures"] = [architecture]
        if len(config.get("id2label", ())) != task.num_classes:  # the head is another one than the folder's
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(task.num_classes)}
            config["label2id"] = {f"LABEL_{i}": i for i in range(task.num_classes)}
    return config


def _same(ours: Any, theirs: Any) -> bool:
    return (list(ours) if isinstance(ours, (tuple, list)) else ours) == (
        list(theirs) if isinstance(theirs, (tuple, list)) else theirs
    )


def _write_tokenizer(path: Path, preset: str | None, codec: Any) -> str:
    """Puts beside the model what turns text into ids, where it is at hand; returns what there is to say."""
    if preset is not None and hugging_face_config(preset):
        for pattern in _BESIDE:
            for file in Path(preset).expanduser().glob(pattern):
                shutil.copyfile(file, path / file.name)
    tokenizer: Any = getattr(codec, "tokenizer", None)
    if not any(path.glob("tokenizer*")) and hasattr(tokenizer, "to_str"):  # of the library `tokenizers`
        tokenizer.save(str(path / "tokenizer.json"))
        write_text(path / "tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    elif not any(path.glob("tokenizer*")) and hasattr(tokenizer, "export_to_transformers"):
        tokenizer.export_to_transformers(str(path))
    return "" if codec is None or any(path.glob("tokenizer*")) else "; without a tokenizer"
