"""Models of KerasHub, pretrained or with fresh weights, as models of one input tensor; KerasHub is the extra `hub`."""

import dataclasses
import functools
import inspect
import json
import os
import weakref
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import keras
import numpy as np

from dist_partial import compat
from dist_partial.errors import UserError, first_line
from dist_partial.validation import AtLeast, OneOf, check_arguments, nearest

TASKS = ("CausalLM", "ImageClassifier", "TextClassifier")
_INSTALL = "it is no part of the core: pip install 'dist_partial[hub]'"


def hub_model(
    task: Annotated[str, OneOf(*TASKS)] = "CausalLM",
    preset: str | None = None,
    architecture: str | None = None,
    arguments: dict[str, Any] | None = None,
    classes: Annotated[int | None, AtLeast(1)] = None,
    load_weights: bool = True,
) -> keras.Model:
    """Builds a task of KerasHub (https://keras.io/keras_hub) from a preset, or an architecture with fresh weights.

    The model is a plain functional one of KerasHub's own layers, so that paths are those of its backbone
    (`transformer_layer_0/self_attention/query/kernel`) and a saved copy loads with KerasHub alone.

    Args:
        task: 'CausalLM', 'ImageClassifier' or 'TextClassifier'.
        preset: name of a preset, or a local folder with one, or with a model of Hugging Face (`config.json` and
            `model.safetensors`) of an architecture that KerasHub converts.
        architecture: in place of a preset, a backbone by its name in KerasHub: 'GPT2', 'Gemma', 'ResNet', ...
        arguments: of the architecture's backbone.
        classes: of a classifier; with a preset this gives it a fresh head. None: the preset's own head.
        load_weights: False gives a preset fresh weights.

    Returns:
        A model of one output. CausalLM: int ids [batch, time] to logits [batch, time, vocabulary], with `make_cache`
        and `decode` (see `ByteTransformer`) where KerasHub has a key-value cache. TextClassifier: int ids
        [batch, time], where the preset's padding id is masked out, to logits [batch, classes]. ImageClassifier: images
        [batch, height, width, channels], as the preset's own preprocessing expects them, to logits [batch, classes].

    Raises:
        UserError: KerasHub is not installed, a name that it does not know, or arguments that it does not take.

    Examples:
        >>> sizes = {"vocabulary_size": 100, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
        >>> hub_model(architecture="GPT2", arguments=sizes).output.shape
        (None, None, 100)
    """
    check_arguments(hub_model, locals())
    hub = _keras_hub()
    if (preset is None) == (architecture is None):
        raise UserError("hub_model needs one of preset and architecture: bind hub_model.preset = 'gpt2_base_en'")
    if arguments is not None and preset is not None:
        raise UserError("hub_model.arguments are of an architecture, and a preset has its own: unbind one of them")
    if task != "CausalLM" and preset is None and classes is None:
        raise UserError(f"hub_model.classes is not bound: a {task} with fresh weights needs their number")
    if task == "CausalLM" and classes is not None:
        raise UserError("hub_model.classes is of classifiers, and a CausalLM has none: unbind it")
    head = {} if task == "CausalLM" else {"activation": None} | ({"num_classes": classes} if classes else {})
    whole: Any
    if preset is not None:
        config = hugging_face_config(preset) if task != "ImageClassifier" else None
        if config is None:
            whole = _from_preset(getattr(hub.models, task), preset, load_weights=load_weights, **head)
        else:
            whole = _from_hugging_face(hub.models, task, preset, config, load_weights, head)
    else:
        assert architecture is not None
        whole = _fresh(hub.models, task, architecture, arguments or {}, head)
    return single_input(whole, "hub_model", preset)


