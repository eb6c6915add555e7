"""The long table: a thousand times fewer bytes, against the best run that exchanges float32 in every step.

python -m tests.benchmarks.quality --table=long [--policies="NAME;..."] [--hours=H]

Simulated replicas train all of a byte transformer on the embedded corpus; every policy reads the same number of
examples, in batches and at rates that are its own best (see `tuned`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.runs import last_evaluation
from tests.benchmarks.tuned import SEEDS, TUNING_SEED, Piece, Policy, Setting, Table

MODEL = {"layers": 4, "width": 64, "heads": 4}
EXAMPLES, WINDOW, HELD_OUT = 36_000, 64, 2048
WARM_UP_EXAMPLES = 1_600
BATCHES, RATES = [8, 16, 32], [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3]
OUTER = [[1.0, 0.0], [0.7, 0.6]]  # rate and momentum of an outer optimizer: the mean, then Nesterov's

How = tuple[str, Callable[[Any, Setting], Any]]  # the optimizer, and what makes the reduction


def _float32(m: Any, setting: Setting) -> Any:
    return m.AllReduce("float32")


def _local(
    name: str,
    optimizer: str,
    examples: int,
    compressor: Callable[[Any], Any] | None = None,
    replicas: Sequence[int] = (8,),
    kind: str = "LocalSGD",
    **options: Any,
) -> Policy:
    """Steps of each replica's own, exchanged every so many examples; options that are counts are in examples, too.

    So bytes do not depend on the batch, which is tuned with the rate and the outer optimizer.
    """

    def make(m: Any, setting: Setting) -> Any:
        outer = functools.partial(m.nesterov, *setting["outer"])
        steps = {name: value if value is True else value // setting["batch"] for name, value in options.items()}
        chosen = compressor(m) if compressor else None
        return getattr(m, kind)(examples // setting["batch"], outer_optimizer=outer, compressor=chosen, **steps)

    start = {"batch": 16, "rate": {"AdamW": 4e-3, "Muon": 8e-3}[optimizer], "outer": OUTER[1]}
    grid = {"batch": BATCHES, "rate": RATES, "outer": OUTER}
    return Policy(name, start, grid, (optimizer, make), replicas)


def _far(policy: Policy, *tuned: str) -> Policy:
    """Begins where the tuning of every 256 examples has ended; tunes what is named, or all."""
    grid = {name: values for name, values in policy.grid.items() if name in (tuned or policy.grid)}
    return dataclasses.replace(policy, start={"batch": 8, "rate": 4e-3, "outer": OUTER[1]}, grid=grid)


def _two_bits(m: Any) -> Any:
    return m.Quantized(2)


def _sparse(m: Any) -> Any:
    """As SparseLoCo (Sarfi et al. 2025), but of each 256 values 16: in a run this short 64 of 4096 are too few."""
    return m.TopK(1 / 16, 256, 2, decay=0.95)


def _every(name: str, optimizer: str, rate: float, make: Callable[[Any, Setting], Any]) -> Policy:
    return Policy(
        name, {"batch": 8, "rate": rate}, {"batch": BATCHES, "rate": RATES}, (optimizer, make), replicas=(8, 2)
    )


POLICIES = [
    _every("AdamW, float32 every step", "AdamW", 2e-3, _float32),
    _every("Muon, float32 every step", "Muon", 4e-3, _float32),
    _every("Muon, 4 bits every step", "Muon", 4e-3, lambda m, setting: m.Quantized(4)),
    _local("DiLoCo: AdamW, every 256 examples", "AdamW", 256),
    _local("SparseLoCo: AdamW, every 256 examples, top 1/16 in 2 bits", "AdamW", 256, _sparse),
    _local("Muon, every 64 examples, 2 bits", "Muon", 64, _two_bits, (8, 2)),
    _local("MuLoCo: Muon, every 256 examples, 2 bits", "Muon", 256, _two_bits, (8, 2)),
    _far(_local("Muon, every 512 examples, 2 bits", "Muon", 512, _two_bits, (8, 2))),
    _far(
        _local(
            "Muon, every 512 examples, 2 bits, applied 64 later", "Muon", 512, _two_bits, delay=64, keep_progress=True
        ),
        "rate",
    ),
    _far(
        _local("Muon, every step for 256 examples, then every 512, 2 bits", "Muon", 512, _two_bits, warm_up=256), "rate"
    ),
    _far(_local("Muon, every 512 examples, top 1/16 in 2 bits", "Muon", 512, _sparse)),
    _far(_local("Muon, block-parallel, every 256 examples, 2 bits", "Muon", 256, _two_bits, kind="BlockParallel")),
]


def run(policy: Policy, piece: Piece) -> dict[str, Any]:
    """Trains as a piece says; returns the loss at the end and the bytes."""
    import keras

    from dist_partial import reductions
    from dist_partial.config.settings import Sampling, Settings
    from dist_partial.data import stdlib_corpus
    from dist_partial.distributed import replicas
    from dist_partial.models import byte_transformer

    kind, reduction = policy.how
    batch, peak = piece.setting["batch"], piece.setting["rate"]
    made = replicas.create("mirrored", piece.replicas)
    steps, warm_up = EXAMPLES // batch, WARM_UP_EXAMPLES // batch

    def optimizer() -> keras.optimizers.Optimizer:
        rate = keras.optimizers.schedules.CosineDecay(
            0.02 * peak, steps - warm_up, alpha=0.02, warmup_target=peak, warmup_steps=warm_up
        )
        if kind == "Muon":
            return keras.optimizers.Muon(rate, exclude_layers=["head"], adam_beta_2=0.99)
        return keras.optimizers.AdamW(rate, beta_2=0.99)

    settings = Settings(
        rules=[("train", ".*")],
        model=lambda: byte_transformer(**MODEL),
        data=lambda: stdlib_corpus(window=WINDOW),
        optimizer=optimizer,
        reduction=reduction(reductions, piece.setting),
        steps=steps,
        global_batch=batch,
        seed=piece.seed,
        eval_examples=HELD_OUT,
        clip_norm=1.0,
        steps_per_loop=50,
        replicas=lambda: made,
        sampling=Sampling(length=1),
    )
    last = last_evaluation(settings)
    return {name: last[name] for name in ("loss", "wire_bytes", "nic_bytes")} | {"steps": steps}


TABLE = Table(
    Path(__file__).parent / "results" / "long.json",
    "python -m tests.benchmarks.quality --table=long",
    f"{EXAMPLES:,} examples of {WINDOW} bytes, byte_transformer({MODEL}), all of it trained, cosine; tuned on seed "
    f"{TUNING_SEED}, reported on seeds {', '.join(map(str, SEEDS))}",
    POLICIES,
    run,
    processes=2,
)
