"""Two workers that are killed and start again end where one worker ends, whatever they read."""

import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from dist_partial import train
from tests.helpers.files import state
from tests.helpers.workers import assert_all_end, run_workers

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_cluster")]

MODULE = """
import keras
import numpy as np
import tensorflow as tf
from dist_partial.data import ArraySource, Dataset, Stream, dataset, tfrecord_dataset

NUMBERS = np.random.default_rng(0).normal(size=(150, 4)).astype(np.float32)
HELD_OUT = ArraySource(NUMBERS[:10, :3], NUMBERS[:10, 3])


def model():
    layers = [keras.layers.Dense(5, "tanh", name="body"), keras.layers.Dense(1, name="head")]
    return keras.Sequential([keras.Input([3]), *layers])


def noisy(x, y, seed):
    return x + tf.random.stateless_normal([3], seed), y


def same(x, y):
    return x, y


def parse(record):
    numbers = tf.ensure_shape(tf.io.decode_raw(record, tf.float32), [4])
    return numbers[:3], numbers[3]


def records(folder):
    return tfrecord_dataset(f"{folder}/*.tfrecord", parse, augment=noisy)


def stream(folder):
    def shuffled():
        return tf.data.Dataset.from_tensor_slices((NUMBERS[:, :3], NUMBERS[:, 3])).shuffle(150, seed=1)

    return Dataset("stream", Stream(shuffled), HELD_OUT, "1").map(noisy, evaluation=same)


class Items:
    def __len__(self):
        return 150

    def __getitem__(self, index):
        return NUMBERS[index, :3], NUMBERS[index, 3]


def noisy_numpy(x, y, rng):
    return x + rng.normal(size=3).astype(np.float32), y


def items(folder):
    return dataset(Items(), HELD_OUT).map(noisy_numpy, same, numpy=True)
"""
GIN = """
import killed_module
run.model = @killed_module.model
run.rules = [('train', 'head/.*'), ('train', 'body/kernel'), ('freeze', '.*')]
run.loss = @keras.losses.MeanSquaredError
run.optimizer = @keras.optimizers.Adam
Adam.learning_rate = 0.01
run.precision = 'float64'
run.global_batch = 12
run.save_every = 1
run.eval_every = None
"""
STEPS = 40  # of 12 examples: into the fourth epoch


@pytest.mark.parametrize("kind", ["records", "stream", "items"])
def test_a_run_of_two_workers_that_are_killed_ends_as_one_of_one_worker(kind, tmp_path, monkeypatch):
    (tmp_path / "killed_module.py").write_text(MODULE)
    (tmp_path / "mine.gin").write_text(GIN)
    monkeypatch.syspath_prepend(tmp_path)
    write_records(tmp_path)
    params = [f"run.data = @killed_module.{kind}", f"killed_module.{kind}.folder = '{tmp_path}'"]
    params += [f"run.reader_processes = {2 if kind == 'items' else 0}", f"run.steps = {STEPS}"]
    flags = [f"--gin_file={tmp_path / 'mine.gin'}", *(f"--gin_param={param}" for param in params)]
    both, alone = tmp_path / "both", tmp_path / "alone"
    command = ["-m", "dist_partial.train", f"--run_dir={both}", *flags]
    step = random.randrange(3, 25)

    def kill(processes):
        until = time.monotonic() + 240
        while not any(name >= f"step-{step:010d}" for name in names(both)):
            if any(process.poll() is not None for process in processes) or time.monotonic() > until:
                return  # the codes say so
            time.sleep(0.002)
        for process in processes:
            process.kill()

    results = run_workers(command, workers=2, timeout=60, pythonpath=tmp_path, meanwhile=kill)
    assert [code for code, _ in results] == [-9, -9], results
    assert names(both)[-1] < f"step-{STEPS:010d}", "killed too late"
    assert_all_end(run_workers(command, workers=2, timeout=240, pythonpath=tmp_path))
    assert train.main([f"--run_dir={alone}", *flags]) == 0
    sys.modules.pop("killed_module", None)
    wanted, found = state(alone, STEPS), state(both, STEPS)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=f"{name}, killed at {step}")


def names(folder: Path) -> list[str]:
    """The checkpoints of a run, which may not have begun."""
    return sorted(path.name for path in folder.glob("checkpoints/step-*"))


def write_records(folder: Path) -> None:
    import killed_module

    for part in range(2):
        with tf.io.TFRecordWriter(str(folder / f"{part}.tfrecord")) as writer:
            for row in killed_module.NUMBERS[part::2]:
                writer.write(row.tobytes())
