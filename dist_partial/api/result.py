"""What `dist_partial.train` returns."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_partial import checkpoints
from dist_partial.selection.plan import Plan
from dist_partial.selection.table import grouped

if TYPE_CHECKING:
    import pandas

_BYTES = ("wire_bytes", "nic_bytes", "wire_share")


class History(list[dict[str, Any]]):
    """Lists the rows of metrics.jsonl: a dict for each step, each evaluation and each switch of a schedule.

    Examples:
        >>> rows = History([{"step": 1, "split": "train", "loss": 2.0}, {"step": 1, "split": "eval", "loss": 1.5}])
        >>> rows.of("eval").column("loss")
        [1.5]
    """

    def of(self, split: str) -> "History":
        """The rows of a split: 'train', 'eval' or 'plan'."""
        return History(row for row in self if row["split"] == split)

    def column(self, name: str) -> list[Any]:
        """The values of those rows that have them."""
        return [row[name] for row in self if name in row]

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


def _numbers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for row in rows for name, value in row.items() if name not in (*_BYTES, "split")}


def _words(metrics: dict[str, Any]) -> str:
    shown = {name: value for name, value in metrics.items() if name not in ("step", "examples")}
    return ", ".join(f"{name} {value:.4f}" if value is not None else f"{name} nan" for name, value in shown.items())
