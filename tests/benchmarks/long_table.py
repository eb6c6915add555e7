"""The long table: a thousand times fewer bytes, against the best run that exchanges float32 in every step.

python -m tests.benchmarks.quality --table=long [--policies="NAME;..."] [--hours=H]

Simulated replicas train all of a byte transformer on the embedded corpus; every policy reads the same number of
examples, in batches and at rates that are its own best (see `tuned`).
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.runs import last_evaluation
from tests.benchmarks.tuned import SEEDS, TUNING_SEED, Piece, Policy, Setting, Table, combinations

MODEL = {"layers": 4, "width": 64, "heads": 4}
EXAMPLES, WINDOW, HELD_OUT = 36_000, 64, 2048
WARM_UP_EXAMPLES = 1_600
MEAN, NESTEROV = [1.0, 0.0], [0.7, 0.6]  # rate and momentum of an outer optimizer
RATES = {"AdamW": [1e-3, 2e-3], "Muon": [2e-3, 4e-3]}

How = tuple[str, Callable[[Any, Setting], Any]]  # the optimizer, and what makes the reduction


def _every_step(m: Any, setting: Setting) -> Any:
    return m.AllReduce("float32")


def _exchanged(
    kind: str, every: int, compressor: Callable[[Any], Any] | None = None, **options: Any
) -> Callable[[Any, Setting], Any]:
    """Steps of each replica's own, whose outer optimizer is that of the setting."""

    def make(m: Any, setting: Setting) -> Any:
        outer = functools.partial(m.nesterov, *setting["outer"])
        chosen = compressor(m) if compressor else None
        return getattr(m, kind)(every, outer_optimizer=outer, compressor=chosen, **options)

    return make


def _two_bits(m: Any) -> Any:
    return m.Quantized(2)


def _sparse(m: Any) -> Any:
    """What SparseLoCo (Sarfi et al. 2025) sends: of each 4096 values 64, in 2 bits."""
    return m.TopK(1 / 64, 4096, 2, decay=0.95)


def _policy(
    name: str,
    optimizer: str,
    reduction: Callable[[Any, Setting], Any],
    outer: Sequence[Any] = (NESTEROV,),
    replicas: Sequence[int] = (8,),
) -> Policy:
    """Of local steps: the rate with the mean of all movements first, then with each other outer optimizer."""
    sweep = combinations(batch=[8], rate=RATES[optimizer], outer=[MEAN])
    return Policy(name, sweep, (optimizer, reduction), replicas, {"outer": outer})


POLICIES = [
    Policy(
        "AdamW, float32 every step",
        combinations(batch=[8], rate=[1e-3, 2e-3, 4e-3]) + combinations(batch=[16], rate=[1e-3, 2e-3, 4e-3, 8e-3]),
        ("AdamW", _every_step),
        (8, 2),
    ),
    Policy(
        "Muon, float32 every step",
        combinations(batch=[8, 16], rate=[2e-3, 4e-3, 8e-3]),
        ("Muon", _every_step),
        (8, 2),
    ),
    Policy(
        "Muon, 4 bits every step",
        combinations(batch=[8], rate=RATES["Muon"]),
        ("Muon", lambda m, setting: m.Quantized(4)),
        (8, 2),
    ),
    _policy("DiLoCo: AdamW, every 30 steps", "AdamW", _exchanged("LocalSGD", 30)),
    _policy("SparseLoCo: AdamW, every 30 steps, top 1/64 in 2 bits", "AdamW", _exchanged("LocalSGD", 30, _sparse)),
    _policy("MuLoCo: Muon, every 30 steps, 2 bits", "Muon", _exchanged("LocalSGD", 30, _two_bits), replicas=(8, 2)),
    _policy("Muon, every 66 steps, 2 bits", "Muon", _exchanged("LocalSGD", 66, _two_bits), replicas=(8, 2)),
    _policy(
        "Muon, every 66 steps, 2 bits, applied 6 steps later",
        "Muon",
        _exchanged("LocalSGD", 66, _two_bits, delay=6, keep_progress=True),
        [],
    ),
    _policy(
        "Muon, every step until 16, then every 90, 2 bits",
        "Muon",
        _exchanged("LocalSGD", 90, _two_bits, warm_up=16),
        [],
    ),
    _policy("Muon, every 30 steps, top 1/64 in 2 bits", "Muon", _exchanged("LocalSGD", 30, _sparse)),
    _policy(
        "Muon, block-parallel, every 32 steps, 2 bits",
        "Muon",
        _exchanged("BlockParallel", 32, _two_bits),
        [[0.5, 0.0]],
    ),
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
