"""How workers meet: in one process, each in its own thread, over loopback."""

import contextlib
import functools
import io
import socket
import subprocess
import sys
import threading
import time
from subprocess import PIPE

import pytest

from dist_partial.distributed import handshake, rendezvous
from dist_partial.errors import Fault, UserError
from tests import ROOT, strangers
from tests.helpers.threads import at_once
from tests.helpers.workers import loopback


def outcomes(functions):
    """What each returns or raises."""

    def call(function):
        try:
            return function()
        except Exception as error:
            return error

    return at_once([functools.partial(call, function) for function in functions])


def test_all_meet_whoever_comes_first():
    workers = loopback(4)

    def come(rank):
        time.sleep([0.9, 0.3, 0, 0.6][rank])
        return rendezvous.connect(rank, workers, 10, "secret")

    found = at_once([functools.partial(come, k) for k in range(4)])
    for rank, connections in enumerate(found):
        assert sorted(connections) == [k for k in range(4) if k != rank]
        for other, link in connections.items():
            link.socket.sendall(bytes([10 * rank + other]))
    for rank, connections in enumerate(found):
        for other, link in connections.items():
            assert link.socket.recv(1) == bytes([10 * other + rank])
            link.socket.close()
    for worker in workers:  # nobody listens any more
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(rendezvous.split(worker))
    at_once([functools.partial(come, k) for k in range(4)])  # and the ports serve again


def test_one_worker_meets_nobody():
    assert rendezvous.connect(0, loopback(1), 1) == {}


def test_it_listens_on_its_own_address_alone():
    workers = ["127.0.0.2:" + loopback(1)[0].split(":")[1], loopback(1)[0]]
    found = []
    thread = threading.Thread(target=lambda: found.extend(outcomes([lambda: rendezvous.connect(0, workers, 1.5)])))
    thread.start()
    time.sleep(0.5)
    socket.create_connection(rendezvous.split(workers[0])).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", rendezvous.split(workers[0])[1]))
    thread.join()
    assert isinstance(found[0], Fault)


def test_who_is_missing_is_named_by_all_others_within_the_deadline(capsys):
    workers = loopback(4)
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
    workers = loopback(2)
    outcomes([lambda: rendezvous.connect(0, workers, 0.6)])
    assert capsys.readouterr().err == f"worker 0 waits for worker 1 ({workers[1]})\n"


def test_a_port_that_is_taken_is_waited_for():
    workers = loopback(2)
    taken = socket.create_server(rendezvous.split(workers[0]))
    threading.Timer(0.5, taken.close).start()
    for connections in at_once([functools.partial(rendezvous.connect, k, workers, 10) for k in range(2)]):
        next(iter(connections.values())).socket.close()
    with socket.create_server(rendezvous.split(workers[0])):
        (fault,) = outcomes([lambda: rendezvous.connect(0, workers, 0.5)])
    assert isinstance(fault, Fault) and f"worker 0 cannot listen on {workers[0]}" in str(fault)


def test_an_address_of_another_host_is_a_mistake():
    with pytest.raises(UserError, match=r"worker 0 cannot listen on 192\.0\.2\.1:2222, which is no address of this"):
        rendezvous.connect(0, ["192.0.2.1:2222", "192.0.2.2:2222"], 5)


def test_a_name_that_means_loopback_here_and_not_elsewhere_is_a_mistake():
    with pytest.raises(UserError, match=r"worker 0: localhost is (127\.0\.0\.1|::1) on this host itself"):
        rendezvous.connect(0, ["localhost:2222", "192.0.2.2:2222"], 5)


def test_one_worker_elsewhere_is_enough_to_be_reached_from_elsewhere():
    here = ["127.0.0.1:1", "localhost:2", "[::1]:3"]
    assert rendezvous.on_loopback(here)
    assert not any(rendezvous.on_loopback([*here, other]) for other in ("192.0.2.1:4", "[2001:db8::1]:4", "host:4"))


def test_other_workers_in_tf_config_are_a_mistake_on_both():
    workers = loopback(3)
    found = outcomes([lambda: rendezvous.connect(0, workers[:2], 5), lambda: rendezvous.connect(1, workers, 5)])
    for error in found:
        assert isinstance(error, UserError) and "TF_CONFIG" in str(error) and workers[2] in str(error)


