"""Step time over a network that is slower than the machines, against PyTorch's DDP and TensorFlow's own loop.

python -m tests.benchmarks.wire --python_torch=PYTHON_WITH_TORCH

Hosts are network namespaces, so this needs root and iproute2. Each system runs in processes of its own, one a host; in
another round they are started in reverse order. A cell of the table is written as soon as it is measured: the same
command with `--resume` measures those that are missing, or have failed. `--smoke` only shows that everything runs.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import tables
from tests.benchmarks.wire_worker import BATCH, LAYERS, SYSTEMS, WARM_UP, WIDTH
from tests.helpers import hosts

COMMAND = "python -m tests.benchmarks.wire"
ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("wire_worker.py")
RESULTS = Path(__file__).parent / "results" / "wire.json"
MODEL = f"{LAYERS} dense layers of {WIDTH}x{WIDTH} with bias, {BATCH} examples a worker, plain SGD"
# What one process times in turn. PyTorch has one thread a process: with its own choice, two, a step took longer
# wherever both were tried (1533 ms against 1450 at 200 Mbit, 413 against 331 at 1 Gbit, all layers on 2 hosts).
VARIANTS = {"ddp": ("1",), "tensorflow": ("float32",), "dist_partial": ("float32", "bfloat16")}
RATES = {"200mbit": 200e6, "1gbit": 1e9, "unshaped": None}  # bits a second
SELECTIONS = {"all": LAYERS, "part": 1}  # layers trained
BLOCK_SECONDS = 1.5
# Losses of the first steps tell whether all systems train the same thing; bfloat16 moves them by far less than this.
LOSS_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Setting:
    """One place in the table."""

    hosts: int
    rate: str
    selected: str

    def must_send(self, dtype: str) -> float:
        """Bytes that one host cannot but send in an all-reduce of the gradients."""
        payload = SELECTIONS[self.selected] * WIDTH * (WIDTH + 1) * (2 if dtype == "bfloat16" else 4)
        return all_reduce_bytes(payload, self.hosts)

    def limit_ms(self, dtype: str) -> float | None:
        rate = RATES[self.rate]
        return None if rate is None else self.must_send(dtype) * 8e3 / rate

    def expected_ms(self, dtype: str) -> float:
        """A guess, which decides how many steps a block has and when a worker hangs."""
        memory = 5e9 / self.hosts  # bits a second that a host of one machine gets through when nothing holds it up
        rate = min(RATES[self.rate] or memory, memory)
        return self.must_send(dtype) * 8e3 / rate + 6 * self.hosts

    def __str__(self) -> str:
        return f"{self.hosts} hosts, {self.rate}, {self.selected}"


def all_reduce_bytes(payload: float, count: int) -> float:
    return 2 * (count - 1) / count * payload


def dtype_of(system: str, variant: str) -> str:
    return "float32" if system == "ddp" else variant


def launch(
    setting: Setting, system: str, python: str, blocks: int, steps: int | None, guard: str = "plain"
) -> tuple[dict[str, dict[str, Any]], str]:
    """Runs one system once, on all hosts; ours with the guard of that name.

    Returns:
        What worker 0 found for each variant, and what went wrong or "".
    """
    expected = {variant: setting.expected_ms(dtype_of(system, variant)) / 1e3 for variant in VARIANTS[system]}
    counts = {variant: steps or max(2, math.ceil(BLOCK_SECONDS / seconds)) for variant, seconds in expected.items()}
    total = sum(seconds * (WARM_UP + blocks * counts[variant]) for variant, seconds in expected.items())
    command = [python, str(WORKER), system, f"--selected={setting.selected}", f"--blocks={blocks}"]
    command += [f"{variant}={count}" for variant, count in counts.items()]
    timeout = 30 + 10 * setting.hosts + 4 * total
    results = hosts.run(command, setting.hosts, timeout, {"TF_CPP_MIN_LOG_LEVEL": "3", "WIRE_GUARD": guard})
    lines = [json.loads(line) for line in results[0][1].splitlines() if line.startswith('{"system"')]
    found = {line["variant"]: line for line in lines}
    # The worker that failed by itself says more than those that were killed while they waited for it.
    failed = sorted(((code, output) for code, output in results if code), key=lambda result: result[0] < 0)
    if failed:
        return found, f"exit code {failed[0][0]}: " + "\n".join(failed[0][1].splitlines()[-5:])
    missing = [variant for variant in counts if variant not in found]
    return found, f"no result of {missing}" if missing else ""


def measure(setting: Setting, order: Sequence[tuple[str, str]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All systems side by side on hosts that are up: one after the other, and in reverse in every other round."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    failures: dict[str, list[str]] = {}
    for round_number in range(options.rounds):
        for system, python in order[:: -1 if round_number % 2 else 1]:
            start = time.perf_counter()
            lines, failure = launch(setting, system, python, options.repeats, options.steps)
            for variant, line in lines.items():
                found.setdefault((system, variant), []).append(line)
            if failure:
                failures.setdefault(system, []).append(failure)
            said = ", ".join(f"{variant} {line['step_ms']} ms" for variant, line in lines.items())
            took = time.perf_counter() - start
            print(f"[{setting}] {system}: {said} {failure} ({took:.0f} s)", file=sys.stderr, flush=True)
    rows = []
    for system, _ in order:
        variants = [row(setting, system, variant, found.get((system, variant), [])) for variant in VARIANTS[system]]
        if system == "ddp":
            variants = [faster(variants)]
        for values in variants:
            if system in failures:
                values["failed"] = failures[system]
            rows.append(values)
    return rows


def row(setting: Setting, system: str, variant: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of the results, over the blocks of all rounds; its times are None if no round came to an end."""
    values: dict[str, Any] = {"system": system, **dataclasses.asdict(setting), "dtype": dtype_of(system, variant)}
    if system == "ddp":
        values["threads"] = variant
    blocks = [block for line in lines for block in line["blocks_ms"]]
    first = lines[0] if lines else {}
    predicted = all_reduce_bytes(first["payload"], setting.hosts) if first else None
    return values | {
        "step_ms": round(statistics.median(blocks), 2) if blocks else None,
        "nic_bytes": round(statistics.mean(line["nic_bytes"] for line in lines)) if lines else None,
        "predicted_bytes": round(predicted) if predicted is not None else None,
        "blocks_ms": blocks,
        "cpu_ms": round(statistics.mean(line["cpu_ms"] for line in lines), 2) if lines else None,
        "first_losses": first.get("first_losses"),
        "version": first.get("version"),
    }


