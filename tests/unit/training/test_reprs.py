"""What a notebook shows of what holds arrays is one short line."""

import numpy as np

from dist_partial import dataset
from dist_partial.config.settings import Settings
from dist_partial.distributed.replicas import create
from dist_partial.models import two_dense
from dist_partial.training.build import build


def test_what_holds_arrays_is_shown_by_names_and_counts():
    x = np.full([4000, 16], 7, np.int32)
    data = dataset(({"ids": x}, x[:, 0]), ({"ids": x[:9]}, x[:9, 0]), name="mine")
    spec = "({'ids': int32 [16]}, int32 [])"
    parts = f"train=ArraySource(4,000 examples {spec}), evaluation=ArraySource(9 examples {spec})"
    assert repr(data) == f"Dataset('mine', {parts})"
    assert "7, 7" not in repr(dataset((x, x[:, 0]))) and len(repr(dataset((x, x[:, 0])))) < 300
    part = dataset((x, x[:, 0] % 3))
    trainer = build(Settings([("train", "dense2/.*"), ("freeze", ".*")], two_dense, lambda: part), create("default"))
    assert repr(trainer).startswith("Trainer('two_dense', 2 of 4 variables, Dataset('data', ")
    assert repr(trainer).endswith(", 1 replica)") and len(repr(trainer)) < 350
    count = len(trainer.state().variables)
    assert repr(trainer.state()) == f"TrainState('two_dense', step 0, {count} variables)"
