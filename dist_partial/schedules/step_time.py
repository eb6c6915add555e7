"""How long a step of a selection takes, learnt from the selections that a run has tried.

Of n units in order from input to output a step takes a base, then something for each unit from the lowest trained one
up, down to which gradients travel, and something for each trained one. Weights are [base, way of each, training of
each], 2 n + 1 of them, in seconds.
"""

from collections.abc import Collection, Sequence

STEP_SIZE = 0.5  # of an update: 1 would believe the last measurement alone


def predicted(weights: Sequence[float], on: Collection[int]) -> float:
    """Predicts the seconds of a step in which the units with these numbers are trained.

    Examples:
        >>> predicted([3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], {2}), predicted([3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], {0, 2})
        (5.0, 8.0)
    """
    return sum(weights[k] for k in _counted(len(weights) // 2, on))


def first(count: int, on: Collection[int], seconds: float) -> list[float]:
    """Makes weights of `count` units from one measurement, as if all units computed alike.

    A unit then takes one part in the forward pass, one on the way of the gradients and one for its own.

    Examples:
        >>> weights = first(3, {2}, seconds=5.0)
        >>> weights, predicted(weights, {2})
        ([3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 5.0)
    """
    part = seconds / (count + len(_counted(count, on)) - 1)
    return [count * part, *[part] * (2 * count)]


def learnt(weights: Sequence[float], on: Collection[int], seconds: float) -> list[float]:
    """Takes in a measurement, by normalised least mean squares; no weight becomes negative.

    Examples:
        >>> weights = first(3, {2}, seconds=5.0)
        >>> round(predicted(learnt(weights, {2}, seconds=6.0), {2}), 6)  # half of the error is gone
        5.5
    """
    counted = _counted(len(weights) // 2, on)
    step = STEP_SIZE * (seconds - predicted(weights, on)) / len(counted)
    return [max(0.0, weight + step) if k in counted else weight for k, weight in enumerate(weights)]


def _counted(count: int, on: Collection[int]) -> list[int]:
    """The numbers of the weights that a step with these units has."""
    return [0, *range(1 + min(on, default=count), 1 + count), *(1 + count + i for i in sorted(on))]
