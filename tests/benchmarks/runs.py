"""Whole runs in folders of their own."""

import tempfile
from pathlib import Path
from typing import Any

from tests.helpers.files import rows


def last_evaluation(settings: Any) -> dict[str, Any]:
    """Trains by settings; returns the row of the last evaluation."""
    from dist_partial.training import loop  # by the process that has TensorFlow

    with tempfile.TemporaryDirectory() as folder:
        loop.run(settings, Path(folder))
        return next(row for row in reversed(rows(Path(folder, "metrics.jsonl"))) if row["split"] == "eval")
