"""How two workers prove to each other that they know one secret, and agree on keys, over a connection just made.

Mutual authentication by keyed hashes in three passes (ISO/IEC 9798-4): HMAC-SHA256 (RFC 2104) over all that was said
before, first by the caller, and by the listener only to a caller who has proved. So a stranger learns nothing, and no
proof is of use in the other role, to another worker or a second time. Keys come by HKDF-SHA256 (RFC 5869).

    1. caller -> listener    hello, 114 bytes
    2. listener -> caller    hello, 114 bytes
    3. caller -> listener    proof, 32 bytes: HMAC(secret, "C" + transcript)
    4. listener -> caller    verdict, 1 byte, and proof, 32 bytes: HMAC(secret, "L" + transcript)

A hello is, of fixed lengths and with numbers big-endian: the label "dist_partial handshake 1" (24 bytes); the role,
"C" or "L" (1); the sum of 1 if records are to be sealed, and 2 for TLS by the secret or 4 for TLS by files (1); the
speaker's rank (4); the rank that the caller means to call, or that the listener was given (4); 16 bytes that the
process has drawn, by which one worker that calls twice is distinguished from two; a nonce of 32 random bytes; the
SHA-256 of the workers' addresses as a JSON list (32). The transcript is both hellos, the caller's first; unless both
want records sealed, or TLS, there follow on a loopback connection the caller's and the listener's end, as a JSON list
of address, port, address, port. The verdict is 1 before the proof. Before 32 zeros it is 0, the caller's proof is
wrong, or 2, it has called another worker than it meant; then the listener closes.

If both hellos want TLS of one kind, it begins after them, the caller as its client, and all else travels inside it;
the client's Finished message (RFC 8446, 4.4.4), which holds for this TLS connection alone, ends the transcript.
Somebody in between can change a hello to keep TLS away; then the proofs do not fit, and nothing else is sent. Workers
that do differ prove it to each other, and end.

    5. each -> other, if the digests differ: 4 bytes, the length of its JSON list, and the list; then both close

If both want it, everything from there on is sealed: each record is followed by a tag of 16 bytes, the first of
HMAC(key, number + record), where the number counts the records of its direction from 0, in 8 bytes. The salt is both
nonces.

    key of what the caller sends      HMAC(HMAC(salt, secret), "C" + transcript + "\\1")
    key of what the listener sends    HMAC(HMAC(salt, secret), "L" + transcript + "\\1")

An attacker between two workers who only passes on their bytes stays unnoticed. Sealed, or in TLS, what it changes,
leaves out, repeats or adds is noticed before it is used; otherwise it gets no proof on loopback, for the two ends
differ. Without TLS it can read everything. And it can try out secrets that somebody has thought of: draw yours.
"""

import contextlib
import dataclasses
import hashlib
import hmac
import ipaddress
import json
import os
import socket
import ssl
import struct
import time
from collections.abc import Iterator

from dist_partial.distributed.cluster import SECRET, split
from dist_partial.distributed.hello import CALLER, HELLO_BYTES, LISTENER, Hello, Worker
from dist_partial.distributed.seal import Seal
from dist_partial.distributed.tcp_channel import Channel, Encrypted, Plain
from dist_partial.errors import UserError

SECONDS = 5.0  # for a whole handshake: who is slower may call again

_VERDICT = struct.Struct("!B32s")
_UNKNOWN, _PROVED, _ASTRAY = 0, 1, 2
_LENGTH = struct.Struct("!I")
_LONGEST = 2**20  # bytes of the workers' addresses


