"""Messages over TCP: several workers in one process, and an independent program in the place of one."""

import contextlib
import functools
import queue
import socket
import struct
import threading
import time

import pytest

from dist_partial.distributed import handshake, rendezvous, tcp_connections, tls
from dist_partial.distributed.tcp_connections import Connections, Message
from dist_partial.errors import Fault, Raised, UserError
from tests import strangers
from tests.helpers.certificates import GUARDS
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

    def make(count, patience=60.0, guard="plain"):
        addresses = loopback(count)
        connect = functools.partial(rendezvous.connect, workers=addresses, seconds=10, **GUARDS[guard]())
        found = at_once([functools.partial(connect, k) for k in range(count)])
        made.extend(Worker(addresses, links, patience) for links in found)
        return made[-count:]

    yield make
    for worker in made:
        worker.connections.close()


@pytest.mark.parametrize("guard", GUARDS)
def test_messages_of_any_size_arrive_in_order(connected, guard):
    workers, sizes, sent = connected(3, guard=guard), [0, 1, 7, 2**20, 2**20 + 1, 3 * 2**20, 0], queue.SimpleQueue()
    messages = [Message(i % 2, 2**40 + i, 2**30 + i, size) for i, size in enumerate(sizes)]
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


@pytest.mark.parametrize("guard", GUARDS)
def test_what_the_system_takes_only_bit_by_bit_leaves_to_the_last_byte(connected, guard):
    """In both directions at once."""
    workers = connected(2, guard=guard)
    sizes = [900 * 2**10, 3 * 2**20 + 1, *[1] * 200, 0]
    for rank, worker in enumerate(workers):
        worker.connections._peers[1 - rank].link.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
        for i, size in enumerate(sizes):
            worker.connections.send(1 - rank, Message(0, i, 0, size), bytes([i + rank]) * size)
    for rank, worker in enumerate(workers):
        for i, size in enumerate(sizes):
            assert worker.arrived.get(timeout=10) == (1 - rank, Message(0, i, 0, size), bytes([i + 1 - rank]) * size)


@pytest.mark.parametrize("guard", GUARDS)
def test_a_message_that_must_wait_holds_up_nobody_else(connected, guard):
    first, second, third = connected(3, guard=guard)
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


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("reason", [UserError("run.steps is 'x'"), Fault("the disk is full"), Raised("ValueError")])
def test_last_words_follow_what_was_sent_before(connected, reason, guard):
    first, second = connected(2, guard=guard)
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
    return [struct.pack("<4sBQIQQ", b"dpm4", kind, 0, 0, size, 0) for kind, size in ((2, 0), (3, len(text)))] + [text]


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


@pytest.mark.parametrize("guard", ["plain", "tls"])
def test_what_comes_with_the_last_of_the_handshake_is_read(guard):
    """By an independent program in the place of the worker that is called."""
    workers, found, options = loopback(2), {}, GUARDS[guard]()
    with strangers.listen(workers[0]) as server:
        meet = functools.partial(rendezvous.connect, 1, workers, 10, "secret", **options)
        thread = threading.Thread(target=lambda: found.update(meet()), daemon=True)
        thread.start()
        channel, _ = server.accept()
    theirs, mine = (
        strangers.exactly(channel, strangers.HELLO),
        strangers.hello(b"L", 0, 1, workers, 2 if options else 0),
    )
    channel.sendall(mine)
    if options:
        channel = options["tls"].called.wrap_socket(channel, server_side=True)
    bound = channel.get_channel_binding("tls-unique") if options else strangers.ends(channel, False)
    transcript = theirs + mine + bound
    assert strangers.exactly(channel, strangers.PROOF) == strangers.proof(b"secret", b"C", transcript)
    proof = strangers.proof(b"secret", b"L", transcript)
    channel.sendall(b"\x01" + proof + b"".join(spoken(b"the disk is full")))
    thread.join(10)
    lost = queue.SimpleQueue()
    connections = Connections(workers, found, 60.0, None, lost.put)
    assert lost.get(timeout=10) == f"worker 0 ({workers[0]}): the disk is full"
    connections.close()
    channel.close()