def enter(connection, workers, secret, rank=1, **fields):
    """Becomes worker `rank` of worker 0, by an independent program."""
    verdict, _ = strangers.greet(connection, rank, 0, workers, secret, **fields)
    assert verdict == 1
    return connection


def test_one_index_twice_is_a_mistake():
    # Two that both believe to be worker 1, on hosts of which each has the address that the table gives worker 1.
    workers = loopback(3)
    thread, found = in_thread(lambda: rendezvous.connect(0, workers, 10, "secret"))
    with enter(strangers.await_call(workers[0]), workers, b"secret"), strangers.call(workers[0]) as second:
        enter(second, workers, b"secret")
        thread.join(10)
    assert isinstance(found[0], UserError) and f"worker 1 ({workers[1]}) has been started twice" in str(found[0])


def test_one_worker_may_call_again_though_its_first_connection_seems_to_stand():
    """As it does where somebody in between has closed one end only."""
    workers = loopback(2)
    thread, found = in_thread(lambda: rendezvous.connect(0, [*workers, "127.0.0.1:1"], 1.5, "secret"))
    process = b"0123456789abcdef"
    with strangers.await_call(workers[0]) as first, strangers.call(workers[0]) as second:
        for connection in (first, second):
            enter(connection, [*workers, "127.0.0.1:1"], b"secret", process=process)
            time.sleep(0.2)  # each has a thread of its own there: the first is to be taken in before the second
        assert first.recv(1) == b""
        thread.join(10)
    assert isinstance(found[0], Fault) and "worker 2" in str(found[0]) and "worker 1" not in str(found[0])


def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.extend(outcomes([function])), daemon=True)
    thread.start()
    return thread, found


class Told(io.StringIO):
    """Lines, and when they were written."""

    def __init__(self):
        super().__init__()
        self.start, self.lines = time.monotonic(), []

    def write(self, text):
        self.lines += [(time.monotonic() - self.start, line) for line in text.splitlines()]


@pytest.mark.parametrize("own", ["a", ""])
def test_who_knows_another_secret_is_told_at_once_on_both_sides(own, monkeypatch):
    """And not let in, and ends nobody: the right one may still come."""
    workers = loopback(2)
    monkeypatch.setattr(sys, "stderr", told := Told())
    right, found = in_thread(lambda: rendezvous.connect(0, workers, 20, own))
    (wrong,) = outcomes([lambda: rendezvous.connect(1, workers, 3, "b")])
    ignorant = "does not know this DIST_PARTIAL_SECRET: give all workers the same"
    assert isinstance(wrong, Fault) and f"worker 0 ({workers[0]}: what answers at {workers[0]} {ignorant}" in str(wrong)
    lines = dict(reversed([(line, when) for when, line in told.lines]))
    listener = [when for line, when in lines.items() if line.startswith("worker 0 waits for worker 1: who calls from")]
    caller = [when for line, when in lines.items() if line.startswith("worker 1 waits for worker 0: what answers at")]
    assert len(listener) == len(caller) == 1 and max(listener + caller) < 2.5
    assert sum(ignorant in line for line in lines) == 2
    links = rendezvous.connect(1, workers, 10, own)
    right.join(10)
    for connections in (links, *found):
        for link in connections.values():
            link.socket.close()


@pytest.mark.parametrize("kind", strangers.ATTACKS)
def test_no_attack_lets_a_stranger_in_or_keeps_a_worker_out(kind):
    workers = loopback(3)
    attack = strangers.Attack(kind, workers)

    def come(rank):
        time.sleep(0.2 + 0.8 * (rank == 2))  # strangers were first
        return rendezvous.connect(rank, workers, 30, "secret")

    try:
        found = at_once([functools.partial(come, rank) for rank in range(3)])
    finally:
        attack.stop()
    assert attack.proofs and not attack.admitted
    for rank, links in enumerate(found):
        for other, link in links.items():
            link.socket.sendall(bytes([10 * rank + other]))
    for rank, links in enumerate(found):
        for other, link in links.items():
            assert link.socket.recv(9) == bytes([10 * other + rank])
            link.socket.close()


