"""Which strategy is made, and what is refused before anything waits for other workers."""

import pytest
import tensorflow as tf

from dist_partial.errors import UserError
from dist_partial.replicas import create


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)


@pytest.mark.parametrize(
    ("kind", "cpu", "strategy", "replicas"),
    [
        ("auto", 1, tf.distribute.Strategy, 1),
        ("auto", 3, tf.distribute.MirroredStrategy, 3),
        ("default", 1, tf.distribute.Strategy, 1),
        ("default", 4, tf.distribute.Strategy, 1),
        ("mirrored", 1, tf.distribute.MirroredStrategy, 1),
        ("mirrored", 2, tf.distribute.MirroredStrategy, 2),
    ],
)
def test_kinds(kind, cpu, strategy, replicas):
    created = create(kind, cpu)
    made, line = created.strategy, created.description
    assert isinstance(made, strategy)
    assert isinstance(made, tf.distribute.MirroredStrategy) == (strategy is tf.distribute.MirroredStrategy)
    assert made.num_replicas_in_sync == replicas
    assert line.startswith(f"replicas: {replicas}, ")
    assert ("mirrored" in line.lower()) == (strategy is tf.distribute.MirroredStrategy)
    assert ("no GPU here" in line) == (kind == "auto")  # auto says why
    assert "\n" not in line


@pytest.mark.parametrize("text", ["", " ", "{}", '{"cluster": {}}', '{"task": {"type": "worker", "index": 0}}'])
def test_without_a_cluster_tf_config_changes_nothing(text, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", text)
    made = create("auto", 1)
    assert made.is_chief
    assert made.strategy.num_replicas_in_sync == 1


def test_a_malformed_tf_config_is_refused(monkeypatch):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"workers": ["a:1"]}}')
    with pytest.raises(UserError, match="TF_CONFIG's cluster"):
        create("auto", 1)


@pytest.mark.parametrize("kind", ["Mirrored", "tpu", None, 3])
def test_unknown_kind(kind):
    with pytest.raises(UserError, match=r"replicas\.kind is .*'auto', 'default', 'mirrored', 'multi_worker'"):
        create(kind)


@pytest.mark.parametrize("cpu", [0, -1, 1.5, True, "2", None])
def test_bad_number_of_replicas(cpu):
    with pytest.raises(UserError, match=r"replicas\.cpu is"):
        create("mirrored", cpu)


def test_multi_worker_needs_a_cluster():
    with pytest.raises(UserError, match="TF_CONFIG names no cluster"):
        create("multi_worker")


def test_more_replicas_than_tensorflow_was_started_with():
    tf.constant(1)  # devices are fixed from the first op on
    with pytest.raises(UserError, match=r"replicas\.cpu = 9 comes too late"):
        create("mirrored", 9)
