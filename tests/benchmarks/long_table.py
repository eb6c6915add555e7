"""The long table: a thousand times fewer bytes, against the best run that exchanges float32 in every step.

python -m tests.benchmarks.quality --table=long [--policies="NAME;..."] [--hours=H] [--processes=2]

Simulated replicas train all of a byte transformer on the embedded corpus. Each policy is tuned first: all settings of
its sweep are tried on `TUNING_SEED`, and the best of them is then run on `SEEDS`, which decide on nothing. Every
policy reads the same examples. A piece is one such run, in a process of its own; its row is written when it ends, so
that the command goes on where it was stopped.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "long.json"
COMMAND = "python -m tests.benchmarks.quality --table=long"
MODEL = {"layers": 4, "width": 64, "heads": 4}
EXAMPLES, WINDOW, HELD_OUT = 36_000, 64, 2048
WARM_UP_EXAMPLES = 1_600
TUNING_SEED, SEEDS = 0, (1, 2, 3)

Tuned = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is tuned, and how gradients or movements travel.

    Attributes:
        name: in the table.
        optimizer: 'AdamW' or 'Muon'.
        sweep: the settings that are tried: of each at least `batch`, the global one, and `rate`, the peak of a cosine.
        reduction: makes it of the module of reductions and a setting, in the process that has TensorFlow.
        replicas: with how many; the sweep is made with the first of them.
    """

    name: str
    optimizer: str
    sweep: Sequence[Tuned]
    reduction: Callable[[Any, Tuned], Any]
    replicas: Sequence[int] = (8,)


def _all(**lists: Sequence[Any]) -> list[Tuned]:
    """Every combination of the given values."""
    found: list[Tuned] = [{}]
    for name, values in lists.items():
        found = [{**each, name: value} for each in found for value in values]
    return found


def _every_step(m: Any, s: Tuned) -> Any:
    return m.AllReduce("float32")


def _local(every: int, compressor: Callable[[Any], Any] | None = None, **options: Any) -> Callable[[Any, Tuned], Any]:
    """Local steps, whose outer optimizer has the setting's `outer`, [rate, momentum]."""

    def make(m: Any, s: Tuned) -> Any:
        rate, momentum = s["outer"]
        outer = functools.partial(m.nesterov, rate, momentum)
        return m.LocalSGD(every, outer_optimizer=outer, compressor=compressor and compressor(m), **options)

    return make


def _two_bits(m: Any) -> Any:
    return m.Quantized(2)


def _sparse(m: Any) -> Any:
    """What SparseLoCo (Sarfi et al. 2025) sends: of each 4096 values 64, in 2 bits."""
    return m.TopK(1 / 64, 4096, 2, decay=0.95)


def _dealt(every: int) -> Callable[[Any, Tuned], Any]:
    def make(m: Any, s: Tuned) -> Any:
        outer = functools.partial(m.nesterov, *s["outer"])
        return m.BlockParallel(every, outer_optimizer=outer, compressor=_two_bits(m))

    return make


MEAN, NESTEROV = [1.0, 0.0], [0.7, 0.6]
RATES = {"AdamW": [2e-3, 4e-3], "Muon": [4e-3, 8e-3]}


def _tuned(optimizer: str, outer: Sequence[Any] = (MEAN, NESTEROV)) -> list[Tuned]:
    return _all(batch=[8], rate=RATES[optimizer], outer=outer)


