"""How far every case is from Keras, on several replicas and workers; the results go to results.json.

python -m tests.conformance.table --replicas=1,2,3 [--workers=2] [--cases=NAME,NAME] [--seconds=300] [--again]

What results.json has is not run again, but for `--again`. Processes on this machine train the cases one after the
other: one for all numbers of replicas, and then as many as there are workers. One that takes longer than `--seconds`
for a case is killed, and another goes on with the cases that follow. Exit code 1: a result is not what `known.py` says.
"""

import argparse
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.conformance.results import as_known, load, save
from tests.helpers.workers import loopback, tf_config

AT_ONCE = 60  # results, after which other processes go on: the graphs of all cases are large
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "CUDA_VISIBLE_DEVICES": "-1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "DIST_PARTIAL_SECRET": "of the tests",
}


def main(argv: Sequence[str]) -> int:
    """Runs what is missing, and says what is not as it is known."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replicas", default="", help="numbers of replicas in one process, such as 1,2,3")
    parser.add_argument("--workers", type=int, default=0, help="worker processes on loopback, of one replica each")
    parser.add_argument("--cases", default="", help="names; without, all that draw no random numbers")
    parser.add_argument("--seconds", type=float, default=300, help="for a case, and the start of the processes")
    parser.add_argument("--again", action="store_true", help="run also what results.json has")
    given = parser.parse_args(argv)
    kinds = kinds_of_cases()
    chosen = given.cases.split(",") if given.cases else [*kinds]
    if unknown := set(chosen) - kinds.keys():
        parser.error(f"no cases, or random ones: {', '.join(sorted(unknown))}")
    groups = [(1, given.replicas.split(","))] if given.replicas else []
    groups += [(given.workers, [f"{given.workers} workers"])] if given.workers else []
    found = load()
    for processes, columns in groups:
        every = [(name, column) for name in chosen for column in columns]
        missing = [pair for pair in every if given.again or pair[1] not in found.get(pair[0], {}).get("results", {})]
        while missing:
            for name, column, row in run(processes, missing[:AT_ONCE], given.seconds):
                missing = missing[1:]
                case = found.setdefault(name, {"kind": kinds[name], "results": {}})
                case["results"][column] = row
                save(found)
                print("ok   " if as_known(name, column, row) else "WRONG", f"{name} on {column}: {row}", flush=True)
    rows = [
        (name, column, row) for name in chosen for column, row in found.get(name, {"results": {}})["results"].items()
    ]
    wrong = [row for row in rows if not as_known(*row)]
    print(f"{len(rows)} results, {len(wrong)} are not as they are known")
    return min(len(wrong), 1)


def kinds_of_cases() -> dict[str, str]:
    """The names of the cases that draw no random numbers, by the module of models/ that has them."""
    from tests.conformance import models  # here, since the pages of the documentation need no TensorFlow

    kinds = [module.name for module in pkgutil.iter_modules(models.__path__)]
    return {
        case.name: kind
        for kind in kinds
        for case in importlib.import_module(f"{models.__name__}.{kind}").CASES
        if not case.random
    }


def run(processes: int, asked: Sequence[tuple[str, str]], seconds: float) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Gives the results of the first of what is asked, at least one, in its order, while processes compute them."""
    addresses, started = loopback(processes), []
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w+", errors="replace") as log:
        try:
            for index in range(processes):
                cluster = {"TF_CONFIG": tf_config(addresses, index)} if processes > 1 else {}
                command = ["-m", "tests.conformance.table_process", str(index), folder]
                started.append(
                    subprocess.Popen(
                        [sys.executable, *command, *(f"{name}:{column}" for name, column in asked)],
                        cwd=ROOT,
                        env={**os.environ, **ENVIRONMENT, **cluster},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
            yield from _results(started, asked, Path(folder) / "results", seconds)
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _results(
    started: Sequence[subprocess.Popen], asked: Sequence[tuple[str, str]], file: Path, seconds: float
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    count, last = 0, time.monotonic()
    while count < len(asked):
        ended = all(process.poll() is not None for process in started)  # before the last results are read
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        for line in lines[count:]:
            if line.endswith("\n"):
                yield (*asked[count], json.loads(line))
                count, last = count + 1, time.monotonic()
        if ended and count:
            return  # the case after the last result is the first of the next processes
        if ended or time.monotonic() - last > seconds:
            log = (file.parent / "log").read_text(errors="replace")
            yield (*asked[count], {"error": log[-1000:] if ended else f"takes longer than {seconds:g} seconds"})
            return
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
