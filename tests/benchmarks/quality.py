"""Held-out loss against bytes sent: what each reduction costs, on everything and on a selection.

python -m tests.benchmarks.quality [--seeds=3] [--policies="NAME;..."] [--go_on]

Two simulated replicas train a byte transformer on the embedded corpus; every run reads the same number of examples.
Each policy runs in a process of its own, two at a time, and its losses are means over the seeds.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks import readme

COMMAND = "python -m tests.benchmarks.quality"
RESULTS = Path(__file__).parent / "results" / "quality.json"
PLOT = RESULTS.with_suffix(".png")
EXAMPLES = 16_000
WINDOW = 64
HELD_OUT = 1024
MODEL = {"layers": 2, "width": 32, "heads": 2}
ALL = [("train", r".*")]
PART = [("freeze", r"block_./mlp/.*"), ("train", r".*")]


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is trained and how it travels.

    Attributes:
        name: in the table.
        reduction: makes it; called in the process that has TensorFlow.
        batch: examples a step; smaller ones make more steps of the same examples.
        learning_rate: the peak of the cosine.
        rules: what is trained.
    """

    name: str
    reduction: Callable[[Any], Any]
    batch: int = 32
    learning_rate: float = 8e-3
    rules: Any = dataclasses.field(default_factory=lambda: ALL)  # or a function that makes them, as `reduction`


def _in_turns(m: Any) -> list[Any]:
    """Fragments that exchange at different steps; the rules carry the reductions."""
    from dist_partial import Rule

    parts = [r"embedding/.*", r"block_0/.*", r"block_1/.*", r".*"]
    return [Rule(part, reduction=m.LocalSGD(12, 3 * i, exchange=m.Quantized(4))) for i, part in enumerate(parts)]


def _policies() -> list[Policy]:
    both: dict[str, Callable[[Any], Any]] = {
        "full": lambda m: m.EveryStep("float32"),
        "bfloat16": lambda m: m.EveryStep("bfloat16"),
        "PowerSGD rank 4": lambda m: m.PowerSGD(4),
        "top 6 %, 8 bits": lambda m: m.TopK(1 / 16, 256, 8),
        "4 bits": lambda m: m.Quantized(4),
        "every 10 steps, Nesterov (DiLoCo)": lambda m: m.LocalSGD(10, outer=m.nesterov),
        "every 10 steps, 4 bits": lambda m: m.LocalSGD(10, exchange=m.Quantized(4)),
        "every 6 steps, 1.6 bits": lambda m: m.LocalSGD(6, exchange=m.Quantized(1.6)),
        "every 2 steps, top 6 % in 1 bit, keep": lambda m: m.LocalSGD(2, exchange=m.TopK(1 / 16, 256, 1), keep=True),
        "never": lambda m: m.Never(),
    }
    smaller: dict[str, Callable[[Any], Any]] = {
        "batch 8, full": lambda m: m.EveryStep("float32"),
        "batch 8, every 24 steps, 1.6 bits": lambda m: m.LocalSGD(24, exchange=m.Quantized(1.6)),
        "batch 8, every 108 steps, 1.6 bits": lambda m: m.LocalSGD(108, exchange=m.Quantized(1.6)),
    }
    found = [Policy(name, make) for name, make in both.items()]
    found.append(Policy("in turns every 12 steps, 4 bits", lambda m: m.EveryStep(), rules=_in_turns))
    found += [Policy(name, make, 8, 6e-3) for name, make in smaller.items()]
    found += [Policy(f"selection: {name}", make, rules=PART) for name, make in both.items()]
    found.append(
        Policy(
            "selection: batch 8, every 24 steps, 1.6 bits", smaller["batch 8, every 24 steps, 1.6 bits"], 8, 6e-3, PART
        )
    )
    return found


POLICIES = {policy.name: policy for policy in _policies()}


