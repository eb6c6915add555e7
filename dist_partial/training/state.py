"""The variables that training changes, by names that do not depend on their order."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from dist_partial.compat import is_generator
from dist_partial.distributed.per_replica import PerReplica
from dist_partial.reductions.local_only import LocalOnly
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.selection.paths import own_names
from dist_partial.selection.plan import Plan
from dist_partial.step.loss_scale import LossScale
from dist_partial.step.optimizers import GroupOptimizer
from dist_partial.step.outer_step import Fragment


def resumable_state(
    strategy: tf.distribute.Strategy,
    model: keras.Model,
    plan: Plan,
    optimizers: Sequence[GroupOptimizer],
    states: Sequence[dict[str, Any]],
    fragments: Sequence[Fragment],
    moving: Sequence[Any],
    scale: LossScale | None = None,
) -> dict[str, Any]:
    """All variables that training changes, by a name that does not depend on their order.

    Selected variables (or their selected rows) and slots by path, what reductions keep, statistics of layers that
    run in training mode, states of random generators, and the loss scale. Of what differs between replicas all
    values are kept; `variables/` of a group that is exchanged every few steps are the anchors, on which they agree.

    Args:
        strategy: the replicas.
        model: the model.
        plan: all that is ever trained.
        optimizers: one a group; those without slots have none in the state.
        states: from `reduction.states`.
        fragments: from `local_sgd.build`.
        moving: what layers change, see `layer_state.find`.
        scale: the loss scale, or None.
    """
    state: dict[str, Any] = {}
    for group, planned in zip(optimizers, plan.groups, strict=True):
        when_fewer = "own" if isinstance(planned.reduction, LocalOnly) else "mean"
        shared = planned.reduction.shared

        def kept(variable: Any, shared: bool = shared, when_fewer: str = when_fewer) -> Any:
            return variable if shared else PerReplica(strategy, variable.value, when_fewer, variable.constraint)

        folder = "own" if isinstance(planned.reduction, LocalSGD) else "variables"
        for member in group.members:
            state[f"{folder}/{member.entry.path}"] = kept(member.variable)
        state |= {f"slots/{name}": kept(variable) for name, variable in group.state.items()}
    for fragment in fragments:
        for anchor in fragment.outer.members:
            state[f"variables/{anchor.entry.path}"] = anchor.variable
        state |= {f"outer/{name}": variable for name, variable in fragment.outer.state.items()}
    for entry, own in zip(plan.trained, states, strict=True):
        for name, variable in own.items():
            when_fewer = "sum" if name == "residual" else "own"
            state[f"reductions/{entry.path}/{name}"] = PerReplica(strategy, variable, when_fewer)
    # Keras numbers generators through the whole process (`seed_generator_7`), so they go by their order here.
    generators = [v for v in moving if is_generator(v)]
    state |= {f"generators/{i}": variable for i, variable in enumerate(generators)}
    statistics = [v for v in moving if not is_generator(v)]
    names = own_names(model, statistics)
    averaged = any(group.reduction.shared for group in plan.groups)
    for name, variable in zip(names, statistics, strict=True):
        state[f"statistics/{name}"] = variable if averaged else PerReplica(strategy, variable.value, "mean")
    if scale is not None:
        state |= {"loss_scale/scale": scale.scale, "loss_scale/good_steps": scale.good_steps}
    return state
