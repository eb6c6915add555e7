"""Rules for `model.fit`: an optimizer that trains and reduces the selection alone.

    with strategy.scope():
        model = build_model()
        optimizer = dist_partial.partial(keras.optimizers.Adam(1e-3), [("train", r"head/.*"), ("freeze", r".*")], model)
        model.compile(optimizer, loss=...)
    model.fit(...)

Keras differentiates `model.trainable_weights`, so `partial` takes what the rules freeze out of them. A model saved with
such an optimizer needs `import dist_partial.fit` before `keras.saving.load_model`, or `compile=False`.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial import batch_norm, compression, reduction
from dist_partial import optimizers as optimizers_lib
from dist_partial.errors import UserError
from dist_partial.reduction import EveryStep
from dist_partial.replicas import local_count
from dist_partial.selection import Entry, Plan, Rule, resolve
from dist_partial.wire import Wire

_REDUCTIONS = {
    each.__name__: each for each in (EveryStep, compression.Quantized, compression.TopK, compression.PowerSGD)
}
_MARK = "_frozen_by_partial"  # on the variables and layers that `partial` has frozen


def partial(
    optimizer: keras.optimizers.Optimizer | str,
    rules: Sequence[Any],
    model: keras.Model,
    reduction: Any = EveryStep(),  # noqa: B008 (frozen)
) -> "Partial | PartialLossScale":
    """Freezes what the rules do not train, and wraps an optimizer so that only the rest is reduced, once.

    Call it inside `strategy.scope()`, before `model.compile`. Loss and metrics stay as in Keras: each replica divides
    its loss by the number of replicas, and the sum of their gradients is the gradient of the global batch's mean. The
    optimizer's clipping is of that sum, each optimizer's of its own part. BatchNorm layers of which nothing is trained
    run in inference mode. A model that has been through here before begins as it was before.

    Args:
        optimizer: a Keras optimizer that has no variables yet, or its name. It trains the rules that name neither an
            optimizer nor a learning rate; each of the others has one of its own, listed in `optimizers`.
        rules: the table, as for `run.rules`; its paths have no model name in front.
        model: a built model.
        reduction: of the rules that name none: `EveryStep`, `Quantized`, `TopK` or `PowerSGD`.

    Returns:
        What `model.compile(optimizer=...)` takes; with loss scaling if the model's policy is mixed_float16.

    Raises:
        UserError: a rule table that does not fit the model, as from `selection.resolve`; a model without variables;
            an optimizer that is wrapped or built already, was made outside the model's strategy, or accumulates,
            averages or scales by itself; a reduction with which replicas would part.
    """
    if not isinstance(model, keras.Model):
        raise UserError(f"partial was given {model!r}: the third argument is the Keras model that will be compiled")
    if not model.built or not model.variables:
        raise UserError(f"model {model.name!r} has no variables yet: call it once on a batch, then partial(...)")
    strategy = model.distribute_strategy
    if strategy.num_replicas_in_sync > local_count(strategy):
        raise UserError(
            "model.fit of Keras 3.15 fails under MultiWorkerMirroredStrategy with more than one worker, with any "
            "optimizer: train with dist_partial.train"
        )
    with strategy.scope():
        plan, made = _resolve(rules, model, reduction, _checked(optimizer, strategy))
        used = list({id(each): each for each in made}.values())
        shares = [
            Share(tuple(e.path for e in group.entries), group.rule.rows, group.reduction, used.index(each))
            for group, each in zip(plan.groups, made, strict=True)
        ]
        inference = _set_modes(model, plan)
        wrapped = Partial(used, shares, [e.path for e in plan.entries if id(e.variable) in inference])
        outer = PartialLossScale(wrapped) if model.dtype_policy.name == "mixed_float16" else wrapped
        outer.build(model.trainable_variables)
        return outer


def release(model: keras.Model) -> None:
    """Makes everything trainable again that `partial` has frozen in this process; compile the model after it."""
    for each in _frozen(model):
        setattr(each, _MARK, False)
        each.trainable = True


def resume(model: keras.Model) -> None:
    """Puts the BatchNorm layers of a loaded model back into inference mode; call it after `load_model`.

    Only for models whose class does not save which of its layers are frozen, as subclassed ones do not; the first step
    of others needs nothing. Keras then warns once that layers have changed since `compile`, which does no harm here.
    """
    outer = model.optimizer
    optimizer = outer.inner_optimizer if isinstance(outer, PartialLossScale) else outer
    if not isinstance(optimizer, Partial):
        raise UserError(f"model {model.name!r} is not compiled with an optimizer from partial(...)")
    _set_modes(model, optimizer._plan)
    _freeze(v for v in model.trainable_variables if all(v is not chosen for chosen in optimizer.selected))
    optimizer._awake = []


@dataclasses.dataclass(frozen=True)
class Share:
    """What one rule trains: paths of variables, their rows, their reduction, and the number of their optimizer."""

    paths: tuple[str, ...]
    rows: tuple[int, int] | None
    reduction: Any
    optimizer: int


@keras.saving.register_keras_serializable(package="dist_partial")
class Partial(keras.optimizers.Optimizer):
    """The optimizer that `partial` makes: reduces the gradients of a selection, then updates it.

    Args:
        inner: the optimizers; the first one's learning rate is this one's.
        shares: what each rule trains.
        inference: paths of the variables of BatchNorm layers in inference mode.
        name: of this optimizer.
    """

    def __init__(
        self,
        inner: Sequence[keras.optimizers.Optimizer],
        shares: Sequence[Share],
        inference: Sequence[str] = (),
        name: str = "partial",
    ) -> None:
        super().__init__(learning_rate=0.0, name=name)
        self._inner = list(inner)  # Keras saves their variables, as it finds them in an attribute
        self._shares, self._inference = tuple(shares), tuple(inference)
        self._reduces = True

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the slots of the selection, and freezes the rest of `variables`, which a loaded model has trainable."""
        if self.built:
            return
        with self._distribution_strategy.scope():
            self._plan = plan = _plan(self._shares, self._inner, variables)
            groups: dict[int, optimizers_lib.GroupOptimizer] = {}
            for group in optimizers_lib.build(plan, lambda: None, slots=False):  # each rule names its own
                same = groups.setdefault(id(group.optimizer), dataclasses.replace(group, members=()))
                same.members += group.members
            for group in groups.values():
                group.allocate()
            self._groups, self._states = tuple(groups.values()), reduction.states(plan)
        self._awake = [v.path for v in variables if {v.path, v.path.split("/", 1)[-1]} & set(self._inference)]
        _freeze(v for v in variables if v.trainable and all(v is not chosen for chosen in self.selected))
        super().build(self.selected)

    def reduce(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Sums the gradients over the replicas; called in a replica context.

        Args:
            grads: this replica's part of each, or None.
            variables: the variables in the same order.

        Returns:
            The sums in the order of `selected`: the same on every replica; of the selected rows alone where rows are.
        """
        if self._awake:
            raise UserError(
                f"the BatchNorm layer of {self._awake[0]!r} was in inference mode when the model was saved, which its "
                "class has not kept: call dist_partial.fit.resume(model) after load_model"
            )
        trained = self._plan.trained
        found = {self._var_key(variable): gradient for variable, gradient in zip(variables, grads, strict=True)}
        known = {self._var_key(entry.variable) for entry in trained}
        for variable in variables:
            if self._var_key(variable) not in known:
                raise UserError(
                    f"{variable.path!r} was made trainable after partial(...) had frozen it: call partial and "
                    "model.compile again, with rules that train it"
                )
        gradients = []
        for entry in trained:
            gradient = found.get(self._var_key(entry.variable))
            if gradient is not None:
                # An embedding's gradient is sparse; dense, what travels has a size that does not depend on the batch.
                gradient = tf.ensure_shape(tf.convert_to_tensor(gradient), entry.shape)
                gradient = gradient if entry.rule.rows is None else gradient[slice(*entry.rule.rows)]
            gradients.append(gradient)
        if all(gradient is None for gradient in gradients):
            raise UserError(f"the loss depends on none of the selected variables ({trained[0].path!r}, ...)")
        return reduction.reduce(Wire(), self._plan, gradients, self._states)[0]

    @property
    def selected(self) -> list[Any]:
        """The variables that are trained."""
        return [entry.variable for entry in self._plan.trained]

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Reduces and applies the gradients of a step; called in a replica context."""
        if not self.built:
            self.build(list(trainable_variables or ()))
        if self._reduces:
            grads = self.reduce(grads, self.selected if trainable_variables is None else trainable_variables)
        sums = {id(entry): gradient for entry, gradient in zip(self._plan.trained, grads, strict=True)}
        members = [member for group in self._groups for member in group.members]
        context: Any = tf.distribute.get_replica_context()
        rows = [member for member in members if member.entry.rule.rows is not None]
        if rows:  # the model's weights may have been loaded since
            context.merge_call(lambda strategy: _read_rows(strategy, rows))
        optimizers_lib.apply(self._groups, [sums[id(member.entry)] for member in members])
        if rows:
            context.merge_call(lambda strategy: optimizers_lib.write_rows(strategy, rows))
        self._iterations.assign_add(1)

    @property
    def optimizers(self) -> list[keras.optimizers.Optimizer]:
        """Where rules have optimizers of their own, all of them: Keras's callbacks set the learning rate of each."""
        if len(self._inner) == 1:
            raise AttributeError("there is one optimizer, whose learning rate is `learning_rate`")
        return self._inner

    @property
    def learning_rate(self) -> Any:
        return self._inner[0].learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        self._inner[0].learning_rate = value

    @property
    def variables(self) -> list[Any]:
        return [*self._variables, *(v for each in self._inner for v in each.variables)]

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        for each in self._inner:
            each.exclude_from_weight_decay(var_list, var_names)

    def save_own_variables(self, store: Any) -> None:
        store["iteration"] = self._iterations.numpy()
        for name, copies in self._residuals().items():
            store[name] = tf.stack(copies).numpy()

    def load_own_variables(self, store: Any) -> None:
        self._iterations.assign(store["iteration"])
        for name, copies in self._residuals().items():
            # With another number of replicas, what they had left out so far is left out for good.
            if name in set(store.keys()) and len(store[name]) == len(copies):
                for copy, value in zip(copies, store[name], strict=True):
                    copy.assign(value)

    def _residuals(self) -> dict[str, Any]:
        kept = self._states if self.built else []
        local = self._distribution_strategy.experimental_local_results
        return {f"{i}_{name}": local(variable) for i, state in enumerate(kept) for name, variable in state.items()}

    def get_config(self) -> dict[str, Any]:
        shares = [
            {
                "paths": list(share.paths),
                "rows": share.rows and list(share.rows),
                "reduction": {"class": type(share.reduction).__name__, **dataclasses.asdict(share.reduction)},
                "optimizer": share.optimizer,
            }
            for share in self._shares
        ]
        inner = [keras.optimizers.serialize(each) for each in self._inner]
        return {"name": self.name, "inner": inner, "shares": shares, "inference": list(self._inference)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "Partial":
        shares = []
        for share in config["shares"]:
            kind, fields = share["reduction"]["class"], {k: v for k, v in share["reduction"].items() if k != "class"}
            rows = tuple(share["rows"]) if share["rows"] else None
            shares.append(Share(tuple(share["paths"]), rows, _REDUCTIONS[kind](**fields), share["optimizer"]))
        inner = [keras.optimizers.deserialize(each, custom_objects) for each in config["inner"]]
        return cls(inner, shares, config["inference"], config["name"])


@keras.saving.register_keras_serializable(package="dist_partial")
class PartialLossScale(keras.optimizers.LossScaleOptimizer):
    """Keras's dynamic loss scaling around `Partial`, which `compile` does not wrap again.

    Keras 3.15 decides about an overflow by the first replica's gradient alone, so that another one's overflow would
    reach the weights; here it sees the sum, which is the same on all of them.
    """

    def __init__(self, inner_optimizer: Partial, *args: Any, **kwargs: Any) -> None:
        super().__init__(inner_optimizer, *args, **kwargs)
        inner_optimizer._reduces = False

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Reduces, unscales and applies the gradients of a step; called in a replica context."""
        inner = self.inner_optimizer
        if not self.built:
            self.build(list(trainable_variables or ()))
        sums = inner.reduce(grads, inner.selected if trainable_variables is None else trainable_variables)
        super().apply(sums, inner.selected)

    @property
    def optimizers(self) -> list[keras.optimizers.Optimizer]:
        return self.inner_optimizer.optimizers


def _plan(shares: Sequence[Share], inner: Sequence[Any], variables: Sequence[Any]) -> Plan:
    wanted = [path for share in shares for path in share.paths]
    # With the model's name in front or not, as Keras does it for the kind of model.
    by_path = {variable.path: variable for variable in variables}
    if not by_path.keys() >= set(wanted):
        by_path = {path.split("/", 1)[-1]: variable for path, variable in by_path.items()}
    for path in wanted:
        if path not in by_path:
            raise UserError(f"the optimizer trains {path!r}, which the model does not have or has frozen")
    rules, entries = [], []
    for share in shares:
        optimizer = inner[share.optimizer]
        rules.append(Rule("|".join(map(re.escape, share.paths)), optimizer=lambda o=optimizer: o, rows=share.rows))
        for path in share.paths:
            v = by_path[path]
            entries.append(Entry(path, tuple(v.shape), v.dtype, v, rules[-1], share.reduction))
    return Plan(tuple(rules), tuple(entries))


def _checked(optimizer: Any, strategy: tf.distribute.Strategy) -> keras.optimizers.Optimizer:
    try:
        inner = keras.optimizers.get(optimizer)
    except (TypeError, ValueError):
        inner = None
    if not isinstance(inner, keras.optimizers.Optimizer):
        raise UserError(f"partial was given {optimizer!r}: pass a Keras optimizer such as keras.optimizers.Adam(1e-3)")
    where = f"the optimizer {inner.name!r}"
    if isinstance(inner, (Partial, PartialLossScale)):
        raise UserError(f"{where} is wrapped already: pass the Keras optimizer itself, a new one")
    if isinstance(inner, keras.optimizers.LossScaleOptimizer) or inner.loss_scale_factor:
        raise UserError(f"{where} scales the loss by itself: pass it without; under mixed_float16 partial does it")
    if isinstance(inner, keras.optimizers.MultiOptimizer):
        raise UserError(f"{where} is several: name them in the rules, Rule(match, optimizer=keras.optimizers.SGD)")
    if inner.built:
        raise UserError(f"{where} has slots for other variables already: pass a new one")
    if inner.gradient_accumulation_steps:
        raise UserError(
            f"{where} accumulates gradients, which Keras 3.15 cannot do on several replicas: leave out "
            "gradient_accumulation_steps, or train with dist_partial.train and run.accumulate"
        )
    if inner.use_ema:
        raise UserError(f"{where} averages weights: leave out use_ema")
    if inner._distribution_strategy is not strategy:
        raise UserError(f"{where} was made outside the model's strategy: make both inside the same strategy.scope()")
    return inner


def _resolve(
    rules: Sequence[Any], model: keras.Model, reduction: Any, inner: keras.optimizers.Optimizer
) -> tuple[Plan, list[keras.optimizers.Optimizer]]:
    """The plan for the model as it was before `partial`, and the optimizer of each of its groups."""

    def make(**options: Any) -> keras.optimizers.Optimizer:
        return type(inner).from_config({**inner.get_config(), **options}) if options else inner

    frozen = _frozen(model)
    release(model)
    try:
        plan = resolve(rules, model, reduction)
        for group in plan.groups:
            if type(group.reduction) not in _REDUCTIONS.values():
                raise UserError(
                    f"rule {group.rule.match!r}: model.fit cannot reduce by {group.reduction}: take one of "
                    f"{', '.join(_REDUCTIONS)}, or train with dist_partial.train"
                )
        return plan, [group.optimizer for group in optimizers_lib.build(plan, make, slots=False)]
    except UserError:
        _freeze(frozen)  # an optimizer that the model was compiled with before stays usable
        raise


def _set_modes(model: keras.Model, plan: Plan) -> set[int]:
    """Sets the BatchNorm layers' modes; returns the ids of the variables of those in inference mode."""
    layers = batch_norm.layers(model)
    batch_norm.set_modes(layers, plan, everywhere=False)
    asleep = [layer for layer in layers if not layer.trainable]
    _freeze(asleep)
    return {id(variable) for layer in asleep for variable in layer.variables}


def _frozen(model: keras.Model) -> list[Any]:
    return [each for each in [*model._flatten_layers(), *model.variables] if getattr(each, _MARK, False)]


def _freeze(layers_or_variables: Iterable[Any]) -> None:
    for each in layers_or_variables:
        each.trainable = False
        setattr(each, _MARK, True)


def _read_rows(strategy: tf.distribute.Strategy, members: Sequence[optimizers_lib.Trained]) -> None:
    for member in members:
        strategy.extended.update(
            member.variable.value,
            lambda rows, whole, at=member.entry.rule.rows: rows.assign(whole[slice(*at)]),
            args=(member.entry.variable.value,),
        )
