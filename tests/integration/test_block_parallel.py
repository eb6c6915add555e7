"""Whole runs whose variables are dealt out: in pieces, on other numbers of replicas, on workers."""

import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from dist_partial.distributed import replicas
from dist_partial.reductions.block_parallel import BlockParallel
from dist_partial.reductions.quantized import Quantized
from dist_partial.selection.rules import Rule
from dist_partial.training import loop
from dist_partial.training.build import build
from tests.helpers import cases
from tests.helpers.files import rows, same_bits, state
from tests.helpers.strategies import in_process
from tests.integration.test_exchanges import assert_same_run, settings

# Nothing of tests.conftest may be imported here: the workers below run this file, too, and have one device each.
# Two fragments, of which each has shares of its own size: after steps 3 and 6, and after 2, 4 and 6.
DEALT = [
    Rule("dense1/.*", reduction=BlockParallel(3, compressor=Quantized(4))),
    Rule("dense2/.*", reduction=BlockParallel(2, delay=1)),
]
STEPS = 7


def test_a_run_in_pieces_is_the_run_at_once(tmp_path):
    """Of two replicas one owns dense1/kernel and the other all else; all send as much as the larger share."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    loop.run(settings(DEALT, in_process(2)), whole)
    for steps in (4, STEPS):
        keras.utils.clear_session(free_memory=False)
        loop.run(settings(DEALT, in_process(2), steps), pieces)
    assert_same_run(whole, pieces)
    kernel = 160 * 12 // 2 + 2 * 8  # two values a byte, and eight scales
    rest = 4 * (12 * 10 + 10)
    lines = [row for row in rows(whole / "metrics.jsonl") if row["split"] == "train"]
    # The larger share of what both send, for a fragment that only one of them owns is padded at the other.
    assert [row["wire_bytes"] for row in lines] == [(s // 3) * kernel + (s // 2) * rest for s in range(1, STEPS + 1)]
    assert [row["nic_bytes"] for row in lines] == [row["wire_bytes"] for row in lines]  # of two each sends its own once


def test_the_number_of_replicas_may_change(tmp_path):
    """Slots go with their variables, and what an owner has not sent goes to the next owner."""
    loop.run(settings(DEALT, in_process(2), 4), tmp_path)
    before = state(tmp_path, 4)
    keras.utils.clear_session(free_memory=False)
    loop.run(settings(DEALT, in_process(3), 5, save_every=5), tmp_path)
    after = state(tmp_path, 5)
    assert after.keys() == before.keys()
    for name in ("slots/dense1/kernel/velocity", "slots/dense2/kernel/velocity"):
        # One value, of whoever owns it, who makes a step with it; Adam's rate of 0.001 keeps most of it.
        assert before[name].shape == after[name].shape and before[name].any()
        assert np.all(after[name] >= 0.998 * before[name]) and not same_bits([after[name], before[name]]), name


def _train(folder: Path) -> None:
    """One of three workers, in pieces."""
    made = replicas.create("multi_worker")
    made.backend.close = lambda reason=None: None  # which a run calls at its end; the next one here goes on with it
    for steps in (4, STEPS):
        keras.utils.clear_session(free_memory=False)
        loop.run(settings(DEALT, made, steps, precision="float64"), folder / "three")
    trainer = build(settings(DEALT, made, precision="float64"), made)
    sizes = {name: variable.shape for group in trainer.optimizers for name, variable in group.state.items()}
    held = {name for name, shape in sizes.items() if name.startswith("dense") and shape[0]}
    owned = [path for path, owner in trainer.plan.owners(3).items() if owner == made.rank]
    assert owned and held == {f"{path}/{slot}" for path in owned for slot in ("momentum", "velocity")}, sizes


@pytest.mark.slow
def test_workers_are_the_replicas_that_are_simulated(tmp_path):
    from tests.helpers.workers import assert_all_end, run_workers

    command = ["-m", "tests.integration.test_block_parallel", str(tmp_path)]
    assert_all_end(run_workers(command, workers=3, timeout=120))
    loop.run(settings(DEALT, in_process(3), precision="float64"), tmp_path / "simulated")
    left, right = (state(tmp_path / name, STEPS) for name in ("three", "simulated"))
    assert left.keys() == right.keys()
    assert left["slots/dense1/kernel/velocity"].shape == (160, 12)  # its owner's
    cases.assert_equal(left, right, 1e-10)


if __name__ == "__main__":
    _train(Path(sys.argv[1]))
