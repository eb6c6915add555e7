"""A run as a piece of HTML for a notebook's cell: what it came to, its curve, and its plan by layer."""

import hashlib
import html as markup
from collections.abc import Sequence

from dist_partial.report.runs import Run

# The notebook's own colours, light or dark, where the report's page has its own.
_STYLE = "--ink: currentColor; --soft: currentColor; --line: #8886; --track: #8883; --paper: transparent;"
_STYLE += " --series-0: #2f7dc4; max-width: 600px"


def html(run: Run, summary: str) -> str:
    """Writes the piece; without the report's libraries, `dist_partial[report]`, it has the summary alone.

    Args:
        run: as `runs.read` gives it.
        summary: lines to begin with.

    Examples:
        >>> import json, pathlib, tempfile
        >>> from dist_partial.report import runs
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plan = {"variables": [{"path": "head/kernel", "shape": [8, 2], "trained": True}], "workers": 2}
        ...     _ = pathlib.Path(folder, "plan.json").write_text(json.dumps(plan))
        ...     found = html(runs.read([pathlib.Path(folder)])[0], "10 of 10 steps")
        >>> "<pre>10 of 10 steps</pre>" in found, "<td>head</td>" in found
        (True, True)
    """
    try:
        from dist_partial.report import page, plots
    except ImportError:
        return f"<pre>{markup.escape(summary)}</pre>"
    plot = plots.loss([run])
    name = hashlib.sha256(f"{run.folder}{run.last_step}".encode()).hexdigest()[:12]  # several are in one notebook
    curve = plot.wide.replace("loss-wide-", f"{name}-") if plot else ""
    header = ("layers", "parameters", "trained", "reduction", "bytes a step")
    rows = [
        (
            layer.name,
            f"{layer.parameters:,}",
            f"{layer.trained_parameters:,}",
            layer.reductions,
            f"{layer.wire_bytes:,.0f}",
        )
        for layer in page.layers(run.variables)
    ]
    table = f"<table>{_row('th', header)}{''.join(_row('td', row) for row in rows)}</table>"
    return f'<div style="{_STYLE}"><pre>{markup.escape(summary)}</pre>{curve}{table}</div>'


def _row(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{markup.escape(cell)}</{tag}>' for cell in cells)}</tr>"
