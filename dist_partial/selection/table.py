"""Prints a plan: a line a variable, or of a large model a line for several; and which layers it trains."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

from dist_partial.selection.payload import average_bytes
from dist_partial.selection.plan import Plan, VariablePlan

_SMALL = 20  # variables of a model that is shown whole
_ENOUGH, _MOST = 8, 32  # rows of a summary
_WIDTH = 100  # columns of a summary
_NAMES = 60  # letters of the names of layers in a line


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
            *_treatment(plan, entry),
            grouped(plan.bytes_of(entry, at_interface=True)),
        )
        for entry in plan.entries
    ]
    lines += [("(statistics)", "", "", "", often, size) for often, size in _statistics(plan)]
    return "\n".join([*columns(header, lines), *_totals(plan, hosts)])


def plan_summary(plan: Plan, hosts: int) -> str:
    """Writes the plan for a terminal: of a large model a line for all variables that begin alike and go the same way.

    These are those of a layer, or of a block of layers, so that there are few lines, none of more than 100 columns.

    Args:
        plan: the plan.
        hosts: as for `plan_table`.

    Examples:
        >>> import keras
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> layers = [keras.layers.Dense(8, name=f"block_{i // 10}_dense_{i % 10}") for i in range(40)]
        >>> plan = resolve([("train", ".*")], keras.Sequential([keras.Input([8]), *layers]), AllReduce())
        >>> print("\\n".join(plan_summary(plan, 2).splitlines()[:3]))
        path             variables  parameters  trained  rule  bytes a step
        ---------------  ---------  ----------  -------  ----  ------------
        block_0_dense_*         20         720  yes         1         2,880
    """
    if len(plan.entries) <= _SMALL:
        return plan_table(plan, hosts)
    numbers = {rule.match: number for number, rule in enumerate(plan.rules, 1)}  # no two match the same
    header = ("path", "variables", "parameters", "trained", "rule", "bytes a step")
    lines = [
        (
            _common(group),
            f"{len(group):,}",
            f"{sum(entry.parameters for entry in group):,}",
            _trained_word(group[0]),
            str(numbers[group[0].rule.match]),
            grouped(sum(plan.bytes_of(entry, at_interface=True) for entry in group)),
        )
        for group in _groups(plan)
    ]
    lines += [("(statistics)", "", "", often, "", size) for often, size in _statistics(plan)]
    most = _WIDTH - len(columns(header, [("", *line[1:]) for line in lines])[1]) + len(header[0])
    lines = [(_cut(line[0], most), *line[1:]) for line in lines]
    travel = {entry.rule.match: f": {entry.travels(plan.peers(entry))}" for entry in plan.trained}
    ends = [travel.get(rule.match, "") for rule in plan.rules]
    rules = [f"rule {number}: {rule}" for number, rule in enumerate(plan.rules, 1)]
    rules = [f"{_cut(rule, _WIDTH - len(end))}{end}" for rule, end in zip(rules, ends, strict=True)]
    note = f"{len(plan.entries):,} variables, one a line in plan.txt of the run folder"
    return "\n".join([*columns(header, lines, right=(1, 2, 4)), *rules, note, *_totals(plan, hosts)])


def trained_layers(plan: Plan) -> str:
    """Names the layers of which a plan trains something: the first few, and how many more there are.

    A layer is the first component of the paths in which they differ.

    Examples:
        >>> import keras
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> layers = [keras.layers.Dense(8, name=f"dense_{i}") for i in range(9)]
        >>> model = keras.Sequential([keras.Input([8]), *layers])
        >>> trained_layers(resolve([("train", "dense_[4-8]/.*|dense_1/bias"), ("freeze", ".*")], model, AllReduce()))
        'dense_1 (in part), dense_4, dense_5, dense_6, dense_7 and 1 more of 9 layers'
    """
    layers: dict[str, list[bool]] = {}
    shared = _shared([entry.path.split("/") for entry in plan.entries])
    for entry in plan.entries:
        layers.setdefault(entry.path.split("/")[shared], []).append(entry.trained)
    names = [name if all(trained) else f"{name} (in part)" for name, trained in layers.items() if any(trained)]
    if len(", ".join(names)) <= _NAMES:
        return ", ".join(names)
    if all(all(trained) for trained in layers.values()):
        return f"all {len(names)} layers"
    few = max(1, sum(end <= _NAMES for end in itertools.accumulate(len(name) + 2 for name in names)))
    return f"{', '.join(names[:few])} and {len(names) - few} more of {len(layers)} layers"


def _groups(plan: Plan) -> list[list[VariablePlan]]:
    """Entries that begin alike and are treated alike, in as many groups as a summary is to have rows."""
    # Models without layers inside layers number their blocks in the names of the layers: conv2_block1_1_conv.
    words = [[*re.findall("_?[^_]+", top), *rest] for top, *rest in (entry.path.split("/") for entry in plan.entries)]
    groups: dict[Any, list[VariablePlan]] = {}
    for depth in range(_shared(words), max(map(len, words)) + 1):
        finer: dict[Any, list[VariablePlan]] = {}
        for entry, each in zip(plan.entries, words, strict=True):
            finer.setdefault((*each[:depth], "", *_treatment(plan, entry)), []).append(entry)
        if groups and len(finer) > _MOST:
            break
        groups = finer
        if len(groups) >= _ENOUGH:
            break
    return list(groups.values())


def _shared(paths: Sequence[Sequence[str]]) -> int:
    """With how many components all paths begin; the last two of a path tell its variables apart."""
    count = 0
    while len({tuple(path[: count + 1]) for path in paths}) == 1 and all(len(path) > count + 2 for path in paths):
        count += 1
    return count


def _common(entries: Sequence[VariablePlan]) -> str:
    """What the paths of a group have in common, up to a mark between two words."""
    first, *others = [entry.path for entry in entries]
    if not others:
        return first
    end = next(i for i, letters in enumerate(zip(first, *others, strict=False)) if len(set(letters)) > 1)
    while end and first[end - 1] not in "/_" and not all(path[end : end + 1] in "/_" for path in [first, *others]):
        end -= 1
    return f"{first[:end]}*"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _treatment(plan: Plan, entry: VariablePlan) -> tuple[str, str, str]:
    """What is done with a variable: whether it is trained, by which rule, and how its gradient travels."""
    travels = entry.travels(plan.peers(entry)) if entry.trained and entry.sent else "-"
    return _trained_word(entry), str(entry.rule), travels


def _statistics(plan: Plan) -> list[tuple[str, str]]:
    return [
        (
            f"every {payload.every} steps" if payload.every > 1 else "every step",
            grouped(average_bytes([payload], plan.workers)),
        )
        for payload in plan.statistics
    ]


def _totals(plan: Plan, hosts: int) -> list[str]:
    trained = sum(entry.trained_parameters for entry in plan.entries)
    total = sum(entry.parameters for entry in plan.entries)
    whose = "worker" if plan.local > 1 else "replica"
    return [
        f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%})",
        f"payload: {grouped(plan.wire_bytes)} of {grouped(plan.full_wire_bytes)} bytes a step and {whose}",
        f"{_interface(plan.workers, hosts)} {grouped(plan.nic_bytes)} of {grouped(plan.full_nic_bytes)} bytes a step "
        f"({plan.nic_bytes / plan.full_nic_bytes:.2%})",
    ]


def _interface(workers: int, hosts: int) -> str:
    """Begins a line of what leaves a machine, or would."""
    if hosts > 1:
        return f"at the network interface of each of {hosts} workers:"
    return f"nothing is sent here; each of {workers} workers would send"


def grouped(average: int | float) -> str:
    """Writes a number with its digits grouped.

    Examples:
        >>> grouped(1234567), grouped(1234.56)
        ('1,234,567', '1,234.6')
    """
    return f"{average:,}" if isinstance(average, int) else f"{average:,.1f}"


def _trained_word(entry: VariablePlan) -> str:
    if not entry.trained:
        return "no"
    if not entry.sent:
        return "no gradient"
    return f"rows {entry.rule.rows[0]}:{entry.rule.rows[1]}" if entry.rule.rows else "yes"


def columns(header: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    r"""Writes cells in columns, of which those in `right`, and the last, are aligned to the right.

    Examples:
        >>> print(*columns(["path", "bytes"], [["a/kernel", "8"]]), sep="\n")
        path      bytes
        --------  -----
        a/kernel      8
    """
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    right = [*right, len(header) - 1]

    def row(cells: Sequence[str]) -> str:
        aligned = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(aligned)

    return [row(header), "  ".join("-" * width for width in widths), *map(row, lines)]
