"""How workers find each other: one TCP connection between every two of them, at the addresses of TF_CONFIG.

Each worker listens on its own address alone. Two that meet prove to each other that they know the same secret (HMAC,
RFC 2104) before either believes a word, so that a stranger can keep nobody waiting and pass for nobody.
"""

import contextlib
import errno
import functools
import hmac
import ipaddress
import json
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from dist_partial.errors import Fault, UserError

SECRET = "DIST_PARTIAL_SECRET"  # the environment variable; the launchers draw one

_LENGTH = struct.Struct("<I")
_LONGEST = 2**20  # bytes of a greeting; a stranger may not fill the memory
_RETRY_SECONDS = 0.2
_PATIENCE_SECONDS = 10.0  # until it is said who is waited for


def connect(
    rank: int, workers: Sequence[str], seconds: float, secret: str = "", congestion: str | None = None
) -> dict[int, socket.socket]:
    """Connects this worker to all others; all workers call it, in any order.

    Args:
        rank: this worker's.
        workers: 'host:port' of each, in rank order.
        seconds: in which all must have met.
        secret: what all workers know and nobody else does.
        congestion: the kernel's congestion control for these connections, such as 'cubic'; where it is not to be had,
            or None, that of the system.

    Returns:
        The connection to each other worker, by rank.

    Raises:
        Fault: some are missing when the time is over; the message names them by address.
        UserError: this address is not of this host, or another worker was started with another TF_CONFIG.
    """
    deadline = time.monotonic() + seconds
    found: queue.SimpleQueue[tuple[int, socket.socket] | UserError] = queue.SimpleQueue()
    reasons: dict[int, str] = {}
    over = threading.Event()
    greet = functools.partial(_greet, rank, list(workers), secret.encode(), deadline)
    connections: dict[int, socket.socket] = {}
    server = _listen(rank, workers, deadline)
    accepting = threading.Thread(target=_take_in, args=(server, greet, found, over), daemon=True)
    calling = [
        threading.Thread(target=_call, args=(k, workers[k], greet, found, reasons, over), daemon=True)
        for k in range(rank)
    ]
    try:
        for thread in (accepting, *calling):
            thread.start()
        silent_until = min(deadline, time.monotonic() + _PATIENCE_SECONDS)
        # One that has come and ended may come again.
        while missing := [k for k in range(len(workers)) if k != rank and _ended(connections.get(k))]:
            try:
                arrival = found.get(timeout=min(_RETRY_SECONDS, max(0.0, silent_until - time.monotonic())))
            except queue.Empty:
                if time.monotonic() < silent_until:
                    continue
                late = ", ".join(
                    f"worker {k} ({workers[k]}{f': {reasons[k]}' if k in reasons else ''})" for k in missing
                )
                if silent_until == deadline:
                    raise Fault(
                        f"missing after {seconds:g} s: {late}; this is worker {rank} ({workers[rank]}); see their own "
                        "output, and that TCP to these addresses is not blocked; replicas.start_seconds waits longer"
                    ) from None
                silent_until = deadline
                print(f"worker {rank} waits for {late}", file=sys.stderr, flush=True)
                continue
            if isinstance(arrival, UserError):
                raise arrival
            other, connection = arrival
            before = connections.get(other)
            if not _ended(before):
                connection.close()
                raise UserError(f"worker {other} ({workers[other]}) has been started twice: give each its own index")
            if before is not None:
                before.close()
            connections[other] = connection
        for connection in connections.values():
            _set_up(connection, congestion)
    except BaseException:
        for connection in connections.values():
            connection.close()
        raise
    finally:
        over.set()
        accepting.join()
        server.close()
        for thread in calling:
            thread.join()
        while not found.empty():  # who has come too late
            if isinstance(late_arrival := found.get(), tuple):
                late_arrival[1].close()
    return connections


def _listen(rank: int, workers: Sequence[str], deadline: float) -> socket.socket:
    host, port = _split(workers[rank])
    while True:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            own = str(address[0])
            if own != host and ipaddress.ip_address(own).is_loopback and {_split(w)[0] for w in workers} != {host}:
                raise UserError(
                    f"worker {rank}: {host} is {own} on this host itself, where no other worker can reach it: mend "
                    "/etc/hosts, or name the workers by their addresses"
                )
            server = socket.create_server((own, port), family=family, backlog=len(workers) + 16)
            server.settimeout(_RETRY_SECONDS)
            return server
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(
                    f"worker {rank} cannot listen on {workers[rank]}, which is no address of this host: see the index "
                    "and the addresses in TF_CONFIG"
                ) from None
            # A name that is not known yet, or a port that the worker before this one has yet to leave.
            if time.monotonic() > deadline:
                raise Fault(f"worker {rank} cannot listen on {workers[rank]}: {error}") from None
            time.sleep(_RETRY_SECONDS)


