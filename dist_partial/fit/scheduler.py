"""The callback with which `model.fit` follows a schedule: what is trained when."""

import collections
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import keras
import numpy as np

from dist_partial.config.words import spoken
from dist_partial.errors import UserError
from dist_partial.fit.loss_scale import of
from dist_partial.fit.optimizer import NOT_FOLLOWED, Partial
from dist_partial.schedules.base import Schedule, Unit, observes
from dist_partial.selection.payload import average_bytes
from dist_partial.selection.plan import Plan
from dist_partial.step import batch_norm
from dist_partial.synonyms import known_arguments
from dist_partial.terminal import say
from dist_partial.validation import AtLeast, OneOf, check_arguments


class SelectionScheduler(keras.callbacks.Callback):
    """Switches what `model.fit` trains, of what the rules train, as a schedule says.

    What is off has no gradient: each selection is compiled by itself, when it first comes. Where the schedule is, is
    saved with the model. Between steps and in what is saved everything that the rules train is trainable.

    Args:
        schedule: the one that `partial` was given. Its steps are updates, as `optimizer.iterations` counts them.
        seed: from which it draws, as `run.seed`.
        leave: what becomes of the slots of a unit that is switched off: 'keep' or 'reset'.
        compiled_plans: how many selections stay compiled.
        verbose: 1 prints a line at each switch.

    Examples:
        >>> from dist_partial import partial
        >>> from dist_partial.schedules import Phases
        >>> layers = [keras.layers.Dense(3, name="body"), keras.layers.Dense(1, name="head")]
        >>> model, schedule = keras.Sequential([keras.Input([4]), *layers]), Phases([(0, "head/.*"), (2, ".*")])
        >>> model.compile(partial("adam", [("train", ".*")], model, schedule=schedule), loss="mse")
        >>> scheduler = SelectionScheduler(schedule, verbose=1)
        >>> _ = model.fit(np.ones([8, 4]), np.ones([8, 1]), batch_size=2, verbose=0, callbacks=[scheduler])
        step 1: training head: 4 parameters
        step 3: training body, head: 19 parameters
    """

    @known_arguments
    def __init__(
        self,
        schedule: Schedule,
        seed: int = 0,
        leave: Annotated[str, OneOf("keep", "reset")] = "keep",
        compiled_plans: Annotated[int, AtLeast(1)] = 8,
        verbose: int = 0,
    ) -> None:
        if leave == "drop":
            raise UserError(
                "SelectionScheduler: leave is 'drop', and the slots of all that the rules train stay in an optimizer "
                "that Keras saves: write 'keep' or 'reset', or train with dist_partial.train"
            )
        check_arguments(SelectionScheduler.__init__, {"leave": leave, "compiled_plans": compiled_plans})
        super().__init__()
        self._schedule, self._seed, self._leave, self._verbose = schedule, seed, leave, verbose
        self._most, self._compiled = compiled_plans, collections.OrderedDict[frozenset[str], Callable[..., Any]]()
        self._usual: Any = None  # the train function of a fit without this callback
        self._entered = False  # whether the next step is one of those that the schedule has seen
        self._due: float = 0
        self._running = 0  # replicas that are in a step

    @spoken()
    def on_train_begin(self, logs: Any = None) -> None:
        """Checks that the schedule is the one for which the optimizer is made."""
        optimizer = of(self.model)
        if optimizer is None:
            raise UserError(f"model {self.model.name!r} is not compiled with an optimizer from partial(...)")
        self._optimizer: Partial = optimizer
        self._units = units_of(self._schedule, optimizer.plan)
        wanted = {path: unit.name for unit in self._units for path in unit.paths}
        if any(wanted[entry.path] != entry.unit for entry in optimizer.plan.trained):
            raise UserError(
                "SelectionScheduler was given another schedule than the optimizer is made for, each unit of which has "
                "slots of its own: give partial(..., schedule=...) the same"
            )
        if self.model.steps_per_execution != 1:
            raise UserError(
                f"SelectionScheduler switches between steps, of which steps_per_execution = "
                f"{self.model.steps_per_execution} makes several in one call: compile with steps_per_execution=1"
            )
        found = self.model.train_function
        if found is not self._usual and found not in self._compiled.values():
            self._compiled.clear()  # compiled for another model, or again
            self._usual = found
        self._due, self._batch_norms = 0, batch_norm.layers(self.model)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Switches, if it is time to, before the step that follows."""
        done = int(keras.ops.convert_to_numpy(self._optimizer.iterations))
        if done >= self._due:
            self._enter(done)
        self._entered = True

    def on_train_end(self, logs: Any = None) -> None:
        """Leaves the model as a fit without this callback finds it, and refuses it."""
        self.model.train_function = self._usual

    def _enter(self, done: int) -> None:
        """Makes the model's train function that of the selection after so many updates."""
        schedule, optimizer = self._schedule, self._optimizer
        kept = json.loads(optimizer.schedule_state) if optimizer.schedule_state else {}
        state, active = kept.get("state", schedule.initial(self._units)), kept.get("active")
        if observes(schedule, done) and kept.get("at") != done:
            state = schedule.observe(done, self._units, self._norms(), state)
        units = schedule.select(done, self._units, self._seed, state)
        if active is not None and self._leave == "reset":
            optimizer.reset(set(active) - units)
        optimizer.schedule_state = json.dumps({"at": done, "active": sorted(units), "state": state})
        next_switch = schedule.next_switch(done)
        self._due = math.inf if next_switch is None else next_switch
        self.model.train_function = self._function(units)
        if self._verbose and (active is None or set(active) != units):
            plan = optimizer.plan.only(units)
            layers = ", ".join(dict.fromkeys(entry.path.split("/")[0] for entry in plan.entries if entry.trained))
            parameters = sum(entry.trained_parameters for entry in plan.entries)
            say(f"step {done + 1}: training {layers}: {parameters:,} parameters")

    def _norms(self) -> np.ndarray:
        """The sums of the units' squared gradient norms since the last switch."""
        squares = self._optimizer.squares
        by_name = dict(zip(self._optimizer.plan.units, keras.ops.convert_to_numpy(squares), strict=True))
        squares.assign(np.zeros_like(squares))
        return np.array([by_name[unit.name] for unit in self._units])

    def _function(self, units: frozenset[str]) -> Callable[..., Any]:
        """Makes the function that trains some units, whose first call traces it, or takes the one made before."""
        if units not in self._compiled:
            self._compiled[units] = self._made(units)
        self._compiled.move_to_end(units)
        while len(self._compiled) > self._most:
            self._compiled.popitem(last=False)
        return self._compiled[units]

    def _made(self, units: frozenset[str]) -> Callable[..., Any]:
        step = self.model.train_step

        def one_step(data: Any) -> Any:
            with self._only(units):
                return step(data)

        self.model.train_step = one_step  # of which Keras makes the function
        try:
            self.model.make_train_function(force=True)
        finally:
            del self.model.train_step
        function = self.model.train_function

        def train(iterator: Any) -> Any:
            if not self._entered:  # in a fit without this callback, after one that was broken off
                raise UserError(NOT_FOLLOWED)
            self._entered = False
            return function(iterator)

        return train

    @contextlib.contextmanager
    def _only(self, units: frozenset[str]) -> Iterator[None]:
        """Switches all but some units off while Python runs a step: when it is traced, or eagerly."""
        # Replicas run theirs in turn: all have begun before the first comes to its end.
        if not self._running:
            self._switch(units, step=True)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._switch(frozenset(unit.name for unit in self._units), step=False)

    def _switch(self, units: frozenset[str], step: bool) -> None:
        plan = self._optimizer.plan
        batch_norm.set_modes(self._batch_norms, plan.only(units), everywhere=not step)
        for entry in plan.trained:
            entry.variable.trainable = entry.unit in units
        self._optimizer.followed = step


def units_of(schedule: Schedule, plan: Plan) -> list[Unit]:
    """Divides what a plan trains into the units of a schedule.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.schedules import Rotation
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1, name="head")])
        >>> plan = resolve([("train", ".*")], model, AllReduce())
        >>> [(unit.name, unit.parameters) for unit in units_of(Rotation(), plan)]
        [('head', 5)]
    """
    trained = {entry.path: entry for entry in plan.entries if entry.trained}
    units = []
    for name, paths in schedule.partition(list(trained)):
        entries = [trained[path] for path in paths]
        sent = average_bytes([payload for entry in entries for payload in plan.handed_over(entry)], plan.workers)
        units.append(Unit(name, tuple(paths), math.ceil(sent), sum(entry.trained_parameters for entry in entries)))
    return units
