"""Prints a plan as a table."""

from collections.abc import Sequence
from typing import Any

from dist_partial.selection.payload import average_bytes
from dist_partial.selection.plan import Plan


def plan_table(plan: Plan, hosts: int) -> str:
    """Writes the plan for people: a line a variable, then totals and the share of the whole.

    Args:
        plan: the plan.
        hosts: over how many processes with a network interface between them its replicas are spread.

    Examples:
        >>> import keras
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(2, name="head")])
        >>> table = plan_table(resolve([("train", ".*/kernel"), ("freeze", ".*")], model, AllReduce()), 2)
        >>> print(table.splitlines()[2])
        head/kernel  8x2    yes      train .*/kernel  all-reduce            64
    """
    header = ("path", "shape", "trained", "rule", "reduction", "bytes a step")
    lines = [
        (
            entry.path,
            "x".join(map(str, entry.shape)) or "scalar",
            _trained_word(entry),
            str(entry.rule),
            str(entry.reduction) if entry.trained and entry.sent else "-",
            grouped(entry.wire_bytes),
        )
        for entry in plan.entries
    ]
    for payload in plan.statistics:
        often = f"every {payload.every} steps" if payload.every > 1 else "every step"
        lines.append(("(statistics)", "", "", "", often, grouped(average_bytes([payload]))))
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    table = [_row(header, widths), "  ".join("-" * width for width in widths), *[_row(line, widths) for line in lines]]
    trained = sum(entry.trained_parameters for entry in plan.entries)
    total = sum(entry.parameters for entry in plan.entries)
    return "\n".join(
        [
            *table,
            f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})",
            f"payload: {grouped(plan.wire_bytes)} of {plan.full_wire_bytes:,} bytes a step and replica",
            f"{_interface(plan.workers, hosts)} {grouped(plan.nic_bytes)} of {grouped(plan.full_nic_bytes)} bytes a "
            f"step ({plan.nic_bytes / plan.full_nic_bytes:.2%} of exchanging everything)",
        ]
    )


def _interface(workers: int, hosts: int) -> str:
    """Begins a line of what leaves a machine, or would."""
    if hosts > 1:
        return f"at the network interface of each of {hosts} workers:"
    return f"nothing leaves this machine; at the network interface of each of {workers} workers it would be"


def grouped(average: int | float) -> str:
    """Writes a number with its digits grouped.

    Examples:
        >>> grouped(1234567), grouped(1234.56)
        ('1,234,567', '1,234.6')
    """
    return f"{average:,}" if isinstance(average, int) else f"{average:,.1f}"


def _trained_word(entry: Any) -> str:
    if not entry.trained:
        return "no"
    if not entry.sent:
        return "no gradient"
    return f"rows {entry.rule.rows[0]}:{entry.rule.rows[1]}" if entry.rule.rows else "yes"


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:-1], widths, strict=False)]
    return "  ".join([*left, cells[-1].rjust(widths[-1])])
