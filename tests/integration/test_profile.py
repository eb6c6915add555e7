"""A profile of some steps of a run."""

import pytest
import tensorflow as tf

from tests.helpers.files import assert_same_state, rows
from tests.helpers.letters import start


def marked(folder) -> list[int]:
    """Numbers of the steps that the profile marks, from TensorFlow's own trace."""
    [file] = (folder / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb")
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space, found = xplane_pb2.XSpace(), []
    space.ParseFromString(file.read_bytes())
    for plane in space.planes:
        names = {key: value.name for key, value in plane.stat_metadata.items()}
        events = {key for key, value in plane.event_metadata.items() if value.name == "train"}
        for line in plane.lines:
            for event in line.events:
                if event.metadata_id in events:
                    stats = {names[stat.metadata_id]: stat.int64_value or stat.uint64_value for stat in event.stats}
                    found.append(stats["step_num"])
    return sorted(found)


@pytest.mark.slow
def test_its_steps_alone_are_in_it(letters, tmp_path, capsys):
    one, other = tmp_path / "one", tmp_path / "other"
    params = ["run.steps_per_loop = 4", "run.save_every = None"]
    assert start(letters, one, *params, "run.profile = (4, 7)") == 0
    assert f"steps 4 to 7: a profile is in {one / 'tensorboard'}" in capsys.readouterr().out
    assert marked(one) == [4, 7]  # calls of 4 to 6, after which there is an evaluation, and of 7
    assert start(letters, other, *params) == 0
    assert rows(one / "metrics.jsonl") == rows(other / "metrics.jsonl")
    assert_same_state(one, other, 12)


@pytest.mark.slow
@pytest.mark.parametrize("last", [12, 100])
def test_a_profile_to_the_end(last, letters, tmp_path):
    assert start(letters, tmp_path / "run", f"run.profile = (12, {last})") == 0
    assert marked(tmp_path / "run") == [12]


@pytest.mark.slow
def test_beside_another_profile(letters, tmp_path, capsys):
    tf.profiler.experimental.start(str(tmp_path / "other"))
    try:
        assert start(letters, tmp_path / "run", "run.profile = (3, 4)") == 0
    finally:
        tf.profiler.experimental.stop()
    assert "no profile: " in capsys.readouterr().out


@pytest.mark.parametrize("value", ["3", "(3,)", "(4, 3)", "(0, 3)", "(1.0, 2)", "('a', 'b')"])
def test_what_is_no_range(value, letters, tmp_path, capsys):
    assert start(letters, tmp_path / "run", f"run.profile = {value}") == 2
    assert "give the first and the last step, such as (10, 12)" in capsys.readouterr().err
