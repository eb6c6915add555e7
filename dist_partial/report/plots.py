"""The report's plots: Matplotlib's SVG, in which colours are the page's CSS variables and ids are unique to the plot.

SVG rather than a plotting library in JavaScript: a plot is tens of kilobytes instead of megabytes, prints, needs no
script, and follows the page from light to dark. Each is drawn twice, for wide and for narrow pages, since text that
shrinks with a plot cannot be read on a phone.
"""

import dataclasses
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from dist_partial.report.runs import Run, Strip

SERIES = 8  # colours of the page; further runs begin them again with other dashes
MARKERS = "osD^vPX*"
DASHES = ("solid", (0, (5, 2)), (0, (2, 1.5)))
_BINS = {True: 220, False: 120}  # points of a curve on a wide and on a narrow page
_LOSSES = {True: 80, False: 50}  # of the training loss, which is noisy: several steps share a point
_CELLS = 6000  # rectangles of a strip chart at most
_LAYERS = 40  # rows of a strip chart from which neighbours that were trained alike share one
_TICKS = [1, 2, 2.5, 5, 10]
_LEVELS = 8  # shades of a strip
_NAMES = {True: 34, False: 17}  # characters of a layer's name beside its strip

Margins = tuple[float, float, float, float]  # left, right, top and bottom of the axes, in CSS pixels

# Placeholders for the page's CSS variables: Matplotlib takes nothing but colours.
_VARIABLES = {"#0a0101": "ink", "#0a0102": "soft", "#0a0103": "line", "#0a0104": "track", "#0a0105": "paper"}
_VARIABLES |= {f"#0a02{i:02x}": f"series-{i}" for i in range(SERIES)}
_INK, _SOFT, _LINE, _TRACK, _PAPER = list(_VARIABLES)[:5]

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "dist_partial",
    "text.parse_math": False,
    "path.simplify": False,
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _SOFT,
    "axes.labelsize": 11,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlecolor": _SOFT,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
}


@dataclasses.dataclass(frozen=True)
class Plot:
    """Holds a plot as SVG elements, for pages of two widths.

    Attributes:
        wide: for columns of about 590 CSS pixels.
        narrow: for about 350.
    """

    wide: str
    narrow: str


def loss(runs: Sequence[Run]) -> Plot | None:
    """Draws training loss (mean, and range where steps share a point) and held-out loss; None without any."""

    def draw(axes: Axes, wide: bool) -> None:
        shown: list[np.ndarray] = []
        for number, run in enumerate(runs):
            steps, mean, low, high = binned(run.train[:, 0], run.train[:, 1], _LOSSES[wide])
            axes.fill_between(steps, low, high, color=_color(number), alpha=0.1, linewidth=0)
            axes.plot(steps, mean, color=_color(number), linewidth=1, alpha=0.75, linestyle=_dash(number))
            held_out = column(run, "loss")
            _curve(axes, column(run, "step"), held_out, number, wide)
            shown += [mean, held_out]
        _scale(axes, np.concatenate(shown))
        axes.set_title("loss")
        _steps(axes)

    known = [np.concatenate([run.train[:, 1], column(run, "loss")]) for run in runs]
    return _plot(draw, "loss") if any(np.isfinite(values).any() for values in known) else None


def held_out(runs: Sequence[Run], over: str) -> Plot | None:
    """Draws held-out bits per byte, or loss, over "step" or "nic_bytes"; None without any."""
    name = quality(runs)

    def draw(axes: Axes, wide: bool) -> None:
        shown = []
        for number, run in enumerate(runs):
            _curve(axes, column(run, over), column(run, name), number, wide)
            shown.append(column(run, name))
        _scale(axes, np.concatenate(shown))
        axes.set_title(f"held-out {name.replace('_', ' ')}")
        if over == "step":
            _steps(axes)
        else:
            _bytes(axes.xaxis)
            axes.set_xlim(left=0)
            axes.set_xlabel("bytes sent, each worker", loc="right")

    # With one replica nothing is sent, and bytes tell nothing.
    known = any((np.isfinite(column(run, name)) & (column(run, over) > 0)).any() for run in runs)
    return _plot(draw, f"held-out-{over}") if known else None


