"""Checks a model, its data and its loss against each other before anything is compiled."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial import compat
from dist_partial.checkpoints import fingerprints
from dist_partial.config.settings import Settings
from dist_partial.data import Dataset, some_targets
from dist_partial.distributed import consistency
from dist_partial.distributed.replicas import Replicas
from dist_partial.errors import UserError, first_line, own_line
from dist_partial.selection.plan import Plan
from dist_partial.step import layer_state, losses
from dist_partial.validation import counted


def make_model(settings: Settings, data: Dataset, strategy: tf.distribute.Strategy) -> tuple[keras.Model, tf.Tensor]:
    """Makes the model, with its variables, and what it gives for one example of zeros; in the strategy's scope.

    Raises:
        UserError: it is none, or not one that a run trains as Keras would, or it does not fit the data.

    Examples:
        >>> from dist_partial.data import stdlib_corpus
        >>> from dist_partial.models import two_dense
        >>> settings = Settings([("train", ".*")], two_dense, stdlib_corpus)
        >>> make_model(settings, stdlib_corpus(window=16), tf.distribute.get_strategy())
        Traceback (most recent call last):
        dist_partial.errors.UserError: stdlib_corpus has 256 symbols and run.model gives logits for 10: bind ...
    """
    model = settings.model()
    if not isinstance(model, keras.Model):
        raise UserError(f"run.model made a {type(model).__name__}: its factory must return a keras.Model")
    for name in ("train_step", "test_step", "compute_loss", "compute_metrics"):
        own = getattr(getattr(model, name), "__func__", None)
        if own is not getattr(keras.Model, name):
            raise UserError(
                f"run.model has a {name} of its own ({type(model).__name__}), which a run does not call: train it by "
                "model.fit with dist_partial.partial, or bind a model without it and its loss as run.loss"
            )
    x = data.train.spec[0]
    generators = [variable for variable in model.variables if compat.is_generator(variable)]
    generators += layer_state.recurrent(model)
    # A subclassed model has its variables only once it has been called.
    with taking(data.name, x), layer_state.untouched(strategy, generators):
        wanted = model.inputs[0].dtype if getattr(model, "inputs", None) else x.dtype.name
        if x.dtype.is_floating and "int" in wanted:  # Keras would cut the fractions off
            raise UserError(
                f"run.model reads ids ({wanted}) and not {_example(data.name, x)}: bind a model of features, or other "
                "data"
            )
        outputs = model(tf.zeros([layer_state.batch_size(model) or 1, *x.shape], x.dtype))
    if not isinstance(outputs, tf.Tensor):
        raise UserError(f"run.model gives a {type(outputs).__name__} of outputs: its model must give one tensor")
    if compat.mask(outputs) is not None:  # which Keras's `fit` would apply to the loss
        raise UserError(
            "run.model's outputs have a mask of Keras's (mask_zero, Masking), and here weights mask a loss: have "
            "run.data give (x, y, weight) with 0 where it pads, and take the mask out of the model"
        )
    if data.codec is not None:
        _check_symbols(model, data.name, data.codec.size, outputs.shape[-1])
    return model, outputs


def check_batch(
    fixed: int, model: keras.Model, settings: Settings, data: Dataset, strategy: tf.distribute.Strategy
) -> None:
    """Raises UserError unless training and evaluation read as many examples at a time as the model takes."""
    batch, parts = settings.global_batch, settings.accumulate
    where = f"run.model has a stateful recurrent layer, built for {fixed:,} examples at a time"
    if strategy.num_replicas_in_sync > 1:
        raise UserError(
            f"{where}, and replicas agree on what layers change, where each has examples of its own: train it on one "
            "replica, or make the layer without stateful=True"
        )
    if parts > 1 or batch != fixed:
        raise UserError(
            f"{where}, and reads {batch} / {parts} (run.global_batch, run.accumulate): bind run.global_batch = {fixed} "
            "and no run.accumulate, or build it for others (keras.Input(batch_shape=...))"
        )
    held_out = len(data.evaluation)
    if (examples := min(settings.eval_examples or held_out, held_out)) % batch:
        raise UserError(
            f"{where}, and an evaluation of {examples:,} does not divide into such batches: bind run.eval_examples = "
            f"{examples // batch * batch or batch}"
        )


def _check_symbols(model: keras.Model, name: str, symbols: int, outputs: int) -> None:
    """Raises UserError unless a model reads and writes all symbols of the data set of that name."""
    if outputs < symbols:
        raise UserError(
            f"{name} has {symbols:,} symbols and run.model gives logits for {outputs:,}: bind a tokenizer of the "
            "model's own, or a model of that size"
        )
    for layer in compat.layers(model):  # Keras encodes an id beyond its tokens as nothing, without a word
        if isinstance(layer, keras.layers.CategoryEncoding) and layer.num_tokens < symbols:
            raise UserError(
                f"{name} has {symbols:,} symbols and {layer.name!r} of run.model encodes {layer.num_tokens:,}: bind a "
                "model that reads all of them"
            )


def check_division(settings: Settings, replicas: int) -> None:
    """Raises UserError unless a batch divides into the micro-batches of that many replicas.

    Examples:
        >>> from dist_partial.data import stdlib_shapes
        >>> from dist_partial.models import two_dense
        >>> settings = Settings([("train", ".*")], two_dense, stdlib_shapes, global_batch=32, accumulate=2)
        >>> check_division(settings, replicas=4)
        >>> check_division(settings, replicas=3)
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.global_batch = 32 does not divide into 3 replicas x 2 micro-batches: ...
    """
    if settings.global_batch % (parts := replicas * settings.accumulate):
        raise UserError(
            f"run.global_batch = {settings.global_batch} does not divide into {counted(replicas, 'replica')} x "
            f"{counted(settings.accumulate, 'micro-batch', 'micro-batches')}: bind a multiple of {parts}"
        )


def check_workers(replicas: Replicas, fingerprint: dict[str, Any], bindings: Mapping[str, str]) -> None:
    """Raises UserError, the same on every worker, unless all have built the same from the same bindings."""
    if replicas.backend is not None:
        facts = {"versions": consistency.versions(), "bindings": dict(bindings)}
        start = {
            fingerprints.INITIAL: fingerprint[fingerprints.INITIAL]
        }  # first: all else that differs follows from it
        consistency.check(replicas.backend, facts | start | fingerprint)


def check_scaled(plan: Plan, states: Sequence[dict[str, tf.Variable]]) -> None:
    """Raises UserError unless all of a plan, with what its reductions keep, can skip a step that overflows.

    Examples:
        >>> from dist_partial.reductions import AllReduce, TopK
        >>> from dist_partial.selection import resolve
        >>> plan = resolve([("train", ".*")], keras.Sequential([keras.Input([4]), keras.layers.Dense(1)]), TopK())
        >>> check_scaled(plan, [{}, {}])
        >>> check_scaled(plan, [{"residual": tf.Variable([0.0])}, {}])
        Traceback (most recent call last):
        dist_partial.errors.UserError: float16 scales the loss and skips the steps that overflow on any ...
    """
    for entry, kept in zip(plan.trained, states, strict=True):
        if kept or not entry.reduction.shared:
            raise UserError(
                "float16 scales the loss and skips the steps that overflow on any replica, which "
                f"{type(entry.reduction).__name__} ({entry.reduction}) of rule {entry.rule.match!r} cannot: bind "
                "run.precision = 'mixed_bfloat16', or reduce by AllReduce(), in a gin file @all_reduce()"
            )


@contextlib.contextmanager
def taking(name: str, x: tf.TensorSpec) -> Iterator[None]:
    """Turns what a model says of the examples of the data set of that name into a mistake of the user's.

    Examples:
        >>> with taking("mine", tf.TensorSpec([4], tf.float32)):
        ...     raise ValueError("expected axis -1 to have value 5")
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.model does not take one of mine's examples, float32 [4]: expected ...
    """
    try:
        yield
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        raise UserError(
            f"run.model does not take {_example(name, x)}: {first_line(error).rstrip('.')}{own_line(error)}; bind "
            "sizes that fit each other"
        ) from error


def _example(name: str, x: tf.TensorSpec) -> str:
    return f"one of {name}'s examples, {x.dtype.name} {list(x.shape)}"


def make_loss(
    settings: Settings, data: Dataset, outputs: tf.Tensor, example: tf.Tensor, parts: int
) -> tuple[losses.Loss, str]:
    """Makes the loss from targets and the model's outputs, and a line to say of it, or ''.

    Args:
        settings: with the loss.
        data: the data set.
        outputs: the model's, in a traced graph.
        example: the same for some example.
        parts: into how many a batch is divided.

    Raises:
        UserError: the loss does not go with the model or the data.

    Examples:
        >>> from dist_partial.data import stdlib_shapes
        >>> from dist_partial.models import two_dense
        >>> settings, classes = Settings([("train", ".*")], two_dense, stdlib_shapes), tf.zeros([1, 10])
        >>> loss, line = make_loss(settings, stdlib_shapes(), classes, classes, parts=1)
        >>> round(float(loss(tf.constant([3]), classes)[0]), 4)  # the default, of ten classes that are alike: ln 10
        2.3026
    """
    loss, batch = settings.loss(), max(1, settings.global_batch // parts)
    unreduced = losses.unreduced(loss, weighted=len(data.train.spec) == 3)
    for source in (data.train, data.evaluation):
        targets = some_targets(source)
        losses.check_class_ids(loss, data.name, targets, example.shape[-1])
        losses.check_shapes(unreduced, source.spec, example, batch)
    losses.check_alone(unreduced, targets, example, parts)
    return losses.of_model(loss, unreduced, outputs, example)
