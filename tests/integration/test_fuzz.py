"""Run folders and gin files that somebody, or something, has damaged: a clear error or what was meant, never else.

With the 4,000 delta files of test_delta.py these are 10,500 inputs.
"""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dist_partial import checkpoints
from dist_partial.checkpoints import fingerprints
from dist_partial.config import gin_files
from dist_partial.errors import UserError
from tests import ROOT

EDITS = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 3), st.binary(max_size=4)), min_size=1, max_size=4)
SETTINGS = {"deadline": None, "database": None, "derandomize": True}


def edited(content: bytes, edits) -> bytes:
    """Bytes replaced, removed, put in, or all that follows cut off."""
    for place, kind, new in edits:
        at = place % (len(content) + 1)
        end = at + len(new)
        content = [content[:at] + new + content[end:], content[:at] + content[end:], content[:at] + new + content[at:]][
            kind % 3
        ]
        if kind == 3 and place % 7 == 0:
            content = content[:at]
    return content


def check(outcome, counts):
    """An error of one line, or a result that `outcome` has accepted."""
    try:
        outcome()
    except UserError as error:
        assert "\n" not in str(error).strip()
        counts["refused"] += 1
    else:
        counts["read"] += 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    rng = np.random.default_rng(0)
    arrays = {f"variables/layer_{i}/kernel": rng.normal(size=(3, 4)).astype(np.float32) for i in range(3)}
    arrays["slots/layer_0/kernel/momentum"] = rng.normal(size=(3, 4))
    path = checkpoints.save(folder, 7, arrays, {"wire_bytes": 5, "frozen": {}}, keep=2)
    return path.read_bytes(), arrays


@pytest.mark.slow
def test_checkpoints(saved, tmp_path):
    content, arrays = saved
    path, counts = tmp_path / "step-0000000007.safetensors", {"refused": 0, "read": 0}
    state = {name: np.zeros_like(value) for name, value in arrays.items()}

    @hypothesis.settings(max_examples=3000, **SETTINGS)
    @hypothesis.given(EDITS)
    def fuzz(edits):
        path.write_bytes(edited(content, edits))

        def outcome():
            found = checkpoints.newest(tmp_path, lambda _: None)
            if found.arrays.keys() == state.keys():  # or `restore` refuses it
                for name, value in arrays.items():
                    np.testing.assert_array_equal(found.arrays[name], value)
            assert found.metadata == {"wire_bytes": 5, "frozen": {}, "step": 7}

        check(outcome, counts)

    fuzz()
    assert counts["refused"] > 1000 and counts["read"] > 10, counts


def test_run_fingerprints(tmp_path):
    content = {"rules": ["train a/.*", "freeze .*"], "seed": 1, "optimizers": [{"class": "Adam", "epsilon": 1e-7}]}
    text = json.dumps(content).encode()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-0000000001.safetensors").touch()  # without one, nothing could be lost
    counts = {"refused": 0, "read": 0}

    @hypothesis.settings(max_examples=2000, **SETTINGS)
    @hypothesis.given(EDITS)
    def fuzz(edits):
        (tmp_path / fingerprints.RUN_FILE).write_bytes(edited(text, edits))

        def outcome():
            assert fingerprints.check_run(tmp_path, content)
            assert json.loads((tmp_path / fingerprints.RUN_FILE).read_bytes()) == content

        check(outcome, counts)

    fuzz()
    assert counts["refused"] > 1000 and counts["read"] > 10, counts


def test_gin_files(tmp_path):
    """Read as from a run folder of somebody else's: nothing is imported or included."""
    text = b"".join((ROOT / "gin_configs" / name).read_bytes() for name in ("base.gin", "quickstart.gin", "lisa.gin"))
    text = b"\n".join(line for line in text.split(b"\n") if not line.startswith((b"#", b"include")))
    words = [b"run.", b"@", b"()", b"'", b"[", b"import os\n", b"include '/etc/passwd'\n", b"%", b"/", b"=", b"\n    "]
    word = st.tuples(st.integers(0, 1 << 30), st.just(2), st.sampled_from(words))
    counts = {"refused": 0, "read": 0}

    @hypothesis.settings(max_examples=1500, **SETTINGS)
    @hypothesis.given(st.one_of(EDITS, st.lists(word, min_size=1, max_size=3)))
    def fuzz(edits):
        file = tmp_path / "fuzzed.gin"
        file.write_bytes(edited(text, edits))

        def outcome():
            settings = gin_files.load([file], imports=False).settings
            assert settings.steps >= 1 and callable(settings.model)

        check(outcome, counts)

    fuzz()
    assert counts["refused"] > 100 and counts["read"] > 100, counts