def measure(runs: Sequence[Run], name: str, number: int) -> Plot | None:
    """Draws a metric of steps and evaluations, or a learning rate; None without any.

    Args:
        runs: in whose order they are drawn.
        name: as the rows have it.
        number: of the plot, unique on the page.
    """

    def draw(axes: Axes, wide: bool) -> None:
        shown: list[np.ndarray] = []
        for place, run in enumerate(runs):
            rows = run.measured.get(name, np.zeros([0, 2]))
            steps, mean, low, high = binned(rows[:, 0], rows[:, 1], _LOSSES[wide])
            axes.fill_between(steps, low, high, color=_color(place), alpha=0.1, linewidth=0)
            axes.plot(steps, mean, color=_color(place), linewidth=1, alpha=0.75, linestyle=_dash(place))
            _curve(axes, column(run, "step"), column(run, name), place, wide)
            shown += [mean, column(run, name)]
        _scale(axes, np.concatenate(shown))
        axes.set_title(_cut(name.replace("_", " "), _NAMES[wide]))
        _steps(axes)

    known = [values for run in runs for values in (column(run, name), run.measured.get(name, np.zeros([0, 2]))[:, 1])]
    return _plot(draw, f"measure-{number}") if any(np.isfinite(values).any() for values in known) else None


def sent(runs: Sequence[Run]) -> Plot | None:
    """Draws the bytes that have left each worker, and what exchanging everything would be; None without any."""

    def draw(axes: Axes, wide: bool) -> None:
        ends: dict[float, int] = {}
        for number, run in enumerate(runs):
            steps, mean, _, _ = binned(run.train[:, 0], run.train[:, 2], _BINS[wide])
            axes.plot(steps, mean, color=_color(number), linewidth=1.8, linestyle=_dash(number))
            if math.isfinite(run.full_bytes):
                ends[run.full_bytes] = max(run.last_step, ends.get(run.full_bytes, 0))
        for full, last in ends.items():
            axes.plot([0, last], [0, full * last], color=_INK, linewidth=1.2, linestyle=(0, (1, 3)))
        axes.set_ylim(bottom=0)
        axes.set_title("bytes")
        _bytes(axes.yaxis)
        _steps(axes)

    return _plot(draw, "sent") if any((run.train[:, 2] > 0).any() for run in runs) else None


def strips(runs: Sequence[Run], rows: Sequence[Sequence[Strip]]) -> list[Plot | None]:
    """Draws the strips of each run, shaded by the share of a layer's parameters that was trained; None without any."""
    last = max((run.last_step for run in runs), default=0)
    longest = max((len(strip.name) for each in rows for strip in each), default=0)
    return [
        _strips(run, each, number, last, longest) for number, (run, each) in enumerate(zip(runs, rows, strict=True))
    ]


