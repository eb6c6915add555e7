"""What it costs that workers can stay when another is lost, while none is: within one run, call by call.

    python -m tests.benchmarks.staying [--workers=2,3] [--configurations=two_dense,quickstart] [--calls=5]

In turns so many calls of the step keep what the workers would go back to, and copies at the next one, and so many keep
nothing; the medians of the steps' times are compared. The batch is that of the configuration, or the next one that
divides. Writes the key "cost" of results/faults.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests import ROOT
from tests.benchmarks import tables

RESULTS = tables.RESULTS / "faults.json"
STEPS = {"two_dense": 6000, "quickstart": 1000}
BATCHES = {"two_dense": 240, "quickstart": 30}  # for three workers
FIRST = 5  # calls of each kind that are left out


def worker() -> int:
    """Trains as a worker does, and prints the medians, in milliseconds a step."""
    from dist_partial import cli

    cli.import_tensorflow_quietly()
    from dist_partial import train
    from dist_partial.training import loop, recovery

    length, calls, keeps = int(os.environ["STAYING_CALLS"]), 0, True
    seconds: dict[bool, list[float]] = {True: [], False: []}
    keep, advance = recovery.Recovery.keep, loop._advance

    def kept(self: Any, *arguments: Any) -> None:
        if keeps or self._kept is None:
            keep(self, *arguments)
        else:  # what is held makes the next step write elsewhere
            object.__setattr__(self._kept, "values", ())

    def timed(*arguments: Any) -> Any:
        nonlocal calls, keeps
        keeps = (calls // length) % 2 == 0
        begun = time.perf_counter()
        state = advance(*arguments)
        if calls % length:  # the first call of a turn frees, or allocates, what the others do not
            seconds[keeps].append((time.perf_counter() - begun) / arguments[2])
        calls += 1
        return state

    recovery.Recovery.keep, loop._advance = kept, timed
    code = train.main(sys.argv[2:])
    ms = {str(on): 1e3 * statistics.median(times[FIRST:]) for on, times in seconds.items()}
    print(f"STAYING {json.dumps(ms)}", flush=True)
    return code


def measured(name: str, workers: int, calls: int) -> dict[str, Any]:
    """A row: step times with and without, of the first worker."""
    with tempfile.TemporaryDirectory() as folder:
        params = [
            f"run.steps = {STEPS[name]}",
            "run.eval_every = None",
            "run.save_every = None",
            "replicas.buddy = True",
        ]
        params += [f"run.global_batch = {BATCHES[name]}"] * (workers == 3)
        flags = [f"--gin_file={ROOT}/gin_configs/{name}.gin", f"--run_dir={folder}/run"]
        arguments = ["local", f"--workers={workers}", "--", *flags, *(f"--gin_param={each}" for each in params)]
        program = [sys.executable, "-m", "tests.benchmarks.staying", "--worker"]
        code = f"import sys; from dist_partial.launch.__main__ import main; sys.exit(main({arguments}, {program}))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "STAYING_CALLS": str(calls), "CUDA_VISIBLE_DEVICES": "-1"},
            capture_output=True,
            text=True,
            timeout=900,
        )
    line = next((each for each in done.stdout.splitlines() if each.startswith("[0] STAYING ")), None)
    if done.returncode or line is None:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    ms = json.loads(line.removeprefix("[0] STAYING "))
    row = {"configuration": name, "workers": workers, "kept_ms": round(ms["True"], 3), "not_ms": round(ms["False"], 3)}
    return row | {"ratio": round(ms["True"] / ms["False"], 4)}


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        return worker()
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.staying")
    parser.add_argument("--workers", type=lambda text: [int(each) for each in text.split(",")], default=[2, 3])
    parser.add_argument("--configurations", type=lambda text: text.split(","), default=list(STEPS))
    parser.add_argument("--calls", type=int, default=5, help="in a turn")
    options = parser.parse_args()
    rows = []
    for name in options.configurations:
        for workers in options.workers:
            rows.append(measured(name, workers, options.calls))
            print(rows[-1], flush=True)
    content = json.loads(Path(RESULTS).read_text()) | {"cost": rows}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
