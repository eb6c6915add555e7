"""A text of letters and a small transformer as a user's module and gin file: a whole run takes seconds."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import keras
import pytest

from dist_partial import train
from tests import ROOT

MODULE = """
import keras, numpy as np
from dist_partial.data import ArraySource, Dataset, fingerprint
from dist_partial.models import byte_transformer

class Letters:
    size = 256
    def encode(self, text): return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    def decode(self, ids): return bytes(np.asarray(ids, np.uint8)).decode("latin-1")

def letters(seed=0):
    ids = np.random.default_rng(seed).choice(np.frombuffer(b"abcabcabd", np.uint8), (61, 13)).astype(np.int32)
    return Dataset("letters", ArraySource(ids[:50, :-1], ids[:50, 1:]), ArraySource(ids[50:, :-1], ids[50:, 1:]),
                   fingerprint(ids), Letters(), "byte")

def small(width=16, dropout=0.1, heads=2): return byte_transformer(1, width, heads, dropout=dropout)

def spoilt():
    # The letters have good embeddings, the newline of the prompt has none.
    model = small()
    rows = model.embedding.embeddings.numpy()
    rows[10] = np.nan
    model.embedding.embeddings.assign(rows)
    return model
"""

GIN = """
import letters_module
run.rules = [('train', r'block_0/(mlp|mlp_norm)/.*'), ('train', r'head/.*'), ('freeze', r'.*')]
run.model = @letters_module.small
run.data = @letters_module.letters
run.optimizer = @keras.optimizers.Adam
Adam.learning_rate = 0.01
run.steps = 12
run.global_batch = 8
run.save_every = 4
run.eval_every = 6
run.steps_per_loop = 3
run.clip_norm = 1.0
replicas.cpu = 2
sample.length = 20
sample.temperature = 0.6
"""


@pytest.fixture
def letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A gin file with a model and data of its own, small enough for many runs."""
    (tmp_path / "letters_module.py").write_text(MODULE)
    (tmp_path / "letters.gin").write_text(GIN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    yield tmp_path / "letters.gin"
    sys.modules.pop("letters_module", None)


def start(gin_file: Path, folder: Path, *params: str) -> int:
    """Trains by the command, as in a new process."""
    keras.utils.clear_session()
    return train.main([f"--gin_file={gin_file}", f"--run_dir={folder}", *[f"--gin_param={p}" for p in params]])
