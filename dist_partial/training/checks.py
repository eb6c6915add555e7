"""Checks a model, its data and its loss against each other before anything is compiled."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.checkpoints import fingerprints
from dist_partial.config.settings import Settings, cross_entropy
from dist_partial.data import Dataset, fetch, looks, some_targets
from dist_partial.distributed import consistency
from dist_partial.distributed.per_replica import local_count
from dist_partial.distributed.replicas import Replicas
from dist_partial.errors import Raised, UserError, calling, first_line, own_line
from dist_partial.models.inputs import check_asked, check_inputs
from dist_partial.selection.plan import Plan
from dist_partial.step import batch_norm, layer_state, losses, metrics
from dist_partial.step.objective import Batch, Objective, prepare, unpacked
from dist_partial.validation import counted

_TRIED = 8  # examples on which a model is tried, at least


def make_model(settings: Settings, data: Dataset, strategy: tf.distribute.Strategy) -> tuple[keras.Model, Batch, Any]:
    """Makes the model, with its variables, in the strategy's scope; some examples, and what it gives for them.

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
    for name in ("train_step", "test_step"):
        if compat.overrides(model, name):
            raise UserError(
                f"run.model has a {name} of its own ({type(model).__name__}), which a run does not call: train it by "
                "model.fit with dist_partial.partial, or give it its loss by a compute_loss of its own"
            )
    x = data.train.spec[0]
    generators = [variable for variable in model.variables if compat.is_generator(variable)]
    generators += layer_state.recurrent(model)
    inputs = getattr(model, "inputs", None)
    if (
        isinstance(x, tf.TensorSpec)
        and x.dtype.is_floating
        and inputs
        and len(inputs) == 1
        and "int" in inputs[0].dtype
    ):
        raise UserError(  # Keras would cut the fractions off
            f"run.model reads ids ({inputs[0].dtype}) and not {_example(data.name, x)}: bind a model of features, or "
            "other data"
        )
    check_inputs(model, data.name, x)
    with taking(data.name, x), layer_state.untouched(strategy, generators):
        batch, outputs = _tried(model, data)
    if data.codec is not None and tf.is_tensor(outputs):
        _check_symbols(model, data.name, data.codec.size, outputs.shape[-1])
    return model, batch, outputs


def _tried(model: keras.Model, data: Dataset) -> tuple[Batch, Any]:
    """Calls a model, which makes the variables of a subclassed one, on a number of examples that is no other size.

    Else targets [n] and outputs [n, n] would go together by broadcasting.
    """
    fixed, own = layer_state.batch_size(model), compat.overrides(model, "compute_loss")
    count = fixed or (_TRIED if own else 2)
    sizes = {size for one in tf.nest.flatten(data.train.spec) for size in one.shape}
    for _ in range(2):  # there are models whose outputs have the number of examples as another size
        while count in sizes and not fixed:
            count += 1
        batch = tf.nest.map_structure(tf.constant, fetch(data.train, np.resize(looks(data.train), count)))
        outputs = model(batch[0], training=False)
        sizes |= {size for output in tf.nest.flatten(outputs) for size in output.shape[1:]}
        if fixed or count not in sizes:
            break
    return batch, outputs


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


