"""The state of a run: a value with the step, the bytes sent, and every variable that training changes, by name."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dist_partial import checkpoints
from dist_partial.compat import is_generator
from dist_partial.distributed import traffic
from dist_partial.distributed.per_replica import OfOwner, PerReplica, Topology
from dist_partial.reductions.base import WHEN_FEWER
from dist_partial.reductions.local_only import LocalOnly
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.reductions.reduce_gradients import OF_INSIDE
from dist_partial.selection.paths import own_names
from dist_partial.selection.plan import Plan, VariablePlan
from dist_partial.step.loss_scale import LossScale
from dist_partial.step.optimizers import GroupOptimizer
from dist_partial.step.outer_step import Fragment
from dist_partial.validation import counted


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainState:
    """Holds everything that training changes; a checkpoint holds all of it.

    The numbers are values. The variables are the live ones: slots come and go with a schedule, so that `variables`
    lists those of this moment.

    Attributes:
        topology: the replicas.
        model: the model.
        plan: all that is ever trained.
        optimizers: one a group; those without slots have none in the state.
        reduction_states: what the reductions keep, from `make_states`.
        fragments: what is exchanged every few steps, from `outer_step.build`.
        moving: what layers change, see `layer_state.find`.
        scale: the loss scale, or None.
        step: updates made so far.
        sent: bytes sent so far, int64 [3], as `traffic.SENT`.
        schedule: where the schedule is, from `ScheduleRunner.to_json`; None at the start, and if it is constant.
        evaluated: False if an evaluation was due after this step and has failed.
        judged: what followed from the evaluations so far, from `Judge.to_json`; None at the start.
        checkpoint: the file from which the state was restored, or None.

    Examples:
        >>> import tensorflow as tf
        >>> from dist_partial.reductions import TopK
        >>> from dist_partial.reductions.reduce_gradients import make_states
        >>> from dist_partial.selection import resolve
        >>> from dist_partial.step import optimizers
        >>> model = keras.Sequential([keras.Input([100]), keras.layers.Dense(1, use_bias=False, name="head")])
        >>> plan = resolve([("train", ".*")], model, TopK())
        >>> groups = optimizers.build(plan, lambda: keras.optimizers.SGD(momentum=0.9))
        >>> state = TrainState(Topology(tf.distribute.get_strategy()), model, plan, groups, make_states(plan), [], [])
        >>> [name for name in state.variables if "head" in name]
        ['variables/head/kernel', 'slots/head/kernel/momentum', 'reductions/head/kernel/residual']
        >>> state.after(np.array([[1, 2, 3], [2, 4, 6]])).step
        2
    """

    topology: Topology
    model: keras.Model
    plan: Plan
    optimizers: Sequence[GroupOptimizer]
    reduction_states: Sequence[dict[str, Any]]
    fragments: Sequence[Fragment]
    moving: Sequence[Any]
    scale: LossScale | None = None
    step: int = 0
    sent: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(len(traffic.SENT), np.int64))
    schedule: dict[str, Any] | None = None
    evaluated: bool = True
    judged: dict[str, Any] | None = None
    checkpoint: Path | None = None

    def __repr__(self) -> str:
        return f"TrainState({self.model.name!r}, step {self.step:,}, {counted(len(self.variables), 'variable')})"

    @property
    def stopped(self) -> str:
        """Why the run has stopped early; empty if it has not."""
        return (self.judged or {}).get("stopped", "")

    @property
    def variables(self) -> dict[str, Any]:
        """All variables that training changes, by names that do not depend on their order.

        Selected variables (or their selected rows) and slots by path, what reductions keep, statistics of layers that
        run in training mode, states of random generators, and the loss scale. Of what differs between replicas all
        values are kept; `variables/` of a group that is exchanged every few steps are the anchors, on which they agree.
        """
        found: dict[str, Any] = {}
        for group, planned in zip(self.optimizers, self.plan.groups, strict=True):
            folder = "own" if isinstance(planned.reduction, LocalSGD) else "variables"
            kept = self._kept(planned.reduction, self._of(planned.inside))
            for member in group.members:
                found[f"{folder}/{member.entry.path}"] = kept(member.variable)
            dealt = {member.entry.path: member.entry for member in group.members if member.entry.dealt}
            for name, variable in group.state.items():
                entry = dealt.get(name.rpartition("/")[0])
                found[f"slots/{name}"] = self._of_owner(entry, variable.value) if entry else kept(variable)
        for fragment in self.fragments:
            for anchor in fragment.outer.members:
                found[f"variables/{anchor.entry.path}"] = anchor.variable
            found |= {f"outer/{name}": variable for name, variable in fragment.outer.state.items()}
            for name, variables in (("moving", fragment.moving), ("begun", fragment.begun)):
                for member, variable in zip(fragment.members, variables, strict=False):
                    # What begun is compared with is under the variable's constraint.
                    constraint = member.variable.constraint if name == "begun" else None
                    who = self._of(member.entry.inside)
                    found[f"{name}/{member.entry.path}"] = PerReplica(who, variable, "mean", constraint)
        for entry, own in zip(self.plan.trained, self.reduction_states, strict=True):
            for name, variable in own.items():
                when_fewer = WHEN_FEWER.get(name.removeprefix(OF_INSIDE), "own")
                inside = name.startswith(OF_INSIDE)
                found[f"reductions/{entry.path}/{name}"] = (
                    self._of_owner(entry, variable)
                    if entry.dealt and not inside
                    else PerReplica(self._of(None if inside else entry.inside), variable, when_fewer)
                )
        # Keras numbers generators through the whole process (`seed_generator_7`), so they go by their order here.
        generators = [v for v in self.moving if is_generator(v)]
        found |= {f"generators/{i}": variable for i, variable in enumerate(generators)}
        statistics = [v for v in self.moving if not is_generator(v)]
        averaged = any(group.reduction.shared for group in self.plan.groups)
        for name, variable in zip(own_names(self.model, statistics), statistics, strict=True):
            found[f"statistics/{name}"] = variable if averaged else PerReplica(self.topology, variable.value, "mean")
        if self.scale is not None:
            found |= {"loss_scale/scale": self.scale.scale, "loss_scale/good_steps": self.scale.good_steps}
        return found

    def _of(self, inside: Any) -> Topology:
        """Who has values of their own: the replicas, or the workers, where a reduction inside makes replicas alike."""
        return self.topology if inside is None else self.topology.hosts

    def _of_owner(self, entry: VariablePlan, variable: Any) -> OfOwner:
        """How what belongs to a variable that is dealt out is kept: with the value of its owner."""
        topology, shape = self._of(entry.inside), tuple(variable.shape)
        if shape[:1] == (0,):  # elsewhere slots have no rows
            shape = (entry.trained_shape[0], *shape[1:])
        return OfOwner(topology, variable, self._owners(topology.replicas)[entry.path], shape)

    @functools.cached_property
    def _owners(self) -> Callable[[int], dict[str, int]]:
        return functools.cache(self.plan.owners)

    def _kept(self, reduction: Any, topology: Topology) -> Callable[[Any], Any]:
        """How a variable of a group is kept: as it is, or with the values of all replicas."""
        when_fewer = "own" if isinstance(reduction, LocalOnly) else "mean"
        if reduction.shared:
            return lambda variable: variable
        return lambda variable: PerReplica(topology, variable.value, when_fewer, variable.constraint)

    def after(self, sent: np.ndarray) -> "TrainState":
        """The state after the steps for which `sent` [steps, 3] gives the bytes until then."""
        return dataclasses.replace(self, step=self.step + len(sent), sent=sent[-1], evaluated=True, checkpoint=None)

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint holds besides the variables, as JSON values."""
        found: dict[str, Any] = dict(zip(traffic.SENT, self.sent.tolist(), strict=True))
        found |= {} if self.schedule is None else {"schedule": self.schedule}
        found |= {} if self.judged is None else {"judged": self.judged}
        return found | ({} if self.evaluated else {"evaluated": False})

    def restored(self, checkpoint: checkpoints.Checkpoint) -> "TrainState":
        """Assigns a checkpoint's arrays to the variables; returns the state with its numbers.

        Call it in the cross-replica context, once all groups have slots that have some in the checkpoint.

        Raises:
            UserError: a name or a shape differs; then nothing has been assigned.
        """
        wanted = self.variables
        checkpoint = dataclasses.replace(checkpoint, arrays=_with_chunks(checkpoint.arrays, wanted))
        checkpoints.restore(checkpoint, wanted)
        return dataclasses.replace(
            self,
            step=checkpoint.step,
            sent=np.array([checkpoint.metadata[name] for name in traffic.SENT]),
            schedule=checkpoint.metadata.get("schedule"),
            evaluated=checkpoint.metadata.get("evaluated", True),
            judged=checkpoint.metadata.get("judged"),
            checkpoint=checkpoint.path,
        )


def _with_chunks(arrays: dict[str, np.ndarray], wanted: dict[str, Any]) -> dict[str, np.ndarray]:
    """A checkpoint's arrays for another number of replicas, which may keep residuals of sums where it does not.

    What was left out of a sum is then left out by the first replica, so that nothing is lost.
    """
    found = dict(arrays)
    for name in [name for name in {*arrays, *wanted} if name.startswith("reductions/")]:
        path, _, kept = name.rpartition("/")
        residual = f"{path}/residual"
        if kept != "sum_residual" or residual not in arrays:
            continue
        if name not in wanted:
            whole = found[residual].copy()
            whole[0] += found.pop(name).ravel()[: whole[0].size].reshape(whole[0].shape)
            found[residual] = whole
        elif name not in arrays:
            found[name] = np.zeros(wanted[name].shape, wanted[name].dtype)
    return found
