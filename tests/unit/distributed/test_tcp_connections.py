"""Messages over TCP: several workers in one process, and an independent program in the place of one."""

import functools
import queue
import socket
import struct
import threading
import time

import pytest

from dist_partial.distributed import rendezvous, tcp_connections
from dist_partial.distributed.tcp_connections import Connections, Message
from dist_partial.errors import Fault, Raised, UserError
from tests import strangers
from tests.helpers.threads import at_once
from tests.helpers.workers import loopback


class Worker:
    """The connections of one worker; what arrives and who is lost is in queues."""

    def __init__(self, workers, links, patience):
        self.arrived, self.lost = queue.SimpleQueue(), queue.SimpleQueue()
        self.connections = Connections(workers, links, patience, self.target, self.lost.put)

    def target(self, rank, message):
        buffer = bytearray(message.size)
        return buffer, lambda: self.arrived.put((rank, message, bytes(buffer)))


@pytest.fixture
def connected():
    """Makes `count` workers, and closes their connections after the test."""
    made = []

    def make(count, patience=60.0, sealed=False):
        addresses = loopback(count)
        connect = functools.partial(rendezvous.connect, workers=addresses, seconds=10, sealed=sealed)
        found = at_once([functools.partial(connect, k) for k in range(count)])
        made.extend(Worker(addresses, links, patience) for links in found)
        return made[-count:]

    yield make
    for worker in made:
        worker.connections.close()


@pytest.mark.parametrize("sealed", [False, True])
def test_messages_of_any_size_arrive_in_order(connected, sealed):
    workers, sizes, sent = connected(3, sealed=sealed), [0, 1, 7, 2**20, 2**20 + 1, 3 * 2**20, 0], queue.SimpleQueue()
    messages = [Message(i % 2, i, 2**40 + i, size) for i, size in enumerate(sizes)]
    for rank, worker in enumerate(workers):
        for message in messages:
            for other in {0, 1, 2} - {rank}:
                worker.connections.send(other, message, bytes([rank]) * message.size, lambda: sent.put(None))
    for rank, worker in enumerate(workers):
        arrived = [worker.arrived.get(timeout=10) for _ in range(2 * len(messages))]
        for other in {0, 1, 2} - {rank}:
            expected = [(other, message, bytes([other]) * message.size) for message in messages]
            assert [each for each in arrived if each[0] == other] == expected
    for _ in range(6 * len(messages)):
        sent.get(timeout=10)
    assert sent.empty() and all(worker.lost.empty() for worker in workers)


@pytest.mark.parametrize("sealed", [False, True])
def test_what_the_system_takes_only_bit_by_bit_leaves_to_the_last_byte(connected, sealed):
    first, second = connected(2, sealed=sealed)
    first.connections._peers[1].link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
    sizes = [900 * 2**10, 3 * 2**20 + 1, *[1] * 200, 0]
    for i, size in enumerate(sizes):
        first.connections.send(1, Message(0, i, 0, size), bytes([i]) * size)
    for i, size in enumerate(sizes):
        assert second.arrived.get(timeout=10) == (0, Message(0, i, 0, size), bytes([i]) * size)


def test_a_message_that_must_wait_holds_up_nobody_else(connected):
    first, second, third = connected(3)
    ready, target = threading.Event(), first.target
    first.connections._target = lambda rank, message: target(rank, message) if rank != 1 or ready.is_set() else None
    second.connections.send(0, Message(0, 0, 0, 2**20), b"a" * 2**20)
    third.connections.send(0, Message(0, 1, 0, 1), b"b")
    assert first.arrived.get(timeout=10) == (2, Message(0, 1, 0, 1), b"b")
    first.connections.retry()
    assert first.arrived.empty()
    ready.set()
    first.connections.retry()
    assert first.arrived.get(timeout=10) == (1, Message(0, 0, 0, 2**20), b"a" * 2**20)


