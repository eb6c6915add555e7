"""Few bits at any number of workers, and exchanges that travel while steps are made: bytes and times.

python -m tests.benchmarks.few_bits [--table=bytes] [--table=delay] [--table=within]

Hosts are network namespaces on this machine, which share its cores; this needs root and iproute2.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import tables
from tests.helpers import hosts

COMMAND = "python -m tests.benchmarks.few_bits"
RESULTS = Path(__file__).parent / "results" / "few_bits.json"
WORKERS = (2, 4, 8, 16)
WIDE = """
run.model = @two_dense
two_dense.hidden = 8192
run.data = @stdlib_shapes
run.rules = [('train', '.*')]
run.optimizer = @keras.optimizers.SGD
run.steps = 12
run.steps_per_loop = 4
run.eval_examples = 16
sample.length = 1
"""
REDUCTIONS = {
    "float32": "",
    "4 bits": "run.reduction = @quantized()\nquantized.bits = 4\n",
    "1.6 bits": "run.reduction = @quantized()\nquantized.bits = 1.6\n",
    "top 1/64": "run.reduction = @top_k()\n",
}
HOSTS, RATE, ROUNDS = 4, "10mbit", 3
DEEP = """
run.model = @byte_transformer
run.data = @stdlib_corpus
run.rules = [('train', '.*')]
run.global_batch = 32
run.steps = 252
run.steps_per_loop = 12
run.eval_every = 252
run.eval_examples = 32
sample.length = 1
"""
EXCHANGE = "run.reduction = @local_sgd()\nlocal_sgd.sync_every = 24\nlocal_sgd.compressor = @quantized()\n"
EXCHANGE += "quantized.bits = 1.6\n"
WITHIN = (2, 12)
WAYS = {
    "nothing travels": "run.reduction = @local_only()\n",
    "every 24 steps in 1.6 bits": EXCHANGE,
    "the same, applied 12 steps later": EXCHANGE + "local_sgd.delay = 12\n",
}


def run(config: str, count: int, rate: str | None) -> dict[str, Any]:
    """The content of traffic.json of a run on so many hosts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.gin")
        file.write_text(config)
        return hosts.trained(file, count, rate)


def bytes_at_interfaces() -> list[dict[str, Any]]:
    """Bytes a step that leave the first worker's interface: by the plan, by its graphs, and by the kernel's counter."""
    rows = []
    for count in WORKERS:
        for name, reduction in REDUCTIONS.items():
            found = run(f"{WIDE}{reduction}run.global_batch = {count}\n", count, None)
            steps = found["last_step"]
            row = {"workers": count, "reduction": name, "payload": found["planned_bytes"] / steps}
            row |= {"counted": found["counted_bytes"] / steps, "expected": found["expected_nic_bytes"] / steps}
            row |= {"read": found["nic_bytes"] / steps, "step_ms": found["step_ms"]}
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    for row in rows:
        whole = next(each for each in rows if each["workers"] == row["workers"] and each["reduction"] == "float32")
        row["fewer"] = whole["read"] / row["read"]
    return rows


def delays_within() -> list[dict[str, Any]]:
    """Mean time of a step in one run: of all steps, and of those in calls during which nothing travels."""
    rows = []
    for delay in WITHIN:
        travelling, others = [0.0, 0], [0.0, 0]  # milliseconds, steps
        with tempfile.TemporaryDirectory() as folder, hosts.hosts(HOSTS, RATE):
            config = f"{DEEP}{EXCHANGE}local_sgd.delay = {delay}\nlocal_sgd.keep_progress = True\n"
            Path(folder, "config.gin").write_text(config)
            command = [sys.executable, "-m", "tests.benchmarks.few_bits", f"--worker={folder}"]
            for code, output in hosts.run(command, HOSTS, timeout=560):
                if code:
                    raise RuntimeError(output[-2000:])
            calls = json.loads(Path(folder, "calls.json").read_text())
        for first, last, milliseconds in calls[2:]:  # what is called first is slower
            kind = travelling if first % 24 < delay else others
            kind[0], kind[1] = kind[0] + milliseconds, kind[1] + last - first
        whole, alone = ((travelling[0] + others[0]) / (travelling[1] + others[1])), others[0] / others[1]
        rows.append({"delay": delay, "step_ms": whole, "alone_ms": alone, "of_alone": whole / alone})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def worker(folder: Path) -> int:
    """Trains as one of the workers, of which each notes the steps of every call and how long they took."""
    from dist_partial import train
    from dist_partial.distributed.network import Meter

    start, stop, calls = Meter.start, Meter.stop, []
    begun = 0.0

    def started(meter: Meter) -> None:
        nonlocal begun
        begun = time.perf_counter()
        start(meter)

    def stopped(meter: Meter, plan: Any, first: int, last: int, *sent: int) -> None:
        stop(meter, plan, first, last, *sent)
        calls.append((first, last, 1e3 * (time.perf_counter() - begun)))

    Meter.start, Meter.stop = started, stopped  # type: ignore[method-assign]
    code = train.main([f"--gin_file={folder}/config.gin", f"--run_dir={folder}/run"])
    if json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 0:
        (folder / "calls.json").write_text(json.dumps(calls))
    return code


def delays() -> list[dict[str, Any]]:
    """Mean time of a step; each way in turn, and in reverse order in every other round."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(ROUNDS):
        for name in list(WAYS)[:: -1 if number % 2 else 1]:
            found[name].append(run(DEEP + WAYS[name], HOSTS, RATE)["mean_step_ms"])
            print(name, found[name], file=sys.stderr, flush=True)
    medians = {name: statistics.median(times) for name, times in found.items()}
    alone = medians["nothing travels"]
    return [
        {"way": name, "step_ms": step, "of_alone": step / alone, "rounds": found[name]}
        for name, step in medians.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("--table", choices=("bytes", "delay", "within"), action="append")
    parser.add_argument("--worker", type=Path)
    arguments = parser.parse_args()
    if arguments.worker:
        sys.exit(worker(arguments.worker))
    chosen = arguments.table or ["bytes", "delay", "within"]
    if reason := hosts.available():
        sys.exit(f"error: no hosts can be made here: {reason}")
    content = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    content |= {"command": COMMAND, "hosts": HOSTS, "rate": RATE}
    for name, measure in (("bytes", bytes_at_interfaces), ("delay", delays), ("within", delays_within)):
        if name in chosen:
            content[name] = measure()
            RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(tables.text("few_bits", content))


if __name__ == "__main__":
    main()