@pytest.mark.slow
def test_a_training_that_is_attacked_while_it_starts(tmp_path):
    attack, results = strangers.train(tmp_path, "relay+reflection+impostor")
    assert attack.proofs and not attack.admitted
    for code, output in results:
        assert code == 0 and "Traceback" not in output, output


@pytest.mark.parametrize(
    ("rank", "other", "verdict"),
    [(1, 0, 1), (2, 0, 1), (1, 2, 2), (0, 0, 2), (3, 0, 2), (2**32 - 1, 0, 2), (1, 2**32 - 1, 2)],
)
def test_a_caller_that_is_proved_must_be_one_of_the_list_and_mean_this_worker(rank, other, verdict):
    workers = loopback(3)
    thread, found = in_thread(lambda: rendezvous.connect(0, workers, 1, "secret"))
    with strangers.await_call(workers[0]) as connection:
        assert strangers.greet(connection, rank, other, workers, b"secret")[0] == verdict
        thread.join(10)
    assert isinstance(found[0], Fault)
    assert (f"worker {rank} (" in str(found[0]).split(";")[0]) == (verdict != 1 and rank in (1, 2))


def test_workers_that_seal_meet_only_those_that_do():
    workers = loopback(2)
    found = outcomes([functools.partial(rendezvous.connect, k, workers, 10, "secret", sealed=bool(k)) for k in (0, 1)])
    for error in found:
        assert isinstance(error, UserError) and "replicas.seal makes worker 1 seal what it sends, and worker 0" in str(
            error
        )


@pytest.mark.skipif(sys.platform == "win32", reason="has no limit of open files")
@pytest.mark.parametrize("limit", [40, 150])
def test_more_silent_connections_than_files_may_be_open_keep_nobody_out(limit):
    workers = loopback(2)
    program = f"""
import resource, time
resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))
from dist_partial.distributed import rendezvous
links = rendezvous.connect(0, {workers}, 60, "secret")
print(time.process_time(), *links)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True)
    silent = []
    try:
        silent.append(strangers.await_call(workers[0]))
        for _ in range(3 * limit):
            with contextlib.suppress(TimeoutError):  # more than the system keeps of what is yet to be accepted
                silent.append(strangers.call(workers[0]))
        links = rendezvous.connect(1, workers, 20, "secret")
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        for connection in silent:
            connection.close()
    links[0].socket.close()
    seconds, rank = output.split()
    assert rank == "1" and not errors and float(seconds) < 3  # it has not spun


def test_a_greeting_has_a_few_seconds_however_slowly_its_bytes_come(monkeypatch):
    monkeypatch.setattr(handshake, "SECONDS", 0.5)
    workers = loopback(2)
    thread, _ = in_thread(lambda: rendezvous.connect(0, workers, 4, "secret"))
    with strangers.await_call(workers[0]) as connection:
        start = time.monotonic()
        with pytest.raises(OSError):
            for byte in strangers.hello(b"C", 1, 0, workers):
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - start < 3
    thread.join(10)


def test_strangers_keep_nobody_waiting():
    workers = loopback(2)
    over = threading.Event()
    knocked = []

    def disturb():
        hello = strangers.hello(b"C", 1, 0, workers)
        for data in [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 200, hello, hello + bytes(32)] * 3:
            try:
                connection = strangers.call(workers[0])
                connection.sendall(data)
                knocked.append(connection)
            except OSError:
                if over.wait(0.05):
                    return

    def late():
        time.sleep(0.7)
        return rendezvous.connect(1, workers, 10, "secret")

    thread = threading.Thread(target=disturb)
    threading.Timer(0.2, thread.start).start()
    start = time.monotonic()
    first, second = at_once([lambda: rendezvous.connect(0, workers, 10, "secret"), late])
    assert time.monotonic() - start < 4
    over.set()
    first[1].socket.sendall(b"!")
    assert second[0].socket.recv(1) == b"!"
    for connection in [*knocked, first[1].socket, second[0].socket]:
        connection.close()
