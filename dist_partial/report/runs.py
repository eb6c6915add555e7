"""Run folders as the report reads them: damaged lines are left out and counted, and a run may be going on."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_partial.errors import UserError
from dist_partial.validation import nearest

_STEPS = 2**53  # the largest step that a float holds exactly
_MEASURES = 24  # metrics that are read of the steps of a run
_NO_MEASURES = {"step", "split", "loss", "gradient_norm", "wire_bytes", "nic_bytes", "wire_share", "examples"}
_PHASES = 440  # stretches of a run in which what is trained is distinguished


@dataclasses.dataclass(frozen=True)
class Variable:
    """Holds a line of plan.json.

    Attributes:
        path: without the model's own name.
        layer: the first component of the path in which the model's paths differ.
        shape: () for a scalar.
        dtype: such as float32.
        trained: whether the rules select it.
        unit: what the schedule switches it with, or "".
        rows: (start, stop) of the leading axis if only these are trained.
        rule: the rule that took it.
        reduction: how its gradient travels, or "".
        wire_bytes: payload bytes of one replica in a step, on average.

    Examples:
        >>> kernel = Variable("a/kernel", "a", (8, 2), "float32", True, "", (0, 3), "train a/.*", "all-reduce", 24.0)
        >>> kernel.parameters, kernel.trained_parameters
        (16, 6)
    """

    path: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    unit: str
    rows: tuple[int, int] | None
    rule: str
    reduction: str
    wire_bytes: float

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def trained_parameters(self) -> int:
        if not self.trained:
            return 0
        if self.rows is None or not self.shape:
            return self.parameters
        return (self.rows[1] - self.rows[0]) * math.prod(self.shape[1:])


@dataclasses.dataclass(frozen=True)
class Strip:
    """Holds what was trained when, of one layer.

    Attributes:
        name: of the layer.
        spans: (first step - 1, last step, share of the layer's parameters that these steps trained), in order.

    Examples:
        >>> Strip("head", ((0, 30, 1.0), (30, 40, 0.0))).total
        0.75
    """

    name: str
    spans: tuple[tuple[float, float, float], ...]

    @property
    def total(self) -> float:
        """Share of parameters times steps that was trained, where `spans` covers all steps."""
        steps = sum(stop - start for start, stop, _ in self.spans)
        return sum((stop - start) * share for start, stop, share in self.spans) / steps if steps else 0.0


@dataclasses.dataclass(frozen=True)
class Workers:
    """Holds what the metrics say of the workers of a run.

    Attributes:
        seconds: that steps took, as far as they were added up.
        waited: of these, the seconds in which each worker waited for others; () if there is one, or it is not known.
        losses: (step from which the run went on, what was lost, seconds until then), in order.

    Examples:
        >>> found = Workers(90.0, (4.5, 0.0), ((120, "worker 1", 10.0),))
        >>> found.goodput, found.slowest
        (0.9, 1)
    """

    seconds: float = 0.0
    waited: tuple[float, ...] = ()
    losses: tuple[tuple[int, str, float], ...] = ()

    @property
    def goodput(self) -> float:
        """The share that steps have of their time and of what was lost; NaN if neither is known."""
        whole = self.seconds + sum(seconds for _, _, seconds in self.losses)
        return self.seconds / whole if whole else math.nan

    @property
    def slowest(self) -> int:
        """The worker that has waited least: the others waited for it."""
        return min(range(len(self.waited)), key=lambda worker: self.waited[worker])


@dataclasses.dataclass(frozen=True)
class Run:
    """Holds what was read of one run folder.

    Attributes:
        name: that tells it from the others of the report.
        folder: where it is, as it was given.
        variables: of the model, in its order.
        workers: among which bytes at the network interface are counted, with one replica each; 0 if it is not known.
        full_bytes: bytes at the interface of each of them a step if everything were trained and sent.
        plan_bytes: the same for what the rules select.
        train: [rows, 3]: step, loss, cumulative bytes at the interface; by step, NaN for what is missing.
        measured: [rows, 2] by name: steps with metrics of their batches, and with learning rates.
        share: of exchanging everything, up to the last step; NaN if it is not known.
        evaluations: rows of the split "eval", by step; numbers only.
        switches: (step, names of the units that are trained from it on); () if the selection never changes.
        staff: what is known of its workers.
        samples: rows of samples.jsonl whose fields have the right types.
        traffic: traffic.json, {} if there is none.
        fingerprint: run_fingerprint.json, {} if there is none.
        bindings: operative_config.gin as name and text.
        configuration: its text.
        skipped: lines that could not be read, by file; the unfinished last line of a running run is none of them.
    """

    name: str
    folder: Path
    variables: tuple[Variable, ...]
    workers: int
    full_bytes: float
    plan_bytes: float
    train: np.ndarray
    measured: dict[str, np.ndarray]
    share: float
    evaluations: tuple[dict[str, float], ...]
    switches: tuple[tuple[int, tuple[str, ...]], ...]
    staff: Workers
    samples: tuple[dict[str, Any], ...]
    traffic: dict[str, Any]
    fingerprint: dict[str, Any]
    bindings: dict[str, str]
    configuration: str
    skipped: dict[str, int]

    @property
    def last_step(self) -> int:
        """The last that the metrics know; 0 if there is none."""
        steps = [*self.train[-1:, 0].tolist(), *[row["step"] for row in self.evaluations[-1:]]]
        return int(max(steps, default=0))

    @property
    def measures(self) -> list[str]:
        """Names of metrics, of steps or evaluations, and of learning rates."""
        found = dict.fromkeys(name for row in self.evaluations for name in row) | dict.fromkeys(self.measured)
        return [name for name in found if name not in _NO_MEASURES]

    @property
    def planned_steps(self) -> int | None:
        text = self.bindings.get("run.steps", "")
        return int(text) if text.isdecimal() and len(text) < 16 else None

    @property
    def alone(self) -> bool:
        """Whether all its replicas are in one process, so that nothing leaves the machine."""
        return self.traffic.get("workers") == 1

    @property
    def nic_bytes(self) -> float:
        """Bytes at the network interface up to the last step that has them; NaN if none has."""
        sent = self.train[~np.isnan(self.train[:, 2]), 2]
        return float(sent[-1]) if len(sent) else math.nan

    @property
    def trained_parameters(self) -> int:
        return sum(variable.trained_parameters for variable in self.variables)

    @property
    def parameters(self) -> int:
        return sum(variable.parameters for variable in self.variables)

    def strips(self) -> tuple[Strip, ...]:
        """Says what was trained when, by layer, or by unit of the schedule where layers cannot be distinguished."""
        last = self.last_step
        if not last:
            return ()
        layers: dict[str, list[Variable]] = {}
        for variable in self.variables:
            layers.setdefault(variable.layer, []).append(variable)
        if not self.switches:
            return tuple(Strip(name, ((0, last, _share(members)),)) for name, members in layers.items())
        phases = _phases(self.switches, last)
        names = dict.fromkeys(unit for _, units in self.switches for unit in units)
        if not names.keys() <= {variable.unit for variable in self.variables}:
            return tuple(Strip(name, tuple((a, b, on.get(name, 0.0)) for a, b, on in phases)) for name in names)
        strips = []
        for name, members in layers.items():
            parts = {v.unit: 0.0 for v in members if v.trained}
            for unit in parts:
                parts[unit] = _share(members, lambda v, unit=unit: v.unit == unit)  # type: ignore[misc]
            shares = [(a, b, sum(on.get(unit, 0.0) * share for unit, share in parts.items())) for a, b, on in phases]
            strips.append(Strip(name, tuple(shares)))
        return tuple(strips)


def _phases(switches: Sequence[tuple[int, tuple[str, ...]]], last: int) -> list[tuple[float, float, dict[str, float]]]:
    """From and to which step which units are trained; averaged over equal stretches where there are too many."""
    stops = [*[min(step - 1, last) for step, _ in switches[1:]], last]
    exact = [(step - 1, stop, units) for (step, units), stop in zip(switches, stops, strict=True) if stop >= step]
    if len(exact) <= _PHASES:
        return [(start, stop, dict.fromkeys(units, 1.0)) for start, stop, units in exact]
    width = last / _PHASES
    columns: list[dict[str, float]] = [{} for _ in range(_PHASES)]
    for start, stop, units in exact:
        for number in range(int(start / width), min(int(stop / width) + 1, _PHASES)):
            part = (min(stop, (number + 1) * width) - max(start, number * width)) / width
            for unit in units if part > 0 else ():
                columns[number][unit] = columns[number].get(unit, 0.0) + part
    return [(number * width, (number + 1) * width, on) for number, on in enumerate(columns)]


def read(folders: Sequence[Path]) -> list[Run]:
    """Reads run folders; one that is named twice is read once.

    Raises:
        UserError: one is absent, is no run folder, or has a plan.json that cannot be read.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plan = {"variables": [{"path": "head/kernel", "shape": [8, 2], "trained": True}], "workers": 2}
        ...     _ = Path(folder, "plan.json").write_text(json.dumps(plan))
        ...     _ = Path(folder, "metrics.jsonl").write_text('{"split": "train", "step": 1, "loss": 2.5}\\n')
        ...     [run] = read([Path(folder)])
        >>> run.trained_parameters, run.last_step, run.train[:, 1].tolist()
        (16, 1, [2.5])
    """
    given: dict[Path, Path] = {}
    for folder in folders:
        _check(folder)
        given.setdefault(folder.resolve(), folder)
    return [_read(folder, name) for folder, name in zip(given.values(), _names(list(given)), strict=True)]


def _check(folder: Path) -> None:
    if not folder.exists():
        around = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        near = nearest(folder.name, around, folder=folder.parent)
        raise UserError(f"no folder {folder}{near or '; name the folder of a run, such as runs/quickstart'}")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: name the run folder that it is in")
    if not (folder / "plan.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/plan.json"))
        more = f", but {', '.join(inside[:5])} in it {'are' if len(inside) > 1 else 'is'}" if inside else ""
        raise UserError(
            f"{folder} is no run folder: it has no plan.json{more}; name a folder that training has written"
        )


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, with as many of those above as tell equal ones apart."""
    names = [folder.name or str(folder) for folder in folders]
    for count in itertools.count(2):
        equal = [names.count(name) > 1 for name in names]
        if not any(equal):
            return ["".join(c if c.isprintable() else "\ufffd" for c in name) for name in names]
        names = [
            "/".join(folder.parts[-count:]) if again else name
            for folder, name, again in zip(folders, names, equal, strict=True)
        ]
    raise AssertionError("unreachable: the folders differ")


def _read(folder: Path, name: str) -> Run:
    plan = _plan(folder / "plan.json")
    train: dict[int, tuple[float, float, float]] = {}
    measured: dict[str, dict[int, float]] = {}
    shares: dict[int, float] = {}
    evaluations: dict[int, dict[str, float]] = {}
    switches: dict[int, tuple[str, ...]] = {}
    of_workers: list[dict[str, Any]] = []
    metrics, samples = _Lines(folder / "metrics.jsonl"), _Lines(folder / "samples.jsonl")
    for row in metrics:
        step, split = row.get("step"), row.get("split")
        if type(step) is not int or not 0 <= step < _STEPS or not isinstance(split, str):
            metrics.skipped += 1
        elif split == "train":
            train[step] = (step, _number(row.get("loss")), _number(row.get("nic_bytes")))
            shares[step] = _number(row.get("wire_share"))
            for key in row.keys() - _NO_MEASURES:
                if key in measured or len(measured) < _MEASURES:
                    measured.setdefault(key, {})[step] = _number(row[key])
        elif split == "eval":
            evaluations[step] = {key: _number(value) for key, value in row.items() if key != "split"}
        elif split == "plan" and isinstance(row.get("units"), list):
            switches[max(step, 1)] = tuple(dict.fromkeys(map(str, row["units"])))
        elif split in ("workers", "fault"):
            of_workers.append(row)
    texts = []
    for row in samples:
        kinds = {"step": int, "temperature": (int, float), "prompt": str, "text": str}
        if all(isinstance(row.get(key), kind) for key, kind in kinds.items()):  # type: ignore[arg-type]
            texts.append(row)
        else:
            samples.skipped += 1
    skipped = {lines.path.name: lines.skipped for lines in (metrics, samples) if lines.skipped}
    configuration = _text(folder / "operative_config.gin")
    return Run(
        name=name,
        folder=folder,
        variables=_variables(plan["variables"]),
        workers=plan["workers"] if type(plan.get("workers")) is int else 0,
        full_bytes=_number(plan.get("full_nic_bytes_per_step")),
        plan_bytes=_number(plan.get("nic_bytes_per_step")),
        train=np.array([train[step] for step in sorted(train)], np.float64).reshape(-1, 3),
        measured={
            key: np.array(sorted(values.items()), np.float64).reshape(-1, 2) for key, values in sorted(measured.items())
        },
        share=shares[max(shares)] if shares else math.nan,
        evaluations=tuple(evaluations[step] for step in sorted(evaluations)),
        switches=tuple((step, switches[step]) for step in sorted(switches)),
        staff=_staff(of_workers),
        samples=tuple(texts),
        traffic=_json(folder / "traffic.json"),
        fingerprint=_json(folder / "run_fingerprint.json"),
        bindings=bindings(configuration),
        configuration=configuration,
        skipped=skipped,
    )


def _staff(rows: Sequence[dict[str, Any]]) -> Workers:
    """Adds up the rows about the workers, of as many as there were last."""
    seconds, waited, losses = 0.0, [0.0], []
    for row in rows:
        took = max(0.0, _number(row.get("seconds")))  # 0 for what is none
        numbers = [max(0.0, _number(each)) for each in _list(row.get("waited_seconds"))]
        if row["split"] == "workers":
            seconds += took
            waited = [a + b for a, b in itertools.zip_longest(waited, numbers, fillvalue=0.0)][: len(numbers)]
            continue
        names = ", ".join(f"worker {each}" for each in _list(row.get("workers")) if type(each) is int)
        counts = [row.get(name) for name in ("of", "now")]
        if all(type(count) is int for count in counts):
            names = f"{names and names + '; '}{counts[1]} instead of {counts[0]} workers go on"
        losses.append((row["step"], names or "a connection", took))
    return Workers(seconds, tuple(waited) if len(waited) > 1 else (), tuple(losses))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


class _Lines:
    """The objects of a JSON Lines file, none if it is absent; counts what it cannot read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            file = open(self.path, "rb")  # noqa: SIM115 (closed below)
        except OSError:
            return
        with file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    self.skipped += line.endswith(b"\n")  # or else it is being written
                    continue
                if isinstance(row, dict):
                    yield row
                else:
                    self.skipped += 1


def _plan(path: Path) -> dict[str, Any]:
    content = _json(path)
    variables = content.get("variables")
    if not isinstance(variables, list) or not variables:
        raise UserError(f"{path} is damaged: it lists no variables; run the same training command again to write it")
    for variable in variables:
        shape = variable.get("shape") if isinstance(variable, dict) else None
        good = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        if not good or not isinstance(variable.get("path"), str):
            raise UserError(
                f"{path} is damaged at {json.dumps(variable)[:80]}: run the same training command again to write it"
            )
    return content


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def _variables(rows: Sequence[dict[str, Any]]) -> tuple[Variable, ...]:
    paths = [row["path"].split("/") for row in rows]
    # A model inside a model: what all paths begin with tells nothing apart.
    common = 0
    while len({tuple(path[: common + 1]) for path in paths}) == 1 and all(len(path) > common + 2 for path in paths):
        common += 1
    variables = []
    for row, path in zip(rows, paths, strict=True):
        rows_of = row.get("rows")
        pair = isinstance(rows_of, list) and len(rows_of) == 2 and all(type(n) is int for n in rows_of)
        variables.append(
            Variable(
                path=row["path"],
                layer=path[common],
                shape=tuple(row["shape"]),
                dtype=str(row.get("dtype", "")),
                trained=row.get("trained") is True,
                unit=str(row.get("unit") or ""),
                rows=(rows_of[0], rows_of[1]) if pair and rows_of else None,
                rule=str(row.get("rule", "")),
                reduction=str(row.get("reduction") or ""),
                wire_bytes=_number(row.get("wire_bytes_per_step")),
            )
        )
    return tuple(variables)


def _share(variables: Sequence[Variable], on: Callable[[Variable], bool] = lambda _: True) -> float:
    parameters = sum(variable.parameters for variable in variables)
    return sum(v.trained_parameters for v in variables if on(v)) / parameters if parameters else 0.0


def bindings(text: str) -> dict[str, str]:
    """Reads the bindings of an operative configuration: name and value as text, in one line.

    Examples:
        >>> bindings("# Parameters for run:\\nrun.rules = \\\\\\n    [('train', '.*')]\\nrun.steps = 5\\n")
        {'run.rules': "[('train', '.*')]", 'run.steps': '5'}
    """
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if match := re.match(r"([\w./]+) = (.*)", line):
            name = match[1]
            found[name] = match[2].strip().removesuffix("\\").strip()
        elif line.startswith((" ", "\t")) and name:
            found[name] = f"{found[name]} {line.strip()}".strip()
        else:
            name = ""
    return found
