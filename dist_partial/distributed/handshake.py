"""How two workers prove to each other that they know one secret, and agree on keys, over a connection just made.

Mutual authentication by keyed hashes in three passes (ISO/IEC 9798-4): HMAC-SHA256 (RFC 2104) over all that was said
before, first by the caller, and by the listener only to a caller who has proved. So a stranger learns nothing, and no
proof is of use in the other role, to another worker or a second time. Keys come by HKDF-SHA256 (RFC 5869).

    1. caller -> listener    hello, 114 bytes
    2. listener -> caller    hello, 114 bytes
    3. caller -> listener    proof, 32 bytes: HMAC(secret, "C" + transcript)
    4. listener -> caller    verdict, 1 byte, and proof, 32 bytes: HMAC(secret, "L" + transcript)

A hello is, of fixed lengths and with numbers big-endian: the label "dist_partial handshake 1" (24 bytes); the role,
"C" or "L" (1); 1 if records are to be sealed, or 0 (1); the speaker's rank (4); the rank that the caller means to
call, or that the listener was given (4); 16 bytes that the process has drawn, by which one worker that calls twice is
distinguished from two; a nonce of 32 random bytes; the SHA-256 of the workers' addresses as a JSON list (32). The
transcript is both hellos, the caller's first; unless both want records sealed, there follow on a loopback connection
the caller's and the listener's end, as a JSON list of address, port, address, port. The verdict is 1 before the proof.
Before 32 zeros it is 0, the caller's proof is wrong, or 2, it has called another worker than it meant; then the
listener closes.

    5. each -> other, if the digests differ: 4 bytes, the length of its JSON list, and the list; then both close

If both want it, everything from there on is sealed: each record is followed by a tag of 16 bytes, the first of
HMAC(key, number + record), where the number counts the records of its direction from 0, in 8 bytes. The salt is both
nonces.

    key of what the caller sends      HMAC(HMAC(salt, secret), "C" + transcript + "\\1")
    key of what the listener sends    HMAC(HMAC(salt, secret), "L" + transcript + "\\1")

An attacker between two workers who only passes on their bytes stays unnoticed. Sealed, what it changes, leaves out,
repeats or adds is noticed before it is used; on loopback it gets no proof, for the two ends differ. It can read
everything: nothing is encrypted. And it can try out secrets that somebody has thought of: draw yours.
"""

import dataclasses
import hashlib
import hmac
import ipaddress
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Sequence

from dist_partial.errors import UserError

SECRET = "DIST_PARTIAL_SECRET"  # the environment variable; the launchers draw one
SECONDS = 5.0  # for a whole handshake: who is slower may call again

_LABEL = b"dist_partial handshake 1"
_CALLER, _LISTENER = b"C", b"L"
_HELLO = struct.Struct("!24sc?II16s32s32s")
_VERDICT = struct.Struct("!B32s")
_UNKNOWN, _PROVED, _ASTRAY = 0, 1, 2
_LENGTH = struct.Struct("!I")
_LONGEST = 2**20  # bytes of the workers' addresses
_NUMBER = struct.Struct("!Q")
_TAG = 16  # bytes


class Unproven(Exception):
    """Reports a peer that says it is a worker and does not prove it.

    Attributes:
        rank: which.
    """

    def __init__(self, rank: int, reason: str) -> None:
        super().__init__(reason)
        self.rank = rank


@dataclasses.dataclass(frozen=True)
class Worker:
    """Describes what a worker is to the others.

    Attributes:
        rank: its rank.
        workers: 'host:port' of all, in rank order.
        secret: what all of them know.
        sealed: whether records are to have tags.
        process: what this process has drawn.

    Examples:
        >>> worker = Worker(0, ["a:2222", "b:2222"], "secret", sealed=True)
        >>> len(worker.hello(b"C", other=1)), worker.addresses
        (114, b'["a:2222", "b:2222"]')
    """

    rank: int
    workers: Sequence[str]
    secret: str
    sealed: bool
    process: bytes = dataclasses.field(default_factory=lambda: secrets.token_bytes(16))

    @property
    def addresses(self) -> bytes:
        return json.dumps(list(self.workers)).encode()

    def hello(self, role: bytes, other: int) -> bytes:
        digest = hashlib.sha256(self.addresses).digest()
        nonce = secrets.token_bytes(32)
        return _HELLO.pack(_LABEL, role, self.sealed, self.rank, other, self.process, nonce, digest)


