"""Which strategy is made, and every TF_CONFIG that is refused before anything waits for other workers."""

import json

import pytest
import tensorflow as tf

from dist_partial.cluster import read_tf_config
from dist_partial.errors import UserError
from dist_partial.replicas import create, is_chief

TWO = ["a:2222", "b:2222"]


def config(cluster=None, task=None) -> str:
    cluster = {"worker": TWO} if cluster is None else cluster
    return json.dumps({"cluster": cluster, "task": {"type": "worker", "index": 0} if task is None else task})


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
    assert read_tf_config(text) is None
    assert is_chief()
    made = create("auto", 1).strategy
    assert made.num_replicas_in_sync == 1


@pytest.mark.parametrize(
    ("cluster", "task", "chief"),
    [
        ({"worker": TWO}, {"type": "worker", "index": 0}, True),
        ({"worker": TWO}, {"type": "worker", "index": 1}, False),
        ({"chief": ["c:1"], "worker": TWO}, {"type": "chief", "index": 0}, True),
        ({"chief": ["c:1"], "worker": TWO}, {"type": "worker", "index": 0}, False),
        ({"worker": ["[::1]:2222", "10.0.0.2:65535"]}, {"type": "worker", "index": 0}, True),
    ],
)
def test_a_cluster_has_one_chief(cluster, task, chief, monkeypatch):
    text = config(cluster, task)
    assert read_tf_config(text) == {"cluster": cluster, "task": task}
    monkeypatch.setenv("TF_CONFIG", text)
    assert is_chief() == chief


MALFORMED = {
    "not JSON": ("{'cluster': 1}", "not JSON"),
    "cut off": (config()[:-2], "not JSON"),
    "a list": ("[1]", "a JSON list"),
    "a string": ('"worker"', "a JSON str"),
    "cluster is a list": (config(cluster=TWO), "cluster is"),
    "unknown type": (config(cluster={"workers": TWO}), "'workers'"),
    "ps": (config(cluster={"worker": TWO, "ps": ["c:1"]}), "'ps'"),
    "evaluator": (config(cluster={"worker": TWO, "evaluator": ["c:1"]}), "'evaluator'"),
    "addresses are a string": (config(cluster={"worker": "a:2222"}), "'a:2222'"),
    "no port": (config(cluster={"worker": ["a", "b:1"]}), "'host:port'"),
    "no host": (config(cluster={"worker": [":2222"]}), "':2222'"),
    "port is a word": (config(cluster={"worker": ["a:http"]}), "'a:http'"),
    "port is not a plain digit": (config(cluster={"worker": ["a:\u00b2"]}), "'host:port'"),
    "port is 0": (config(cluster={"worker": ["a:0"]}), "'a:0'"),
    "port too large": (config(cluster={"worker": ["a:65536"]}), "'a:65536'"),
    "address is a number": (config(cluster={"worker": [2222]}), "2222"),
    "no address": (config(cluster={"worker": []}), "has 0"),
    "duplicate": (config(cluster={"worker": ["a:1", "b:1", "a:1"]}), "a:1 twice"),
    "duplicate over types": (config(cluster={"worker": ["a:1"], "chief": ["a:1"]}), "a:1 twice"),
    "no task": (json.dumps({"cluster": {"worker": TWO}}), "task is None"),
    "task is a list": (config(task=["worker", 0]), "task is"),
    "task without type": (config(task={"index": 0}), "type (worker)"),
    "task without index": (config(task={"type": "worker"}), "index"),
    "task of another type": (config(task={"type": "chief", "index": 0}), "type (worker)"),
    "task type is a list": (config(task={"type": ["worker"], "index": 0}), "type (worker)"),
    "index is a string": (config(task={"type": "worker", "index": "0"}), "'0'"),
    "index is a bool": (config(task={"type": "worker", "index": True}), "True"),
    "index too large": (config(task={"type": "worker", "index": 2}), "index is 2, but the cluster has 2"),
    "index negative": (config(task={"type": "worker", "index": -1}), "index is -1"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_tf_config(name, monkeypatch):
    text, words = MALFORMED[name]
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UserError) as raised:
        create("auto", 1)
    message = str(raised.value)
    assert message.startswith("TF_CONFIG") and words in message and "\n" not in message, message


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
