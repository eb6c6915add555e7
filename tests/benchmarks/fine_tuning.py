"""Ways to fine-tune SmolLM2-135M, each tuned on one seed and reported on others: loss, bytes, time and memory.

python -m tests.benchmarks.fine_tuning [--policies="NAME;..."] [--hours=H]

The text is the standard library as CPython's instructions, of which the model has read little (see `disassembly`). Runs
come two at a time, a core each, in pieces that go on where they were stopped (see `tuned`). Needs the weights of
SmolLM2.
"""

import contextlib
import dis
import json
import os
import re
import resource
import sysconfig
import tempfile
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.tuned import SEEDS, TUNING_SEED, Piece, Policy, Table
from tests.helpers.files import rows

CONFIGS = Path(__file__).parents[2] / "gin_configs"
STEPS, BATCH, WINDOW, HELD_OUT = 200, 4, 64, 128
TEXT_BYTES = 2_000_000
# Of what everything in float32 sends in a step between two workers.
FULL_BYTES = 134_515_008 * 4

How = tuple[str, Sequence[str]]  # a gin file, and bindings over it, in which {rate} is the setting's

EVERYTHING = "run.rules = [('train', '.*')]"
CONSTANT = "keras.optimizers.Adam.learning_rate = {rate}"  # each unit of a schedule counts steps of its own
SPARSE = [
    "local_sgd.compressor = @top_k()",
    "top_k.density = 0.015625",
    "top_k.block = 4096",
    "top_k.bits = 2",
    "top_k.decay = 0.95",
]


RATES = [2.5e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3]


def _policy(name: str, file: str, bindings: Sequence[str], rate: float) -> Policy:
    return Policy(name, {"rate": rate}, {"rate": RATES}, (file, bindings), replicas=(2,))


POLICIES = [
    _policy("everything", "smollm2.gin", [EVERYTHING], 1e-4),
    _policy("the last 4 of 30 blocks", "smollm2.gin", [], 5e-4),
    _policy("LoRA 8, all kernels", "smollm2_lora.gin", [], 4e-3),
    _policy(
        "LoRA 8, exchanged every 20 steps, top 1/64 in 2 bits",
        "smollm2_lora.gin",
        ["run.reduction = @local_sgd()", "local_sgd.sync_every = 20", *SPARSE],
        4e-3,
    ),
    _policy(
        "LISA, 2 blocks for 10 steps",
        "smollm2.gin",
        [EVERYTHING, CONSTANT, "run.schedule = @lisa()", "lisa.every = 10", "lisa.count = 2", "run.leave = 'drop'"],
        1e-4,
    ),
    _policy(
        "BAdam, each block for 7 steps",
        "smollm2.gin",
        [EVERYTHING, CONSTANT, "run.schedule = @block_rotation()", "block_rotation.every = 7", "run.leave = 'drop'"],
        2e-4,
    ),
    _policy(
        "AutoFreeze, activations kept",
        "smollm2.gin",
        [
            EVERYTHING,
            CONSTANT,
            "run.schedule = @autofreeze()",
            "autofreeze.every = 20",
            "run.activation_cache = 'memory'",
        ],
        1e-4,
    ),
    _policy(
        "a budget of 3 % of the bytes",
        "smollm2.gin",
        [
            EVERYTHING,
            CONSTANT,
            "run.schedule = @budget()",
            "budget.every = 5",
            f"budget.bytes = {FULL_BYTES * 3 // 100}",
            "run.leave = 'drop'",
        ],
        2e-4,
    ),
    _policy(
        "everything, block-parallel, every 10 steps in 2 bits",
        "smollm2.gin",
        [
            EVERYTHING,
            "run.reduction = @block_parallel()",
            "block_parallel.sync_every = 10",
            "block_parallel.compressor = @quantized()",
            "quantized.bits = 2",
        ],
        1e-4,
    ),
]


def disassembly(folder: Path, size: int = TEXT_BYTES) -> None:
    """Writes modules of the standard library as instructions, a file each, until there are so many bytes.

    Where something lies in memory is left out, so that the text is the same each time; it differs between versions of
    Python.
    """
    written = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = compile(path.read_text(encoding="utf-8"), path.name, "exec")
        lines = []
        for code in _codes(whole):
            lines.append(f"def {code.co_qualname}")
            for each in dis.get_instructions(code):
                argument = re.sub(r" at 0x[0-9a-f]+, file .*?, line \d+", "", each.argrepr)
                lines.append(f"{each.offset} {each.opname} {argument}".rstrip())
        text = "\n".join(lines) + "\n"
        (folder / f"{path.stem}.txt").write_text(text, encoding="utf-8")
        written += len(text)
        if written >= size:
            return


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def run(policy: Policy, piece: Piece) -> dict[str, Any]:
    """Fine-tunes as a piece says; returns losses, bytes, times and the most memory."""
    from dist_partial.config import gin_files
    from dist_partial.training import loop

    file, more = policy.how
    rate = piece.setting["rate"]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        text = Path(folder, "text")
        text.mkdir()
        disassembly(text)
        params = [
            f"tokenized_text.root = {str(text)!r}",
            f"tokenized_text.window = {WINDOW}",
            "tokenized_text.limit = None",
            f"run.seed = {piece.seed}",
            f"run.steps = {STEPS}",
            f"run.global_batch = {BATCH}",
            f"run.eval_examples = {HELD_OUT}",
            "run.eval_every = None",
            "run.save_every = None",
            f"CosineDecay.decay_steps = {STEPS - 10}",
            f"CosineDecay.warmup_target = {rate}",
            f"CosineDecay.initial_learning_rate = {rate / 20}",
            f"replicas.cpu = {piece.replicas}",
            "replicas.kind = 'mirrored'",
            "sample.count = 0",
            *(line.format(rate=rate) for line in more),
        ]
        loop.run(gin_files.load([CONFIGS / file], params).settings, Path("run"))
        found = rows(Path("run", "metrics.jsonl"))
        traffic = json.loads(Path("run", "traffic.json").read_text())
    before, after = (row for row in found if row["split"] == "eval")
    return {
        "loss_before": before["loss"],
        "loss": after["loss"],
        "nic_bytes": after["nic_bytes"],
        "full_nic_bytes": FULL_BYTES * STEPS,  # of two workers each sends as much as everything is
        "step_ms": traffic["mean_step_ms"],
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "cores": len(os.sched_getaffinity(0)),
    }


TABLE = Table(
    Path(__file__).parent / "results" / "fine_tuning.json",
    "python -m tests.benchmarks.fine_tuning",
    f"{STEPS} steps of {BATCH} examples of {WINDOW} tokens, two simulated replicas on a core, Adam; tuned on seed "
    f"{TUNING_SEED}, reported on seeds {', '.join(map(str, SEEDS))}",
    POLICIES,
    run,
    processes=2,
)

if __name__ == "__main__":
    TABLE.main()