class Unproven(Exception):
    """Reports a peer that says it is a worker and does not prove it.

    Attributes:
        rank: which.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(reason)
        self.rank = rank


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
    """Holds a connection to a worker that has proved to be one.

    Attributes:
        channel: the connection.
        rank: the other worker's.
        process: what the other's process has drawn.
        sending: of the records that this worker sends.
        receiving: of those that the other sends.
    """

    channel: Channel
    rank: int
    process: bytes
    sending: Seal
    receiving: Seal

    @property
    def socket(self) -> socket.socket:
        return self.channel.socket


def call(connection: socket.socket, own: Worker, other: int) -> Link:
    """Runs the caller's side of the handshake.

    Args:
        connection: made by this worker.
        own: who this is.
        other: the rank that it calls.

    Raises:
        Unproven: who answers does not know the secret, or says so of this worker.
        OSError, ValueError: it is no worker, or gone.
        UserError: it is one, and was started with other addresses or another `replicas.seal`.

    Examples:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> first, second = (Worker(rank, ["a:2222", "b:2222"], "secret", sealed=True) for rank in (0, 1))
        >>> with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as threads:
        ...     calling = threads.submit(call, socket.create_connection(server.getsockname()), second, 0)
        ...     answering = answer(server.accept()[0], first)
        ...     calling.result().rank, answering.rank
        (0, 1)
    """
    channel, deadline = _prepare(connection)
    mine = own.hello(CALLER, other)
    channel.sendall(mine)
    theirs = _receive(channel, HELLO_BYTES, deadline)
    talk = _Talk.of(channel, own, CALLER, mine, theirs)
    with _protected(talk, other, deadline) as talk:
        talk.channel.sendall(talk.proof(CALLER))
        verdict, proof = _VERDICT.unpack(_receive(talk.channel, _VERDICT.size, deadline))
    if verdict == _ASTRAY:
        raise Unproven(other, f"says that it is worker {talk.theirs.rank}: see the addresses in TF_CONFIG")
    if verdict != _PROVED or not hmac.compare_digest(proof, talk.proof(LISTENER)):
        raise Unproven(other, talk.doubt())
    return _agree(talk, deadline)


def answer(connection: socket.socket, own: Worker) -> Link:
    """Runs the listener's side of the handshake; raises as `call` does.

    Examples:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> first, second = (Worker(rank, ["a:2222", "b:2222"], f"secret {rank}", sealed=True) for rank in (0, 1))
        >>> with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as threads:
        ...     _ = threads.submit(call, socket.create_connection(server.getsockname()), second, 0)
        ...     answer(server.accept()[0], first)
        Traceback (most recent call last):
        dist_partial.distributed.handshake.Unproven: does not know this DIST_PARTIAL_SECRET: give all workers the same
    """
    channel, deadline = _prepare(connection)
    theirs = _receive(channel, HELLO_BYTES, deadline)
    caller = Hello.read(theirs, CALLER)
    mine = own.hello(LISTENER, caller.rank)
    channel.sendall(mine)
    talk = _Talk.of(channel, own, LISTENER, theirs, mine)
    with _protected(talk, caller.rank, deadline) as talk:
        proof = _receive(talk.channel, hashlib.sha256().digest_size, deadline)
    if caller.digest == talk.mine.digest and not caller.other == own.rank < caller.rank < len(own.workers):
        talk.channel.sendall(_VERDICT.pack(_ASTRAY, b""))
        raise ValueError("it means to call another worker")
    if not hmac.compare_digest(proof, talk.proof(CALLER)):
        talk.channel.sendall(_VERDICT.pack(_UNKNOWN, b""))
        raise Unproven(caller.rank, talk.doubt())
    talk.channel.sendall(_VERDICT.pack(_PROVED, talk.proof(LISTENER)))
    return _agree(talk, deadline)


@dataclasses.dataclass(frozen=True)
class _Talk:
    """A handshake after the hellos, of which `mine` is this worker's."""

    channel: Channel
    own: Worker
    mine: Hello
    theirs: Hello
    transcript: bytes
    bound: bool  # to the ends of the connection

    @classmethod
    def of(cls, channel: Channel, own: Worker, role: bytes, caller: bytes, listener: bytes) -> "_Talk":
        hellos = [Hello.read(caller, CALLER), Hello.read(listener, LISTENER)]
        ends = [channel.socket.getsockname()[:2], channel.socket.getpeername()[:2]]
        if role == LISTENER:
            mine, theirs, ends = hellos[1], hellos[0], ends[::-1]
        else:
            mine, theirs = hellos
        # On loopback nothing translates addresses, and the system lets nobody else send on a connection.
        guarded = (mine.sealed and theirs.sealed) or (own.tls and mine.tls == theirs.tls)
        bound = not guarded and ipaddress.ip_address(ends[0][0]).is_loopback
        where = json.dumps([*ends[0], *ends[1]]).encode() if bound else b""
        return cls(channel, own, mine, theirs, caller + listener + where, bound)

    def proof(self, role: bytes) -> bytes:
        return hmac.digest(os.fsencode(self.own.secret), role + self.transcript, "sha256")

    def doubt(self) -> str:
        else_ = ", or something passes on what it says, which replicas.tls = True would allow" if self.bound else ""
        return f"does not know this {SECRET}: give all workers the same{else_}"

    def seal(self, hello: Hello) -> Seal:
        """Of what is sent by whose hello it is."""
        if not hello.sealed:
            return Seal(None)
        caller, listener = sorted((self.mine, self.theirs), key=lambda hello: hello.role)
        extracted = hmac.digest(caller.nonce + listener.nonce, os.fsencode(self.own.secret), "sha256")
        return Seal(hmac.digest(extracted, hello.role + self.transcript + b"\1", "sha256"))


