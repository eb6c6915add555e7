"""What a run shows: the plan's table, the progress bar, TensorBoard, and the files of JSON lines."""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from dist_partial.errors import Fault
from dist_partial.files import write_atomically, write_json, write_text, writing
from dist_partial.selection.plan import Plan
from dist_partial.selection.table import grouped, trained_layers
from dist_partial.synonyms import meant
from dist_partial.terminal import is_silent, say
from dist_partial.trackers import Following, Row

LINES = ("metrics.jsonl", "samples.jsonl", "speed.jsonl")  # the files of JSON lines
_SPLITS = ("train", "eval")
# The steps, and what never changes or is only another measure of what is charted.
_NOT_CHARTED = {"step", "examples", "wire_bytes", "wire_share", "wire_bytes_per_step", "nic_bytes_per_step"}
_BYTES = {"nic_bytes"}  # an evaluation sends none


class MetricWriter:
    """Writes what happens in a run to its folder and to the terminal.

    Lines of steps after `step`, left by a run that was stopped after its last checkpoint, are removed: these
    steps are about to be made again. Of a run that begins nothing is kept, and none of TensorBoard's events; else these
    are only added to, so that of a step that is made again they have both values.

    Args:
        folder: the run folder.
        step: the step from which the run goes on.
        steps: the step at which it ends.
        active: whether this process writes; the others' calls do nothing.
        evaluated: whether the evaluation that was due after `step` was made; if not, what it wrote is removed.
        rows: of steps until then, which may have got lost with who wrote them: added if they are not there.
        following: reports to trackers what is written.

    Raises:
        UserError, Fault: (from every method, too) the folder cannot be written, or is full.

    Examples:
        >>> import tempfile
        >>> sent = np.array([[0] * 3, [100, 100, 400], [200, 200, 800]])  # wire_bytes, nic_bytes and full_nic_bytes
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with MetricWriter(Path(folder), step=0, steps=2, active=True) as writer:
        ...         _ = writer.train(1, losses=np.array([2.5, np.inf]), norms=np.array([1.0, 1.0]), sent=sent)
        ...     last = json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[1])
        >>> last["step"], last["loss"], last["wire_bytes"], last["wire_share"]
        (2, None, 200, 0.25)
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        steps: int,
        active: bool,
        evaluated: bool = True,
        rows: Sequence[dict[str, Any]] = (),
        following: Following | None = None,
    ) -> None:
        self._folder = folder
        self._steps = steps
        self._following = following if active else None
        self._active = active
        self._boards = {split: tf.summary.create_noop_writer() for split in _SPLITS}
        if active:
            with _writing(folder):
                for name in LINES:
                    _keep_until(folder / name, step, evaluated or name == "speed.jsonl")
                for path in [] if step else (folder / "tensorboard").rglob("events.out.tfevents.*"):
                    path.unlink()
                # Values of one name from two folders share a chart.
                self._boards = {
                    split: tf.summary.create_file_writer(str(folder / "tensorboard" / split)) for split in _SPLITS
                }
            self._record(rows[_recorded(folder / "metrics.jsonl", rows) :])
        hidden = not active or is_silent()
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=hidden)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        with _writing(self._folder):
            for board in self._boards.values():
                board.close()

    def train(
        self,
        step: int,
        losses: np.ndarray,
        norms: np.ndarray,
        sent: np.ndarray,
        metrics: Sequence[dict[str, float]] | None = None,
    ) -> list[dict[str, Any]]:
        """Records consecutive steps, the first of which is `step`; all arrays have a value, or a row, a step.

        Args:
            step: number of the first of these updates, counted from 1.
            losses: mean loss over the global batch.
            norms: global norm of the summed gradient, before clipping.
            sent: bytes since the run began, each row as `traffic.SENT`; one more row, of before the first step.
            metrics: of each step's batch, by name.

        Returns:
            The rows of metrics.jsonl.
        """
        columns = zip(losses.tolist(), norms.tolist(), sent[1:], metrics or [{} for _ in losses], strict=True)
        rows = [
            {"step": step + i, "split": "train", "loss": loss, **measured, "gradient_norm": norm, **_sent(row)}
            for i, (loss, norm, row, measured) in enumerate(columns)
        ]
        if not rows:
            return rows
        self._record(rows)
        _, now, full = (sent[-1] - sent[0]).tolist()
        values = {"loss": losses[-1], **(metrics[-1] if metrics else {})}
        shown = ", ".join(
            f"{name} {value:.3g}" if name.startswith("learning_rate") else f"{name} {value:.3f}"
            for name, value in values.items()
        )
        if sent[-1, 1]:  # one replica sends nothing at all
            shown += f", {tqdm.format_sizeof(now / len(rows), 'B')}/step at the interface ({now / full:.2%})"
        # Drawn a few times a second at most: a notebook keeps each line that it is sent.
        self._bar.set_postfix_str(shown, refresh=False)
        self._bar.update(len(rows))
        return rows

    def evaluation(self, step: int, metrics: dict[str, float], sent: np.ndarray) -> None:
        """Records an evaluation after `step` updates; `sent` as for `train`, of one step."""
        self._record([{"step": step, "split": "eval", **metrics, **_sent(sent)}])
        words = [f"{name} {value:.4f}" for name, value in metrics.items() if name != "examples"]
        self.say(f"step {step}: held-out {', '.join(words)} ({metrics['examples']} examples)")

    def plan(self, step: int, plan: Plan, digest: str) -> None:
        """Records that from `step` on, counted from 1, another selection is trained."""
        trained = sum(entry.trained_parameters for entry in plan.entries)
        row = {"step": step, "split": "plan", "digest": digest, "wire_bytes_per_step": plan.wire_bytes}
        row |= {"nic_bytes_per_step": plan.nic_bytes}
        self._record([row | {"trained_parameters": trained, "units": list(plan.units)}])
        self.say(
            f"step {step}: training {trained_layers(plan)}: {trained:,} parameters, {grouped(plan.nic_bytes)} bytes a "
            f"step at the interface of each of {plan.workers} workers"
        )

    def workers(self, row: dict[str, Any], text: str = "") -> None:
        """Records what is about the workers: that some were lost, or how long they wait; says the text, if any."""
        self._append("metrics.jsonl", [row])
        if text:
            self.say(text)

    def speed(self, row: dict[str, Any]) -> None:
        """Records how fast the steps are: see `times.Speed`."""
        self._append("speed.jsonl", [row])
        self._chart([(row["step"], "train", {f"speed/{n}": v for n, v in row.items() if n.endswith("_per_second")})])

    def samples(self, rows: Sequence[dict[str, Any]]) -> None:
        """Records sampled texts: `{"step", "temperature", "prompt", "text"}`."""
        self._append("samples.jsonl", rows)
        with _writing(self._folder), self._boards["eval"].as_default():
            for i, row in enumerate(rows):
                text = f"temperature {row['temperature']}\n\n```\n{row['prompt']}{row['text']}\n```"
                tf.summary.text(f"samples/{i}", text, step=row["step"])
        if self._following:
            for i, row in enumerate(rows):
                self._following.text(f"sample_{i}.txt", f"{row['prompt']}{row['text']}", row["step"])
        for row in rows:
            head = f"step {row['step']}: sample at temperature {row['temperature']}"
            self.say(f"--- {head}\n{row['prompt']}{row['text']}\n---")

    def configuration(self, operative: str, unused: Sequence[str]) -> None:
        """Writes the bindings in use, and says which were never used."""
        if self._active and operative:
            path = self._folder / "operative_config.gin"
            with _writing(path):
                write_text(path, operative)
            if self._following:
                for name in (path.name, "plan.txt"):
                    self._following.text(name, (self._folder / name).read_text(encoding="utf-8"), 0)
        if unused:
            # A line such as `lr = 0.1` of a gin file is a macro, whatever was meant by it.
            words = [f"{name} ({ours[2:]})" if (ours := meant(name)) else name for name in unused]
            self.say(f"bound but never used: {', '.join(words)}")

    def traffic(self, row: dict[str, Any]) -> None:
        """Writes traffic.json, and says at the end of the run what was planned, counted and read."""
        if not self._active:
            return
        with _writing(self._folder):
            write_json(self._folder / "traffic.json", row)
        if row["workers"] > 1 and row["last_step"] == self._steps:
            read = f"{row['nic_bytes']:,} read from {row['nic']}" if row["nic"] else "none to read"
            self.say(
                f"bytes of steps {row['first_step']} to {row['last_step']}, this worker: {row['planned_bytes']:,} "
                f"planned, {row['counted_bytes']:,} counted in the graph; at the network interface "
                f"{row['expected_nic_bytes']:,} expected, {read}"
            )

    def say(self, text: str) -> None:
        """Prints above the progress bar."""
        if self._active:
            say(text)

    def _record(self, rows: Sequence[dict[str, Any]]) -> None:
        self._append("metrics.jsonl", rows)
        self._chart([(row["step"], *_charted(row)) for row in rows])

    def _chart(self, charted: Sequence[tuple[int, str, dict[str, float]]]) -> None:
        with _writing(self._folder):
            for step, split, numbers in charted:
                with self._boards[split].as_default():
                    for name, value in numbers.items():
                        tf.summary.scalar(name, value, step=step)
        if self._following:
            self._following.log(
                [
                    Row(step, {f"{split}/{name}": value for name, value in numbers.items()})
                    for step, split, numbers in charted
                ]
            )

    def _append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        if not self._active:
            return
        text = "".join(json.dumps({k: _finite(v) for k, v in row.items()}) + "\n" for row in rows)
        with _writing(self._folder / name), open(self._folder / name, "a") as file:
            file.write(text)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        with writing(path):
            yield
    except tf.errors.OpError as error:  # TensorBoard's writer is TensorFlow's own
        raise Fault(f"cannot write {path}: {error.message}; free some space or choose another --run_dir") from None


def _charted(row: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """The chart, by its split, and the numbers that go there."""
    # A switch of a schedule is about the steps that follow it.
    split, left_out = ("eval", _NOT_CHARTED | _BYTES) if row["split"] == "eval" else ("train", _NOT_CHARTED)
    return split, {
        name: value for name, value in row.items() if isinstance(value, (int, float)) and name not in left_out
    }


def _sent(sent: np.ndarray) -> dict[str, Any]:
    """Bytes so far; the share is that of exchanging all gradients whole in every step."""
    payload, at_interface, full = sent.tolist()
    share = at_interface / full if full else 0.0
    return {"wire_bytes": payload, "nic_bytes": at_interface, "wire_share": share}


def _finite(value: Any) -> Any:
    # JSON has no infinity; under a loss scale the norm of a skipped step is one.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _recorded(path: Path, rows: Sequence[dict[str, Any]]) -> int:
    """How many of the rows of consecutive steps a file has."""
    if not rows or not path.exists():
        return 0
    steps = [row["step"] for row in map(json.loads, path.read_bytes().splitlines()) if row["split"] == "train"]
    return sum(row["step"] <= max(steps, default=0) for row in rows)


def _keep_until(path: Path, step: int, evaluated: bool) -> None:
    """Removes the lines of what follows `step`; at 0, where an evaluation may come first, all of them.

    Unless `evaluated`, the evaluation after `step` follows it, too, and its samples, which name no split.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
            if not 0 <= row["step"] <= step or step == 0:
                continue
            if not evaluated and row["step"] == step and row.get("split", "eval") == "eval":
                continue
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was killed while it wrote
        kept.append(line)
    write_atomically(path, lambda file: file.writelines(kept))
