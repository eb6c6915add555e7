"""What a run is told: the names that users bind under `run.` and `sample.`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras

from dist_partial.adapters import quantization
from dist_partial.distributed import replicas
from dist_partial.errors import UserError
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.schedules.fixed import Constant
from dist_partial.selection.rules import check_reduction

_FACTORIES = {  # each with an example
    "model": "@byte_transformer",
    "data": "@stdlib_corpus",
    "optimizer": "@keras.optimizers.Adam",
    "loss": "@keras.losses.MeanSquaredError",
}
PRECISIONS = ("float32", "float64", "mixed_bfloat16", "mixed_float16")


def cross_entropy() -> keras.losses.Loss:
    """Cross-entropy of logits against class ids: the default loss."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How text is sampled.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: only the k likeliest symbols, or None.
        top_p: only the likeliest symbols that together have this probability, or None.
        seed: the same seed gives the same text.
        prompt: what the text goes on from.
        length: symbols to generate.
        count: how many texts.

    Examples:
        >>> Sampling(temperature=0.6, prompt="def ").length
        200
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    prompt: str = "\n"
    length: int = 200
    count: int = 1

    def __post_init__(self) -> None:
        _number("sample.temperature", self.temperature, least=0)
        _count("sample.top_k", self.top_k, optional=True)
        _count("sample.length", self.length)
        _count("sample.count", self.count)
        _count("sample.seed", self.seed, least=0, most=2**63 - 1)
        if self.top_p is not None:
            _number("sample.top_p", self.top_p, least=0)
            if not 0 < self.top_p <= 1:
                raise UserError(f"sample.top_p is {self.top_p}: it is a probability above 0 and at most 1")
        if not isinstance(self.prompt, str) or not self.prompt:
            raise UserError(f"sample.prompt is {self.prompt!r}: write at least one character, such as '\\n'")


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        rules: the table: `('train' | 'freeze', pattern)` lines or `Rule`s.
        model: factory of the Keras model.
        data: factory of the `data.Dataset`.
        optimizer: factory of the Keras optimizer of the rules that name none.
        loss: factory of a Keras loss, or of a function (y, outputs) -> losses with the batch axis first.
        reduction: how gradients travel under the rules that do not say.
        steps: updates in the whole run.
        global_batch: examples an update, over all replicas.
        seed: of initial weights, dropout and the order of the data.
        eval_first: whether to evaluate, and to sample, before the first update, too.
        eval_every: updates between evaluations; None evaluates at the end only.
        eval_examples: how many held-out examples an evaluation reads; None reads all.
        save_every: updates between checkpoints; None saves at the end only.
        keep: checkpoints that are kept.
        clip_norm: bound on the global norm of the summed gradient over the selection, or None.
        accumulate: micro-batches an update, one after the other on each replica.
        steps_per_loop: updates in one call of the compiled function.
        precision: Keras dtype policy: 'float32', 'float64', 'mixed_bfloat16', 'mixed_float16'.
        frozen_dtype: how what no rule trains is stored: 'bfloat16', 'int8' (see `storage.lower`), or None as it is.
        jit_compile: XLA for the gradient computation.
        statistics: which BatchNorm layers run in training mode: 'trained' (those of which something is) or 'all'.
        schedule: what is trained when, of what the rules train.
        leave: what becomes of the slots of a unit that the schedule leaves: 'keep', 'reset' or 'drop'.
        compiled_plans: how many selections of the schedule stay compiled.
        activation_cache: where the activations of what is frozen for good, from the input up, are kept for when an
            example comes again: 'memory', 'disk', or None to compute them each time, the same up to rounding.
        replicas: makes the strategy; bound under `replicas.`.
        sampling: bound under `sample.`.

    Example:
        >>> from dist_partial.data import stdlib_corpus
        >>> from dist_partial.models import byte_transformer
        >>> settings = Settings([("train", "head/.*"), ("freeze", ".*")], byte_transformer, stdlib_corpus, steps=100)
        >>> settings.global_batch, settings.precision
        (32, 'float32')
    """

    rules: Sequence[Any]
    model: Callable[[], Any]
    data: Callable[[], Any]
    optimizer: Callable[..., Any] = keras.optimizers.Adam
    loss: Callable[[], Any] = cross_entropy
    reduction: Any = dataclasses.field(default_factory=AllReduce)
    steps: int = 1000
    global_batch: int = 32
    seed: int = 0
    eval_first: bool = False
    eval_every: int | None = None
    eval_examples: int | None = None
    save_every: int | None = None
    keep: int = 3
    clip_norm: float | None = None
    accumulate: int = 1
    steps_per_loop: int = 1
    precision: str = "float32"
    frozen_dtype: str | None = None
    jit_compile: bool = False
    statistics: str = "trained"
    schedule: Any = dataclasses.field(default_factory=Constant)
    leave: str = "keep"
    compiled_plans: int = 8
    activation_cache: str | None = None
    replicas: Callable[[], Any] = replicas.create
    sampling: Sampling = dataclasses.field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "keep", "accumulate", "steps_per_loop", "compiled_plans"):
            _count(f"run.{name}", getattr(self, name))
        for name in ("eval_every", "eval_examples", "save_every"):
            _count(f"run.{name}", getattr(self, name), optional=True)
        _count("run.seed", self.seed, least=0, most=2**32 - 1)  # NumPy takes no more
        if self.clip_norm is not None:
            _number("run.clip_norm", self.clip_norm, least=0)
            if self.clip_norm == 0:
                raise UserError("run.clip_norm is 0, which would train nothing: it must be above 0, or None")
        for name in _FACTORIES:
            value = getattr(self, name)
            # Models and losses can be called too, but not to make one.
            if not callable(value) or isinstance(value, (keras.Layer, keras.losses.Loss)):
                example = _FACTORIES[name]
                raise UserError(f"run.{name} is {value!r}: bind a factory, such as {example} without ()")
        check_reduction("run", self.reduction)
        if self.precision not in PRECISIONS:
            raise UserError(f"run.precision is {self.precision!r}: write one of {', '.join(map(repr, PRECISIONS))}")
        if self.frozen_dtype not in quantization.PRECISIONS:
            raise UserError(f"run.frozen_dtype is {self.frozen_dtype!r}: write 'bfloat16', 'int8' or None")
        if isinstance(self.schedule, type) or not hasattr(self.schedule, "next_switch"):
            raise UserError(f"run.schedule is {self.schedule!r}: bind a schedule such as @lisa(), with the ()")
        if self.leave not in ("keep", "reset", "drop"):
            raise UserError(f"run.leave is {self.leave!r}: write 'keep', 'reset' or 'drop'")
        if self.activation_cache not in (None, "memory", "disk"):
            raise UserError(f"run.activation_cache is {self.activation_cache!r}: write 'memory', 'disk' or None")
        if self.activation_cache and self.jit_compile:
            raise UserError(
                "run.activation_cache beside run.jit_compile: XLA rounds what it compiles together otherwise; bind one"
            )
        if self.statistics not in ("trained", "all"):
            raise UserError(f"run.statistics is {self.statistics!r}: write 'trained' or 'all'")


def _count(name: str, value: Any, least: int = 1, most: int | None = None, optional: bool = False) -> None:
    if value is None and optional:
        return
    if type(value) is not int or value < least:
        raise UserError(f"{name} is {value!r}: it must be a whole number of at least {least}")
    if most is not None and value > most:
        raise UserError(f"{name} is {value!r}: it must be at most {most}")


def _number(name: str, value: Any, least: float) -> None:
    # `not >=` and not `<`, so that NaN is refused too.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
        raise UserError(f"{name} is {value!r}: it must be a number of at least {least}")
