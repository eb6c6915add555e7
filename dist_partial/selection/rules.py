"""The table of rules: which variables are trained, by which optimizer, and how their gradients travel.

Rules are ordered and the first match wins, like a router's.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from dist_partial.errors import UserError
from dist_partial.validation import AtLeast, Factory, Has, check, check_pattern, check_value, shown


class _Table:
    """Annotates a table of rules."""

    def refusal(self, value: Any) -> str:
        """What to write instead of a value; '' where it is a list with something in it."""
        if isinstance(value, (list, tuple)) and value:
            return ""
        what = "" if isinstance(value, (list, tuple)) else f"it is a {type(value).__name__} and no list; "
        return f"{what}write a list such as [('train', r'head/.*'), ('freeze', r'.*')]"


TABLE = _Table()
REDUCTION = Has("payloads", "give one such as AllReduce(), in a gin file @all_reduce(), with the ()")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Selects variables by their paths, and says what happens to them: one line of the table.

    Attributes:
        match: regular expression that must match the whole path of a variable (`dense1/kernel`, without
            the model's own name; a trailing `:0` is understood).
        train: whether the variables that match are trained.
        optimizer: factory of the Keras optimizer of this rule's group; None takes the run's.
        learning_rate: overrides the factory's learning rate: a float or a Keras schedule.
        reduction: how the gradients cross the replicas; None takes the run's.
        between_hosts: how they cross the workers, where `reduction` is to sum those of each worker's own replicas only;
            None takes the run's, and where that is None, too, `reduction` crosses all.
        rows: (start, stop) of the leading axis: only these rows are trained, as a variable of their own with the
            whole one's path, name and constraint (optimizers that look at a variable's norm or shape see the rows').
        lora: rank of the factors that are trained in place of the kernels that match, which stay frozen (see `lora`).

    Examples:
        >>> str(Rule("head/.*")), str(Rule("embedding/embeddings", rows=(0, 128)))
        ('train head/.*', 'train embedding/embeddings rows 0:128')
    """

    match: str
    train: bool = True
    optimizer: Annotated[
        Callable[..., Any] | None,
        Factory("@keras.optimizers.SGD"),
        "give what makes one, such as keras.optimizers.SGD (in a gin file @keras.optimizers.SGD) without (), and "
        "learning_rate beside it",
    ] = None
    learning_rate: Any = None
    reduction: Annotated[Any | None, REDUCTION] = None
    between_hosts: Annotated[Any | None, REDUCTION] = None
    rows: tuple[int, int] | None = None
    lora: Annotated[int | None, AtLeast(1), "write its rank, a whole number of at least 1"] = None

    def __post_init__(self) -> None:
        where = f"rule {shown(self.match)}"
        check(self, where, ": ")
        check_pattern("Rule.match", self.match)
        options = ("optimizer", "learning_rate", "reduction", "between_hosts", "rows", "lora")
        if not self.train and (given := [name for name in options if getattr(self, name) is not None]):
            raise UserError(f"{where} freezes what it matches, so {given[0]} has no use: remove it or set train = True")
        rate, number = self.learning_rate, isinstance(self.learning_rate, (int, float))
        # Keras takes functions, too; True is a number to Python.
        fits = 0 < rate < math.inf and rate is not True if number else callable(rate) and not isinstance(rate, type)
        if rate is not None and not fits:
            raise UserError(f"{where}: learning_rate is {shown(rate)}: give a number above 0, or a Keras schedule")
        self._check_rows(where)

    def _check_rows(self, where: str) -> None:
        rows: Any = self.rows
        if rows is None:
            return
        if not (isinstance(rows, (list, tuple)) and len(rows) == 2 and all(type(row) is int for row in rows)):
            raise UserError(f"{where}: rows is {shown(rows)}: write (start, stop) of the leading axis")
        if not 0 <= rows[0] < rows[1]:
            raise UserError(f"{where}: rows {tuple(rows)} is empty or negative: write 0 <= start < stop")
        if self.lora is not None:
            raise UserError(f"{where}: lora trains factors of whole kernels, so rows has no use: remove one of them")

    def __str__(self) -> str:
        rows = f" rows {self.rows[0]}:{self.rows[1]}" if self.rows else ""
        lora = f" lora {self.lora}" if self.lora else ""
        return f"{'train' if self.train else 'freeze'} {self.match}{rows}{lora}"


def parse_rules(table: Sequence[Any]) -> tuple[Rule, ...]:
    """Reads a table in the short form `('train' | 'freeze', pattern)` or of `Rule`s, mixed as one likes.

    Raises:
        UserError: if a line is neither, or a pattern is not a regular expression.

    Examples:
        >>> [str(rule) for rule in parse_rules([("train", "head/.*"), Rule(".*", train=False)])]
        ['train head/.*', 'freeze .*']
    """
    check_value("rules", table, Annotated[Any, TABLE])
    return tuple(_parse_rule(number, line) for number, line in enumerate(table, 1))


def _parse_rule(number: int, line: Any) -> Rule:
    if isinstance(line, Rule):
        # The table's lines are distinguished by id, so each line is an object of its own.
        return dataclasses.replace(line)
    if not (isinstance(line, (list, tuple)) and len(line) == 2 and line[0] in ("train", "freeze")):
        raise UserError(
            f"rule {number} is {shown(line)}: write ('train', pattern), ('freeze', pattern) or a Rule, in a gin file "
            "@name/Rule()"
        )
    check_pattern(f"rule {number}", line[1])
    return Rule(match=line[1], train=line[0] == "train")


def first_match(rules: Sequence[Rule], path: str) -> int | None:
    """Finds the place of the rule that covers the path, or None.

    Examples:
        >>> first_match(parse_rules([("train", "head/.*"), ("freeze", ".*")]), "body/kernel")
        1
    """
    return next((number for number, rule in enumerate(rules) if matches(rule.match, path)), None)


def matches(pattern: str, path: str) -> bool:
    """Tells whether a regular expression matches a whole path, which may be written with a trailing `:0`.

    Examples:
        >>> matches("dense[12]/kernel", "dense1/kernel"), matches("dense1", "dense1/kernel")
        (True, False)
    """
    return any(re.fullmatch(pattern, name) is not None for name in (path, f"{path}:0"))