def child(name: str, seeds: int) -> None:
    """Runs one policy with each seed; prints a JSON line a seed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import types

    import keras

    from dist_partial import compression, reduction, replicas, run
    from dist_partial.data import stdlib_corpus
    from dist_partial.models import byte_transformer
    from dist_partial.settings import Sampling, Settings

    policy = POLICIES[name]
    made = replicas.create("mirrored", 2)
    steps = EXAMPLES // policy.batch
    warm_up = 640 // policy.batch
    names = types.SimpleNamespace(**{**vars(compression), **vars(reduction)})

    def optimizer() -> keras.optimizers.Optimizer:
        rate = policy.learning_rate
        return keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(
                0.02 * rate, steps - warm_up, alpha=0.05, warmup_target=rate, warmup_steps=warm_up
            )
        )

    for seed in range(1, seeds + 1):
        settings = Settings(
            rules=policy.rules(names) if callable(policy.rules) else policy.rules,
            model=lambda: byte_transformer(**MODEL),
            data=lambda: stdlib_corpus(window=WINDOW),
            optimizer=optimizer,
            reduction=policy.reduction(names),
            steps=steps,
            global_batch=policy.batch,
            seed=seed,
            eval_examples=HELD_OUT,
            clip_norm=1.0,
            steps_per_loop=50,
            replicas=lambda: made,
            sampling=Sampling(length=1),
        )
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            run.run(settings, Path(folder))
            rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        last = next(row for row in reversed(rows) if row["split"] == "eval")
        found = {"seed": seed, "loss": last["loss"], "wire_bytes": last["wire_bytes"]}
        print("RESULT " + json.dumps(found | {"seconds": time.perf_counter() - start}), flush=True)


def measure(name: str, seeds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.quality", "--child", name, f"--seeds={seeds}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or len(found) != seeds:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    losses = [each["loss"] for each in found]
    policy = POLICIES[name]
    row = {
        "policy": name,
        "selected": "part" if policy.rules is PART else "all",
        "global_batch": policy.batch,
        "eval_loss": statistics.mean(losses),
        "wire_bytes": statistics.mean(each["wire_bytes"] for each in found),
        "spread": statistics.stdev(losses) if seeds > 1 else 0.0,
        "losses": losses,
        "seconds": round(statistics.mean(each["seconds"] for each in found), 1),
    }
    print(f"{name}: {row['eval_loss']:.4f} +- {row['spread']:.4f}, {row['wire_bytes']:,.0f} bytes", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    full = next((row for row in rows if row["policy"] == "full"), rows[0])
    lines = []
    for row in rows:
        ratio = f"{full['wire_bytes'] / row['wire_bytes']:,.1f}x" if row["wire_bytes"] else "all"
        against = f"{row['eval_loss'] / full['eval_loss'] - 1:+.2%}"
        lines.append(
            [
                row["policy"],
                f"{row['eval_loss']:.4f}",
                f"{row['spread']:.4f}",
                against,
                f"{row['wire_bytes']:,.0f}",
                ratio,
            ]
        )
    return readme.table(["policy", "held-out loss", "spread", "against full", "bytes a replica", "fewer bytes"], lines)


def plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    full = next((row for row in rows if row["policy"] == "full"), rows[0])
    for row in rows:
        if row["wire_bytes"]:
            marker = "s" if row["selected"] == "part" else "^" if row["global_batch"] < 32 else "o"
            axes.errorbar(row["wire_bytes"], row["eval_loss"], row["spread"], fmt=marker)
            axes.annotate(row["policy"], (row["wire_bytes"], row["eval_loss"]), fontsize=7, rotation=15)
    axes.axhline(full["eval_loss"] * 1.01, linestyle=":", color="grey", label="1 % worse than full")
    axes.set(xscale="log", xlabel="bytes a replica has handed over", ylabel="held-out loss, nats a byte")
    axes.legend()
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--policies", default="", help="some of them, separated by ;")
    parser.add_argument("--go_on", action="store_true", help="keep the rows that are there")
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.seeds)
        return
    rows: dict[str, dict[str, Any]] = {}
    if arguments.go_on and RESULTS.exists():
        rows = {row["policy"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    failures = []
    with ThreadPoolExecutor(2) as pool:
        names = arguments.policies.split(";") if arguments.policies else list(POLICIES)
        missing = [name for name in names if name not in rows]
        for name, result in [(name, pool.submit(measure, name, arguments.seeds)) for name in missing]:
            if error := result.exception():
                failures.append(str(error))
                continue
            rows[name] = result.result()
            write([rows[name] for name in POLICIES if name in rows])
    if failures:
        sys.exit("\n".join(failures))


def write(rows: list[dict[str, Any]]) -> None:
    setting = f"{EXAMPLES:,} examples of {WINDOW} bytes, byte_transformer({MODEL}), Adam, cosine, 2 simulated replicas"
    RESULTS.write_text(json.dumps({"command": COMMAND, "setting": setting, "rows": rows}, indent=1) + "\n")
    plot(rows)
    readme.write("quality", table(rows))


if __name__ == "__main__":
    main()
