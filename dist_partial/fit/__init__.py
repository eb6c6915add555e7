"""Rules for `model.fit`: an optimizer that trains and reduces the selection alone.

    with strategy.scope():
        model = build_model()
        optimizer = dist_partial.partial(keras.optimizers.Adam(1e-3), [("train", r"head/.*"), ("freeze", r".*")], model)
        model.compile(optimizer, loss=...)
    model.fit(...)

Keras differentiates `model.trainable_weights`, so `partial` takes what the rules freeze out of them. A model saved with
such an optimizer needs `import dist_partial.fit` before `keras.saving.load_model`, or `compile=False`.
"""

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import keras
import tensorflow as tf

from dist_partial import compat
from dist_partial.checkpoints.fingerprints import digest, variables
from dist_partial.config.words import spoken
from dist_partial.distributed.per_replica import topology
from dist_partial.distributed.replicas import collectives_of, joined_by
from dist_partial.errors import UserError
from dist_partial.fit import saved_plan
from dist_partial.fit.alike import begin_alike, check_alike, joined, name_losses
from dist_partial.fit.loss_scale import PartialLossScale, of
from dist_partial.fit.optimizer import FROZEN, Partial, freeze
from dist_partial.fit.saved_plan import Options
from dist_partial.fit.scheduler import SelectionScheduler, units_of
from dist_partial.fit.workers import connect, metrics, on_workers
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.schedules.fixed import Constant
from dist_partial.selection.payload import PAIR
from dist_partial.selection.plan import Plan, VariablePlan
from dist_partial.selection.resolve import resolve
from dist_partial.step import batch_norm, optimizers
from dist_partial.synonyms import known_arguments
from dist_partial.validation import AtLeast, Has, check_arguments, shown

__all__ = [
    "Partial",
    "PartialLossScale",
    "SelectionScheduler",
    "connect",
    "metrics",
    "on_workers",
    "partial",
    "release",
    "resume",
]

SCHEDULE = Has("select", "give one such as dist_partial.schedules.Rotation(every=20)")


@spoken()
@known_arguments
def partial(
    optimizer: keras.optimizers.Optimizer | str,
    rules: Sequence[Any],
    model: keras.Model,
    reduction: Any = AllReduce(),  # noqa: B008 (frozen)
    schedule: Annotated[Any, SCHEDULE] = Constant(),  # noqa: B008 (frozen)
    accumulate: Annotated[int, AtLeast(1)] = 1,
    between_hosts: Any = None,
) -> Partial | PartialLossScale:
    """Freezes what the rules do not train, and wraps an optimizer so that only the rest is reduced, once.

    Call it inside `strategy.scope()`, before `model.compile`, when the model has its weights: they are a delta's base.
    Loss and metrics stay as in Keras: each replica divides its loss by the number of replicas, and the sum of their
    gradients is the gradient of the global batch's mean. Under a strategy from `connect` it is the mean over the
    workers, which all call this at the same point and begin with the first one's weights. The optimizer's clipping is
    of that sum, each optimizer's of its own part. BatchNorm layers of which nothing is trained run in inference mode. A
    model that has been through here before begins as it was before.

    Args:
        optimizer: a Keras optimizer that has no variables yet, or its name. It trains the rules that name neither an
            optimizer nor a learning rate; each of the others has one of its own, listed in `optimizers`.
        rules: the table, as for `run.rules`; its paths have no model name in front.
        model: a built model.
        reduction: of the rules that name none: `AllReduce`, `Quantized`, `TopK` or `PowerSGD`.
        schedule: what is trained when: the callback `SelectionScheduler` follows it. Each unit has its own optimizer.
        accumulate: steps of `fit` in one update; learning rates, schedules and `iterations` count updates.
        between_hosts: how gradients cross the workers, once `reduction` has summed those of a worker's own replicas;
            one of the same. None: `reduction` crosses all replicas.

    Returns:
        What `model.compile(optimizer=...)` takes; with loss scaling if the model's policy is mixed_float16. Its `plan`
        prints what is trained.

    Raises:
        UserError: a rule table, a reduction or a schedule that does not fit, or that differs among the workers; a
            model without variables; an optimizer that is wrapped or built already, was made outside the model's
            strategy, or accumulates, averages or scales by itself.

    Examples:
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3), keras.layers.Dense(1, name="head")])
        >>> optimizer = partial(keras.optimizers.Adam(1e-3), [("train", "head/.*"), ("freeze", ".*")], model)
        >>> model.compile(optimizer, loss="mse")
        >>> [(variable.name, tuple(variable.shape)) for variable in model.trainable_variables]
        [('kernel', (3, 1)), ('bias', (1,))]
    """
    check_arguments(partial, {"schedule": schedule, "accumulate": accumulate})
    strategy = _checked_model(model).distribute_strategy
    backend = joined_by(strategy)
    with strategy.scope(), joined(backend):
        begin_alike(backend, model)
        inner = _checked(optimizer, strategy)
        found = _resolve(rules, model, (reduction, between_hosts), schedule, inner)
        wrapped = _wrapped(*found, schedule, model, accumulate)
        outer = PartialLossScale(wrapped) if model.dtype_policy.name == "mixed_float16" else wrapped
        outer.build(model.trainable_variables)
        check_alike(backend, {"optimizer": wrapped.get_config()})
    name_losses(backend, model)
    return outer