@dataclasses.dataclass(frozen=True, eq=False)
class Link:
    """Holds a connection to a worker that has proved to be one.

    Attributes:
        socket: the connection.
        rank: the other worker's.
        process: what the other's process has drawn.
        sending: of the records that this worker sends.
        receiving: of those that the other sends.
    """

    socket: socket.socket
    rank: int
    process: bytes
    sending: "Seal"
    receiving: "Seal"


class Seal:
    """Computes the tags of the records of one direction, as their bytes come; for one thread.

    Attributes:
        length: bytes of a tag; 0 where nothing is sealed.

    Examples:
        >>> def tag(seal):
        ...     seal.update(memoryview(b"a record"))
        ...     return seal.tag()
        >>> sending, receiving = Seal(b"key"), Seal(b"key")
        >>> first = tag(sending)
        >>> tag(receiving) == first, tag(receiving) == first  # the second record differs by its number
        (True, False)
    """

    def __init__(self, key: bytes | None) -> None:
        self.length = _TAG if key else 0
        self._keyed = hmac.new(key, digestmod="sha256") if key else None
        self._count = 0
        self._begin()

    def _begin(self) -> None:
        if self._keyed:
            self._record = self._keyed.copy()
            self._record.update(_NUMBER.pack(self._count))
            self._count += 1

    def update(self, data: memoryview) -> None:
        """Takes the next bytes of the record."""
        if self._keyed:
            self._record.update(data)

    def tag(self) -> bytes:
        """The tag of the record, which ends with it; b"" where nothing is sealed."""
        if not self._keyed:
            return b""
        tag = self._record.digest()[:_TAG]
        self._begin()
        return tag


@dataclasses.dataclass(frozen=True)
class _Hello:
    """A hello that has come, or gone."""

    label: bytes
    role: bytes
    sealed: bool
    rank: int
    other: int
    process: bytes
    nonce: bytes
    digest: bytes

    @classmethod
    def read(cls, data: bytes, role: bytes) -> "_Hello":
        hello = cls(*_HELLO.unpack(data))
        if (hello.label, hello.role) != (_LABEL, role):
            raise ValueError("it does not speak as a worker of this version does")
        return hello


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
    deadline = _prepare(connection)
    mine = own.hello(_CALLER, other)
    connection.sendall(mine)
    theirs = _receive(connection, _HELLO.size, deadline)
    talk = _Talk.of(connection, own, _CALLER, mine, theirs)
    connection.sendall(talk.proof(_CALLER))
    verdict, proof = _VERDICT.unpack(_receive(connection, _VERDICT.size, deadline))
    if verdict == _ASTRAY:
        raise Unproven(other, f"says that it is worker {talk.theirs.rank}: see the addresses in TF_CONFIG")
    if verdict != _PROVED or not hmac.compare_digest(proof, talk.proof(_LISTENER)):
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
    deadline = _prepare(connection)
    theirs = _receive(connection, _HELLO.size, deadline)
    caller = _Hello.read(theirs, _CALLER)
    mine = own.hello(_LISTENER, caller.rank)
    connection.sendall(mine)
    talk = _Talk.of(connection, own, _LISTENER, theirs, mine)
    proof = _receive(connection, hashlib.sha256().digest_size, deadline)
    if caller.digest == talk.mine.digest and not caller.other == own.rank < caller.rank < len(own.workers):
        connection.sendall(_VERDICT.pack(_ASTRAY, b""))
        raise ValueError("it means to call another worker")
    if not hmac.compare_digest(proof, talk.proof(_CALLER)):
        connection.sendall(_VERDICT.pack(_UNKNOWN, b""))
        raise Unproven(caller.rank, talk.doubt())
    connection.sendall(_VERDICT.pack(_PROVED, talk.proof(_LISTENER)))
    return _agree(talk, deadline)