@contextlib.contextmanager
def _protected(talk: _Talk, other: int, deadline: float) -> Iterator[_Talk]:
    """Goes on in TLS, if both want it; who cannot speak it is named.

    What is proved then is of this TLS connection: somebody in between, who has one with each side, passes on no proof.
    """
    tls = talk.own.tls
    if not tls or talk.mine.tls != talk.theirs.tls:
        yield talk
        return
    calls = talk.mine.role == CALLER
    channel = Encrypted(talk.channel.socket, tls, calls, split(talk.own.workers[other])[0] if calls else "")
    try:
        while not channel.shake():
            _wait(channel, deadline)
            channel.read()
        yield dataclasses.replace(talk, channel=channel, transcript=talk.transcript + channel.binding)
    except ssl.SSLError as error:
        raise Unproven(other, tls.doubt(error)) from None


def _agree(talk: _Talk, deadline: float) -> Link:
    """Both have proved: compares what they were started with."""
    channel, own, mine, theirs = talk.channel, talk.own, talk.mine, talk.theirs
    if mine.digest != theirs.digest:
        channel.sendall(_LENGTH.pack(len(own.addresses)) + own.addresses)
        (length,) = _LENGTH.unpack(_receive(channel, _LENGTH.size, deadline))
        addresses = _receive(channel, min(length, _LONGEST), deadline)
        if hashlib.sha256(addresses).digest() != theirs.digest:
            raise ValueError("it sends other addresses than it has proved")
        raise UserError(
            f"worker {theirs.rank} was started with other workers in its TF_CONFIG than worker {own.rank}: "
            f"{', '.join(json.loads(addresses))} against {', '.join(own.workers)}"
        )
    if mine.tls != theirs.tls:
        both = sorted([(own.rank, mine.tls), (theirs.rank, theirs.tls)])
        words = [f"{tls} on worker {rank}" for rank, tls in both]
        raise UserError(f"replicas.tls is {' and '.join(words)}: bind the same on all")
    if mine.sealed != theirs.sealed:
        raise UserError(
            f"replicas.seal makes worker {theirs.rank if theirs.sealed else own.rank} seal what it sends, and worker "
            f"{own.rank if theirs.sealed else theirs.rank} not: bind the same on all"
        )
    channel.socket.settimeout(None)
    return Link(channel, theirs.rank, theirs.process, talk.seal(mine), talk.seal(theirs))


def _prepare(connection: socket.socket) -> tuple[Channel, float]:
    connection.settimeout(SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Plain(connection), time.monotonic() + SECONDS


def _receive(channel: Channel, count: int, deadline: float) -> bytes:
    data = bytearray(count)
    rest = memoryview(data)
    rest = rest[channel.take(rest) :]
    while rest:
        _wait(channel, deadline)
        rest = rest[channel.receive(rest) :]
    return bytes(data)


def _wait(channel: Channel, deadline: float) -> None:
    """Lets the next call wait until then at most."""
    if (left := deadline - time.monotonic()) <= 0:
        raise TimeoutError("it takes too long")
    channel.socket.settimeout(left)
