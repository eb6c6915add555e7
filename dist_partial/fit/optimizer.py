"""The optimizer that `fit.partial` makes: what Keras's `fit` and `save` see of a plan."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial import compat, reductions
from dist_partial.distributed.collectives import Collectives
from dist_partial.errors import UserError
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.reduce_gradients import make_states, reduce_gradients
from dist_partial.selection.plan import Plan, VariablePlan
from dist_partial.selection.rules import Rule
from dist_partial.step import optimizers

REDUCTIONS = {each.__name__: each for each in (AllReduce, reductions.Quantized, reductions.TopK, reductions.PowerSGD)}
FROZEN = "_frozen_by_partial"  # a mark on the variables and layers that `partial` has frozen


def freeze(variables: Iterable[Any]) -> None:
    """Makes variables not trainable until `fit.release`.

    Examples:
        >>> variable = keras.Variable([1.0])
        >>> freeze([variable])
        >>> variable.trainable
        False
    """
    for variable in variables:
        variable.trainable = False
        setattr(variable, FROZEN, True)


@dataclasses.dataclass(frozen=True)
class Share:
    """Describes what one rule trains: paths of variables, rows, reduction, and the number of the optimizer.

    Examples:
        >>> share = Share(("head/kernel",), (0, 2), AllReduce("bfloat16"), optimizer=0)
        >>> share.to_json()["reduction"], Share.from_json(share.to_json()) == share
        ({'class': 'AllReduce', 'dtype': 'bfloat16'}, True)
    """

    paths: tuple[str, ...]
    rows: tuple[int, int] | None
    reduction: Any
    optimizer: int

    def to_json(self) -> dict[str, Any]:
        fields = {"class": type(self.reduction).__name__, **dataclasses.asdict(self.reduction)}
        rows = self.rows and list(self.rows)
        return {"paths": list(self.paths), "rows": rows, "reduction": fields, "optimizer": self.optimizer}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Share":
        fields = dict(content["reduction"])
        made = REDUCTIONS[fields.pop("class")](**fields)
        rows = tuple(content["rows"]) if content["rows"] else None
        return cls(tuple(content["paths"]), rows, made, content["optimizer"])


@keras.saving.register_keras_serializable(package="dist_partial")
class Partial(keras.optimizers.Optimizer):
    """Reduces the gradients of a selection, then updates it: the optimizer that `partial` makes.

    Args:
        inner: the optimizers; the first one's learning rate is this one's.
        shares: what each rule trains.
        inference: paths of the variables of BatchNorm layers in inference mode.
        name: of this optimizer.
        excluded: of each optimizer, what is excluded from weight decay: see `optimizers.exclusions`.

    Examples:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="head")])
        >>> optimizer = Partial([keras.optimizers.SGD(0.5)], [Share(("head/bias",), None, AllReduce(), 0)])
        >>> optimizer.build(model.trainable_variables)
        >>> optimizer.apply([tf.constant([2.0])], [model.layers[0].bias])
        >>> model.layers[0].bias.numpy().tolist(), [variable.name for variable in model.trainable_variables]
        ([-1.0], ['bias'])
    """

    def __init__(
        self,
        inner: Sequence[keras.optimizers.Optimizer],
        shares: Sequence[Share],
        inference: Sequence[str] = (),
        name: str = "partial",
        excluded: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__(learning_rate=0.0, name=name)
        self._inner = list(inner)  # Keras saves their variables, as it finds them in an attribute
        self._shares, self._inference, self._excluded = tuple(shares), tuple(inference), tuple(excluded)
        self._reduces = True

    def build(self, variables: Sequence[Any], by_path: Mapping[str, Any] | None = None) -> None:
        """Makes the slots of the selection, and freezes the rest of `variables`, which a loaded model has trainable.

        Args:
            variables: the model's that may be trained.
            by_path: these and others by the paths that rules read; None, as in `load_model`, goes by Keras's paths.
        """
        if self.built:
            return
        with compat.strategy_of(self).scope():
            self.plan = plan = _plan(self._shares, self._inner, by_path or _by_path(variables, self._shares))
            groups: dict[int, optimizers.GroupOptimizer] = {}
            for group in optimizers.build(plan, lambda: None, slots=False):  # each rule names its own
                same = groups.setdefault(id(group.optimizer), dataclasses.replace(group, members=()))
                same.members += group.members
            variable_at = {entry.path: entry.variable for entry in plan.trained}
            for group, excluded in zip(groups.values(), self._excluded, strict=False):
                if excluded:
                    listed, pattern = [variable_at[path] for path in excluded["paths"]], excluded["pattern"]
                    group.optimizer.exclude_from_weight_decay(listed, pattern and [pattern])
            for group in groups.values():
                group.allocate()
            self._groups, self._states = tuple(groups.values()), make_states(plan)
        self.awake = self.asleep(variables)
        freeze(v for v in variables if v.trainable and all(v is not chosen for chosen in self.selected))
        super().build(self.selected)

    def asleep(self, variables: Sequence[Any]) -> list[Any]:
        """Those of BatchNorm layers that `partial` has put into inference mode."""
        return [v for v in variables if {v.path, v.path.split("/", 1)[-1]} & set(self._inference)]

    def reduce(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Sums the gradients over the replicas; called in a replica context.

        Args:
            grads: this replica's part of each, or None.
            variables: the variables in the same order.

        Returns:
            The sums in the order of `selected`: the same on every replica; of the selected rows alone where rows are.
        """
        if self.awake:
            raise UserError(
                f"the BatchNorm layer of {self.awake[0].path!r} was in inference mode when the model was saved, which "
                "its class has not kept: call dist_partial.fit.resume(model) after load_model"
            )
        trained = self.plan.trained
        found = {
            compat.variable_key(self, variable): gradient for variable, gradient in zip(variables, grads, strict=True)
        }
        known = {compat.variable_key(self, entry.variable) for entry in trained}
        for variable in variables:
            if compat.variable_key(self, variable) not in known:
                raise UserError(
                    f"{variable.path!r} was made trainable after partial(...) had frozen it: call partial and "
                    "model.compile again, with rules that train it"
                )
        gradients = []
        for entry in trained:
            gradient = found.get(compat.variable_key(self, entry.variable))
            if gradient is not None:
                # An embedding's gradient is sparse; dense, what travels has a size that does not depend on the batch.
                gradient = tf.ensure_shape(tf.convert_to_tensor(gradient), entry.shape)
                gradient = gradient if entry.rule.rows is None else gradient[slice(*entry.rule.rows)]
            gradients.append(gradient)
        if all(gradient is None for gradient in gradients):
            raise UserError(f"the loss depends on none of the selected variables ({trained[0].path!r}, ...)")
        return reduce_gradients(Collectives(), self.plan, gradients, self._states)[0]

    @property
    def selected(self) -> list[Any]:
        """The variables that are trained."""
        return [entry.variable for entry in self.plan.trained]

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Reduces and applies the gradients of a step; called in a replica context."""
        if not self.built:
            self.build(list(trainable_variables or ()))
        if self._reduces:
            grads = self.reduce(grads, self.selected if trainable_variables is None else trainable_variables)
        sums = {id(entry): gradient for entry, gradient in zip(self.plan.trained, grads, strict=True)}
        members = [member for group in self._groups for member in group.members]
        context: Any = tf.distribute.get_replica_context()
        rows = [member for member in members if member.entry.rule.rows is not None]
        if rows:  # the model's weights may have been loaded since
            context.merge_call(lambda strategy: _read_rows(strategy, rows))
        optimizers.apply(self._groups, [sums[id(member.entry)] for member in members])
        if rows:
            context.merge_call(lambda strategy: optimizers.write_rows(strategy, rows))
        self.iterations.assign_add(1)

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
        return [*super().variables, *(v for each in self._inner for v in each.variables)]

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        for each in self._inner:
            each.exclude_from_weight_decay(var_list, var_names)

    def save_own_variables(self, store: Any) -> None:
        store["iteration"] = self.iterations.numpy()
        for name, copies in self._residuals().items():
            store[name] = tf.stack(copies).numpy()

    def load_own_variables(self, store: Any) -> None:
        self.iterations.assign(store["iteration"])
        for name, copies in self._residuals().items():
            # With another number of replicas, what they had left out so far is left out for good.
            if name in set(store.keys()) and len(store[name]) == len(copies):
                for copy, value in zip(copies, store[name], strict=True):
                    copy.assign(value)

    def _residuals(self) -> dict[str, Any]:
        kept = self._states if self.built else []
        local = compat.strategy_of(self).experimental_local_results
        return {f"{i}_{name}": local(variable) for i, state in enumerate(kept) for name, variable in state.items()}

    def get_config(self) -> dict[str, Any]:
        shares = [share.to_json() for share in self._shares]
        inner = [keras.optimizers.serialize(each) for each in self._inner]
        excluded = list(self._excluded)
        if self.built:
            excluded = [optimizers.exclusions(group.optimizer, group.members) for group in self._groups]
        content = {"name": self.name, "inner": inner, "shares": shares, "inference": list(self._inference)}
        return content | {"excluded": excluded}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "Partial":
        shares = [Share.from_json(share) for share in config["shares"]]
        inner = [keras.optimizers.deserialize(each, custom_objects) for each in config["inner"]]
        return cls(inner, shares, config["inference"], config["name"], config["excluded"])


@keras.saving.register_keras_serializable(package="dist_partial")
class PartialLossScale(keras.optimizers.LossScaleOptimizer):
    """Scales the loss around `Partial` as Keras does dynamically, which `compile` does not wrap again.

    Keras 3.15 decides about an overflow by the first replica's gradient alone, so that another one's overflow would
    reach the weights; here it sees the sum, which is the same on all of them.

    Examples:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="head")])
        >>> inner = Partial([keras.optimizers.SGD(0.5)], [Share(("head/bias",), None, AllReduce(), 0)])
        >>> optimizer = PartialLossScale(inner, initial_scale=8.0)
        >>> optimizer.build(model.trainable_variables)
        >>> optimizer.apply([tf.constant([2.0])], [model.layers[0].bias])  # of a loss that is 8 times as large
        >>> model.layers[0].bias.numpy().tolist()
        [-0.125]
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

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    @property
    def optimizers(self) -> list[keras.optimizers.Optimizer]:
        return self.inner_optimizer.optimizers


