"""Two hosts fine-tune SmolLM2 over a modem's line: LoRA, exchanged in few bits every few steps, applied later.

python -m tests.benchmarks.modem [--lines="NAME;..."] [--go_on]

Against LoRA that is exchanged in float32 in every step, with no limit. Hosts are network namespaces on this machine, a
core each; this needs root, iproute2 and the weights of SmolLM2.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks import fine_tuning, tables
from tests.helpers import hosts
from tests.helpers.files import rows

COMMAND = "python -m tests.benchmarks.modem"
RESULTS = Path(__file__).parent / "results" / "modem.json"
STEPS, RANK, SEED = 200, 1, 1
NO_LIMIT = "no limit, float32 every step"


def _local(every: int, bits: float) -> list[str]:
    """Exchanges that travel until the next one begins."""
    return [
        "run.reduction = @local_sgd()",
        f"local_sgd.sync_every = {every}",
        f"local_sgd.delay = {every}",
        "local_sgd.keep_progress = True",
        "local_sgd.compressor = @quantized()",
        f"quantized.bits = {bits}",
        f"run.steps_per_loop = {every}",
    ]


# By line: what each host can send, how long its queue is, the learning rate, and how the run exchanges. At 56 kbit/s a
# packet takes 0.2 s: in a queue of 1 s so many were dropped that 235 kB took 54 s, in place of 34.
LINES: dict[str, tuple[str | None, str, float, list[str]]] = {
    NO_LIMIT: (None, "", 8e-3, ["run.steps_per_loop = 10"]),
    "56 kbit/s, 1.6 bits every 20 steps": ("56kbit", "10s", 16e-3, _local(20, 1.6)),
    "1 Mbit/s, 4 bits every 4 steps": ("1mbit", "200ms", 16e-3, _local(4, 4)),
    "10 Mbit/s, 4 bits every 4 steps": ("10mbit", "200ms", 16e-3, _local(4, 4)),
}


def measure(line: str, text: Path) -> dict[str, Any]:
    """Trains on two hosts with such a line; returns the first one's losses, bytes and times."""
    limit, latency, rate, how = LINES[line]
    queue = {"burst": "4kb", "latency": latency} if limit else {}
    bindings = [
        f"tokenized_text.root = {str(text)!r}",
        f"tokenized_text.window = {fine_tuning.WINDOW}",
        "tokenized_text.limit = None",
        f"run.seed = {SEED}",
        f"run.steps = {STEPS}",
        f"run.global_batch = {fine_tuning.BATCH}",
        f"run.eval_examples = {fine_tuning.HELD_OUT}",
        "run.eval_every = None",
        "run.save_every = None",
        f"adapters/Rule.lora = {RANK}",
        f"CosineDecay.decay_steps = {STEPS - 10}",
        f"CosineDecay.warmup_target = {rate}",
        f"CosineDecay.initial_learning_rate = {rate / 20}",
        "sample.count = 0",
        *how,
    ]
    with tempfile.TemporaryDirectory() as folder, hosts.hosts(2, limit, **queue):
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
        "line": line,
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
    os.execv(sys.executable, [*command, *params])  # in this process, which is ended when it takes too long


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", default=";".join(LINES), help="some of them, separated by ;")
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
        for line in arguments.lines.split(";"):
            if all(row["line"] != line for row in measured):
                measured.append(measure(line, Path(folder)))
                print(measured[-1], flush=True)
                setting = (
                    f"SmolLM2-135M, LoRA of rank {RANK}, {STEPS} steps of {fine_tuning.BATCH} x {fine_tuning.WINDOW}"
                )
                found = {"command": COMMAND, "setting": f"{setting} tokens", "rows": measured}
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(tables.text("modem"))


if __name__ == "__main__":
    main()