@pytest.mark.parametrize("reason", [UserError("run.steps is 'x'"), Fault("the disk is full"), Raised("ValueError")])
def test_last_words_follow_what_was_sent_before(connected, reason):
    first, second = connected(2)
    second.connections.send(0, Message(0, 0, 0, 2), b"ab")
    second.connections.close(reason)
    assert first.arrived.get(timeout=10) == (1, Message(0, 0, 0, 2), b"ab")
    assert first.lost.get(timeout=10).endswith(f": {reason}")
    assert type(first.connections.lost([1])) is type(reason)


def test_silence_loses_a_worker_and_heartbeats_keep_it(connected, monkeypatch):
    monkeypatch.setattr(tcp_connections, "HEARTBEAT_SECONDS", 0.1)
    first, second = connected(2, patience=0.5)
    second.connections.send(0, Message(0, 0, 0, 1), b"a")
    first.arrived.get(timeout=10)
    time.sleep(1.5)
    assert first.lost.empty()
    monkeypatch.setattr(second.connections, "_look", lambda *times: None)
    assert "worker 1 (127.0.0.1:" in (text := first.lost.get(timeout=10)) and "has been silent for 0.5 s" in text


def test_what_is_no_message_loses_a_worker(connected):
    first, second = connected(2)
    second.connections._peers[0].link.socket.sendall(b"GET / HTTP/1.1\r\nHost: someone\r\n\r\n")
    assert "sent what does not fit (not a header)" in first.lost.get(timeout=10)
    assert isinstance(first.connections.lost([1]), UserError)


def spoken(text):
    """A sign of life, and the last words of a worker that has made a mistake: a header, and the text."""
    return [struct.pack("<4sBIQQQ", b"dpm3", kind, 0, 0, size, 0) for kind, size in ((2, 0), (3, len(text)))] + [text]


CHANGES = {
    "nothing": lambda life, header, words: [life, header, words],
    "a byte of a header": lambda life, header, words: [life, flipped(header, 4), words],
    "a byte of the words": lambda life, header, words: [life, header, flipped(words, 3)],
    "a byte of a tag": lambda life, header, words: [life, header, flipped(words, -1)],
    "one left out": lambda life, header, words: [header, words],
    "one twice": lambda life, header, words: [life, life, header, words],
    "another order": lambda life, header, words: [header, words, life],
    "no tags": lambda life, header, words: [life[:-16], header[:-16], words[:-16]],
}


def flipped(data, place):
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rank", [0, 1])  # of the worker: one listens, the other calls
def test_what_is_sealed_and_changed_on_its_way_is_not_believed(rank, change):
    """By an independent program, that is the other worker and then the one in between."""
    workers = loopback(2)
    thread = threading.Thread(
        target=lambda: links.update(rendezvous.connect(rank, workers, 10, "secret", sealed=True)), daemon=True
    )
    links = {}
    if rank == 0:
        thread.start()
        connection = strangers.await_call(workers[0])
        verdict, transcript = strangers.greet(connection, 1, 0, workers, b"secret", sealed=True)
        assert verdict == 1
    else:
        with strangers.listen(workers[0]) as server:
            thread.start()
            connection, _ = server.accept()
        transcript = strangers.welcome(connection, 0, 1, workers, b"secret", sealed=True)
    thread.join(10)
    lost = queue.SimpleQueue()
    connections = Connections(workers, links, 60.0, None, lost.put)
    key = strangers.key(b"secret", b"C" if rank == 0 else b"L", transcript)
    records = [strangers.record(key, i, each) for i, each in enumerate(spoken(b"the disk is full"))]
    with connection:
        connection.sendall(b"".join(CHANGES[change](*records)) + bytes(200))
        reported, reason = lost.get(timeout=10), connections.lost([1 - rank])
        assert reported == str(reason)
        if change == "nothing":
            assert type(reason) is UserError and reported.endswith(": the disk is full")
        else:
            assert type(reason) is Fault and "is not what it has sent: something between" in reported
        connections.close()
