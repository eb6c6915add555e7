"""Where the variables of a KerasHub model are in Hugging Face's files, read from KerasHub's own converters.

A converter of KerasHub says which tensor each variable is taken from, and by which function. Here it is called with a
loader that has no file and writes down what is asked for; the function is then applied to the numbers of the tensor's
places, which shows where each value comes from, and so where it has to go.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from dist_partial import compat
from dist_partial.adapters import layers
from dist_partial.errors import UserError
from dist_partial.models.hub import HubOrigin, origin

# By backbone: what the names of a whole model have before those that the converter asks for.
PREFIXES = {
    "Bert": "bert.",
    "GPT2": "transformer.",
    "Gemma": "",
    "Llama3": "",
    "Mistral": "",
    "Qwen": "",
    "Qwen3": "model.",
    "ViT": "",
}
# In transformers 5 the modules of ViT have other names than in files, which it reads and writes as before.
_RENAMED = {
    "ViT": (
        (r"\.encoder\.layer\.(\d+)\.", r".layers.\1."),
        (r"\.attention\.attention\.(q|k|v)[a-z]+\.", r".attention.\1_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.(\d+)\.output\.dense\.", r".\1.mlp.fc2."),
    )
}


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """Tells where a variable's values are in a tensor of Hugging Face's.

    Attributes:
        name: of the tensor in a whole model's file, such as `model.layers.0.self_attn.q_proj.weight`.
        shape: of the tensor.
        where: ints of the variable's shape: the places in the tensor, as if that were flat.

    Examples:
        >>> place = Place("fc.weight", (2, 3), np.arange(6).reshape(2, 3).T)  # of a Dense kernel [3, 2]
        >>> tensor = np.zeros(place.shape)
        >>> tensor.flat[place.where] = np.array([[1, 2], [3, 4], [5, 6]])
        >>> tensor.tolist()
        [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]
    """

    name: str
    shape: tuple[int, ...]
    where: np.ndarray


@dataclasses.dataclass(frozen=True)
class Linear:
    """Tells how a kernel is a part of a linear module of Hugging Face's.

    Attributes:
        place: of the kernel.
        inputs: int [inputs]: which of the module's inputs each of the kernel's is, its input axes taken as one.
        outputs: int [outputs]: the same of its outputs.
        input_axes: of the kernel.
        transposed: whether the module's weight is [inputs, outputs], as GPT-2's, instead of [outputs, inputs].
    """

    place: Place
    inputs: np.ndarray
    outputs: np.ndarray
    input_axes: list[int]
    transposed: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """How many inputs and outputs the whole module has."""
        return self.place.shape[:: 1 if self.transposed else -1]  # type: ignore[return-value]


class HubNames:
    """Knows the names and layouts of a model's variables in Hugging Face's files.

    Args:
        model: of `hub_model` or `smollm2`.

    Raises:
        UserError: it is another model, or one of an architecture whose names are not known.

    Examples:
        >>> from dist_partial.models import hub_model
        >>> sizes = {"vocabulary_size": 100, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
        >>> model = hub_model(architecture="GPT2", arguments=sizes)
        >>> kernel = model.get_layer("transformer_layer_0").trainable_variables[0]
        >>> place = HubNames(model).place(kernel)
        >>> kernel.path, place.name, place.shape
        ('transformer_layer_0/self_attention/query/kernel', 'transformer.h.0.attn.c_attn.weight', (8, 24))
    """

    def __init__(self, model: keras.Model) -> None:
        self.origin = origin_of(model)
        self.kind = type(self.origin.task.backbone).__name__.removesuffix("Backbone")
        asked = _asked(self.origin, PREFIXES[self.kind])
        self._of_variable = {id(variable): name for name, calls in asked.items() for variable, _ in calls}
        self._asked = asked
        self._layers = {id(layers.raw(layer)): layer for layer in layers.layers(model)}

    @property
    def names(self) -> list[str]:
        """All tensors' names."""
        return list(self._asked)

    def variables(self, name: str) -> list[Any]:
        """The variables that are parts of a tensor."""
        return [variable for variable, _ in self._asked[name]]

    def layer(self, kernel: Any) -> Any:
        """The Dense, EinsumDense or Embedding layer that has a kernel; None: it is no kernel."""
        return self._layers.get(id(kernel))

    def place(self, variable: Any) -> Place:
        """Where a variable's values go.

        Raises:
            UserError: KerasHub's converter knows no such variable, or changes its values.
        """
        name = self._of_variable.get(id(variable))
        if name is None:
            raise UserError(f"{variable.path!r} has no name in Hugging Face's models that KerasHub would know")
        return next(place for place, part in self._places(name) if part is variable)

    def _places(self, name: str) -> list[tuple[Place, Any]]:
        """The places of the variables that are parts of a tensor, and these."""
        variables = self.variables(name)
        for shape in self._shapes(name, variables):
            parts = [_where(shape, variable, hook) for variable, hook in self._asked[name]]
            places = [Place(name, shape, part) for part in parts if part is not None]
            if len(places) < len(parts) or not _fill(places, shape):
                continue
            layers_of = [self.layer(variable) for variable in variables]
            if all(_fits(place, layer) for place, layer in zip(places, layers_of, strict=True)):
                return list(zip(places, variables, strict=True))
        raise UserError(
            f"{variables[0].path!r}: KerasHub's converter does more to {name!r} than to order its values, so that it "
            "cannot be written"
        )

    def tensor(self, name: str) -> np.ndarray:
        """The value of a tensor, of the variables that are parts of it.

        Raises:
            UserError: as for `place`.
        """
        parts = self._places(name)
        tensor = np.zeros(parts[0][0].shape, parts[0][1].dtype)
        for place, variable in parts:
            tensor.flat[place.where] = keras.ops.convert_to_numpy(variable)
        return tensor

    def linear(self, layer: Any) -> Linear:
        """How the kernel of a Dense or EinsumDense layer is a part of a linear module.

        Raises:
            UserError: as for `place`; or it is no kernel of a linear module.
        """
        place = self.place(layers.raw(layer))
        linear = None if isinstance(layer, keras.layers.Embedding) else _linear(place, layer)
        if linear is None:
            raise UserError(f"{layers.raw(layer).path!r} is no kernel of a linear module in Hugging Face's models")
        return linear

    def _shapes(self, name: str, parts: list[Any]) -> list[tuple[int, ...]]:
        """Shapes that a tensor of these variables could have."""
        total, own, layer = sum(math.prod(part.shape) for part in parts), tuple(parts[0].shape), self.layer(parts[0])
        if name.endswith(".bias"):
            return [(total,)]
        if layer is not None and not isinstance(layer, keras.layers.Embedding):
            inputs = math.prod(own[axis] for axis in input_axes(layer))
            return [(total // inputs, inputs), (inputs, total // inputs)]
        shapes = [own, own[::-1], (1, *own)]
        if len(own) == 4:  # a convolution's kernel
            shapes.insert(0, (own[3], own[2], *own[:2]))
        return [shape for shape in shapes if math.prod(shape) == total]


def origin_of(model: keras.Model) -> HubOrigin:
    """Finds the task of a model whose names in Hugging Face's files are known.

    Raises:
        UserError: they are not.

    Examples:
        >>> origin_of(keras.Sequential([keras.Input([2]), keras.layers.Dense(1)], name="mine"))
        Traceback (most recent call last):
        dist_partial.errors.UserError: model 'mine' is not made by hub_model or smollm2, ...
    """
    made = origin(model)
    if made is None:
        raise UserError(
            f"model {model.name!r} is not made by hub_model or smollm2, so that its names in Hugging Face's models are "
            "not known: write --format=safetensors or keras"
        )
    kind = type(made.task.backbone).__name__.removesuffix("Backbone")
    if kind not in PREFIXES:
        raise UserError(
            f"the names of {kind} in Hugging Face's models are not known, only those of {', '.join(PREFIXES)}: write "
            "--format=safetensors or keras"
        )
    return made


def name_in_memory(name: str, kind: str) -> str:
    """Gives the name of a tensor of a file in a model of transformers 5, where it may be another.

    Examples:
        >>> name_in_memory("vit.encoder.layer.3.attention.attention.query.weight", "ViT")
        'vit.layers.3.attention.q_proj.weight'
    """
    for before, after in _RENAMED.get(kind, ()):
        name = re.sub(before, after, name)
    return name


def input_axes(layer: Any) -> list[int]:
    """Tells which axes of a kernel are summed over.

    Examples:
        >>> layer = keras.layers.EinsumDense("bqm,muh->bquh", [None, 2, 3])
        >>> layer.build([None, 5, 4])
        >>> input_axes(layer)
        [0]
    """
    if not isinstance(layer, keras.layers.EinsumDense):
        return [0]
    kernel, _, outputs = layer.equation.replace(" ", "").partition(",")[2].partition("->")
    return [axis for axis, letter in enumerate(kernel) if letter not in outputs]


class _Loader:
    """Stands in for KerasHub's loader of a file; writes down what a converter asks for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, str, Callable[..., Any] | None]] = []

    def port_weight(self, keras_variable: Any, hf_weight_key: str, hook_fn: Callable[..., Any] | None = None) -> None:
        self.calls.append((keras_variable, hf_weight_key, hook_fn))

    def get_tensor(self, hf_weight_key: str) -> Any:
        raise KeyError(hf_weight_key)  # a converter that looks for older names goes on with the present ones


def _asked(made: HubOrigin, prefix: str) -> dict[str, list[tuple[Any, Any]]]:
    """By a tensor's name, the variables that are taken from it, and by which functions."""
    backbone, loader = made.task.backbone, _Loader()
    converter = compat.hub_converter(backbone)
    config = {"n_embd": getattr(backbone, "hidden_dim", None), "model_type": "gemma"}
    adapted = [layer for layer in compat.layers(made.task) if getattr(layer, "lora_enabled", False)]
    for layer in adapted:  # of which `kernel` is a sum and no variable
        layer.lora_enabled = False
    try:
        converter.convert_weights(backbone, loader, config)
    finally:
        for layer in adapted:
            layer.lora_enabled = True
    asked = defaultdict(list)
    for variable, name, hook in loader.calls:
        asked[name if name.startswith("lm_head.") else prefix + name].append((variable, hook))
    head = getattr(made.task, "output_dense", None)  # of a classifier
    if head is not None:
        asked["classifier.weight"].append((layers.raw(head), lambda tensor, _: tensor.T))
        asked["classifier.bias"].append((head.bias, None))
    return asked


class _Numbers(np.ndarray):
    """Numbers of places, which stay whole where a converter rounds the values that it takes, as Mistral's does."""

    def astype(self, *args: Any, **kwargs: Any) -> Any:
        return self


def _where(shape: tuple[int, ...], variable: Any, hook: Callable[..., Any] | None) -> np.ndarray | None:
    """The places of a variable's values in a tensor of that shape; None: the tensor cannot have it."""
    numbers = np.arange(math.prod(shape)).reshape(shape).view(_Numbers)
    try:
        where = np.asarray(hook(numbers, list(variable.shape)) if hook else numbers)
    except (ValueError, IndexError):
        return None
    return where if where.shape == tuple(variable.shape) and where.dtype == numbers.dtype else None


def _fill(places: list[Place], shape: tuple[int, ...]) -> bool:
    """Whether each value of a tensor has a place, and one alone."""
    taken = np.zeros(math.prod(shape), bool)
    for place in places:
        taken[place.where.reshape(-1)] = True
    return bool(taken.all()) and sum(place.where.size for place in places) == taken.size


def _fits(place: Place, layer: Any) -> bool:
    """Whether a layer's kernel is taken as a matrix of inputs and outputs; other variables are taken as they are."""
    return layer is None or isinstance(layer, keras.layers.Embedding) or _linear(place, layer) is not None


def _linear(place: Place, layer: Any) -> Linear | None:
    """A kernel as a part of a linear module; None: it is none in a tensor of that shape."""
    axes = input_axes(layer)
    where = np.moveaxis(place.where, axes, range(len(axes)))
    where = where.reshape(math.prod(where.shape[: len(axes)]), -1)
    for transposed in (False, True):
        rows, columns = np.divmod(where, place.shape[1])
        inputs, outputs = (rows, columns) if transposed else (columns, rows)
        whole = len(inputs) == place.shape[0 if transposed else 1]
        if whole and (inputs == inputs[:, :1]).all() and (outputs == outputs[:1]).all():
            return Linear(place, inputs[:, 0], outputs[0], axes, transposed)
    return None