@dataclasses.dataclass(frozen=True, eq=False)
class HubOrigin:
    """Says of which task of KerasHub a flat model was made.

    Attributes:
        task: a `keras_hub.models.Task`, whose layers are the model's.
        preset: with which it was loaded; None: of a class, or of another file.

    Examples:
        >>> sizes = {"vocabulary_size": 100, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
        >>> type(origin(hub_model(architecture="GPT2", arguments=sizes)).task).__name__
        'GPT2CausalLM'
    """

    task: Any
    preset: str | None


_ORIGINS: "weakref.WeakKeyDictionary[keras.Model, HubOrigin]" = weakref.WeakKeyDictionary()


def origin(model: keras.Model) -> HubOrigin | None:
    """Finds of which task of KerasHub a model was made in this process; None: of none.

    Examples:
        >>> origin(keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])) is None
        True
    """
    return _ORIGINS.get(model)


def hugging_face_config(preset: str | None) -> dict[str, Any] | None:
    """Reads the `config.json` of a local folder with a model of Hugging Face; None: it is none.

    Examples:
        >>> hugging_face_config("gpt2_base_en") is None
        True
    """
    try:
        config = json.loads((Path(preset or "").expanduser() / "config.json").read_text())
    except (OSError, ValueError, RuntimeError):  # RuntimeError: ~somebody
        return None
    return config if isinstance(config, dict) and "model_type" in config else None


def _fresh(models: ModuleType, task: str, architecture: str, arguments: dict[str, Any], head: dict[str, Any]) -> Any:
    """Makes a task with fresh weights; raises UserError if the architecture does not take the arguments."""
    backbone = _named(models, architecture, "Backbone")
    of_task = _named(models, architecture, task)
    _check_sizes(backbone, arguments)
    try:
        return of_task(backbone=backbone(**arguments), preprocessor=None, **head)
    except Exception as error:  # KerasHub divides by what it does not check
        taken = [name for name in inspect.signature(backbone).parameters if name != "kwargs"]
        raise UserError(
            f"hub_model.arguments {arguments!r}: {first_line(error)}; {architecture}Backbone takes {', '.join(taken)}"
        ) from error


def single_input(task: Any, name: str, preset: str | None = None) -> keras.Model:
    """Turns a task of KerasHub into a flat functional model of one input: see `hub_model`.

    Args:
        task: a `keras_hub.models.Task`.
        name: of the model.
        preset: with which the task was loaded.

    Raises:
        UserError: it takes an input besides token ids, their mask and segments.

    Examples:
        >>> import keras_hub
        >>> sizes = {"vocabulary_size": 100, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
        >>> backbone = keras_hub.models.GPT2Backbone(**sizes)  # which takes ids and their mask
        >>> model = single_input(keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None), "mine")
        >>> [each.name for each in model.inputs], model.output.shape
        (['token_ids'], (None, None, 100))
    """
    wanted = compat.inputs_structure(task)
    model = _of_ids(task, wanted, name, preset) if isinstance(wanted, dict) else _of_images(task, wanted, name)
    _ORIGINS[model] = HubOrigin(task, preset)
    return model


def _of_ids(task: Any, wanted: dict[str, Any], name: str, preset: str | None) -> keras.Model:
    x = keras.Input((None,), dtype="int32", name="token_ids")
    # A causal model does not look ahead at what pads a text, and the weights of the targets mask its loss.
    padding = None if hasattr(task, "call_with_cache") else _padding_id(task, preset)
    mask = keras.ops.ones_like(x) if padding is None else keras.ops.cast(keras.ops.not_equal(x, padding), "int32")
    known = {"token_ids": x, "padding_mask": mask, "segment_ids": keras.ops.zeros_like(x)}
    if unknown := [key for key in wanted if key not in known]:
        raise UserError(
            f"{type(task).__name__} takes {', '.join(unknown)} beside token_ids: only text and images are fed"
        )
    model = keras.Model(x, _through(task, [known[key] for key in wanted]), name=name)
    _give_cache(model, task)
    return model


