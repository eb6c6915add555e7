"""Held-out loss against bytes sent: what each reduction costs, on everything and on a selection, or each schedule.

python -m tests.benchmarks.quality [--table=schedules|long] [--seeds=3] [--policies="NAME;..."] [--go_on]

Simulated replicas, two unless a policy says otherwise, train a byte transformer on the embedded corpus; every run reads
the same number of examples. Each policy runs in a process of its own, two at a time, and its losses are means over the
seeds.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.benchmarks import long_table, tables
from tests.benchmarks.runs import give, last_evaluation, results_of

COMMAND = "python -m tests.benchmarks.quality"
RESULTS = Path(__file__).parent / "results"
EXAMPLES = 16_000
WINDOW = 64
HELD_OUT = 1024
MODELS = {
    "quality": {"layers": 2, "width": 32, "heads": 2},
    "schedules": {"layers": 4, "width": 32, "heads": 2},  # enough layers to switch
}
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
        schedule: makes what is trained when, as `reduction`.
        decay: whether the learning rate decays. Each unit of a schedule has an optimizer of its own, which counts its
            own steps: there a constant rate compares like with like.
        leave: what becomes of the slots of what a schedule leaves.
        replicas: how many.
    """

    name: str
    reduction: Callable[[Any], Any]
    batch: int = 32
    learning_rate: float = 8e-3
    rules: Any = dataclasses.field(default_factory=lambda: ALL)  # or a function that makes them, as `reduction`
    schedule: Callable[[Any], Any] | None = None
    decay: bool = True
    leave: str = "keep"
    replicas: int = 2


def _in_turns(m: Any) -> list[Any]:
    """Fragments that exchange at different steps; the rules carry the reductions."""
    from dist_partial import Rule

    parts = [r"embedding/.*", r"block_0/.*", r"block_1/.*", r".*"]
    return [Rule(part, reduction=m.LocalSGD(12, 3 * i, compressor=m.Quantized(4))) for i, part in enumerate(parts)]


def _policies() -> list[Policy]:
    both: dict[str, Callable[[Any], Any]] = {
        "full": lambda m: m.AllReduce("float32"),
        "bfloat16": lambda m: m.AllReduce("bfloat16"),
        "PowerSGD rank 4": lambda m: m.PowerSGD(4),
        "top 6 %, 8 bits": lambda m: m.TopK(1 / 16, 256, 8),
        "4 bits": lambda m: m.Quantized(4),
        "every 10 steps, Nesterov (DiLoCo)": lambda m: m.LocalSGD(10, outer_optimizer=m.nesterov),
        "every 10 steps, 4 bits": lambda m: m.LocalSGD(10, compressor=m.Quantized(4)),
        "every 6 steps, 1.6 bits": lambda m: m.LocalSGD(6, compressor=m.Quantized(1.6)),
        "every 2 steps, top 6 % in 1 bit, residual kept local": lambda m: m.LocalSGD(
            2, compressor=m.TopK(1 / 16, 256, 1), keep_residual_local=True
        ),
        "local only": lambda m: m.LocalOnly(),
    }
    smaller: dict[str, Callable[[Any], Any]] = {
        "batch 8, full": lambda m: m.AllReduce("float32"),
        "batch 8, every 24 steps, 1.6 bits": lambda m: m.LocalSGD(24, compressor=m.Quantized(1.6)),
        "batch 8, every 108 steps, 1.6 bits": lambda m: m.LocalSGD(108, compressor=m.Quantized(1.6)),
    }
    found = [Policy(name, make) for name, make in both.items()]
    found.append(Policy("in turns every 12 steps, 4 bits", lambda m: m.AllReduce(), rules=_in_turns))
    delays: dict[str, dict[str, Any]] = {
        "2 steps later, progress kept": {"delay": 2, "keep_progress": True},
        "3 steps later, progress kept": {"delay": 3, "keep_progress": True},
        "6 steps later, mixed by half": {"delay": 6, "mix": 0.5, "keep_residual_local": True},
        "6 steps later, progress kept": {"delay": 6, "keep_progress": True},
        "12 steps later, mixed by half": {"delay": 12, "mix": 0.5, "keep_residual_local": True},
        "12 steps later, progress kept": {"delay": 12, "keep_progress": True},
    }
    smaller |= {
        f"batch 8, every 24 steps, 1.6 bits, applied {name}": (
            lambda m, options=options: m.LocalSGD(24, compressor=m.Quantized(1.6), **options)
        )
        for name, options in delays.items()
    }
    found += [Policy(name, make, 8, 6e-3) for name, make in smaller.items()]
    found += [Policy(f"selection: {name}", make, rules=PART) for name, make in both.items()]
    found.append(
        Policy(
            "selection: batch 8, every 24 steps, 1.6 bits", smaller["batch 8, every 24 steps, 1.6 bits"], 8, 6e-3, PART
        )
    )
    # From three replicas on there are two hops: what the owner of a chunk sends of the sum.
    sums: dict[str, Callable[[Any], Any]] = {
        "full": lambda m: m.AllReduce("float32"),
        "top 1/64, of the sum its largest": lambda m: m.TopK(1 / 64),
        "top 1/64, of the sum all in 4 bits": lambda m: _union(m, 4),
        "top 1/64 in 4 bits, of the sum its largest": lambda m: m.TopK(1 / 64, bits=4),
    }
    found += [Policy(f"4 replicas: {name}", make, replicas=4) for name, make in sums.items()]
    return found


