"""How workers meet: in one process, each in its own thread, over loopback."""

import functools
import json
import socket
import threading
import time

import pytest

from dist_partial import rendezvous
from dist_partial.errors import Fault, UserError
from tests.test_mesh import at_once
from tests.workers import free_ports


def addresses(count):
    return [f"127.0.0.1:{port}" for port in free_ports(count)]


def outcomes(functions):
    """What each returns or raises."""

    def call(function):
        try:
            return function()
        except Exception as error:
            return error

    return at_once([functools.partial(call, function) for function in functions])


def test_all_meet_whoever_comes_first():
    workers = addresses(4)

    def come(rank):
        time.sleep([0.9, 0.3, 0, 0.6][rank])
        return rendezvous.connect(rank, workers, 10, "secret")

    found = at_once([functools.partial(come, k) for k in range(4)])
    for rank, connections in enumerate(found):
        assert sorted(connections) == [k for k in range(4) if k != rank]
        for other, connection in connections.items():
            connection.sendall(bytes([10 * rank + other]))
    for rank, connections in enumerate(found):
        for other, connection in connections.items():
            assert connection.recv(1) == bytes([10 * other + rank])
            connection.close()
    for worker in workers:  # nobody listens any more
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(rendezvous._split(worker))
    at_once([functools.partial(come, k) for k in range(4)])  # and the ports serve again


def test_one_worker_meets_nobody():
    assert rendezvous.connect(0, addresses(1), 1) == {}


def test_it_listens_on_its_own_address_alone():
    workers = ["127.0.0.2:" + addresses(1)[0].split(":")[1], addresses(1)[0]]
    found = []
    thread = threading.Thread(target=lambda: found.extend(outcomes([lambda: rendezvous.connect(0, workers, 1.5)])))
    thread.start()
    time.sleep(0.5)
    socket.create_connection(rendezvous._split(workers[0])).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", rendezvous._split(workers[0])[1]))
    thread.join()
    assert isinstance(found[0], Fault)


def test_who_is_missing_is_named_by_all_others_within_the_deadline(capsys):
    workers = addresses(4)
    start = time.monotonic()
    found = outcomes([functools.partial(rendezvous.connect, k, workers, 1.0) for k in (0, 2)])
    assert 0.9 < time.monotonic() - start < 3
    for fault in found:
        assert isinstance(fault, Fault)
        assert "missing after 1 s: worker 1 (" in str(fault) and f"worker 3 ({workers[3]}" in str(fault)
        assert "worker 0 (" not in str(fault).split(";")[0] and "worker 2 (" not in str(fault).split(";")[0]
    assert "Connection refused" in str(found[1])


def test_who_is_waited_for_is_said(monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "_PATIENCE_SECONDS", 0.2)
    workers = addresses(2)
    outcomes([lambda: rendezvous.connect(0, workers, 0.6)])
    assert capsys.readouterr().err == f"worker 0 waits for worker 1 ({workers[1]})\n"


def test_a_port_that_is_taken_is_waited_for():
    workers = addresses(2)
    taken = socket.create_server(rendezvous._split(workers[0]))
    threading.Timer(0.5, taken.close).start()
    for connections in at_once([functools.partial(rendezvous.connect, k, workers, 10) for k in range(2)]):
        next(iter(connections.values())).close()
    with socket.create_server(rendezvous._split(workers[0])):
        (fault,) = outcomes([lambda: rendezvous.connect(0, workers, 0.5)])
    assert isinstance(fault, Fault) and f"worker 0 cannot listen on {workers[0]}" in str(fault)


def test_an_address_of_another_host_is_a_mistake():
    with pytest.raises(UserError, match=r"worker 0 cannot listen on 192\.0\.2\.1:2222, which is no address of this"):
        rendezvous.connect(0, ["192.0.2.1:2222", "192.0.2.2:2222"], 5)


def test_a_name_that_means_loopback_here_and_not_elsewhere_is_a_mistake():
    with pytest.raises(UserError, match=r"worker 0: localhost is (127\.0\.0\.1|::1) on this host itself"):
        rendezvous.connect(0, ["localhost:2222", "192.0.2.2:2222"], 5)


def test_other_workers_in_tf_config_are_a_mistake_on_both():
    workers = addresses(3)
    found = outcomes([lambda: rendezvous.connect(0, workers[:2], 5), lambda: rendezvous.connect(1, workers, 5)])
    for error in found:
        assert isinstance(error, UserError) and "TF_CONFIG" in str(error) and workers[2] in str(error)


def test_one_index_twice_is_a_mistake():
    workers = addresses(3)
    shared = workers[1]
    other = addresses(1)[0]

    # Two that both believe to be worker 1, on hosts of which each has the address that the table gives worker 1.
    def second():
        time.sleep(0.3)
        connection = socket.create_connection(rendezvous._split(workers[0]))
        rendezvous._greet(1, workers, b"", time.monotonic() + 5, connection)
        return connection

    found = outcomes(
        [lambda: rendezvous.connect(0, workers, 3), lambda: rendezvous.connect(1, workers, 1), lambda: second()]
    )
    assert isinstance(found[0], UserError) and f"worker 1 ({shared}) has been started twice" in str(found[0]), other


@pytest.mark.parametrize("secrets", [("a", "b"), ("", "b")])
def test_who_knows_another_secret_is_not_let_in(secrets):
    workers = addresses(2)
    found = outcomes([functools.partial(rendezvous.connect, k, workers, 1.0, secrets[k]) for k in range(2)])
    assert all(isinstance(error, Fault) for error in found)
    assert "knows another DIST_PARTIAL_SECRET" in str(found[1])


def test_strangers_keep_nobody_waiting():
    workers = addresses(2)
    over = threading.Event()
    strangers = []

    def knock():
        hello = json.dumps({"rank": 1, "workers": workers, "nonce": "0"}).encode()
        for data in [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, rendezvous._LENGTH.pack(len(hello)) + hello] * 3:
            try:
                connection = socket.create_connection(rendezvous._split(workers[0]))
                connection.sendall(data)
                strangers.append(connection)
            except OSError:
                if over.wait(0.05):
                    return

    def late():
        time.sleep(0.7)
        return rendezvous.connect(1, workers, 10, "secret")

    thread = threading.Thread(target=knock)
    threading.Timer(0.2, thread.start).start()
    start = time.monotonic()
    first, second = at_once([lambda: rendezvous.connect(0, workers, 10, "secret"), late])
    assert time.monotonic() - start < 3
    over.set()
    first[1].sendall(b"!")
    assert second[0].recv(1) == b"!"
    for connection in [*strangers, *first.values(), *second.values()]:
        connection.close()
