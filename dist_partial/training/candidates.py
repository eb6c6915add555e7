"""Finds the cheapest reduction among those whose held-out loss was measured."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from dist_partial.config.settings import Settings
from dist_partial.errors import UserError
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.local_sgd import LocalSGD
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.reductions.quantized import Quantized
from dist_partial.reductions.top_k import TopK
from dist_partial.selection.rules import Rule
from dist_partial.training.cost_model import Cost, Machine, cost_of, measure


class Candidate(NamedTuple):
    """Holds a reduction, and how much higher than in float32 the held-out loss was, as a part of it."""

    reduction: Any
    loss: float


# tests/benchmarks/results/quality.json: a byte transformer with 41,120 parameters on two replicas, each run with the
# same number of examples. Another model loses less or more.
MEASURED = {
    "full": Candidate(AllReduce("float32"), 0.0),
    "bfloat16": Candidate(AllReduce("bfloat16"), 0.0002),
    "4 bits": Candidate(Quantized(4), 0.0),
    "every 2 steps, top 6 % in 1 bit, residual kept local": Candidate(
        LocalSGD(2, compressor=TopK(1 / 16, 256, 1), keep_residual_local=True), 0.0168
    ),
    "every 6 steps, 1.6 bits": Candidate(LocalSGD(6, compressor=Quantized(1.6)), 0.0172),
    "every 10 steps, 4 bits": Candidate(LocalSGD(10, compressor=Quantized(4)), 0.0222),
    "PowerSGD rank 4": Candidate(PowerSGD(4), 0.0516),
    "top 6 %, 8 bits": Candidate(TopK(1 / 16, 256, 8), 0.0985),
}


def cheapest(
    settings: Settings, machine: Machine, max_loss: float, price: Callable[[Cost], float], seed: int = 0
) -> tuple[str, Cost]:
    """Finds the reduction with which the run costs least, or without prices ends first.

    Args:
        settings: of the run; what its rules train is kept, and how that travels is replaced.
        machine: what it will run on.
        max_loss: how much higher than in float32 the held-out loss may have been where it was measured; a part of it.
        price: of a run.
        seed: of the simulation.

    Returns:
        The name of the reduction, and what the plan costs with it.

    Examples:
        >>> from dist_partial.data import stdlib_shapes
        >>> from dist_partial.models import two_dense
        >>> settings = Settings([("train", ".*")], lambda: two_dense(hidden=8), stdlib_shapes)
        >>> name, cost = cheapest(settings, Machine(workers=2, bandwidth=1e5), 0.0, lambda cost: 0.0)
        >>> name, str(cost.plan.trained[0].reduction)
        ('4 bits', '4 bits a value')
    """
    in_float32 = measure(_with(settings, AllReduce("float32")), machine)

    def at_least(candidate: Candidate) -> tuple[float, float]:
        """What a run would cost that encodes in no time."""
        lookups = hasattr(candidate.reduction, "lookup_payloads")
        entries = tuple(
            dataclasses.replace(e, reduction=candidate.reduction, ids=e.ids if lookups else None)
            for e in in_float32.plan.entries
        )
        plan = dataclasses.replace(in_float32.plan, entries=entries)
        exchanges = [0.0 for group in plan.groups if not group.reduction.shared]
        quick = dataclasses.replace(in_float32, plan=plan, exchanges=exchanges)
        return rank(cost_of(quick, settings, machine, seed))

    def rank(cost: Cost) -> tuple[float, float]:
        return price(cost), cost.run.seconds

    bounds = {name: at_least(each) for name, each in MEASURED.items() if each.loss <= max_loss}
    found: dict[str, Cost] = {}
    for name in sorted(bounds, key=lambda name: bounds[name]):
        if any(rank(cost) <= bounds[name] for cost in found.values()):
            break  # neither this one nor those after it can cost less
        with contextlib.suppress(UserError):  # a model in float16, for one, takes no residuals
            measured = in_float32 if name == "full" else measure(_with(settings, MEASURED[name].reduction), machine)
            found[name] = cost_of(measured, settings, machine, seed)
    if not found:
        raise UserError("no reduction of which the loss was measured suits this run")
    return min(found.items(), key=lambda item: rank(item[1]))


def _with(settings: Settings, reduction: Any) -> Settings:
    rules = [
        dataclasses.replace(rule, reduction=None, between_hosts=None) if isinstance(rule, Rule) else rule
        for rule in settings.rules
    ]
    level = "between_hosts" if settings.between_hosts is not None else "reduction"
    return dataclasses.replace(settings, rules=rules, **{level: reduction})