def _union(m: Any, replicas: int) -> Any:
    """TopK, but that the owner of a chunk sends in few bits all that it was sent."""

    @dataclasses.dataclass(frozen=True)
    class Union(m.TopK):  # type: ignore[name-defined]
        """Tells the two hops apart by the number of chunks that are encoded, and by the size of a message."""

        @property
        def all(self) -> Any:
            return m.TopK(self.density * replicas, self.block, 4)

        def payloads(self, shape: Any, dtype: str, peers: Any = None) -> Any:
            found = super().payloads(shape, dtype, *([peers] if peers else []))
            if found[0].kind != "all-to-all":
                return found
            count = self.rounded(-(-math.prod(shape) // peers.replicas), math.prod(shape))
            return found[0], found[1]._replace(bytes=self.all.message_bytes(count))

        def encode(self, chunks: Any, filled: Any) -> Any:
            return self.all.encode(chunks, filled) if chunks[0].shape[0] == 1 else super().encode(chunks, filled)

        def decode(self, messages: Any, counts: Any, dtype: Any) -> Any:
            own = messages.shape[1] == sum(map(self.message_bytes, counts))
            return (super() if own else self.all).decode(messages, counts, dtype)

    return Union(1 / 64)


def _schedules() -> list[Policy]:
    """Each schedule, and constant selections of fewer and more bytes."""
    steps = EXAMPLES // 32
    top = r"(block_[23]|final_norm|head)/.*"
    made: dict[str, Callable[[Any], Any]] = {
        "phases": lambda m: m.Phases([(0, r"(final_norm|head)/.*"), (100, top), (200, r".*")]),
        "gradual unfreezing": lambda m: m.Gradual(every=40),
        "block rotation": lambda m: m.Rotation(every=20, always=["embedding", "final_norm", "head"]),
        "LISA, 2 layers": lambda m: m.Lisa(every=20, count=2),
        "AutoFreeze": lambda m: m.AutoFreeze(every=25, retest=5),
        "byte budget, 100 kB": lambda m: m.Budget(bytes=100_000, every=20),
        "byte budget, 140 kB": lambda m: m.Budget(bytes=140_000, every=20),
    }
    constant = {
        "full": ALL,
        "constant: embedding, norm, head": [("train", r"(embedding|final_norm|head)/.*"), ("freeze", r".*")],
        "constant: and block 0": [("train", r"(embedding|block_0|final_norm|head)/.*"), ("freeze", r".*")],
        "constant: and block 3": [("train", r"(embedding|block_3|final_norm|head)/.*"), ("freeze", r".*")],
        "constant: and attention": [("train", r"(embedding|block_./att.*|final_norm|head)/.*"), ("freeze", r".*")],
        "constant: and blocks 0, 1": [("train", r"(embedding|block_[01]|final_norm|head)/.*"), ("freeze", r".*")],
        "constant: and blocks 2, 3": [("train", r"(embedding|block_[23]|final_norm|head)/.*"), ("freeze", r".*")],
    }
    assert steps == 500
    found = [Policy(name, _every_step, 32, 3e-3, rules, decay=False) for name, rules in constant.items()]
    found += [Policy(name, _every_step, 32, 3e-3, schedule=make, decay=False) for name, make in made.items()]
    found.append(
        Policy("block rotation, slots dropped", _every_step, 32, 3e-3, ALL, made["block rotation"], False, "drop")
    )
    return found


def _every_step(m: Any) -> Any:
    return m.AllReduce("float32")


TABLES = {
    "quality": {policy.name: policy for policy in _policies()},
    "schedules": {policy.name: policy for policy in _schedules()},
}


def child(which: str, name: str, seeds: int) -> None:
    """Runs one policy with each seed; prints a JSON line a seed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import types

    import keras

    from dist_partial import reductions, schedules
    from dist_partial.config.settings import Sampling, Settings
    from dist_partial.data import stdlib_corpus
    from dist_partial.distributed import replicas
    from dist_partial.models import byte_transformer

    policy = TABLES[which][name]
    made = replicas.create("mirrored", policy.replicas)
    steps = EXAMPLES // policy.batch
    warm_up = 640 // policy.batch
    names = types.SimpleNamespace(**{**vars(reductions), **vars(schedules)})

    def optimizer() -> keras.optimizers.Optimizer:
        rate = policy.learning_rate
        if not policy.decay:
            return keras.optimizers.Adam(rate)
        return keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(
                0.02 * rate, steps - warm_up, alpha=0.05, warmup_target=rate, warmup_steps=warm_up
            )
        )

    for seed in range(1, seeds + 1):
        settings = Settings(
            rules=policy.rules(names) if callable(policy.rules) else policy.rules,
            model=lambda: byte_transformer(**MODELS[which]),
            data=lambda: stdlib_corpus(window=WINDOW),
            optimizer=optimizer,
            reduction=policy.reduction(names),
            schedule=policy.schedule(names) if policy.schedule else schedules.Constant(),
            leave=policy.leave,
            compiled_plans=24,
            steps=steps,
            global_batch=policy.batch,
            seed=seed,
            eval_examples=HELD_OUT,
            clip_norm=1.0,
            steps_per_loop=50,
            replicas=lambda: made,
            sampling=Sampling(length=1),
        )
        start = time.perf_counter()
        last = last_evaluation(settings)
        found = {"seed": seed, "loss": last["loss"], "wire_bytes": last["wire_bytes"]}
        give(found | {"seconds": time.perf_counter() - start})


def measure(which: str, name: str, seeds: int) -> dict[str, Any]:
    found = results_of("tests.benchmarks.quality", f"--table={which}", f"--child={name}", f"--seeds={seeds}")
    if len(found) != seeds:
        raise RuntimeError(f"{name}: {len(found)} results of {seeds} seeds")
    losses = [each["loss"] for each in found]
    policy = TABLES[which][name]
    row = {
        "policy": name,
        "selected": "all" if policy.rules is ALL or callable(policy.rules) else "part",
        "global_batch": policy.batch,
        "eval_loss": statistics.mean(losses),
        "wire_bytes": statistics.mean(each["wire_bytes"] for each in found),
        "spread": statistics.stdev(losses) if seeds > 1 else 0.0,
        "losses": losses,
        "seconds": round(statistics.mean(each["seconds"] for each in found), 1),
    }
    print(f"{name}: {row['eval_loss']:.4f} +- {row['spread']:.4f}, {row['wire_bytes']:,.0f} bytes", flush=True)
    return row


def plot(rows: list[dict[str, Any]], which: str) -> None:
    """A colour for each policy, with an open marker where it trains a selection."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5.2), layout="constrained")
    full = next((row for row in rows if row["policy"] == "full"), rows[0])
    colours = [*pyplot.get_cmap("tab20").colors[::2], *pyplot.get_cmap("tab20").colors[1::2]]
    names = list(dict.fromkeys(row["policy"].removeprefix("selection: ") for row in rows if row["wire_bytes"]))
    for row in rows:
        if row["wire_bytes"]:
            name = row["policy"].removeprefix("selection: ")
            marker = "s" if name.startswith("constant") else "o" if row["global_batch"] == 32 else "^"
            # More names than colours: from then on the same colours with an edge.
            again, i = divmod(names.index(name), len(colours))
            style = {"marker": marker, "color": colours[i], "markeredgecolor": "black" if again else colours[i]}
            if part := row["policy"] != name:
                style |= {"markerfacecolor": "white"}
            label = None if part and any(other["policy"] == name for other in rows) else name
            axes.errorbar(row["wire_bytes"], row["eval_loss"], row["spread"], linestyle="", label=label, **style)
    axes.axhline(full["eval_loss"] * 1.01, linestyle=":", color="grey", label="1 % worse than full")
    axes.set(xscale="log", xlabel="bytes that a replica sends in the whole run", ylabel="held-out loss, nats a byte")
    title = "open markers: a selection is trained" if which == "quality" else None
    figure.legend(loc="outside right upper", fontsize=8, title=title, title_fontsize=8)
    figure.savefig(RESULTS / f"{which}.png", dpi=110)


def main() -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--table")
    known, others = first.parse_known_args()
    if known.table == "long":  # which has arguments of its own
        long_table.TABLE.main(others)
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--policies", default="", help="some of them, separated by ;")
    parser.add_argument("--go_on", action="store_true", help="keep the rows that are there")
    parser.add_argument("--table", choices=[*TABLES, "long"], default="quality")
    parser.add_argument("--child")
    arguments = parser.parse_args()
    which, seeds = arguments.table, arguments.seeds
    if arguments.child:
        child(which, arguments.child, seeds)
        return
    rows: dict[str, dict[str, Any]] = {}
    results = RESULTS / f"{which}.json"
    if arguments.go_on and results.exists():
        rows = {row["policy"]: row for row in json.loads(results.read_text())["rows"]}
    failures = []
    with ThreadPoolExecutor(2) as pool:
        names = arguments.policies.split(";") if arguments.policies else list(TABLES[which])
        missing = [name for name in names if name not in rows]
        for name, result in [(name, pool.submit(measure, which, name, seeds)) for name in missing]:
            if error := result.exception():
                failures.append(str(error))
                continue
            rows[name] = result.result()
            write([rows[name] for name in TABLES[which] if name in rows], which)
    if failures:
        sys.exit("\n".join(failures))


def write(rows: list[dict[str, Any]], which: str) -> None:
    model, rate = MODELS[which], "cosine" if which == "quality" else "constant rate"
    setting = f"{EXAMPLES:,} examples of {WINDOW} bytes, byte_transformer({model}), Adam, {rate}, 2 replicas"
    command = COMMAND + ("" if which == "quality" else f" --table={which}")
    content = {"command": command, "setting": setting, "rows": rows}
    (RESULTS / f"{which}.json").write_text(json.dumps(content, indent=1) + "\n")
    plot(rows, which)
    print(tables.text(which), flush=True)


if __name__ == "__main__":
    main()