def release(model: keras.Model) -> None:
    """Makes everything trainable again that `partial` has frozen; compile the model after it.

    What was not trainable before `partial` stays so. Keras does not save which single variables are: in a loaded model
    all of those that the rules froze become trainable.

    Examples:
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3), keras.layers.Dense(1, name="head")])
        >>> _ = partial("adam", [("train", "head/.*"), ("freeze", ".*")], model)
        >>> frozen = len(model.trainable_variables)
        >>> release(model)
        >>> frozen, len(model.trainable_variables)
        (2, 4)
    """
    layers, frozen = _frozen(model)
    for layer in layers:
        setattr(layer, FROZEN, False)
        batch_norm.set_mode(layer, True)
    for variable in frozen:
        setattr(variable, FROZEN, False)
        variable.trainable = True


def resume(model: keras.Model) -> None:
    """Puts the BatchNorm layers of a loaded model back into inference mode; call it after `load_model`.

    Only for models whose class does not save which of its layers are frozen, as subclassed ones do not; the first step
    of others needs nothing. Keras then warns once that layers have changed since `compile`, which does no harm here.

    Examples:
        >>> layers = [keras.layers.BatchNormalization(), keras.layers.Dense(1, name="head")]
        >>> model = keras.Sequential([keras.Input([4]), *layers])
        >>> model.compile(partial("adam", [("train", "head/.*"), ("freeze", ".*")], model), loss="mse")
        >>> layers[0].trainable = True  # as in a loaded model whose class does not save it
        >>> resume(model)
        >>> layers[0].trainable
        False
    """
    optimizer = of(model)
    if optimizer is None:
        raise UserError(f"model {model.name!r} is not compiled with an optimizer from partial(...)")
    _freeze_rest(model, optimizer.plan)
    optimizer.awake = []


def _checked_model(model: Any) -> keras.Model:
    if not isinstance(model, keras.Model):
        raise UserError(
            f"partial was given {shown(model)}: the third argument is the Keras model that will be compiled"
        )
    if not model.built or not model.variables:
        raise UserError(f"model {model.name!r} has no variables yet: call it once on a batch, then partial(...)")
    strategy, made = model.distribute_strategy, getattr(model.variables[0].value, "distribute_strategy", None)
    if tf.distribute.has_strategy() and made is not tf.distribute.get_strategy():
        raise UserError(
            f"model {model.name!r} was made outside this strategy's scope: build or load it within strategy.scope(), "
            "where partial is called"
        )
    if topology(strategy).workers > 1:
        raise UserError(
            "model.fit of Keras 3.15 fails under MultiWorkerMirroredStrategy with more than one worker, with any "
            "optimizer: make the model within dist_partial.connect().strategy.scope()"
        )
    return model


def _checked(optimizer: Any, strategy: tf.distribute.Strategy) -> keras.optimizers.Optimizer:
    try:
        inner = keras.optimizers.get(optimizer)
    except (TypeError, ValueError):
        inner = None
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise UserError(
            f"partial was given {shown(optimizer)}: pass a Keras optimizer such as keras.optimizers.Adam(1e-3)"
        )
    where = f"the optimizer {inner.name!r}"
    if isinstance(inner, (Partial, PartialLossScale)):
        raise UserError(f"{where} is wrapped already: pass the Keras optimizer itself, a new one")
    if inner.built:
        raise UserError(f"{where} has slots for other variables already: pass a new one")
    if steps := inner.gradient_accumulation_steps:
        raise UserError(
            f"{where} accumulates gradients by itself, which Keras 3.15 cannot do on several replicas: leave out "
            f"gradient_accumulation_steps, and give partial accumulate={steps}"
        )
    optimizers.check(where, inner)
    if inner.use_ema:
        raise UserError(f"{where} averages weights (use_ema), which dist_partial.train alone does: leave out use_ema")
    if compat.strategy_of(inner) is not strategy:
        raise UserError(f"{where} was made outside the model's strategy: make both inside the same strategy.scope()")
    return inner


