"""Whole runs in folders of their own, and benchmarks in processes of their own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.files import rows


def last_evaluation(settings: Any) -> dict[str, Any]:
    """Trains by settings; returns the row of the last evaluation."""
    from dist_partial.training import loop  # by the process that has TensorFlow

    with tempfile.TemporaryDirectory() as folder:
        loop.run(settings, Path(folder))
        return next(row for row in reversed(rows(Path(folder, "metrics.jsonl"))) if row["split"] == "eval")


_MARK = "RESULT "


def give(result: Any) -> None:
    """Gives a result to the process that has called `results_of`."""
    print(_MARK + json.dumps(result), flush=True)


def in_rounds(module: str, names: Sequence[str], rounds: int, **how: Any) -> dict[str, list[Any]]:
    """The results of a module by `--child=NAME`, for so many rounds in which the names take turns; `how` as there."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found[name] += results_of(module, f"--child={name}", **how)
            print(name, found[name][-1], flush=True)
    return found


def results_of(
    module: str, *options: str, timeout: float = 3600, begin: Callable[[], None] | None = None, wrong: str = "\0"
) -> list[Any]:
    """Runs a module in a process of its own; returns what it gives.

    Args:
        module: its name.
        options: of its command line.
        timeout: seconds, after which it is killed.
        begin: called in the process before Python starts.
        wrong: what it may not print.

    Raises:
        RuntimeError: it has ended with an error, or has given nothing.
    """
    command = [sys.executable, "-m", module, *options]
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3"} | os.environ
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, preexec_fn=begin)
    found = [json.loads(line.removeprefix(_MARK)) for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not found or wrong in done.stdout:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return found
