"""Two hosts fine-tune SmolLM2 over a modem's line: LoRA, exchanged in few bits every few steps, applied later.

python -m tests.benchmarks.modem [--rates=56kbit,1mbit,10mbit] [--go_on]

Against LoRA that is exchanged in float32 in every step, with no limit. Hosts are network namespaces on this machine, a
core each; this needs root, iproute2 and the weights of SmolLM2.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks import fine_tuning, tables
from tests.helpers import hosts
from tests.helpers.files import rows

COMMAND = "python -m tests.benchmarks.modem"
RESULTS = Path(__file__).parent / "results" / "modem.json"
STEPS, RATE = 200, 4e-3
NO_LIMIT = "no limit, float32 every step"
# At 56 kbit/s an exchange takes 34 s, which is 14 steps of 2.4 s: a delay of 10 had steps wait.
FEW = [
    "run.reduction = @local_sgd()",
    "local_sgd.sync_every = 40",
    "local_sgd.delay = 20",
    "local_sgd.keep_progress = True",
    *fine_tuning.SPARSE,
]
# On a line of 56 kbit/s a packet of 1500 bytes takes 0.2 s: the queue is long, and what may pass at once short.
QUEUE = {"burst": "4kb", "latency": "10s"}


def measure(rate: str | None, text: Path) -> dict[str, Any]:
    """Trains on two hosts that can send so fast; returns the first one's losses, bytes and times."""
    bindings = [
        f"tokenized_text.root = {str(text)!r}",
        f"tokenized_text.window = {fine_tuning.WINDOW}",
        "tokenized_text.limit = None",
        f"run.steps = {STEPS}",
        f"run.global_batch = {fine_tuning.BATCH}",
        f"run.eval_examples = {fine_tuning.HELD_OUT}",
        "run.eval_every = None",
        "run.save_every = None",
        "run.steps_per_loop = 10",
        f"CosineDecay.decay_steps = {STEPS - 10}",
        f"CosineDecay.warmup_target = {RATE}",
        f"CosineDecay.initial_learning_rate = {RATE / 20}",
        "sample.count = 0",
        *(FEW if rate else []),
    ]
    with tempfile.TemporaryDirectory() as folder, hosts.hosts(2, rate, **(QUEUE if rate else {})):
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.modem",
            "--child",
            folder,
            *(f"--gin_param={each}" for each in bindings),
        ]
        for code, output in hosts.run(command, 2, timeout=2 * 3600, environment={"TF_CPP_MIN_LOG_LEVEL": "3"}):
            if code:
                raise RuntimeError(output[-2000:])
        found = rows(Path(folder, "run", "metrics.jsonl"))
        traffic = json.loads(Path(folder, "run", "traffic.json").read_text())
    before, after = (row["loss"] for row in found if row["split"] == "eval")
    return {
        "line": rate or NO_LIMIT,
        "loss_before": before,
        "loss": after,
        "mean_step_ms": traffic["mean_step_ms"],
        "nic_bytes": traffic["nic_bytes"],
        "steps": STEPS,
    }


def child(folder: str, params: list[str]) -> None:
    """One of the hosts, on a core of its own."""
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[index]})
    config = fine_tuning.CONFIGS / "smollm2_lora.gin"
    command = [sys.executable, "-m", "dist_partial.train", f"--gin_file={config}", f"--run_dir={folder}/run"]
    sys.exit(subprocess.run([*command, *params]).returncode)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rates", default="56kbit,1mbit,10mbit")
    parser.add_argument("--go_on", action="store_true", help="keep the rows that are there")
    parser.add_argument("--child")
    arguments, params = parser.parse_known_args()
    if arguments.child:
        child(arguments.child, params)
        return
    if reason := hosts.available():
        sys.exit(reason)
    measured = json.loads(RESULTS.read_text())["rows"] if arguments.go_on and RESULTS.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        fine_tuning.disassembly(Path(folder))
        for rate in [None, *arguments.rates.split(",")]:
            if all(row["line"] != (rate or NO_LIMIT) for row in measured):
                measured.append(measure(rate, Path(folder)))
                print(measured[-1], flush=True)
                setting = f"SmolLM2-135M, {STEPS} steps of {fine_tuning.BATCH} x {fine_tuning.WINDOW} tokens; {FEW}"
                RESULTS.write_text(
                    json.dumps({"command": COMMAND, "setting": setting, "rows": measured}, indent=1) + "\n"
                )
    print(tables.text("modem"))


if __name__ == "__main__":
    main()
