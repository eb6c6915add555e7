"""What `dist_partial.train` returns."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_partial import checkpoints
from dist_partial.checkpoints.fingerprints import INITIAL, began
from dist_partial.errors import UserError
from dist_partial.selection.plan import Plan
from dist_partial.selection.table import columns, grouped
from dist_partial.validation import nearest

if TYPE_CHECKING:
    import pandas

    from dist_partial.export.delta import Delta

_SPLITS = ("train", "eval", "plan")
_SHOWN = 5  # rows of each split, the last ones
_BYTES = ("wire_bytes", "nic_bytes", "wire_share")


class History(list[dict[str, Any]]):
    """Lists the rows of metrics.jsonl: a dict for each step, each evaluation and each switch of a schedule.

    Examples:
        >>> rows = History([{"step": 1, "split": "train", "loss": 2.0}, {"step": 1, "split": "eval", "loss": 1.5}])
        >>> rows.of("eval").column("loss")
        [1.5]
        >>> rows
        2 rows: .of('train' | 'eval' | 'plan'), .column(name), .to_pandas()
        step  split    loss
        ----  -----  ------
           1  train  2.0000
           1  eval   1.5000
    """

    def of(self, split: str) -> "History":
        """The rows of a split: 'train', 'eval' or 'plan'.

        Raises:
            UserError: there is no such split.
        """
        if split not in _SPLITS:
            raise UserError(f"history has no split {split!r}{nearest(split, _SPLITS, always=True)}")
        return History(row for row in self if row["split"] == split)

    def column(self, name: str) -> list[Any]:
        """The values of those rows that have them.

        Raises:
            UserError: no row has that name.
        """
        names = dict.fromkeys(each for row in self for each in row)
        if self and name not in names:
            raise UserError(f"history has no {name!r}{nearest(name, names, always=True)}")
        return [row[name] for row in self if name in row]

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, str):
            raise UserError(f"history is a list of rows: write history.of('train').column({place!r})")
        return super().__getitem__(place)

    def __repr__(self) -> str:
        shown = [row for split in _SPLITS[:2] for row in list(self.of(split))[-_SHOWN:]]
        names = [name for name in dict.fromkeys(each for row in shown for each in row) if name not in _BYTES]
        lines = [f"{len(self):,} rows: .of('train' | 'eval' | 'plan'), .column(name), .to_pandas()"]
        if shown:
            cells = [[_cell(row.get(name, "")) for name in names] for row in shown]
            lines += columns(names, cells, right=[number for number, name in enumerate(names) if name != "split"])
        return "\n".join(lines)

    def to_pandas(self) -> "pandas.DataFrame":
        """The rows as a data frame of pandas, which has to be installed."""
        import pandas

        return pandas.DataFrame(list(self))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Holds what came of a training.

    Attributes:
        model: with the trained weights.
        folder: the run folder.
        plan: what was trained, and what it sends.
        steps: that were to be made.
        history: the rows of metrics.jsonl.
        best: the evaluation of the best checkpoint; None without the setting of that name.

    Examples:
        >>> history = History([{"step": 10, "split": "eval", "loss": 0.5, "accuracy": 0.75, "examples": 20}])
        >>> result = Result(None, Path("runs/mine"), Plan((), ()), 10, history)
        >>> result.metrics
        {'step': 10, 'loss': 0.5, 'accuracy': 0.75, 'examples': 20}
        >>> print(str(result).splitlines()[1])
        held-out, step 10: loss 0.5000, accuracy 0.7500
    """

    model: Any
    folder: Path
    plan: Plan
    steps: int
    history: History
    best: dict[str, Any] | None = None
    _trained: tuple[Any, int] | None = None  # a model with the plan's variables, and the updates that it has had

    def delta(self) -> "Delta":
        """What the run has changed, for `dist_partial.delta.write`.

        Raises:
            UserError: the folder has no checkpoint.
        """
        from dist_partial.export import delta

        base = began(self.folder)
        if not base or self._trained is None:
            raise UserError(f"{self.folder} has no checkpoint, and so no delta: let the run save one first")
        model, step = self._trained
        return delta.of(model, self.plan, base[INITIAL], step)

    @property
    def metrics(self) -> dict[str, Any]:
        """The last evaluation; {} if there was none."""
        return _numbers(self.history.of("eval")[-1:])

    def __repr__(self) -> str:
        done = max((row["step"] for row in self.history if row["split"] != "plan"), default=0)
        trained = sum(entry.trained_parameters for entry in self.plan.entries)
        total = sum(entry.parameters for entry in self.plan.entries)
        lines = [f"{self.folder}: {done:,} of {self.steps:,} steps"]
        if self.metrics:
            lines.append(f"held-out, step {self.metrics['step']}: {_words(self.metrics)}")
        if self.best:
            lines.append(f"best, step {self.best['step']}: {_words(self.best)}")
        lines.append(
            f"trained: {trained:,} of {total:,} parameters ({trained / max(total, 1):.2%}), "
            f"{grouped(self.plan.wire_bytes)} of {grouped(self.plan.full_wire_bytes)} bytes a step and replica"
        )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from dist_partial.report import notebook, runs

        return notebook.html(runs.read([self.folder])[0], str(self))


def read(model: Any, folder: Path, plan: Plan, steps: int) -> Result:
    """Reads what a run has written to its folder.

    Args:
        model: with the trained weights.
        folder: the run folder.
        plan: of the run.
        steps: that were to be made.
    """
    file = folder / "metrics.jsonl"
    history = History(json.loads(line) for line in file.read_text().splitlines()) if file.exists() else History()
    kept = checkpoints.steps(folder / "best")
    best = _numbers([row for row in history.of("eval") if row["step"] in kept][-1:])
    return Result(model, folder, plan, steps, history, best or None)


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "nan" if value is None else str(value)


def _numbers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for row in rows for name, value in row.items() if name not in (*_BYTES, "split")}


def _words(metrics: dict[str, Any]) -> str:
    shown = {name: value for name, value in metrics.items() if name not in ("step", "examples")}
    return ", ".join(f"{name} {value:.4f}" if value is not None else f"{name} nan" for name, value in shown.items())