def _strips(run: Run, rows: Sequence[Strip], number: int, last: int, longest: int) -> Plot | None:
    if not rows:
        return None
    pitch = 18.0 if len(rows) <= _LAYERS else max(3.0, 700 / len(rows))
    every = math.ceil(14 / pitch)

    def draw(axes: Axes, wide: bool) -> None:
        levels: dict[int, list[tuple[float, float, int]]] = {}
        columns = max(40, min(_BINS[wide] * 2, _CELLS // len(rows)))
        for place, strip in enumerate(rows):
            for start, stop, share in cells(strip, last, columns):
                levels.setdefault(math.ceil(share * _LEVELS), []).append((start, stop, place))
        height = 0.72 if pitch >= 10 else 0.9
        levels[0] = [(0, run.last_step, place) for place in range(len(rows))]
        for level, rectangles in sorted(levels.items()):
            path = Path.make_compound_path(
                *[
                    Path([(a, y - height / 2), (b, y - height / 2), (b, y + height / 2), (a, y + height / 2), (0, 0)],
                         [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY])
                    for a, b, y in rectangles
                ]
            )  # fmt: skip
            color, alpha = (_color(number), 0.15 + 0.85 * level / _LEVELS) if level else (_TRACK, 1.0)
            axes.add_patch(PathPatch(path, facecolor=color, alpha=alpha, linewidth=0))
        axes.set_xlim(0, last)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        labelled = range(0, len(rows), every)
        axes.set_yticks(labelled, [_cut(rows[place].name, _NAMES[wide]) for place in labelled])
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        shares = axes.secondary_yaxis("right")
        shares.set_yticks(labelled, [percent(rows[place].total) for place in labelled])
        shares.tick_params(axis="y", length=0, labelcolor=_SOFT)
        shares.spines["right"].set_visible(False)
        axes.spines["left"].set_visible(False)
        _steps(axes)
        axes.grid(False)

    def margins(wide: bool) -> Margins:
        return 12 + 6.6 * min(longest, _NAMES[wide]), 46, 2, 40

    return _plot(draw, f"strips-{number}", 42 + pitch * len(rows), 1060, margins)


def quality(runs: Sequence[Run]) -> str:
    """Chooses what compares held-out quality: bits per byte if every run that has evaluations has them.

    Examples:
        >>> from types import SimpleNamespace
        >>> of_bytes, other = (SimpleNamespace(evaluations=({name: 1.0},)) for name in ("bits_per_byte", "loss"))
        >>> quality([of_bytes]), quality([of_bytes, other])
        ('bits_per_byte', 'loss')
    """
    names = [set().union(*run.evaluations) for run in runs if run.evaluations]
    return "bits_per_byte" if names and all("bits_per_byte" in each for each in names) else "loss"


def column(run: Run, name: str) -> np.ndarray:
    """Reads a column as [evaluations], NaN where it is missing.

    Examples:
        >>> from types import SimpleNamespace
        >>> column(SimpleNamespace(evaluations=({"loss": 2.5}, {})), "loss").tolist()
        [2.5, nan]
    """
    return np.array([row.get(name, math.nan) for row in run.evaluations], np.float64)


def binned(x: np.ndarray, y: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Thins a curve to at most `count` points: rows [n] in order of `x` that fall into one bin are one point.

    Returns:
        Mean `x`, mean, least and greatest `y` of each bin that has any; rows whose `y` is NaN are left out.

    Examples:
        >>> [each.tolist() for each in binned(np.arange(4.0), np.array([1.0, 3.0, 5.0, 9.0]), count=2)]
        [[0.5, 2.5], [2.0, 7.0], [1.0, 5.0], [3.0, 9.0]]
    """
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) <= count:
        return x, y, y, y
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    bins = np.minimum(((x - x[0]) / (x[-1] - x[0] or 1) * count).astype(np.int64), count - 1)
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    rows = np.diff(starts, append=len(x))
    means = np.add.reduceat(x, starts) / rows, np.add.reduceat(y, starts) / rows
    return *means, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def cells(strip: Strip, last: int, columns: int) -> list[tuple[float, float, float]]:
    """Joins equal neighbours of trained spans, and averages where there are too many to draw.

    Examples:
        >>> cells(Strip("head", ((0, 10, 1.0), (10, 20, 1.0), (20, 30, 0.0))), last=30, columns=100)
        [(0, 20, 1.0)]
    """
    spans = list(strip.spans)
    if len(spans) > columns:
        edges = np.linspace(0, last, columns + 1)
        at = np.array([0, *[stop for _, stop, _ in spans]], np.float64)
        at[0] = spans[0][0]
        trained = np.cumsum([0.0, *[(stop - start) * share for start, stop, share in spans]])
        shares = np.diff(np.interp(edges, at, trained)) / (last / columns)
        spans = [(float(a), float(b), float(s)) for a, b, s in zip(edges, edges[1:], shares, strict=False)]
    joined: list[tuple[float, float, float]] = []
    for start, stop, share in spans:
        level = min(math.ceil(round(share, 9) * _LEVELS), _LEVELS) / _LEVELS
        if joined and joined[-1][1] == start and joined[-1][2] == level:
            joined[-1] = joined[-1][0], stop, level
        elif level:
            joined.append((start, stop, level))
    return joined


def merged(strips: Sequence[Strip]) -> list[Strip]:
    """Merges neighbouring layers that were trained alike, where there are many, into one row.

    Examples:
        >>> alike = [Strip(f"block_{i}", ((0, 10, 1.0),)) for i in range(_LAYERS + 1)]
        >>> [strip.spans for strip in merged(alike)], len(merged(alike[1:])) == _LAYERS
        ([((0, 10, 1.0),)], True)
    """
    if len(strips) <= _LAYERS:
        return list(strips)
    groups: list[list[Strip]] = []
    for strip in strips:
        if groups and groups[-1][0].spans == strip.spans:
            groups[-1].append(strip)
        else:
            groups.append([strip])
    return [
        group[0] if len(group) == 1 else Strip(f"{group[0].name} … {group[-1].name} ({len(group)})", group[0].spans)
        for group in groups
    ]


def bytes_text(value: float) -> str:
    """Writes a number of bytes in three digits and SI units.

    Examples:
        >>> bytes_text(1234567).replace("\\u00a0", " ")
        '1.23 MB'
    """
    if not math.isfinite(value):
        return "-"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(value) < 999.5 or unit == "PB":
            return f"{value:.0f}\u00a0{unit}" if unit == "B" or value >= 100 else f"{value:.3g}\u00a0{unit}"
        value /= 1000
    raise AssertionError("unreachable")


def percent(share: float) -> str:
    """Writes a share in percent, never rounded to nothing or to everything.

    Examples:
        >>> percent(0.385)
        '38.5%'
    """
    if not math.isfinite(share):
        return "-"
    if share in (0, 1):
        return f"{share:.0%}"
    for digits in (1, 2, 4):
        text = f"{share * 100:.{digits}f}"
        if 0 < float(text) != 100:
            return f"{text}%"
    return "<0.0001%" if share < 0.5 else ">99.9999%"


def _plot(
    draw: Callable[[Axes, bool], None],
    name: str,
    height: float | None = None,
    width: float = 580,
    margins: Callable[[bool], Margins] = lambda wide: (56 if wide else 50, 12, 24, 42),
) -> Plot:
    """Draws for both widths of the page.

    Args:
        draw: puts the content into axes; called with whether they are wide.
        name: unique on the page.
        height: in CSS pixels.
        width: of the wide one, in CSS pixels.
        margins: fixed, so that the axes of all plots begin and end alike; called with whether they are wide.
    """
    return Plot(
        _svg(draw, f"{name}-wide", (width, height or 300), margins(True), True),
        _svg(draw, f"{name}-narrow", (350, height or 240), margins(False), False),
    )


def _svg(draw: Callable[[Axes, bool], None], name: str, size: tuple[float, float], margins: Margins, wide: bool) -> str:
    (width, height), (left, right, top, bottom) = size, margins
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure = Figure((width / 72, height / 72), dpi=72)
        FigureCanvasSVG(figure)
        place = left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height
        axes = figure.add_axes(place)
        axes.grid(True, axis="y")
        draw(axes, wide)
        file = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    text = file.getvalue()
    content = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    # Its style sheet would be one for the whole page, and its fonts are Matplotlib's.
    content = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", content, flags=re.DOTALL)
    content = re.sub(r"font-family: [^;\"]*;? ?", "", content)
    # Plots of one page must not take each other's clip paths and markers.
    content = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", content)
    content = re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _variable, content)
    return f'<svg viewBox="0 0 {width:g} {height:g}" aria-hidden="true">{content}</svg>'


def _variable(found: re.Match[str]) -> str:
    name = _VARIABLES.get(found[2])
    return f"{found[1]}: var(--{name})" if name else found[0]


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, number: int, wide: bool) -> None:
    known = np.isfinite(x)
    steps, mean, _, _ = binned(x[known], y[known], _BINS[wide])
    few = len(steps) <= 30
    axes.plot(
        steps,
        mean,
        color=_color(number),
        linewidth=1.8,
        linestyle=_dash(number),
        marker=MARKERS[number % SERIES] if few else None,
        markersize=6,
        markeredgecolor=_PAPER,
        markeredgewidth=0.6,
    )


def _scale(axes: Axes, shown: np.ndarray) -> None:
    """Fits the axis to the curves, whatever the range of single steps, and logarithmic if one end is far away."""
    shown = shown[np.isfinite(shown)]
    if not len(shown):
        return
    low, high = float(shown.min()), float(shown.max())
    if low > 0 and high / low > 50:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / 1.2, high * 1.2)
    elif high > low:
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=_TICKS))


def _steps(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("step", loc="right")


def _bytes(axis: Any) -> None:
    axis.set_major_locator(MaxNLocator(5, steps=_TICKS))
    axis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value) if value else "0"))


def _color(number: int) -> str:
    return f"#0a02{number % SERIES:02x}"


def _dash(number: int) -> Any:
    return DASHES[number // SERIES % len(DASHES)]


def _cut(text: str, length: int) -> str:
    """Shortens a name in its middle: its ends tell most."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-(length - length // 2 - 1) :]}"