POLICIES = {
    policy.name: policy
    for policy in [
        Policy("AdamW, float32 every step", "AdamW", _all(batch=[8, 16], rate=[2e-3, 4e-3, 8e-3]), _every_step, (8, 2)),
        Policy("Muon, float32 every step", "Muon", _all(batch=[8, 16], rate=[4e-3, 8e-3, 16e-3]), _every_step, (8, 2)),
        Policy(
            "Muon, 4 bits every step", "Muon", _all(batch=[8], rate=RATES["Muon"]), lambda m, s: m.Quantized(4), (8, 2)
        ),
        Policy("DiLoCo: AdamW, every 30 steps", "AdamW", _tuned("AdamW"), _local(30)),
        Policy("SparseLoCo: AdamW, every 30 steps, top 1/64 in 2 bits", "AdamW", _tuned("AdamW"), _local(30, _sparse)),
        Policy("MuLoCo: Muon, every 30 steps, 2 bits", "Muon", _tuned("Muon"), _local(30, _two_bits), (8, 2)),
        Policy("Muon, every 66 steps, 2 bits", "Muon", _tuned("Muon"), _local(66, _two_bits), (8, 2)),
        Policy(
            "Muon, every 66 steps, 2 bits, applied 6 steps later",
            "Muon",
            _tuned("Muon", [MEAN]),
            _local(66, _two_bits, delay=6, keep_progress=True),
        ),
        Policy(
            "Muon, every step until 16, then every 90, 2 bits",
            "Muon",
            _tuned("Muon", [MEAN]),
            _local(90, _two_bits, warm_up=16),
        ),
        Policy("Muon, every 30 steps, top 1/64 in 2 bits", "Muon", _tuned("Muon"), _local(30, _sparse)),
        Policy("Muon, block-parallel, every 32 steps, 2 bits", "Muon", _tuned("Muon", [MEAN, [0.5, 0.0]]), _dealt(32)),
    ]
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One run."""

    policy: str
    replicas: int
    seed: int
    setting: Tuned

    def is_of(self, row: Mapping[str, Any]) -> bool:
        return all(row[name] == value for name, value in dataclasses.asdict(self).items())


def child(asked: str) -> None:
    """Runs a piece, given as JSON; prints its row."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras

    from dist_partial import reductions
    from dist_partial.config.settings import Sampling, Settings
    from dist_partial.data import stdlib_corpus
    from dist_partial.distributed import replicas
    from dist_partial.models import byte_transformer
    from dist_partial.training import loop

    piece = Piece(**json.loads(asked))
    policy, setting = POLICIES[piece.policy], piece.setting
    made = replicas.create("mirrored", piece.replicas)
    steps, warm_up = EXAMPLES // setting["batch"], WARM_UP_EXAMPLES // setting["batch"]

    def optimizer() -> keras.optimizers.Optimizer:
        rate = keras.optimizers.schedules.CosineDecay(
            0.02 * setting["rate"],
            steps - warm_up,
            alpha=0.02,
            warmup_target=setting["rate"],
            warmup_steps=warm_up,
        )
        if policy.optimizer == "Muon":
            return keras.optimizers.Muon(rate, exclude_layers=["head"], adam_beta_2=0.99)
        return keras.optimizers.AdamW(rate, beta_2=0.99)

    settings = Settings(
        rules=[("train", ".*")],
        model=lambda: byte_transformer(**MODEL),
        data=lambda: stdlib_corpus(window=WINDOW),
        optimizer=optimizer,
        reduction=policy.reduction(reductions, setting),
        steps=steps,
        global_batch=setting["batch"],
        seed=piece.seed,
        eval_examples=HELD_OUT,
        clip_norm=1.0,
        steps_per_loop=50,
        replicas=lambda: made,
        sampling=Sampling(length=1),
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        loop.run(settings, Path(folder))
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if row["split"] == "eval")
    found = {name: last[name] for name in ("loss", "wire_bytes", "nic_bytes")}
    row = dataclasses.asdict(piece) | found | {"steps": steps, "seconds": round(time.perf_counter() - began)}
    print("RESULT " + json.dumps(row), flush=True)


def measure(piece: Piece, core: int) -> dict[str, Any]:
    asked = json.dumps(dataclasses.asdict(piece))
    command = [sys.executable, "-m", "tests.benchmarks.quality", "--table=long", f"--child={asked}"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=3600,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # two at a time take turns less
    )
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or len(found) != 1:
        raise RuntimeError(f"{asked}: {done.stderr[-2000:]}")
    print(f"{asked}: {found[0]['loss']:.4f}, {found[0]['nic_bytes']:,} bytes", flush=True)
    return found[0]


def best(rows: Sequence[Mapping[str, Any]], policy: Policy) -> Tuned | None:
    """The setting with the least loss, once all of the sweep have been tried; None before."""
    tried = [
        row
        for row in rows
        for setting in policy.sweep
        if Piece(policy.name, policy.replicas[0], TUNING_SEED, setting).is_of(row)
    ]
    return min(tried, key=lambda row: row["loss"])["setting"] if len(tried) == len(policy.sweep) else None


def missing(rows: Sequence[Mapping[str, Any]], policies: Sequence[Policy]) -> Iterator[Piece]:
    """The pieces that can be run now and have no row."""
    for policy in policies:
        found = [Piece(policy.name, policy.replicas[0], TUNING_SEED, setting) for setting in policy.sweep]
        if (setting := best(rows, policy)) is not None:
            found = [Piece(policy.name, count, seed, setting) for count in policy.replicas for seed in SEEDS]
        yield from (piece for piece in found if not any(piece.is_of(row) for row in rows))


def run(names: Sequence[str], hours: float, processes: int) -> list[str]:
    """Runs what is missing, for so long; returns what failed."""
    policies, end = [POLICIES[name] for name in names or POLICIES], time.monotonic() + 3600 * hours
    rows = json.loads(RESULTS.read_text())["pieces"] if RESULTS.exists() else []
    failures: list[str] = []
    running: dict[Future[dict[str, Any]], tuple[Piece, int]] = {}
    tried: list[Piece] = []
    with ThreadPoolExecutor(processes) as pool:
        while True:
            for piece in missing(rows, policies):
                if len(running) == processes or time.monotonic() > end:
                    break
                if piece not in tried:
                    tried.append(piece)
                    core = min(set(range(processes)) - {core for _, core in running.values()})
                    running[pool.submit(measure, piece, core)] = piece, core
            if not running:
                return failures
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                running.pop(future)
                if error := future.exception():
                    failures.append(str(error))
                else:
                    rows.append(future.result())
                    write(rows)


def write(rows: Sequence[Mapping[str, Any]]) -> None:
    setting = (
        f"{EXAMPLES:,} examples of {WINDOW} bytes, byte_transformer({MODEL}), cosine, tuned on seed {TUNING_SEED}, "
        f"reported on seeds {', '.join(map(str, SEEDS))}"
    )
    order = list(POLICIES)
    rows = sorted(rows, key=lambda row: order.index(row["policy"]) if row["policy"] in order else len(order))
    found = {"command": COMMAND, "setting": setting, "tuning_seed": TUNING_SEED}
    head = json.dumps(found, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)  # a line each
    text = f'{head},\n "pieces": [\n{lines}\n ]\n}}\n'
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(RESULTS)