def check_added(model: keras.Model, strategy: tf.distribute.Strategy) -> None:
    """Raises UserError if replicas of one process would mix up what layers add to the loss.

    Keras 3.15 keeps it in one list a layer, and replicas that meet within the model, in a synchronised BatchNorm, find
    each other's. The model has been called.
    """
    met = [layer.name for layer in batch_norm.layers(model) if layer.synchronized]
    regularisers = [v for v in model.trainable_variables if v.regularizer is not None]
    if met and local_count(strategy) > 1 and len(model.losses) > len(regularisers):
        raise UserError(
            f"run.model has the synchronised BatchNorm {met[0]!r} and layers that add to the loss "
            "(activity_regularizer, add_loss), which replicas of one process would mix up: start one process a "
            "replica, or build it without synchronized=True"
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
def taking(name: str, x: Any) -> Iterator[None]:
    """Turns what a model says of the examples of the data set of that name into a mistake of the user's.

    Examples:
        >>> with taking("mine", tf.TensorSpec([4], tf.float32)):
        ...     raise ValueError("expected axis -1 to have value 5")
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.model does not take one of mine's examples, float32 [4]: expected ...
    """
    try:
        yield
    except KeyError as error:
        check_asked(name, x, error)
        raise
    except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
        raise UserError(
            f"run.model does not take {_example(name, x)}: {first_line(error).rstrip('.')}{own_line(error)}; bind "
            "sizes that fit each other"
        ) from error


def _example(name: str, x: Any) -> str:
    return f"one of {name}'s examples, {described(x)}"


def described(spec: Any) -> str:
    """Writes a nest of tensors or their specs as messages show it.

    Examples:
        >>> described({"age": tf.TensorSpec([2], tf.int32)})
        "{'age': int32 [2]}"
    """
    if isinstance(spec, dict):
        return "{" + ", ".join(f"{name!r}: {described(each)}" for name, each in spec.items()) + "}"
    if isinstance(spec, (list, tuple)):
        return f"({', '.join(map(described, spec))})"
    return f"{spec.dtype.name} {spec.shape.as_list()}"


def make_objective(
    settings: Settings, data: Dataset, model: keras.Model, batch: Batch, outputs: Any, parts: int
) -> tuple[Objective, list[losses.DividedLoss]]:
    """Makes the loss and the metrics, and lines to say of them; in the strategy's scope.

    Args:
        settings: with the loss and the metrics.
        data: the data set.
        model: the model.
        batch: some examples.
        outputs: the model's for them.
        parts: into how many a batch is divided.

    Raises:
        UserError: the loss or the metrics do not go with the model or the data.
    """
    with calling("run.loss"):
        loss, weights = _loss(settings, data, model)
        loss = losses.made(loss)
    _, y, weight = unpacked(batch)
    compiled = {"loss": loss, "loss_weights": weights}
    with calling("run.metrics"):
        names = ("metrics", "weighted_metrics")
        compiled |= {name: metrics.made(getattr(settings, name), f"run.{name}") for name in names}
        quiet = []
        if settings.metrics is None and settings.weighted_metrics is None:
            text = data.codec is not None
            compiled["weighted_metrics"] = metrics.suggested(y, outputs, loss, text, data.unit) or None
            quiet = [metric.name for metric in compiled["weighted_metrics"] or ()]
    try:
        objective = prepare(model, batch, outputs, compiled, quiet)
    except Raised as raised:
        _check_class_ids(data, loss, y)
        error = raised.__cause__
        if not isinstance(error, (ValueError, TypeError, KeyError, tf.errors.InvalidArgumentError)):
            raise
        given = "none" if y is None else _batchless(y)
        given += "" if weight is None else f", weights {_batchless(weight)}"
        raise UserError(
            f"{str(raised).split(' raised ')[0]} does not take run.data's targets {given} and outputs "
            f"{_batchless(outputs)} of run.model: {first_line(error)}{own_line(error)}; bind another loss, or a model "
            "of other outputs"
        ) from error
    _check_class_ids(data, loss, y)
    called = _called(loss)
    for each, _, targets in _targets_of(called, y, some_targets(data.train)):
        losses.check_divisible(each, targets, parts)
    return objective, called


def _check_class_ids(data: Dataset, loss: Any, y: Any) -> None:
    for source in (data.train, data.evaluation):
        for each, outputs, targets in _targets_of(_called(loss), y, some_targets(source)):
            losses.check_class_ids(each.inner, data.name, targets, outputs.shape[-1])


def _called(loss: Any) -> list[losses.DividedLoss]:
    return [each for each in tf.nest.flatten(loss) if each is not None and each.seen is not None]


def _loss(settings: Settings, data: Dataset, model: keras.Model) -> tuple[Any, Any]:
    """What is bound; or what the model was compiled with; or its own `compute_loss` alone; or cross-entropy."""
    if settings.loss is not None:
        return settings.loss, settings.loss_weights
    compiled = compat.compiled_loss(model)
    if compiled or compat.overrides(model, "compute_loss") or len(data.train.spec) == 1:
        return compiled or (None, None)
    return cross_entropy(), settings.loss_weights


def _batchless(values: Any) -> str:
    return described(tf.nest.map_structure(lambda value: tf.TensorSpec(value.shape[1:], value.dtype), values))


def _targets_of(
    found: Sequence[losses.DividedLoss], y: Any, targets: Any
) -> Iterator[tuple[losses.DividedLoss, tf.Tensor, np.ndarray]]:
    """Gives each loss with the outputs that it was tried on and the targets that it takes, of the whole data set."""
    places = {id(tensor): array for tensor, array in zip(tf.nest.flatten(y), tf.nest.flatten(targets), strict=True)}
    for loss in found:
        assert loss.seen is not None
        if id(loss.seen[0]) in places:
            yield loss, loss.seen[1], places[id(loss.seen[0])]


def notes_on(found: Sequence[losses.DividedLoss]) -> list[str]:
    """Says what outputs are taken for, where the loss takes logits."""
    kinds = sorted({loss.probabilities for loss in found} - {""})
    return [
        f"run.model gives probabilities ({k}), and run.loss takes logits: it is given those behind them" for k in kinds
    ]