def _call(other: int, address: str, greet: Any, found: Any, reasons: dict[int, str], over: threading.Event) -> None:
    """Calls a worker of a lower rank until it answers, and again if it ends before all have met."""
    while not over.is_set():
        try:
            connection = socket.create_connection(_split(address), timeout=2.0)
        except OSError as error:
            reasons[other] = error.strerror or str(error)
        else:
            try:
                if (answered := greet(connection)) != other:
                    raise UserError(
                        f"worker {answered} answers at {address}, the address of worker {other}: see the indices in "
                        "TF_CONFIG"
                    )
                found.put((other, connection))
                while not over.is_set() and not _ended(connection):
                    over.wait(_RETRY_SECONDS)
            except UserError as error:
                connection.close()
                return found.put(error)
            except (OSError, ValueError) as error:
                connection.close()
                reasons[other] = str(error)
        over.wait(_RETRY_SECONDS)


def _take_in(server: socket.socket, greet: Any, found: Any, over: threading.Event) -> None:
    """Answers whoever calls: in a thread each, as one that is silent must not keep the others waiting."""

    def answer(connection: socket.socket) -> None:
        try:
            arrival = (greet(connection), connection)
            if over.is_set():
                raise OSError("too late")
            found.put(arrival)
        except UserError as error:
            connection.close()
            found.put(error)
        except (OSError, ValueError):
            connection.close()  # a stranger; if it was a worker, it will call again

    while not over.is_set():
        with contextlib.suppress(OSError):  # nobody has called
            connection, _ = server.accept()
            threading.Thread(target=answer, args=(connection,), daemon=True).start()


def _greet(rank: int, workers: list[str], secret: bytes, deadline: float, connection: socket.socket) -> int:
    """Exchanges greetings and proofs; returns the other's rank.

    Raises:
        OSError, ValueError: it is no worker of this run, or gone.
        UserError: it is, and was started with another TF_CONFIG.
    """
    connection.settimeout(max(0.1, deadline - time.monotonic()))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    nonce = secrets.token_hex(16)
    _send(connection, json.dumps({"rank": rank, "workers": workers, "nonce": nonce}).encode())
    try:
        theirs = json.loads(_receive(connection))
        other, named, its_nonce = int(theirs["rank"]), list(theirs["workers"]), str(theirs["nonce"])
    except (KeyError, TypeError, RecursionError):
        raise ValueError("it does not speak as a worker does") from None

    def proof(of: int, first: str, second: str) -> bytes:
        return hmac.digest(secret, f"{of}:{first}:{second}".encode(), "sha256")

    _send(connection, proof(rank, its_nonce, nonce))
    if not hmac.compare_digest(_receive(connection), proof(other, nonce, its_nonce)):
        raise ValueError(f"it knows another {SECRET}")
    if named != workers:
        raise UserError(
            f"worker {other} was started with other workers in its TF_CONFIG than worker {rank}: "
            f"{', '.join(map(str, named))} against {', '.join(workers)}"
        )
    if other == rank or not 0 <= other < len(workers):
        raise UserError(f"another worker says that it is worker {other}, too: give each its own index in TF_CONFIG")
    connection.settimeout(None)
    return other


def _ended(connection: socket.socket | None) -> bool:
    """Whether there is no connection, or nobody at its other end any more."""
    if connection is None:
        return True
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:  # it is there, and has not said anything yet
        return False
    except OSError:
        return True


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket) -> bytes:
    def exactly(count: int) -> bytes:
        data = b""
        while len(data) < count:
            if not (received := connection.recv(count - len(data))):
                raise OSError("it closed the connection")
            data += received
        return data

    (length,) = _LENGTH.unpack(exactly(_LENGTH.size))
    if length > _LONGEST:
        raise ValueError("it does not speak as a worker does")
    return exactly(length)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _set_up(connection: socket.socket, congestion: str | None) -> None:
    if congestion and hasattr(socket, "TCP_CONGESTION"):
        with contextlib.suppress(OSError):  # the kernel has no such module
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
