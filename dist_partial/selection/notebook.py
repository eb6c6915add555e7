"""Shows the printed table of a plan as notebooks show tables."""

import html
import re


def as_html(table: str) -> str:
    """Makes HTML of what `plan_table` writes: a header, a line under it, rows, and three lines of totals.

    Examples:
        >>> print(as_html("path    bytes\\n------  -----\\nkernel      8\\ntrained: 2\\npayload: 8\\nnothing leaves"))
        <table><tr><th>path</th><th>bytes</th></tr><tr><td>kernel</td><td>8</td></tr></table><p>trained: 2<br>...
    """
    header, rule, *lines = table.splitlines()
    columns = [found.span() for found in re.finditer("-+", rule)]

    def row(line: str, tag: str) -> str:
        cells = [html.escape(line[start:end].strip()) for start, end in columns]
        return f"<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"

    rows = "".join(row(line, "td") for line in lines[:-3])
    return f"<table>{row(header, 'th')}{rows}</table><p>{'<br>'.join(map(html.escape, lines[-3:]))}</p>"