def _by_path(variables: Sequence[Any], shares: Sequence[Share]) -> dict[str, Any]:
    """The variables by the paths that the shares have of them; without the model they are known by Keras's alone."""
    wanted = [path for share in shares for path in share.paths]
    # With the model's name in front or not, as Keras does it for the kind of model.
    by_path = {variable.path: variable for variable in variables}
    if not by_path.keys() >= set(wanted):
        by_path = {path.split("/", 1)[-1]: variable for path, variable in by_path.items()}
    for path in wanted:
        if path not in by_path:
            raise UserError(
                f"the optimizer trains {path!r}, which the model does not have or has frozen, or in which Keras calls "
                "several variables the same: load it with compile=False, then call partial and model.compile again"
            )
    return by_path


def _plan(shares: Sequence[Share], inner: Sequence[Any], by_path: Mapping[str, Any]) -> Plan:
    rules, entries = [], []
    for share in shares:
        optimizer = inner[share.optimizer]
        rules.append(Rule("|".join(map(re.escape, share.paths)), optimizer=lambda o=optimizer: o, rows=share.rows))
        for path in share.paths:
            v = by_path[path]
            entries.append(VariablePlan(path, tuple(v.shape), v.dtype, v, rules[-1], share.reduction))
    return Plan(tuple(rules), tuple(entries))


def _read_rows(strategy: tf.distribute.Strategy, members: Sequence[optimizers.OptimizerVariable]) -> None:
    for member in members:
        strategy.extended.update(
            member.variable.value,
            lambda rows, whole, at=member.entry.rule.rows: rows.assign(whole[slice(*at)]),
            args=(member.entry.variable.value,),
        )
