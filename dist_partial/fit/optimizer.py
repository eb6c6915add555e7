"""The optimizer that `fit.partial` makes: what Keras's `fit` and `save` see of a plan."""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.distributed.replicas import collectives_of
from dist_partial.errors import UserError
from dist_partial.fit import groups, saved_plan
from dist_partial.fit.saved_plan import Options
from dist_partial.reductions.reduce_gradients import make_states, reduce_gradients
from dist_partial.selection.plan import Plan
from dist_partial.selection.table import grouped
from dist_partial.step import optimizers
from dist_partial.step.gradients import unit_squares
from dist_partial.step.keras_configs import exclusions
from dist_partial.terminal import say

FROZEN = "_frozen_by_partial"  # a mark on the variables and layers that `partial` has frozen
NOT_FOLLOWED = (
    "partial was given a schedule, which a callback of fit follows: "
    "model.fit(..., callbacks=[dist_partial.fit.SelectionScheduler(schedule)])"
)


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


@keras.saving.register_keras_serializable(package="dist_partial")
class Partial(keras.optimizers.Optimizer):
    """Reduces the gradients of a selection, then updates it: the optimizer that `partial` makes.

    Args:
        inner: the optimizers; the learning rate of those that `options.alike` numbers is this one's.
        plan: from `saved_plan`: with the variables, or without those that `build` finds.
        options: how it trains.
        name: of this optimizer.
        excluded: of each optimizer, what is excluded from weight decay: see `keras_configs.exclusions`.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="head")])
        >>> plan = resolve([("train", ".*/bias"), ("freeze", ".*")], model, AllReduce())
        >>> sgd = keras.optimizers.SGD(0.5)
        >>> optimizer = Partial([sgd], saved_plan.with_optimizers(plan, [sgd]))
        >>> optimizer.build(model.trainable_variables)
        >>> optimizer.apply([tf.constant([2.0])], [model.layers[0].bias])
        >>> model.layers[0].bias.numpy().tolist(), [variable.name for variable in model.trainable_variables]
        ([-1.0], ['bias'])
    """

    def __init__(
        self,
        inner: Sequence[keras.optimizers.Optimizer],
        plan: Plan,
        options: Options = Options(),  # noqa: B008 (frozen)
        name: str = "partial",
        excluded: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__(learning_rate=0.0, name=name)
        self._inner = list(inner)  # Keras saves their variables, as it finds them in an attribute
        names = [each.name for each in inner]
        for number, each in enumerate(inner):  # by which Keras's callbacks log their learning rates
            if each.name in names[:number]:
                each.name = f"{each.name}_{number}"
        self.plan, self.options, self._excluded = plan, options, tuple(excluded)
        self.reduces = True  # or else it is handed sums
        self.followed = False  # whether a callback runs the step with the units of its schedule
        self.schedule_state: str | None = None  # as JSON
        self.alone = True  # whether no callback of `on_workers` has begun a training
        self._said = False

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the slots of the selection, and freezes the rest of `variables`, which a loaded model has trainable."""
        if self.built:
            return
        with compat.strategy_of(self).scope():
            if any(entry.variable is None for entry in self.plan.trained):
                self.plan = saved_plan.bound(self.plan, variables)
            collectives = collectives_of(tf.distribute.get_strategy())
            self.plan = self.plan.among(collectives)  # not those of whoever has saved it
            self._groups = groups.build(self.plan, self._excluded)
            self._states = make_states(self.plan)
            if self.options.norms:
                self.squares = self._counter([len(self.plan.units)], "float64", "squares")
            if self.options.accumulate > 1:
                self._done = self._counter([], "int64", "accumulated_steps")
                self._sums = [groups.sum_of(entry) for entry in self.plan.trained]
        self.awake = self.asleep(variables)
        freeze(v for v in variables if v.trainable and all(v is not chosen for chosen in self.selected))
        super().build(self.selected)

    def _counter(self, shape: list[int], dtype: str, name: str) -> Any:
        return self.add_variable(shape, dtype=dtype, aggregation="only_first_replica", name=name)

    def asleep(self, variables: Sequence[Any]) -> list[Any]:
        """Those of BatchNorm layers that `partial` has put into inference mode."""
        return [v for v in variables if {v.path, v.path.split("/", 1)[-1]} & set(self.options.inference)]

    @property
    def _among_workers(self) -> bool:
        return collectives_of(compat.strategy_of(self)).backend.two_levels

    @property
    def selected(self) -> list[Any]:
        """The variables that are trained."""
        return [entry.variable for entry in self.plan.trained]

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Reduces and applies the gradients of a step; called in a replica context."""
        if not self.built:
            self.build(list(trainable_variables or ()))
        if self.reduces:
            self.reduce(grads, trainable_variables, self._update)
        else:
            self._update(grads)

    def reduce(
        self, grads: Sequence[Any], variables: Sequence[Any] | None, update: Callable[[list[Any]], None]
    ) -> None:
        """Sums the gradients of a step over the replicas, and has them applied; called in a replica context.

        Where several steps make one update, each replica adds up its own until then.

        Args:
            grads: this replica's part of each, or None.
            variables: the variables in the same order; None is `selected`.
            update: takes the sums in the order of `selected`: the same on every replica; of the selected rows alone
                where rows are.
        """
        gradients = self._in_order(grads, self.selected if variables is None else variables)
        if self.options.accumulate == 1:
            update(self._summed(gradients))
            return
        for gradient, own in zip(gradients, self._sums, strict=True):
            if gradient is not None:
                own.assign_add(gradient / self.options.accumulate)
        self._done.assign_add(1)

        def update_replica() -> None:
            pairs = list(zip(gradients, self._sums, strict=True))
            totals = [None if gradient is None else tf.identity(own) for gradient, own in pairs]
            update(self._summed(totals))
            for gradient, own in pairs:
                if gradient is not None:
                    own.assign(tf.zeros_like(own))

        def when_due(strategy: Any) -> None:
            # Within a branch replicas cannot leave their context, so the branch is outside of it.
            due = tf.equal(tf.convert_to_tensor(self._done.value) % self.options.accumulate, 0)
            tf.cond(due, lambda: strategy.extended.call_for_each_replica(update_replica), lambda: None)

        context: Any = tf.distribute.get_replica_context()
        context.merge_call(when_due)

    def _in_order(self, grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """The gradients in the order of `selected`; what has none, or is switched off by a schedule, has None."""
        if self.awake:
            raise UserError(
                f"the BatchNorm layer of {self.awake[0].path!r} was in inference mode when the model was saved, which "
                "its class has not kept: call dist_partial.fit.resume(model) after load_model"
            )
        trained = self.plan.trained
        if any(entry.unit for entry in trained) and not self.followed:
            raise UserError(NOT_FOLLOWED)
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
            raise UserError(f"the loss depends on none of the selected variables ({variables[0].path!r}, ...)")
        return gradients

    def _summed(self, gradients: list[Any]) -> list[Any]:
        strategy = tf.distribute.get_strategy()
        collectives = collectives_of(strategy)
        if collectives.backend.two_levels:  # Keras has divided by the replicas of this worker alone
            workers = collectives.backend.topology(strategy).workers
            if self.alone and not self._said and getattr(collectives.backend, "rank", 0) == 0:
                self._said = True
                say(
                    "no callback of dist_partial.fit.on_workers(callbacks, workers) has begun this training: with fit, "
                    "each worker then writes files, stops and shows metrics by itself"
                )
            gradients = [gradient if gradient is None else gradient / workers for gradient in gradients]
        return reduce_gradients(collectives, self.plan, gradients, self._states)[0]

    def _update(self, grads: Sequence[Any]) -> None:
        """Applies gradients that are reduced already, in the order of `selected`; called in a replica context."""
        sums = {id(entry): gradient for entry, gradient in zip(self.plan.trained, grads, strict=True)}
        if self.options.norms:
            self.squares.assign_add(tf.cast(unit_squares(self.plan, grads), tf.float64))
        members = [member for group in self._groups for member in group.members]
        context: Any = tf.distribute.get_replica_context()
        rows = [
            member for member in members if member.entry.rule.rows is not None and sums[id(member.entry)] is not None
        ]
        if rows:  # the model's weights may have been loaded since
            context.merge_call(lambda strategy: groups.read_rows(strategy, rows))
        optimizers.apply(self._groups, [sums[id(member.entry)] for member in members])
        if rows:
            context.merge_call(lambda strategy: optimizers.write_rows(strategy, rows))
        self.iterations.assign_add(1)

    def reset(self, units: Collection[str]) -> None:
        """Gives the slots of some units the values of a new optimizer; called in the cross-replica context."""
        with compat.strategy_of(self).scope():
            for group in self._groups:
                if group.members[0].entry.unit in units:
                    group.reset()

    @property
    def optimizers(self) -> list[keras.optimizers.Optimizer]:
        """Where there are several, all of them: Keras's callbacks set the learning rate of each."""
        if len(self._inner) == 1:
            raise AttributeError("there is one optimizer, whose learning rate is `learning_rate`")
        return self._inner

    @property
    def learning_rate(self) -> Any:
        return self._inner[self.options.alike[0]].learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        for number in self.options.alike:
            self._inner[number].learning_rate = value

    @property
    def variables(self) -> list[Any]:
        return [*super().variables, *(v for each in self._inner for v in each.variables)]

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        for each in self._inner:
            each.exclude_from_weight_decay(var_list, var_names)

    def save_own_variables(self, store: Any) -> None:
        store["iteration"] = self.iterations.numpy()
        for name, variable in self._counters().items():
            store[name] = variable.numpy()
        if self.schedule_state is not None:
            store["schedule"] = np.frombuffer(self.schedule_state.encode(), np.uint8)
        if not self._among_workers:  # of which one alone saves
            for name, copies in self._kept().items():
                store[name] = tf.stack(copies).numpy()

    def load_own_variables(self, store: Any) -> None:
        self.iterations.assign(store["iteration"])
        found = set(store.keys())
        for name, variable in self._counters().items():
            variable.assign(store[name])
        self.schedule_state = np.asarray(store["schedule"]).tobytes().decode() if "schedule" in found else None
        for name, copies in self._kept().items():
            # With another number of replicas, what they had left out, or added up, so far is left out for good.
            alike = name in found and store[name].shape == (len(copies), *copies[0].shape)
            if alike and not self._among_workers:
                for copy, value in zip(copies, store[name], strict=True):
                    copy.assign(value)
            elif name.endswith("_accumulated"):
                self.begin_sums()

    def begin_sums(self) -> None:
        """Leaves out what each replica has added up so far; called in the cross-replica context."""
        if self.built and self.options.accumulate > 1:
            self._done.assign(0)
            for own in self._sums:
                for copy in compat.strategy_of(self).experimental_local_results(own):
                    copy.assign(tf.zeros_like(copy))

    def _counters(self) -> dict[str, Any]:
        names = [("squares", self.options.norms), ("_done", self.options.accumulate > 1)]
        return {name: getattr(self, name) for name, kept in names if kept and self.built}

    def _kept(self) -> dict[str, Any]:
        """What each replica has of its own."""
        if not self.built:
            return {}
        kept = {f"{i}_{name}": value for i, state in enumerate(self._states) for name, value in state.items()}
        if self.options.accumulate > 1:
            kept |= {f"{i}_accumulated": value for i, value in enumerate(self._sums)}
        local = compat.strategy_of(self).experimental_local_results
        return {name: local(variable) for name, variable in kept.items()}

    def __repr__(self) -> str:
        trained = sum(entry.trained_parameters for entry in self.plan.entries)
        names = ", ".join(type(each).__name__ for each in self._inner)
        return f"<{type(self).__name__} of {names}: trains {grouped(trained)} parameters; its plan says which>"

    def get_config(self) -> dict[str, Any]:
        excluded = list(self._excluded)
        if self.built:
            excluded = [exclusions(group.optimizer, group.members) for group in self._groups]
        return {
            "name": self.name,
            "inner": [keras.optimizers.serialize(each) for each in self._inner],
            "plan": saved_plan.to_json(self.plan, self._inner),
            "options": json.dumps(dataclasses.asdict(self.options)),
            "excluded": excluded,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "Partial":
        inner = [keras.optimizers.deserialize(each, custom_objects) for each in config["inner"]]
        plan, options = saved_plan.from_json(config["plan"], inner), Options(**json.loads(config["options"]))
        return cls(inner, plan, options, config["name"], config["excluded"])