@dataclasses.dataclass(frozen=True)
class _Talk:
    """A handshake after the hellos, of which `mine` is this worker's."""

    connection: socket.socket
    own: Worker
    mine: _Hello
    theirs: _Hello
    transcript: bytes
    bound: bool  # to the ends of the connection

    @classmethod
    def of(cls, connection: socket.socket, own: Worker, role: bytes, caller: bytes, listener: bytes) -> "_Talk":
        hellos = [_Hello.read(caller, _CALLER), _Hello.read(listener, _LISTENER)]
        ends = [connection.getsockname()[:2], connection.getpeername()[:2]]
        if role == _LISTENER:
            mine, theirs, ends = hellos[1], hellos[0], ends[::-1]
        else:
            mine, theirs = hellos
        # On loopback nothing translates addresses, and the system lets nobody else send on a connection.
        bound = not (mine.sealed and theirs.sealed) and ipaddress.ip_address(ends[0][0]).is_loopback
        where = json.dumps([*ends[0], *ends[1]]).encode() if bound else b""
        return cls(connection, own, mine, theirs, caller + listener + where, bound)

    def proof(self, role: bytes) -> bytes:
        return hmac.digest(os.fsencode(self.own.secret), role + self.transcript, "sha256")

    def doubt(self) -> str:
        else_ = ", or something passes on what it says, which replicas.seal = True would allow" if self.bound else ""
        return f"does not know this {SECRET}: give all workers the same{else_}"

    def seal(self, hello: _Hello) -> Seal:
        """Of what is sent by whose hello it is."""
        if not hello.sealed:
            return Seal(None)
        caller, listener = sorted((self.mine, self.theirs), key=lambda hello: hello.role)
        extracted = hmac.digest(caller.nonce + listener.nonce, os.fsencode(self.own.secret), "sha256")
        return Seal(hmac.digest(extracted, hello.role + self.transcript + b"\1", "sha256"))


def _agree(talk: _Talk, deadline: float) -> Link:
    """Both have proved: compares what they were started with."""
    connection, own, mine, theirs = talk.connection, talk.own, talk.mine, talk.theirs
    if mine.digest != theirs.digest:
        connection.sendall(_LENGTH.pack(len(own.addresses)) + own.addresses)
        (length,) = _LENGTH.unpack(_receive(connection, _LENGTH.size, deadline))
        addresses = _receive(connection, min(length, _LONGEST), deadline)
        if hashlib.sha256(addresses).digest() != theirs.digest:
            raise ValueError("it sends other addresses than it has proved")
        raise UserError(
            f"worker {theirs.rank} was started with other workers in its TF_CONFIG than worker {own.rank}: "
            f"{', '.join(json.loads(addresses))} against {', '.join(own.workers)}"
        )
    if mine.sealed != theirs.sealed:
        raise UserError(
            f"replicas.seal makes worker {theirs.rank if theirs.sealed else own.rank} seal what it sends, and worker "
            f"{own.rank if theirs.sealed else theirs.rank} not: bind the same on all"
        )
    connection.settimeout(None)
    return Link(connection, theirs.rank, theirs.process, talk.seal(mine), talk.seal(theirs))


def _prepare(connection: socket.socket) -> float:
    connection.settimeout(SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return time.monotonic() + SECONDS


def _receive(connection: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError("it takes too long")
        connection.settimeout(left)
        if not (received := connection.recv(count - len(data))):
            raise OSError("it closed the connection")
        data += received
    return data
