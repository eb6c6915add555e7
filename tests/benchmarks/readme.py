"""Results as the README shows them: Markdown tables between two markers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "README.md"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], words: int = 1) -> str:
    """A Markdown table whose columns after the first `words` hold numbers, to the right."""
    lines = [header, [*["---"] * words, *["--:"] * (len(header) - words)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write(marker: str, text: str) -> None:
    """Puts the text between `<!-- marker -->` and `<!-- /marker -->`.

    Raises:
        ValueError: the README has no such place.
    """
    opening, closing = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, found, rest = README.read_text().partition(opening)
    _, ended, after = rest.partition(closing)
    if not found or not ended:
        raise ValueError(f"{README.name} has no {opening} ... {closing}")
    README.write_text(f"{before}{opening}\n\n{text}\n\n{closing}{after}")
