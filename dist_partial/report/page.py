"""The report's page: what runs have in common side by side, set by a Jinja template that escapes every text."""

import dataclasses
import math
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
import markupsafe

from dist_partial.report import plots
from dist_partial.report.plots import bytes_text, percent
from dist_partial.report.runs import Run, Variable

_EARLIER = 8  # steps whose samples are shown beside the last one's
_TEXTS = 3  # samples of one run, step and temperature
_MEASURES = 24  # plots of metrics
_CARDS = 24  # texts side by side
_CHARACTERS = 3000  # of a sample
_VALUES = 100  # evaluations in the table of values
_FOLDED = 40  # lines from which a table is folded
# Control characters and halves of surrogate pairs, which HTML cannot hold, and what turns the direction of the text.
_UNSHOWN = (*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)
_REPLACED = dict.fromkeys((*_UNSHOWN, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


@dataclasses.dataclass(frozen=True)
class Figure:
    """Holds a plot with its description.

    Attributes:
        title: a heading.
        note: how to read it.
        label: for those who do not see it.
        plot: the drawing.
    """

    title: str
    note: str
    label: str
    plot: plots.Plot


@dataclasses.dataclass(frozen=True)
class Layer:
    """Holds what a plan says of a layer's variables, or of neighbouring layers about which it says the same."""

    name: str
    variables: int
    parameters: int
    trained_parameters: int
    rules: str
    reductions: str
    wire_bytes: float


@dataclasses.dataclass(frozen=True)
class Sample:
    """Holds a sampled text: the run's number, step, temperature, prompt and continuation."""

    run: int
    step: int
    temperature: float
    prompt: str
    text: str


def page(runs: Sequence[Run]) -> str:
    """Writes the whole page as HTML."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, markupsafe.Markup) else visible(str(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": bytes_text, "percent": percent, "visible": visible, "number": _number}
    environment.globals |= {"svg": markupsafe.Markup, "mark": _mark}
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    lines = [summary(run) for run in runs]
    # What all have in common is above the table.
    common = {name: lines[0].get(name) for name in ("model", "data") if len({line.get(name) for line in lines}) == 1}
    common = {name: text for name, text in common.items() if text}
    return template.render(
        runs=runs,
        summary=lines,
        summary_names=[name for name in dict.fromkeys(n for line in lines for n in line) if name not in common],
        common=common,
        figures=figures(runs),
        strips=strips(runs),
        values=[_thinned(run.evaluations, _VALUES) for run in runs],
        value_names=_value_names(runs),
        staff=[(number, run.staff) for number, run in enumerate(runs) if run.staff.losses or run.staff.waited],
        values_at_most=_VALUES,
        traffic=[(number, run.traffic) for number, run in enumerate(runs) if _metered(run)],
        layers=[layers(run.variables) for run in runs],
        folded=_FOLDED,
        characters=_CHARACTERS,
        series=plots.SERIES,
        samples=samples(runs),
        differences=differences(runs),
        notes=[_notes(run) for run in runs],
    )


def summary(run: Run) -> dict[str, str]:
    """Makes a line of the table that compares runs, as text."""
    last = run.last_step
    steps = f"{last:,}" + (f" of {run.planned_steps:,}" if run.planned_steps and run.planned_steps > last else "")
    end = run.evaluations[-1] if run.evaluations else {}
    best = min((row["loss"] for row in run.evaluations if math.isfinite(row.get("loss", math.nan))), default=math.nan)
    cells = {"steps": steps}
    if math.isfinite(end.get("loss", math.nan)):
        lowest = "" if end["loss"] <= best else f" (lowest {best:.4f})"
        cells["held-out loss"] = f"{end['loss']:.4f}{lowest}"
    for name in _value_names([run]):
        if name not in ("loss", "examples") and math.isfinite(end.get(name, math.nan)):
            cells[name.replace("_", " ")] = f"{end[name]:.4f}"
    share = percent(run.trained_parameters / run.parameters) if run.parameters else "-"
    cells["selected parameters"] = f"{run.trained_parameters:,} ({share})"
    cells["bytes sent"] = bytes_text(run.nic_bytes)
    if last:
        cells["of exchanging everything"] = percent(run.share)
    milliseconds = run.traffic.get("step_ms")
    if isinstance(milliseconds, (int, float)):
        cells["time a step"] = f"{milliseconds:,.1f}\u00a0ms"
    data = run.fingerprint.get("data")
    if isinstance(data, dict) and data.get("name"):
        cells["data"] = str(data["name"])
    if model := run.bindings.get("run.model"):
        cells["model"] = re.sub(r"^@(?:\w+/)?", "", model)
    if run.fingerprint.get("schedule"):
        cells["schedule"] = re.sub(r"^@|\(\)$", "", run.bindings.get("run.schedule", str(run.fingerprint["schedule"])))
    return cells


def figures(runs: Sequence[Run]) -> list[Figure]:
    """Draws the plots in which all runs share the axes, as far as there is anything to draw."""
    name = plots.quality(runs)
    words = name.replace("_", " ")
    ends = "; ".join(
        f"{run.name}: {run.evaluations[0].get(name, math.nan):.3f} at step {run.evaluations[0]['step']:,.0f}, "
        f"{run.evaluations[-1].get(name, math.nan):.3f} at step {run.evaluations[-1]['step']:,.0f} after "
        f"{bytes_text(run.evaluations[-1].get('nic_bytes', math.nan))}"
        for run in runs
        if run.evaluations
    )
    sent = "; ".join(
        f"{run.name}: {bytes_text(run.nic_bytes)} of {bytes_text(run.full_bytes * run.last_step)}" for run in runs
    )
    trained = "; ".join(
        f"{run.name}: {run.train[0, 1]:.3f} at step {run.train[0, 0]:,.0f}, {run.train[-1, 1]:.3f} at step "
        f"{run.train[-1, 0]:,.0f}"
        for run in runs
        if len(run.train)
    )
    drawn = [
        (
            "Loss",
            "Thin: training, with the range of the steps that share a point. Marked: held-out.",
            f"Training and held-out loss over steps. Training, {trained}.",
            plots.loss(runs),
        ),
        (
            f"Held-out {words} over bytes",
            "What a byte sent buys: lower and further left is better.",
            f"Held-out {words} over bytes sent. {ends}.",
            plots.held_out(runs, "nic_bytes"),
        ),
        (
            f"Held-out {words} over steps",
            "The same evaluations by the number of updates.",
            f"Held-out {words} over steps. {ends}.",
            plots.held_out(runs, "step"),
        ),
        (
            "Bytes sent",
            "What has left each worker's network interface. Dotted: if everything were trained and exchanged.",
            f"Cumulative bytes sent over steps, against exchanging everything. {sent}.",
            plots.sent(runs),
        ),
        *_measures(runs),
    ]
    return [Figure(title, note, visible(label), plot) for title, note, label, plot in drawn if plot is not None]


def _measures(runs: Sequence[Run]) -> list[tuple[str, str, str, plots.Plot | None]]:
    """The plots of metrics and learning rates, but of what another plot has."""
    names = dict.fromkeys(name for run in runs for name in run.measures)
    known = {name for run in runs for name in run.measured}
    shown = [name for name in names if name in known or name != plots.quality(runs)][:_MEASURES]
    found = []
    for number, name in enumerate(shown):
        words = name.replace("_", " ")
        title = words[:1].upper() + words[1:]
        note = "Thin: training, with the range of the steps that share a point. Marked: held-out."
        note = note if any(name in row for run in runs for row in run.evaluations) else "Of each step."
        found.append((title, note, f"{title} over steps.", plots.measure(runs, name, number)))
    return found


def strips(runs: Sequence[Run]) -> list[Figure | None]:
    """Draws what each run trained when; None for one without steps."""
    drawn: list[Figure | None] = []
    rows = [plots.merged(run.strips()) for run in runs]
    for run, each, plot in zip(runs, rows, plots.strips(runs, rows), strict=True):
        said = ", ".join(f"{strip.name} {percent(strip.total)}" for strip in each[:60])
        label = f"What {run.name} trained in its {run.last_step:,} steps, by layer: {said}."
        drawn.append(Figure(run.name, "", visible(label), plot) if plot else None)
    return drawn


def layers(variables: Sequence[Variable]) -> list[Layer]:
    """Groups a plan's lines by layer; with many layers, equal neighbours become one line.

    Examples:
        >>> names = ("kernel", "bias")
        >>> variables = [Variable(f"a/{n}", "a", (2,), "float32", n == "bias", "", None, "", "", 8.0) for n in names]
        >>> [(line.name, line.variables, line.parameters, line.trained_parameters) for line in layers(variables)]
        [('a', 2, 4, 2)]
    """
    members: dict[str, list[Variable]] = {}
    for variable in variables:
        members.setdefault(variable.layer, []).append(variable)
    lines: list[Layer] = []
    first = ""
    for name, group in members.items():
        trained = [variable for variable in group if variable.trained]
        line = Layer(
            name,
            len(group),
            sum(variable.parameters for variable in group),
            sum(variable.trained_parameters for variable in group),
            "; ".join(dict.fromkeys(variable.rule for variable in group)),
            "; ".join(dict.fromkeys(variable.reduction for variable in trained if variable.reduction)) or "-",
            sum(variable.wire_bytes for variable in group if math.isfinite(variable.wire_bytes)),
        )
        before = lines[-1] if lines and len(members) > _FOLDED else None
        if before and (before.rules, before.reductions) == (line.rules, line.reductions):
            lines[-1] = Layer(
                f"{first} … {name}",
                before.variables + line.variables,
                before.parameters + line.parameters,
                before.trained_parameters + line.trained_parameters,
                line.rules,
                line.reductions,
                before.wire_bytes + line.wire_bytes,
            )
        else:
            first = name
            lines.append(line)
    return lines


def samples(runs: Sequence[Run]) -> list[tuple[str, list[Sample], int]]:
    """Puts samples side by side: first the last of each run, then earlier steps.

    Returns:
        A heading, "" for the last ones; texts by prompt, temperature and run; how many texts more there are.

    Examples:
        >>> from types import SimpleNamespace
        >>> rows = [{"step": step, "temperature": 1.0, "prompt": "def", "text": f" {step}"} for step in (10, 20)]
        >>> [(title, [sample.text for sample in texts]) for title, texts, _ in samples([SimpleNamespace(samples=rows)])]
        [('', [' 20']), ('step 10', [' 10'])]
    """
    by_place: dict[tuple[int, int, float, str], list[Sample]] = {}
    for number, run in enumerate(runs):
        for row in run.samples:
            key = row["step"], number, row["temperature"], row["prompt"]
            if len(found := by_place.setdefault(key, [])) < _TEXTS:
                found.append(Sample(number, row["step"], row["temperature"], row["prompt"], row["text"]))
    last: dict[tuple[int, float, str], int] = {}
    for step, number, temperature, prompt in by_place:
        last[number, temperature, prompt] = max(step, last.get((number, temperature, prompt), step))
    latest = [(last[place], *place) for place in last]
    steps = sorted({step for step, *place in by_place if last[tuple(place)] != step})  # type: ignore[index]
    groups = [("", latest)] if latest else []
    for step in reversed(_thinned(steps, _EARLIER)):
        groups.append((f"step {step:,}", [place for place in by_place if place[0] == step]))
    # By prompt, in the order in which they came, so that what can be compared is together.
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompt for *_, prompt in by_place))}
    sets = []
    for title, places in groups:
        order = sorted(places, key=lambda place: (prompts[place[3]], place[2], place[1]))
        texts = [sample for place in order for sample in by_place[place]]
        sets.append((title, texts[:_CARDS], len(texts[_CARDS:])))
    return sets


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Lists bindings in which runs differ: the name, and the value in each; "" where there is none.

    Examples:
        >>> from types import SimpleNamespace
        >>> differences([SimpleNamespace(bindings={"run.seed": seed, "run.steps": "5"}) for seed in ("0", "1")])
        [('run.seed', ['0', '1'])]
    """
    names = sorted({name for run in runs for name in run.bindings})
    table = [(name, [run.bindings.get(name, "") for run in runs]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def visible(text: str, limit: int | None = None) -> str:
    """Replaces what cannot be shown by the replacement character, and cuts after `limit` characters.

    Examples:
        >>> visible("a\\x00b"), visible("abcdef", limit=2)
        ('a\ufffdb', 'ab… (4 more characters)')
    """
    rest = len(text) - limit if limit else 0
    shown = text[:limit].translate(_REPLACED)
    return f"{shown}… ({rest:,} more characters)" if rest > 0 else shown


def _value_names(runs: Sequence[Run]) -> list[str]:
    names = dict.fromkeys(name for run in runs for row in run.evaluations for name in row)
    return [name for name in names if name not in ("step", "wire_bytes", "nic_bytes", "wire_share")][:8]


def _thinned(rows: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the rows, evenly spaced, the first and the last among them."""
    if len(rows) <= count:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (count - 1))] for i in range(count)]


def _metered(run: Run) -> bool:
    # In one process there is no network to read.
    workers = run.traffic.get("workers")
    return isinstance(workers, int) and workers > 1


def _notes(run: Run) -> list[str]:
    notes = []
    if not run.last_step:
        notes.append("No step is recorded yet: the plan is known, the rest comes with the first steps.")
    elif run.nic_bytes == 0:
        notes.append("Nothing is sent: there is one replica, or what it trains is never sent.")
    elif run.alone:
        notes.append(
            f"All replicas are in one process, and nothing leaves the machine: bytes are what would leave each of "
            f"{run.workers} workers with one of them each."
        )
    if run.last_step and not run.evaluations:
        notes.append("No evaluation is recorded yet.")
    lost = sum(map(math.isnan, run.train[:, 1].tolist()))
    if lost:
        notes.append(f"The loss of {lost:,} step{'s' if lost > 1 else ''} is not finite and is left out of the plots.")
    for name, count in run.skipped.items():
        notes.append(f"{count:,} line{'s' if count > 1 else ''} of {name} cannot be read and {_are(count)} left out.")
    if not run.configuration:
        notes.append("There is no operative_config.gin yet.")
    return notes


def _are(count: int) -> str:
    return "are" if count > 1 else "is"


def _number(value: Any) -> str:
    """A number as a table shows it; "-" where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4f}"


def _mark(number: int) -> markupsafe.Markup:
    """A run's sign in the legend: its line with its mark."""
    dashes = ("", ' stroke-dasharray="7 3"', ' stroke-dasharray="3 2.5"')[number // plots.SERIES % 3]
    color = f"var(--series-{number % plots.SERIES})"
    shapes = {
        "o": '<circle cx="16" cy="7" r="4"/>',
        "s": '<rect x="12.3" y="3.3" width="7.4" height="7.4"/>',
        "D": '<path d="M16 1.8 21.2 7 16 12.2 10.8 7z"/>',
        "^": '<path d="M16 2.4 20.6 11H11.4z"/>',
        "v": '<path d="M16 11.6 20.6 3H11.4z"/>',
        "P": '<path d="M14.4 2.5h3.2v2.9h2.9v3.2h-2.9v2.9h-3.2V8.6h-2.9V5.4h2.9z"/>',
        "X": '<path d="M13 2.2 16 5.2l3-3 1.8 1.8-3 3 3 3-1.8 1.8-3-3-3 3-1.8-1.8 3-3-3-3z"/>',
        "*": '<path d="M16 1.6l1.4 3.7 4 .2-3.1 2.5 1 3.9L16 9.7l-3.3 2.2 1-3.9-3.1-2.5 4-.2z"/>',
    }
    shape = shapes[plots.MARKERS[number % plots.SERIES]]
    return markupsafe.Markup(
        f'<svg class="mark" viewBox="0 0 32 14" width="32" height="14" aria-hidden="true" style="fill: {color}">'
        f'<path d="M0 7H32" style="stroke: {color}" stroke-width="2"{dashes}/>{shape}</svg>'
    )