def _resolve(
    rules: Sequence[Any], model: keras.Model, levels: Sequence[Any], schedule: Any, inner: keras.optimizers.Optimizer
) -> tuple[Plan, list[keras.optimizers.Optimizer], set[int]]:
    """The plan for the model as it was before `partial`, in the schedule's units.

    Returns:
        The plan; the optimizer of each of its groups; the ids of those that are `inner` or a copy for another unit.
    """
    config, rate, alike = inner.get_config(), compat.learning_rate(inner), {id(inner)}

    def make(learning_rate: Any = None) -> keras.optimizers.Optimizer:
        if learning_rate is not None:
            return optimizers.another(inner, learning_rate)
        if isinstance(schedule, Constant) or not copies:
            copies.append(inner)
        else:  # each unit counts its own steps
            copies.append(optimizers.another(inner, rate if callable(rate) else config["learning_rate"]))
        return copies[-1]

    copies: list[keras.optimizers.Optimizer] = []
    layers, frozen = _frozen(model)
    release(model)
    try:
        plan = resolve(rules, model, levels[0], between_hosts=levels[1])
        plan = plan.among(collectives_of(tf.distribute.get_strategy()))
        for entry in plan.trained:
            _check_reduction(entry, model.dtype_policy.name)
        if schedule.statistics == "probe":
            raise UserError(
                f"{type(schedule).__name__} measures gradients on the batch that comes next, which model.fit does not "
                "show: take another schedule, or train with dist_partial.train"
            )
        units = units_of(schedule, plan)
        schedule.check(units, sys.maxsize)  # steps of fit are not known yet
        plan = plan.divided([(unit.name, unit.paths) for unit in units])
        made = [group.optimizer for group in optimizers.build(plan, make, slots=False)]
        return plan, made, alike | {id(each) for each in copies}
    except UserError:
        # An optimizer that the model was compiled with before stays usable.
        _sleep(layers)
        freeze(frozen)
        raise


def _wrapped(
    plan: Plan, made: Sequence[Any], similar: set[int], schedule: Any, model: keras.Model, accumulate: int
) -> Partial:
    """The optimizer of a plan, whose groups `made` trains, with its slots."""
    used = list({id(each): each for each in made}.values())
    asleep = {id(variable) for layer in _freeze_rest(model, plan) for variable in layer.variables}
    options = Options(
        inference=[e.path for e in plan.entries if id(e.variable) in asleep],
        accumulate=accumulate,
        norms=schedule.statistics == "norms",
        alike=[i for i, each in enumerate(used) if id(each) in similar] or [0],
        base=_changeable(model, plan),
    )
    wrapped = Partial(used, saved_plan.with_optimizers(plan, made), options)
    wrapped.build(model.trainable_variables)
    return wrapped


def _check_reduction(entry: VariablePlan, policy: str) -> None:
    names, where = saved_plan.REDUCTIONS, f"rule {entry.rule.match!r}: "
    for how in (entry.reduction, entry.inside):
        if how is not None and type(how) not in names.values():
            raise UserError(
                f"{where}model.fit cannot reduce by {type(how).__name__} ({how}): take one of {', '.join(names)}, or "
                "train with dist_partial.train"
            )
        if (
            how is not None
            and policy == "mixed_float16"
            and how.state(entry.path, entry.trained_shape, entry.dtype, PAIR)
        ):
            raise UserError(
                f"{where}under mixed_float16 a step that overflows is skipped, which {type(how).__name__} ({how}) "
                "cannot: take AllReduce, or the policy mixed_bfloat16"
            )


def _changeable(model: keras.Model, plan: Plan) -> dict[str, str]:
    """Digests of all that training may change, by path: of what the rules do not freeze."""
    frozen = {id(entry.variable) for entry in plan.frozen}
    return {
        path: digest(keras.ops.convert_to_numpy(variable))
        for path, variable in variables(model).items()
        if id(variable) not in frozen
    }


def _freeze_rest(model: keras.Model, plan: Plan) -> list[Any]:
    """Freezes what the plan does not train; returns the BatchNorm layers that it has put into inference mode."""
    layers = batch_norm.layers(model)
    batch_norm.set_modes(layers, plan, everywhere=False)
    asleep = [layer for layer in layers if not layer.trainable]
    _sleep(asleep)
    trained = {id(entry.variable) for entry in plan.trained}
    freeze(v for v in model.trainable_variables if id(v) not in trained)
    return asleep


def _sleep(layers: Sequence[Any]) -> None:
    for layer in layers:
        batch_norm.set_mode(layer, False)
        setattr(layer, FROZEN, True)


def _frozen(model: keras.Model) -> tuple[list[Any], list[Any]]:
    """BatchNorm layers and variables that `partial` has frozen, in this process or before the model was saved."""
    optimizer, still = of(model), [v for v in model.variables if not v.trainable]
    before = optimizer.asleep(still) if optimizer else []
    frozen = [v for v in still if getattr(v, FROZEN, False) or any(v is other for other in before)]
    ids = {id(v) for v in before}
    layers = [
        layer
        for layer in compat.layers(model)
        if getattr(layer, FROZEN, False) or (not layer.trainable and ids & {id(v) for v in compat.own_weights(layer)})
    ]
    return layers, frozen
