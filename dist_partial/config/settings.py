"""The settings of a run: the names that users bind under `run.` and `sample.`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import keras

from dist_partial.distributed import replicas
from dist_partial.errors import UserError
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.schedules.fixed import Constant
from dist_partial.selection.rules import REDUCTION, TABLE, parse_rules
from dist_partial.trackers import Tracker
from dist_partial.validation import Above, AtLeast, AtMost, Factory, Has, OneOf, check, shown

_SCHEDULE = Has("next_switch", "give an object, with parentheses, as in Phases(table), in a gin file @phases()")
_REPLICAS = "give what makes them, such as functools.partial(dist_partial.distributed.replicas.create, cpu=2)"
_SAMPLING = Has("temperature", "give a Sampling(...), in a gin file sample.temperature and so on")
PRECISIONS = ("float32", "float64", "mixed_bfloat16", "mixed_float16")


def cross_entropy() -> keras.losses.Loss:
    """Makes the default loss: cross-entropy of logits against class ids, the weighted mean over all targets.

    Examples:
        >>> import numpy as np
        >>> round(float(cross_entropy()(np.array([1]), np.array([[0.0, 0.0]]))), 4)  # ln 2
        0.6931
    """
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Describes how text is sampled: what is bound under `sample.`.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: only the k likeliest symbols, or None.
        top_p: only the likeliest symbols that together have this probability, or None.
        seed: the same seed gives the same text.
        prompt: what the text goes on from.
        length: symbols to generate.
        count: how many texts; 0 has training sample nothing.

    Examples:
        >>> Sampling(temperature=0.6, prompt="def ").length
        200
    """

    temperature: Annotated[float, AtLeast(0)] = 1.0
    top_k: Annotated[int | None, AtLeast(1)] = None
    top_p: Annotated[float | None, Above(0), AtMost(1)] = None
    seed: Annotated[int, AtLeast(0), AtMost(2**63 - 1)] = 0
    prompt: str = "\n"
    length: Annotated[int, AtLeast(1)] = 200
    count: Annotated[int, AtLeast(0)] = 1

    def __post_init__(self) -> None:
        check(self, "sample")
        if not self.prompt:
            raise UserError("sample.prompt is '': write at least one character, such as '\\n'")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Describes one run: what is bound under `run.`.

    Attributes:
        rules: the table: `('train' | 'freeze', pattern)` lines or `Rule`s.
        model: factory of the Keras model.
        data: factory of the data: whatever `dataset` takes.
        optimizer: factory of the Keras optimizer of the rules that name none.
        loss: factory of a Keras loss, or of a function (y, outputs) -> losses with the batch axis first; the name of a
            Keras loss; or a dict or list of such, by output, as `Model.compile` takes it. None takes what the model was
            compiled with, else its own `compute_loss`, else `cross_entropy`.
        loss_weights: of several losses: a dict or list as `loss`.
        metrics: Keras metrics, or their names, in a list, or by output in a dict; None chooses by the data.
        weighted_metrics: the same, of metrics that weigh targets as the loss does.
        callbacks: Keras callbacks; an evaluation ends their epoch, and a call of the compiled step is their batch.
        trackers: where else the run is watched, such as `[@MLflow()]`: see `trackers`.
        profile: the first and the last step, counted from 1, of those that TensorBoard gets a profile of; None of none.
        best: the number of an evaluation, such as 'accuracy' or 'loss', by which the best checkpoint is kept.
        patience: evaluations without a better one after which the run stops; None does not stop it.
        class_weight: weights of the training examples by class id, which a dict has.
        reduction: how gradients travel under the rules that do not say.
        between_hosts: how they travel between workers, once `reduction` has summed those of a worker's own replicas;
            None: `reduction` crosses all replicas.
        steps: updates in the whole run.
        global_batch: examples an update, over all replicas.
        readers: threads of a worker that read, a batch each, or of TFRecords and folders of images a part of one;
            None: 8 for these, 4 where the source says that several may read it at once (`thread_safe = True`), else 1.
            A `tf.data.Dataset` reads as it says itself.
        reader_processes: processes of a worker that read batches in place of threads, for sources and functions of
            NumPy that Python's lock would keep waiting for each other; they share the arrays of the source.
        prefetch_to_device: whether batches are on a worker's GPU, of which it then has one alone, before their steps
            begin (untested). Of several each is sent its part by the step.
        seed: of initial weights, dropout and the order of the data.
        eval_first: whether to evaluate, and to sample, before the first update, too.
        eval_every: updates between evaluations; None evaluates at the end only.
        eval_examples: how many held-out examples an evaluation reads; None reads all.
        save_every: updates between checkpoints; None saves at the end only.
        save_async: whether a thread writes a checkpoint while the next steps are made.
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

    Examples:
        >>> from dist_partial.data import stdlib_corpus
        >>> from dist_partial.models import byte_transformer
        >>> settings = Settings([("train", "head/.*"), ("freeze", ".*")], byte_transformer, stdlib_corpus, steps=100)
        >>> settings.global_batch, settings.precision
        (32, 'float32')
    """

    rules: Annotated[Sequence[Any], TABLE]
    model: Annotated[Callable[[], Any], Factory("@byte_transformer", (keras.Layer,))]
    data: Annotated[Callable[[], Any], Factory("@stdlib_corpus")]
    optimizer: Annotated[Callable[..., Any], Factory("@keras.optimizers.Adam")] = keras.optimizers.Adam
    loss: Any = None
    loss_weights: Any = None
    metrics: Any = None
    weighted_metrics: Any = None
    class_weight: Any = None
    callbacks: Sequence[Any] = ()
    trackers: Sequence[Any] = ()
    profile: Any = None
    best: str | None = None
    patience: Annotated[int | None, AtLeast(1)] = None
    reduction: Annotated[Any, REDUCTION] = dataclasses.field(default_factory=AllReduce)
    between_hosts: Annotated[Any | None, REDUCTION] = None
    steps: Annotated[int, AtLeast(1)] = 1000
    global_batch: Annotated[int, AtLeast(1)] = 32
    readers: Annotated[int | None, AtLeast(1)] = None
    reader_processes: Annotated[int, AtLeast(0)] = 0
    prefetch_to_device: bool = False
    seed: Annotated[int, AtLeast(0), AtMost(2**32 - 1)] = 0  # NumPy takes no more
    eval_first: bool = False
    eval_every: Annotated[int | None, AtLeast(1)] = None
    eval_examples: Annotated[int | None, AtLeast(1)] = None
    save_every: Annotated[int | None, AtLeast(1)] = None
    save_async: bool = True
    keep: Annotated[int, AtLeast(1)] = 3
    clip_norm: Annotated[float | None, Above(0)] = None
    accumulate: Annotated[int, AtLeast(1)] = 1
    steps_per_loop: Annotated[int, AtLeast(1)] = 1
    precision: Annotated[str, OneOf(*PRECISIONS)] = "float32"
    frozen_dtype: Annotated[str | None, OneOf("bfloat16", "int8", None)] = None
    jit_compile: bool = False
    statistics: Annotated[str, OneOf("trained", "all")] = "trained"
    schedule: Annotated[Any, _SCHEDULE] = dataclasses.field(default_factory=Constant)
    leave: Annotated[str, OneOf("keep", "reset", "drop")] = "keep"
    compiled_plans: Annotated[int, AtLeast(1)] = 8
    activation_cache: Annotated[str | None, OneOf("memory", "disk", None)] = None
    replicas: Annotated[Callable[[], Any], Factory(""), _REPLICAS] = replicas.create
    sampling: Annotated[Sampling, _SAMPLING] = dataclasses.field(default_factory=Sampling)

    def __post_init__(self) -> None:
        check(self, "run")
        if not isinstance(self.callbacks, (list, tuple)):
            raise UserError(
                f"run.callbacks is {shown(self.callbacks)}: give a list, such as [@keras.callbacks.CSVLogger()]"
            )
        listed = isinstance(self.trackers, (list, tuple))
        if not listed or not all(isinstance(each, Tracker) for each in self.trackers):
            raise UserError(f"run.trackers is {shown(self.trackers)}: give a list of trackers, such as [@MLflow()]")
        if self.profile is not None and not _is_range(self.profile):
            raise UserError(f"run.profile is {shown(self.profile)}: give the first and the last step, such as (10, 12)")
        for name in ("metrics", "weighted_metrics"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (list, tuple, dict)):
                raise UserError(f"run.{name} is {shown(value)}: give a list, such as ['accuracy'], or a dict by output")
        if self.patience is not None and self.best is None:
            raise UserError("run.patience without run.best: bind the number that has to get better, such as 'loss'")
        parse_rules(self.rules)
        if self.activation_cache and self.jit_compile:
            raise UserError(
                "run.activation_cache beside run.jit_compile: XLA rounds what it compiles together otherwise; bind one"
            )


def _is_range(value: Any) -> bool:
    pair = isinstance(value, (list, tuple)) and len(value) == 2
    return pair and all(type(each) is int for each in value) and 1 <= value[0] <= value[1]
