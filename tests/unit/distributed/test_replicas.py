"""Which strategy is made, and what is refused before anything waits for other workers."""

import os

import pytest
import tensorflow as tf

from dist_partial.distributed import rendezvous
from dist_partial.distributed.replicas import ReplicaOptions, create
from dist_partial.errors import Fault, UserError
from tests.helpers.workers import free_ports, tf_config

pytestmark = pytest.mark.usefixtures("no_cluster")


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
    with pytest.raises(UserError, match=r"replicas\.kind is .*'auto', 'default', 'mirrored' or 'multi_worker'"):
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


ELSEWHERE = ["192.0.2.1:2222", "192.0.2.2:2222"]  # of RFC 5737: no address of this host, so that nobody waits


@pytest.fixture
def no_secret(monkeypatch):
    monkeypatch.delenv("DIST_PARTIAL_SECRET", raising=False)


@pytest.mark.parametrize("addresses", [ELSEWHERE, ["127.0.0.1:2222", "192.0.2.2:2222"], ["a:1", "b:1"]])
def test_without_a_secret_workers_elsewhere_are_refused(addresses, no_secret, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", tf_config(addresses, 0))
    start = "no DIST_PARTIAL_SECRET: whoever reaches"
    with pytest.raises(UserError, match=rf"{start} {addresses[0]} .*replicas\.allow_no_secret = True$"):
        create("multi_worker")


def test_without_a_secret_where_that_is_allowed(no_secret, monkeypatch, capsys):
    monkeypatch.setenv("TF_CONFIG", tf_config(ELSEWHERE, 0))
    with pytest.raises(UserError, match="which is no address of this host"):
        create("multi_worker", allow_no_secret=True)
    assert capsys.readouterr().err.startswith("warning: no DIST_PARTIAL_SECRET: whoever reaches")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "localhost", "[::1]"])
@pytest.mark.parametrize("secret", ["", "s"])
def test_without_a_secret_on_loopback_there_is_a_warning(host, secret, monkeypatch, capsys):
    monkeypatch.setenv("TF_CONFIG", tf_config([f"{host}:{port}" for port in free_ports(2)], 0))
    monkeypatch.setenv("DIST_PARTIAL_SECRET", secret)
    with pytest.raises(Fault):
        create("multi_worker", start_seconds=0.1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (not secret) and all(line.startswith("warning: no DIST_PARTIAL_SECRET: ") for line in lines)


@pytest.mark.parametrize(
    ("addresses", "secret", "seal", "tls", "sealed"),
    [
        (ELSEWHERE, "s", None, False, True),
        (ELSEWHERE, "s", False, False, False),
        (ELSEWHERE, "", None, False, False),
        (["127.0.0.1:1", "127.0.0.1:2"], "s", None, False, False),
        (["127.0.0.1:1", "127.0.0.1:2"], "s", True, False, True),
        (["127.0.0.1:1", "192.0.2.1:1"], "s", None, False, True),
        (["a:1", "b:1"], "s", None, False, True),
        (ELSEWHERE, "s" * 32, None, True, False),
        (ELSEWHERE, "s" * 32, True, True, True),
    ],
)
def test_what_is_sealed(addresses, secret, seal, tls, sealed, monkeypatch):
    called = []
    monkeypatch.setattr(rendezvous, "connect", lambda *arguments: called.append(arguments) or {})
    monkeypatch.setenv("TF_CONFIG", tf_config(addresses, 1))
    monkeypatch.setenv("DIST_PARTIAL_SECRET", secret)
    made = create("multi_worker", seal=seal, tls=tls, allow_no_secret=True, start_seconds=7)
    made.backend.close()
    assert [each[:-2] for each in called] == [(1, addresses, 7, secret, sealed)]
    assert bool(called[0][-2]) == tls == ("direct connections in TLS 1.3" in made.description)


@pytest.mark.parametrize("value", [True, "certificates"])
def test_tensorflow_s_own_collectives_cannot_be_encrypted(value, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", tf_config(ELSEWHERE, 0))
    with pytest.raises(UserError, match=r"replicas\.tls encrypts the sockets, and replicas\.transport is 'tensorflow'"):
        create("multi_worker", transport="tensorflow", tls=value)


@pytest.mark.parametrize("value", [None, 1, b"folder"])
def test_tls_is_true_false_or_a_folder(value):
    with pytest.raises(UserError, match=r"^replicas\.tls is .*: write True, False or a folder of tls\.crt, tls\.key"):
        create("auto", tls=value)


@pytest.mark.parametrize(("name", "value"), [("seal", "auto"), ("seal", 1), ("allow_no_secret", None)])
def test_bindings_that_are_true_or_false(name, value):
    with pytest.raises(UserError, match=rf"replicas\.{name} is {value!r}: write True(, False or None| or False)$"):
        create("auto", **{name: value})


@pytest.mark.parametrize(
    ("cluster", "transport", "bound", "wanted"),
    [
        ("{}", "auto", 0, [len(os.sched_getaffinity(0)) + 2]),
        ("{}", "tensorflow", 0, []),
        ("", "auto", 0, []),
        ("{}", "auto", 3, []),
    ],
)
def test_threads_beside_those_that_wait_for_workers(cluster, transport, bound, wanted, monkeypatch):
    """Two more than cores, where sockets may join workers and the user has not said how many."""
    found = []
    monkeypatch.setenv("TF_CONFIG", cluster)
    monkeypatch.delenv("TF_NUM_INTEROP_THREADS", raising=False)
    monkeypatch.setattr(tf.config.threading, "get_inter_op_parallelism_threads", lambda: bound)
    monkeypatch.setattr(tf.config.threading, "set_inter_op_parallelism_threads", found.append)
    ReplicaOptions(transport=transport).prepare()
    assert found == wanted
