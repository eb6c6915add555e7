"""Which variables are trained: a table of rules, resolved against one model into a plan.

Rules are ordered and the first match wins, like a router's. Everything here is pure: a plan is computed
from names and shapes, and reading it changes nothing.
"""

import collections
import dataclasses
import difflib
import fractions
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from dist_partial.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the table.

    Attributes:
        match: regular expression that must match the whole path of a variable (`dense1/kernel`, without
            the model's own name; a trailing `:0` is understood).
        train: whether the variables that match are trained.
        optimizer: factory of the Keras optimizer of this rule's group; None takes the run's.
        learning_rate: overrides the factory's learning rate: a float or a Keras schedule.
        reduction: how the gradients cross the replicas; None takes the run's.
        rows: (start, stop) of the leading axis: only these rows are trained, as a variable of their own with the
            whole one's path, name and constraint (optimizers that look at a variable's norm or shape see the rows').
        lora: rank of the factors that are trained in place of the kernels that match, which stay frozen (see `lora`).
    """

    match: str
    train: bool = True
    optimizer: Callable[..., Any] | None = None
    learning_rate: Any = None
    reduction: Any = None
    rows: tuple[int, int] | None = None
    lora: int | None = None

    def __str__(self) -> str:
        rows = f" rows {self.rows[0]}:{self.rows[1]}" if self.rows else ""
        lora = f" lora {self.lora}" if self.lora else ""
        return f"{'train' if self.train else 'freeze'} {self.match}{rows}{lora}"


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """A kernel that is frozen, and the LoRA factors that are trained in its place."""

    kernel: Any
    factors: tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """One variable of the model under the rule that covers it."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    variable: Any
    rule: Rule
    reduction: Any = None
    sent: bool = True  # False once tracing has shown that the loss does not depend on the variable
    unit: str = ""  # what a schedule switches as one
    active: bool = True  # False while the schedule leaves its unit out

    @property
    def trained(self) -> bool:
        return self.rule.train and self.active

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """Shape of what is trained: the selected rows, or the whole variable."""
        if self.rule.rows is None:
            return self.shape
        start, stop = self.rule.rows
        return (stop - start, *self.shape[1:])

    @property
    def trained_parameters(self) -> int:
        return math.prod(self.trained_shape) if self.trained else 0

    @property
    def messages(self) -> tuple[Any, ...]:
        """What one replica hands over for this variable: (kind, bytes, every so many steps)."""
        return self.reduction.messages(self.trained_shape, self.dtype) if self.trained and self.sent else ()

    @property
    def wire_bytes(self) -> int | float:
        """Bytes that one replica hands over in a step, on average."""
        return average_bytes(self.messages)

    @property
    def full_bytes(self) -> int:
        """Bytes of the whole gradient in the variable's own dtype."""
        return self.parameters * itemsize(self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The variables of one unit that one trained rule covers: they share an optimizer and a reduction."""

    rule: Rule
    entries: tuple[Entry, ...]

    @property
    def reduction(self) -> Any:
        return self.entries[0].reduction


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The rules resolved against one model; entries stand in the model's order."""

    rules: tuple[Rule, ...]
    entries: tuple[Entry, ...]
    statistics: tuple[Any, ...] = ()  # what BatchNorm layers in training mode send; known once the step is traced
    workers: int = 2  # among which bytes at the network interface are counted, with one replica each

    @property
    def groups(self) -> tuple[Group, ...]:
        """The trained rules, in the table's order, each by the units of the schedule, in the model's."""
        order = {id(rule): number for number, rule in enumerate(self.rules)}
        members: dict[tuple[int, str], list[Entry]] = {}
        for entry in self.entries:
            if entry.trained:
                members.setdefault((order[id(entry.rule)], entry.unit), []).append(entry)
        by_rule = sorted(members.items(), key=lambda item: item[0][0])
        return tuple(Group(self.rules[number], tuple(entries)) for (number, _), entries in by_rule)

    @property
    def trained(self) -> tuple[Entry, ...]:
        """The trained entries, group by group: the order in which gradients travel through a step."""
        return tuple(entry for group in self.groups for entry in group.entries)

    @property
    def units(self) -> tuple[str, ...]:
        """Names of the units of which something is trained, in the model's order."""
        return tuple(dict.fromkeys(entry.unit for entry in self.entries if entry.trained))

    @property
    def frozen(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if not entry.trained)

    @property
    def messages(self) -> tuple[Any, ...]:
        """All that one replica hands over."""
        return tuple(message for entry in self.entries for message in entry.messages) + self.statistics

    @property
    def wire_bytes(self) -> int | float:
        """Bytes that one replica hands over in a step, on average."""
        return average_bytes(self.messages)

    @property
    def full_wire_bytes(self) -> int:
        """Bytes a step if everything were trained and sent in its own dtype."""
        return sum(entry.full_bytes for entry in self.entries)

    @property
    def nic_bytes(self) -> int | float:
        """Bytes that leave the network interface of each of the workers in a step, on average."""
        return average_bytes(self.messages, self.workers)

    @property
    def full_nic_bytes(self) -> int | float:
        """The same if everything were trained and summed in its own dtype."""
        return _number(nic_bytes("sum", self.full_wire_bytes, self.workers))

    def divided(self, units: Sequence[tuple[str, Sequence[str]]]) -> "Plan":
        """The same plan in units, each a name and paths, that `only` can switch."""
        names = {path: name for name, paths in units for path in paths}
        return self._replaced(lambda entry: {"unit": names.get(entry.path, "")})

    def only(self, units: Collection[str]) -> "Plan":
        """The same plan with nothing trained but these units."""
        return self._replaced(lambda entry: {"active": entry.unit in units})

    def _replaced(self, change: Callable[[Entry], dict[str, Any]]) -> "Plan":
        entries = tuple(dataclasses.replace(entry, **change(entry)) for entry in self.entries)
        return dataclasses.replace(self, entries=entries)

    def traced(self, without_gradient: Sequence[str], statistics: Sequence[Any]) -> "Plan":
        """The same plan, with what tracing the step has shown.

        Args:
            without_gradient: paths of selected variables on which the loss does not depend: nothing is sent.
            statistics: messages beyond those of the gradients.
        """
        plan = self._replaced(lambda entry: {"sent": entry.path not in without_gradient})
        return dataclasses.replace(plan, statistics=tuple(statistics))

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json.

        Of a variable, `dtype` is the one in which its gradient would be exchanged whole, `stored_dtype` the one in
        which it is kept (see `storage`), and `unit` what a schedule switches it with; None where none does. Of bytes,
        `wire` is the payload that one replica hands over, and `nic` what leaves each of the `workers`.
        """
        return {
            "variables": [
                {
                    "path": e.path,
                    "shape": list(e.shape),
                    "dtype": e.dtype,
                    "stored_dtype": e.variable.dtype,
                    "trained": e.trained,
                    "rule": str(e.rule),
                    "unit": e.unit or None,
                    "rows": list(e.rule.rows) if e.trained and e.rule.rows else None,
                    "reduction": str(e.reduction) if e.trained and e.sent else None,
                    "wire_bytes_per_step": e.wire_bytes,
                }
                for e in self.entries
            ],
            "trained_parameters": sum(e.trained_parameters for e in self.entries),
            "total_parameters": sum(e.parameters for e in self.entries),
            "wire_bytes_per_step": self.wire_bytes,
            "statistics_wire_bytes_per_step": average_bytes(self.statistics),
            "full_wire_bytes_per_step": self.full_wire_bytes,
            "workers": self.workers,
            "nic_bytes_per_step": self.nic_bytes,
            "full_nic_bytes_per_step": self.full_nic_bytes,
        }


def nic_bytes(kind: str, payload: int, workers: int) -> fractions.Fraction:
    """Bytes that leave the network interface of each of N workers when each hands over a payload, without headers.

    Of a sum 2 (N-1)/N of the payload, by a ring or by our own connections (Patarasuk & Yuan 2009, "Bandwidth optimal
    all-reduce algorithms"); of a gather N-1 times the payload, which is N/2 times what a sum costs.

    Args:
        kind: 'sum' or 'gather'.
        payload: bytes that one worker hands over.
        workers: how many there are, with one replica each.

    Example:
        >>> [int(nic_bytes(kind, 100, workers=4)) for kind in ("sum", "gather")]
        [150, 300]
    """
    factors = {"sum": fractions.Fraction(2 * (workers - 1), workers), "gather": fractions.Fraction(workers - 1)}
    return factors[kind] * payload


def average_bytes(messages: Sequence[Any], workers: int | None = None) -> int | float:
    """Bytes a step of messages that travel every so many steps: payload, or at the interface of each of the workers."""
    sizes = [m.bytes if workers is None else nic_bytes(m.kind, m.bytes, workers) for m in messages]
    return _number(sum(fractions.Fraction(size, m.every) for size, m in zip(sizes, messages, strict=True)))


def _number(value: fractions.Fraction | int) -> int | float:
    return int(value) if value == int(value) else float(value)


def itemsize(dtype: str) -> int:
    """Bytes of one element; `bfloat16` is not a NumPy name, so the size is read off the name."""
    return int(re.sub(r"\D", "", dtype.replace("bfloat", "float"))) // 8


def parse_rules(table: Sequence[Any]) -> tuple[Rule, ...]:
    """Reads a table in the short form `('train' | 'freeze', pattern)` or of `Rule`s, mixed as one likes.

    Raises:
        UserError: if a line is neither, or a pattern is not a regular expression.
    """
    if not isinstance(table, (list, tuple)) or not table:
        raise UserError(
            "the rules (run.rules) are empty: write a list such as [('train', r'head/.*'), ('freeze', r'.*')]"
        )
    return tuple(_parse_rule(number, line) for number, line in enumerate(table, 1))


def _parse_rule(number: int, line: Any) -> Rule:
    if isinstance(line, Rule):
        rule = line
    elif isinstance(line, (list, tuple)) and len(line) == 2 and line[0] in ("train", "freeze"):
        rule = Rule(match=line[1], train=line[0] == "train")
    else:
        raise UserError(
            f"rule {number} is {line!r}: write ('train', pattern), ('freeze', pattern) or a Rule, in a gin file "
            "@name/Rule()"
        )
    if not isinstance(rule.match, str):
        raise UserError(f"rule {number} matches {rule.match!r}: the pattern must be a string")
    try:
        re.compile(rule.match)
    except re.error as error:
        raise UserError(
            f"rule {number} ({rule.match!r}) is not a regular expression: {error}; it must match whole paths, "
            "such as r'block_3/.*'"
        ) from None
    _check_options(number, rule)
    # The table's lines are told apart by identity, so each line is an object of its own.
    return dataclasses.replace(rule)


def _check_options(number: int, rule: Rule) -> None:
    where = f"rule {number} ({rule.match!r})"
    if not isinstance(rule.train, bool):
        raise UserError(f"{where}: train is {rule.train!r}: write True or False")
    options = [
        name for name in ("optimizer", "learning_rate", "reduction", "rows", "lora") if getattr(rule, name) is not None
    ]
    if not rule.train and options:
        raise UserError(f"{where} freezes what it matches, so {options[0]} has no use: remove it or set train = True")
    if rule.optimizer is not None and not callable(rule.optimizer):
        raise UserError(
            f"{where}: optimizer is {rule.optimizer!r}: give what makes one, such as keras.optimizers.SGD (in a gin "
            "file @keras.optimizers.SGD) without (), and learning_rate beside it"
        )
    if rule.reduction is not None:
        check_reduction(where, rule.reduction)
    if rule.rows is not None:
        rows = rule.rows
        if not (isinstance(rows, (list, tuple)) and len(rows) == 2 and all(type(row) is int for row in rows)):
            raise UserError(f"{where}: rows is {rows!r}: write (start, stop) of the leading axis")
        if not 0 <= rows[0] < rows[1]:
            raise UserError(f"{where}: rows {tuple(rows)} is empty or negative: write 0 <= start < stop")
    if rule.lora is not None:
        if type(rule.lora) is not int or rule.lora < 1:
            raise UserError(f"{where}: lora is {rule.lora!r}: write its rank, a whole number of at least 1")
        if rule.rows is not None:
            raise UserError(f"{where}: lora trains factors of whole kernels, so rows has no use: remove one of them")
    if isinstance(rule.learning_rate, (int, float)) and not rule.learning_rate > 0:
        raise UserError(f"{where}: learning_rate is {rule.learning_rate}: it must be above 0")


def check_reduction(where: str, reduction: Any) -> None:
    """Raises UserError if it is none; `where` says which."""
    if isinstance(reduction, type) or not hasattr(reduction, "messages"):
        raise UserError(
            f"{where}: reduction is {reduction!r}: give one such as EveryStep(), in a gin file @every_step(), "
            "with the ()"
        )


def variable_paths(model: Any) -> list[str]:
    """Paths of the model's trainable variables without the model's own leading name."""
    return paths_of(model, model.trainable_variables)


def paths_of(model: Any, variables: Sequence[Any]) -> list[str]:
    """Paths of some of a model's variables without the model's own leading name: what they are called everywhere.

    They are Keras's, `variable.path`. Functional submodels are missing from these, so that those of two towers may be
    the same: then all are made of the names of the layers, one inside the other, as `left/hidden/kernel`.
    """
    weights = {id(v): v.path for layer in model._flatten_layers() for v in layer._trainable_variables}
    if len(set(weights.values())) == len(weights):
        return _strip_root(model.name, [variable.path for variable in variables])
    placed: dict[int, str] = {}
    _place(model, "", placed)
    return [placed.get(id(variable), variable.path) for variable in variables]


def _place(layer: Any, prefix: str, placed: dict[int, str]) -> None:
    """Notes the paths of a layer's variables, and of those of the layers in it, by the names of the layers."""
    for variable in (*layer._trainable_variables, *layer._non_trainable_variables):
        placed.setdefault(id(variable), f"{prefix}{variable.name}")
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        _place(inner, f"{prefix}{inner.name}/", placed)


def _strip_root(root: str, paths: Sequence[str]) -> list[str]:
    # Keras puts the model's name before some models' paths (subclassed, Sequential) and not before others'
    # (functional); a layer may bear the model's name, so it is stripped only where all paths begin with it.
    if all(path.startswith(f"{root}/") for path in paths):
        return [path[len(root) + 1 :] for path in paths]
    return list(paths)


def own_names(model: Any, variables: Sequence[Any]) -> list[str]:
    """`paths_of`; of several that are the same all but the first end in ` (2)`, ` (3)`, ..."""
    names: dict[str, None] = {}
    for path in paths_of(model, variables):
        name, number = path, 1
        while name in names:
            number += 1
            name = f"{path} ({number})"
        names[name] = None
    return list(names)


def resolve(
    table: Sequence[Any], model: Any, reduction: Any, adapters: Mapping[str, Adapter] = MappingProxyType({})
) -> Plan:
    """Resolves the rules against a built Keras model.

    Args:
        table: the rules, short or full form.
        model: a built model; its trainable variables are the candidates.
        reduction: the reduction of the rules that name none.
        adapters: from `lora.enable`; the factors go by the path of their kernel, which is frozen.

    Returns:
        The plan.

    Raises:
        UserError: a rule that matches nothing, a variable that no rule covers, an empty selection, two
            variables with one path, a pattern that is not a regular expression, rows beyond a variable.
    """
    rules = parse_rules(table)
    check_reduction("all rules that name none", reduction)
    paths = variable_paths(model)
    if not paths:
        why = "; its own code has set trainable = False, which is for the rules to do" if model.weights else ""
        raise UserError(f"model {model.name!r} has no trainable variables: nothing can be selected{why}")
    for path, count in collections.Counter(paths).items():
        if count > 1:
            raise UserError(f"{count} variables have the path {path!r}: name the layers apart")
    kernels = {id(factor): path for path, adapter in adapters.items() for factor in adapter.factors}
    entries, used, frozen = [], set(), set()
    for own_path, variable in zip(paths, model.trainable_variables, strict=True):
        path = kernels.get(id(variable), own_path)
        number = first_match(rules, path)
        if number is None:
            near = _nearest(path, [rule.match for rule in rules])
            raise UserError(f"no rule covers {path!r} (rules: {near}): end the table with ('freeze', r'.*') or name it")
        used.add(number)
        rule, shape = rules[number], tuple(variable.shape)
        if rule.rows is not None and (not shape or rule.rows[1] > shape[0]):
            raise UserError(
                f"rule {number + 1} ({rule.match!r}): rows {rule.rows} lie beyond {path!r} of shape {shape}"
            )
        if rule.lora is not None and path not in adapters:
            raise UserError(
                f"rule {number + 1} ({rule.match!r}) asks for LoRA of {path!r}, and nothing has enabled it: call "
                f"enable_lora({rule.lora}) of the layer and match r'.*/lora_.*', or train with dist_partial.train"
            )
        if path in adapters and path not in frozen:
            frozen.add(path)
            kernel = adapters[path].kernel
            entries.append(Entry(path, tuple(kernel.shape), kernel.dtype, kernel, Rule(rule.match, train=False)))
        sent_by = (rule.reduction or reduction) if rule.train else None
        entries.append(Entry(own_path, shape, variable.dtype, variable, rule, sent_by))
    for number in range(len(rules)):
        if number not in used and not _closes(number, rules, paths):
            _check_unused(number, rules, paths, model)
    plan = Plan(rules, tuple(entries))
    if not plan.trained:
        raise UserError(f"the rules train nothing: all {len(paths)} variables are frozen; add ('train', pattern)")
    return plan


def first_match(rules: Sequence[Rule], path: str) -> int | None:
    """The place of the rule that covers the path, or None."""
    return next((number for number, rule in enumerate(rules) if matches(rule.match, path)), None)


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression matches a whole path, which may be written with a trailing `:0`."""
    return any(re.fullmatch(pattern, name) is not None for name in (path, f"{path}:0"))


def _closes(number: int, rules: Sequence[Rule], paths: Sequence[str]) -> bool:
    """Whether a rule ends the table as ('freeze', r'.*') does: that nothing may be left for it is no mistake."""
    return number == len(rules) - 1 and not rules[number].train and all(matches(rules[number].match, p) for p in paths)


def _check_unused(number: int, rules: Sequence[Rule], paths: Sequence[str], model: Any) -> None:
    """Raises UserError of a rule that covers none of the paths, unless it freezes what is frozen already."""
    rule = rules[number]
    taken = [path for path in paths if matches(rule.match, path)]
    frozen = [path for path in _frozen_by_code(model) if matches(rule.match, path)]
    if taken:
        first = next(n for n, r in enumerate(rules) if matches(r.match, taken[0]))
        raise UserError(
            f"rule {number + 1} ({rule.match!r}) never applies: rule {first + 1} ({rules[first].match!r}) stands "
            f"before it and takes {taken[0]!r}; the first match wins, so move it up"
        )
    if not frozen:
        near = _nearest(rule.match, paths)
        raise UserError(f"rule {number + 1} ({rule.match!r}) matches no variable; nearest paths: {near}")
    if rule.train:
        layer = frozen[0].rpartition("/")[0]
        factors = [path for path in paths if path.startswith(f"{layer}/lora_")]
        what = "trainable = False: take that out of the code and let the rules decide, or take out the rule"
        if factors:
            what = f"enable_lora: match its factors, such as {factors[0]!r}, or take that out of the code"
        where = f"rule {number + 1} ({rule.match!r})"
        raise UserError(f"{where} would train {frozen[0]!r}, which the model's own code has frozen by {what}")


def _frozen_by_code(model: Any) -> list[str]:
    """Paths of the weights that are out of the rules' reach because of `trainable = False`; no statistics."""
    trainable = {id(variable) for variable in model.trainable_variables}
    weights = {id(v): v for layer in model._flatten_layers() for v in layer._trainable_variables}
    return paths_of(model, [variable for key, variable in weights.items() if key not in trainable])


def _nearest(word: str, names: Sequence[str], count: int = 3) -> str:
    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, word, name).ratio()

    return ", ".join(repr(name) for name in sorted(names, key=likeness, reverse=True)[:count])