def faster(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    best = min(rows, key=lambda values: values["step_ms"] or math.inf)
    others = {values["threads"]: values["step_ms"] for values in rows if values is not best}
    return best | {"other_threads_ms": others}


def limits(setting: Setting) -> list[dict[str, Any]]:
    """Rows of what the rate alone allows."""
    return [
        {
            "system": "limit",
            **dataclasses.asdict(setting),
            "dtype": dtype,
            "step_ms": round(limit, 2),
            "nic_bytes": None,
            "predicted_bytes": round(setting.must_send(dtype)),
        }
        for dtype in ("float32", "bfloat16")
        if (limit := setting.limit_ms(dtype)) is not None
    ]


def compare(setting: Setting, rows: list[dict[str, Any]]) -> None:
    """Adds the ratios to DDP and to the limit, and checks that all systems trained the same model alike."""
    baseline = next((values["step_ms"] for values in rows if values["system"] == "ddp"), None)
    losses = [values["first_losses"] for values in rows if values.get("first_losses")]
    for values in rows:
        took, limit = values["step_ms"], setting.limit_ms(values["dtype"])
        values["of_ddp"] = round(took / baseline, 3) if took and baseline else None
        values["of_limit"] = round(limit / took, 3) if took and limit else None
        own = values.pop("first_losses", None)
        if own and abs(own[-1] - losses[0][-1]) > LOSS_TOLERANCE * (losses[0][0] - losses[0][-1]):
            values.setdefault("failed", []).append(f"trains something else: losses {own}, not {losses[0]}")


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What all cells of one file have in common."""
    return {
        "command": COMMAND,
        "model": MODEL,
        "cores": os.cpu_count(),
        "rounds": options.rounds,
        "blocks_a_round": options.repeats,
    }


def measured(options: argparse.Namespace) -> dict[Setting, list[dict[str, Any]]]:
    """The rows of cells that are in the results, without those in which something has failed."""
    content = json.loads(RESULTS.read_text())
    rows = content.pop("rows")
    if content != about(options):
        sys.exit(f"error: {RESULTS} was measured otherwise: {content}; leave out --resume")
    found: dict[Setting, list[dict[str, Any]]] = {}
    for values in rows:
        found.setdefault(Setting(values["hosts"], values["rate"], values["selected"]), []).append(values)
    return {setting: cell for setting, cell in found.items() if not any("failed" in values for values in cell)}


def write(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(about(options) | {"rows": rows}, indent=1) + "\n")


def names(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown} unknown: choose from {list(known)}")
        return chosen

    return parse


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND)
    torch_here = sys.executable if importlib.util.find_spec("torch") else None
    parser.add_argument("--python_torch", default=torch_here, help="the Python that has PyTorch; without it, no DDP")
    parser.add_argument("--hosts", type=lambda text: [int(count) for count in text.split(",")], default=None)
    parser.add_argument("--rates", type=names(list(RATES)), default=list(RATES))
    parser.add_argument("--selected", type=names(list(SELECTIONS)), default=list(SELECTIONS))
    parser.add_argument("--systems", type=names(list(SYSTEMS)), default=list(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=2, help="times that each system is started")
    parser.add_argument("--repeats", type=int, default=3, help="timed blocks in each round")
    parser.add_argument("--steps", type=int, help="steps a block; left out, as many as take about 1.5 s")
    parser.add_argument(
        "--resume", action="store_true", help="keep what is in the results, and measure the cells that are not"
    )
    parser.add_argument("--smoke", action="store_true", help="a short run that writes no results")
    options = parser.parse_args()
    options.hosts = options.hosts or ([2] if options.smoke else [2, 4, 8])
    if options.smoke:
        options.rates, options.selected = ["unshaped"], ["part"]
        options.rounds, options.repeats, options.steps = 1, 2, 2
    return options


def main() -> None:
    options = arguments()
    if reason := hosts.available():
        sys.exit(f"error: no hosts can be made here: {reason}")
    pythons = {"ddp": options.python_torch, "tensorflow": sys.executable, "dist_partial": sys.executable}
    order = [(system, pythons[system]) for system in options.systems if pythons[system]]
    if "ddp" in options.systems and not options.python_torch:
        print("no --python_torch: DDP is left out", file=sys.stderr)
    # So that workers are ended and hosts removed as well when this is ended from outside.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    known = measured(options) if options.resume and not options.smoke else {}
    rows: list[dict[str, Any]] = []
    for number, values in enumerate(itertools.product(options.hosts, options.rates, options.selected)):
        setting = Setting(*values)
        found = known.pop(setting, None)
        if found is None:
            first = number % len(order)
            with hosts.hosts(setting.hosts, None if setting.rate == "unshaped" else setting.rate):
                found = limits(setting) + measure(setting, order[first:] + order[:first], options)
            compare(setting, found)
        rows += found
        if not options.smoke:
            write([*rows, *itertools.chain(*known.values())], options)
    print(f"{MODEL}; ms a step, the ratio to DDP in brackets\n\n{tables.text('wire', {'rows': rows})}")
    slower = [values for values in rows if values["system"] == "dist_partial" and (values["of_ddp"] or 0) > 1.05]
    for values in slower:
        setting = Setting(values["hosts"], values["rate"], values["selected"])
        print(f"{setting}, {values['dtype']}: {values['of_ddp']} of DDP's time")


if __name__ == "__main__":
    main()