class Between:
    """Passes on what two workers send each other, and from `change` on what that makes of a record of TLS."""

    def __init__(self, caller, listener):
        self.change, self.ends = None, (caller, listener)
        for pair in (self.ends, self.ends[::-1]):
            threading.Thread(target=self.relay, args=pair, daemon=True).start()

    def relay(self, source, target):
        held = []
        with contextlib.suppress(OSError, EOFError):
            target.sendall(strangers.exactly(source, strangers.HELLO))
            while True:
                record = strangers.exactly(source, 5)
                record += strangers.exactly(source, int.from_bytes(record[3:5], "big"))
                for each in self.change(held, record) if self.change else [record]:
                    target.sendall(each)
        for end in self.ends:
            end.close()


def later(held, record):
    """Two records in another order."""
    held.append(record)
    return [] if len(held) % 2 else held[-2:][::-1]


ON_THE_WAY = {
    "nothing": lambda held, record: [record],
    "a byte": lambda held, record: [flipped(record, len(record) // 2)],
    "the last byte": lambda held, record: [flipped(record, -1)],
    "one twice": lambda held, record: [record, record],
    "another order": later,
    "one in the clear": lambda held, record: [*spoken(b"the disk is full"), record],
    "an alert in the clear": lambda held, record: [bytes([21, 3, 3, 0, 2, 1, 0]), record],  # close_notify
}


@pytest.mark.parametrize("change", ON_THE_WAY)
@pytest.mark.parametrize("rank", [0, 1])  # who reads it: one has listened, the other called
def test_what_is_changed_in_tls_on_its_way_is_not_believed(rank, change):
    workers = loopback(2)
    own = [handshake.Worker(k, workers, "s", False, tls.from_secret("s" * 32)) for k in range(2)]
    with socket.create_server(("127.0.0.1", 0)) as outer, socket.create_server(("127.0.0.1", 0)) as inner:
        calling = socket.create_connection(outer.getsockname())
        between = Between(outer.accept()[0], socket.create_connection(inner.getsockname()))
        called = inner.accept()[0]
    links = at_once([lambda: handshake.answer(called, own[0]), lambda: handshake.call(calling, own[1], 0)])
    made = [Worker(workers, {1 - k: link}, 60.0) for k, link in enumerate(links)]
    reader, writer = made[rank], made[1 - rank]
    writer.connections.send(rank, Message(0, 0, 0, 3), b"one")
    assert reader.arrived.get(timeout=10)[2] == b"one"
    between.change = ON_THE_WAY[change]
    for _ in range(2):
        writer.connections.send(rank, Message(0, 0, 0, 3), b"two")
    if change == "nothing":
        assert reader.arrived.get(timeout=10)[2] == b"two" and reader.lost.empty()
    else:
        reported, reason = reader.lost.get(timeout=10), reader.connections.lost([1 - rank])
        assert reported == str(reason) and type(reason) is Fault
        assert f"what comes from worker {1 - rank} ({workers[1 - rank]}) is not what it has sent: something" in reported
        # One that comes twice has come once.
        assert reader.arrived.empty() or (change == "one twice" and reader.arrived.qsize() == 1)
    for worker in made:
        worker.connections.close()


@pytest.mark.parametrize("guard", GUARDS)
def test_a_connection_that_is_cut_loses_the_worker(connected, guard):
    """Also where TLS has not been ended in order: what is missing is never taken for the end."""
    first, second = connected(2, guard=guard)
    second.connections.send(0, Message(0, 0, 0, 2**16), bytes(2**16))
    first.arrived.get(timeout=10)
    second.connections._peers[0].link.socket.shutdown(socket.SHUT_RDWR)
    assert (
        "worker 1 (127.0.0.1:" in (text := first.lost.get(timeout=10)) and "is gone (it closed the connection)" in text
    )
    assert isinstance(first.connections.lost([1]), Fault)
