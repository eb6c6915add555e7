"""Step time of two configurations now, and at earlier commits of this repository, in turn.

python -m tests.benchmarks.before --commits=COMMIT,COMMIT [--rounds=6]

Each run is of a process of its own, in a work tree of its commit, with the packages of this environment. A step is the
difference of a long and a short training of one process, so that start and tracing are left out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests import ROOT

RESULTS = Path(__file__).parent / "results" / "before.json"
STEPS = {"two_dense": (500, 3500), "quickstart": (20, 100)}  # of the short and the long training
CHILD = """
import contextlib, io, json, resource, sys, tempfile, time
from dist_partial import train
name, *steps = sys.argv[1], *map(int, sys.argv[2:])
def took(count):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        more = [f"run.steps = {count}", "run.save_every = None", "run.eval_every = None", "sample.length = 1"]
        code = train.main([f"--gin_file=gin_configs/{name}.gin", f"--run_dir={folder}/run"]
                          + [f"--gin_param={each}" for each in more])
        assert code == 0, code
        after, seconds = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - began
    return [seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime]
took(steps[0])
short, long = took(steps[0]), took(steps[1])
print("RESULT", json.dumps([1e3 * (b - a) / (steps[1] - steps[0]) for a, b in zip(short, long)]))
"""


def main() -> None:
    """Measures, and writes the medians and their ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--commits", required=True, help="separated by commas")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    now = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    with tempfile.TemporaryDirectory() as trees:
        places = {now: ROOT}
        try:
            for commit in options.commits.split(","):
                places[commit] = Path(trees, commit)
                subprocess.run(["git", "worktree", "add", "--detach", places[commit], commit], cwd=ROOT, check=True)
            found = measured(places, options.rounds)
        finally:
            for place in [*places.values()][1:]:
                subprocess.run(["git", "worktree", "remove", "--force", place], cwd=ROOT)
    command = f"python -m tests.benchmarks.before --commits={options.commits} --rounds={options.rounds}"
    rows = [row for name in STEPS for row in summed_up(name, now, found)]
    RESULTS.write_text(json.dumps({"command": command, "cores": os.cpu_count(), "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(row)


def measured(places: dict[str, Path], rounds: int) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Milliseconds of a step, by configuration and commit: on the clock, and of CPU time, in each round."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    for number in range(rounds):
        for name, steps in STEPS.items():
            for commit in [*places] if number % 2 else reversed(places):
                ended = subprocess.run(
                    [sys.executable, "-c", CHILD, name, *map(str, steps)],
                    cwd=places[commit],
                    env=environment | {"PYTHONPATH": str(places[commit])},
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=300,
                )
                wall, cpu = json.loads(ended.stdout.rpartition("RESULT ")[2])
                found[name, commit].append((wall, cpu))
                print(number, name, commit, f"{wall:.3f} {cpu:.3f}", file=sys.stderr, flush=True)
    return found


def summed_up(name: str, now: str, found: dict[tuple[str, str], list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """A row for each commit: medians, and the median of what each round takes now against then."""
    rows = []
    for (config, commit), values in found.items():
        if config != name:
            continue
        row: dict[str, Any] = {"configuration": name, "commit": commit}
        for place, what in enumerate(("step_ms", "cpu_ms")):
            row[what] = round(statistics.median(value[place] for value in values), 3)
            pairs = zip(found[name, now], values, strict=True)
            row[f"now_against_{what}"] = round(statistics.median(a[place] / b[place] for a, b in pairs), 3)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