def _of_images(task: Any, wanted: Any, name: str) -> keras.Model:
    x = image = keras.Input(wanted.shape[1:], dtype=wanted.dtype, name="images")
    converter = getattr(task.preprocessor, "image_converter", None)
    if converter is not None:  # the preset's own size, scale and offset
        x = keras.Input((None, None, wanted.shape[-1]), dtype=wanted.dtype, name="images")
        image = converter(x)
    return keras.Model(x, _through(task, [image]), name=name)


class HubCodec:
    """Encodes text by a tokenizer of KerasHub.

    Args:
        tokenizer: a `keras_hub.tokenizers.Tokenizer`.

    Examples:
        >>> import keras_hub
        >>> letters = {letter: i for i, letter in enumerate(["<|endoftext|>", *"abc", "ab"])}
        >>> codec = HubCodec(keras_hub.tokenizers.GPT2Tokenizer(vocabulary=letters, merges=["a b"]))
        >>> codec.encode("abc").tolist(), codec.decode(np.array([4, 3])), codec.size
        ([4, 3], 'abc', 5)
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.size = int(tokenizer.vocabulary_size())

    def encode(self, text: str) -> np.ndarray:
        """Text to int32 ids [n]; nothing is added at its ends."""
        return np.asarray(self.tokenizer(text), np.int32).reshape(-1)

    def decode(self, ids: np.ndarray) -> str:
        """Ids [n] to text."""
        text = self.tokenizer.detokenize(np.asarray(ids, np.int32))
        text = text.numpy() if hasattr(text, "numpy") else text
        return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def hub_tokenizer(preset: str) -> HubCodec:
    """Loads the tokenizer of a preset of KerasHub, for `tokenized_text.tokenizer`.

    Args:
        preset: its name, or a local folder.

    Raises:
        UserError: KerasHub is not installed, or there is no such preset.

    Examples:
        >>> import tempfile
        >>> import keras_hub
        >>> letters = {letter: i for i, letter in enumerate(["<|endoftext|>", *"abc", "ab"])}
        >>> sizes = {"vocabulary_size": 5, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     keras_hub.models.GPT2Backbone(**sizes).save_to_preset(folder)
        ...     keras_hub.tokenizers.GPT2Tokenizer(vocabulary=letters, merges=["a b"]).save_to_preset(folder)
        ...     codec = hub_tokenizer(folder)
        >>> codec.encode("abc").tolist()
        [4, 3]
    """
    return HubCodec(_from_preset(_keras_hub().tokenizers.Tokenizer, preset))


def _keras_hub() -> ModuleType:
    try:
        import keras_hub
    except ImportError as error:
        raise UserError(f"KerasHub cannot be imported ({error}): {_INSTALL}") from None
    return keras_hub


def _named(module: ModuleType, architecture: str, suffix: str) -> Any:
    if not isinstance(architecture, str) or not hasattr(module, f"{architecture}{suffix}"):
        known = [name.removesuffix(suffix) for name in dir(module) if name.endswith(suffix) and name != suffix]
        near = nearest(str(architecture), known, always=True)
        raise UserError(f"hub_model.architecture is {architecture!r}: KerasHub has no {architecture}{suffix}{near}")
    return getattr(module, f"{architecture}{suffix}")


def _check_sizes(backbone: Any, arguments: dict[str, Any]) -> None:
    """Raises UserError for a size below 1, of which KerasHub refuses some, and builds a model that fails of others."""
    taken = inspect.signature(backbone).parameters
    for name, value in arguments.items():
        size = name.startswith("num_") or name.endswith(("_dim", "_size", "_length"))
        least = 0 if name in taken and taken[name].default == 0 else 1
        if size and isinstance(value, (int, float)) and value < least:
            raise UserError(f"hub_model.arguments has {name!r}: {value!r}, which must be at least {least}")


def _from_preset(of: Any, preset: str, **options: Any) -> Any:
    looks_local = preset.startswith((".", "/", "~"))
    try:
        folder = Path(preset).expanduser()
    except RuntimeError as error:  # ~somebody
        raise UserError(f"no preset folder {preset}: {error}") from None
    if looks_local and not os.path.isdir(folder):
        siblings = [p.name for p in folder.parent.glob("*") if p.is_dir()]
        raise UserError(f"no preset folder {preset}{nearest(folder.name, siblings, folder=folder.parent)}")
    try:
        return of.from_preset(str(folder) if os.path.isdir(folder) else preset, **options)
    except Exception as error:  # KerasHub, Kaggle and the file readers below it each raise their own
        raise UserError(
            f"KerasHub cannot load the preset {preset!r} as {of.__name__} ({first_line(error).rstrip('.:')}): name a "
            "preset of keras_hub, which needs the network once, or a local folder written by save_to_preset()"
            f"{nearest(preset, of.presets)}"
        ) from error


def _from_hugging_face(
    models: ModuleType, task: str, folder: str, config: dict[str, Any], load_weights: bool, head: dict[str, Any]
) -> Any:
    """Makes a task of a folder of Hugging Face, without what turns text into ids, which the folder may lack."""
    if task == "TextClassifier" and not head.get("num_classes"):
        raise UserError(f"hub_model.classes is not bound: the head of {folder} is not read, so give their number")
    # KerasHub 0.32 leaves a Llama's epsilon at 1e-6, where most have 1e-5.
    own = {"layer_norm_epsilon": config["rms_norm_eps"]} if config["model_type"] == "llama" else {}
    backbone = _from_preset(models.Backbone, folder, load_weights=load_weights, **own)
    of_task = _named(models, type(backbone).__name__.removesuffix("Backbone"), task)
    return of_task(backbone=backbone, preprocessor=None, **head)


def _through(function: Any, inputs: list[Any]) -> Any:
    """The outputs of a functional model for other inputs, with the models inside it taken apart into their layers.

    So the graph is flat: it is cut layer by layer where something above is trained (`split_model.split`).
    """

    def operation(op: Any) -> Any:
        if not isinstance(op, keras.Model) or not compat.is_functional(op):
            return op
        names = compat.inputs_structure(op)

        def through(x: Any, **_: Any) -> Any:
            return _through(op, [x[name] for name in names] if isinstance(names, dict) else keras.tree.flatten(x))

        return through

    return compat.run_graph(function, inputs, operation)


def _padding_id(task: Any, preset: str | None) -> int | None:
    if config := hugging_face_config(preset):
        return config.get("pad_token_id")
    return getattr(getattr(task.preprocessor, "tokenizer", None), "pad_token_id", None)


def _give_cache(model: keras.Model, task: Any) -> None:
    """Adds `make_cache` and `decode` where the task has a cache that needs nothing but ids."""
    # As attributes and not as methods of a class of ours, which a saved model would then need.
    if not compat.has_cache(task):
        return
    for method, known in zip(compat.cache_methods(task), (1, 3), strict=True):
        parameters = list(inspect.signature(method).parameters.values())
        if any(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters[known:]):
            return
    model.make_cache = functools.partial(_make_cache, task)
    model.decode = functools.partial(_decode, task)


def _make_cache(task: Any, batch: int, length: int) -> Any:
    longest = getattr(task.backbone, "max_sequence_length", None)
    if longest is not None and length > longest:
        raise UserError(
            f"the prompt and sample.length make {length} tokens, and the model reads {longest}: shorten one"
        )
    # KerasHub makes a cache of the right shape only by filling it; in a compiled function the filling is pruned.
    cache = compat.build_cache(task, keras.ops.zeros((batch, length), "int32"))
    return keras.tree.map_structure(keras.ops.zeros_like, cache)


def _decode(task: Any, tokens: Any, cache: Any, position: Any) -> tuple[Any, Any]:
    logits, _, cache = task.call_with_cache(tokens, cache, position)
    return logits, cache
