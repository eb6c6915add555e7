"""How workers find each other: one TCP connection between every two of them, at the addresses of TF_CONFIG.

Each worker listens on its own address alone, and calls those of lower ranks. Two that meet prove to each other that
they know the same secret before either believes a word (`handshake`). A stranger can keep nobody waiting: a handshake
has a few seconds, only so many may be going on at a time, and the oldest makes room for the next. Nor can it end
anybody: whoever does not prove what it says is named, and waited past.
"""

import contextlib
import dataclasses
import errno
import ipaddress
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from dist_partial.distributed import handshake
from dist_partial.distributed.cluster import split
from dist_partial.distributed.tls import Credentials
from dist_partial.errors import Fault, UserError
from dist_partial.terminal import say

_RETRY_SECONDS = 0.2
_PATIENCE_SECONDS = 10.0  # until it is said who is waited for
_UNPROVEN = 64  # connections that may be at it at a time, beside one of each worker
_LINES = 4  # about those who do not prove to be a worker, for each worker
_NO_MORE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE_SECONDS = 0.05


def connect(
    rank: int,
    workers: Sequence[str],
    seconds: float,
    secret: str = "",
    sealed: bool = False,
    tls: Credentials | None = None,
    abandoned: Callable[[], bool] = lambda: False,
) -> dict[int, handshake.Link]:
    """Connects this worker to all others; all workers call it, in any order.

    Args:
        rank: this worker's.
        workers: 'host:port' of each, in rank order.
        seconds: in which all must have met.
        secret: what all workers know and nobody else does.
        sealed: whether what travels over these connections is to have tags, by which any change is noticed.
        tls: what this worker shows and trusts, or None for connections without TLS.
        abandoned: whether to give it up, as the others will not come.

    Returns:
        The connection to each other worker, by rank.

    Raises:
        Fault: some are missing when the time is over, or it is given up; the message names them by address.
        UserError: this address is not of this host, or another worker was started with another TF_CONFIG.
    """
    deadline = time.monotonic() + seconds
    meeting = _Meeting(handshake.Worker(rank, workers, secret, sealed, tls))
    links: dict[int, handshake.Link] = {}
    server = _listen(rank, workers, deadline, abandoned)
    threads = [threading.Thread(target=_take_in, args=(server, meeting), daemon=True)]
    threads += [threading.Thread(target=_call, args=(k, meeting), daemon=True) for k in range(rank)]
    try:
        for thread in threads:
            thread.start()
        _gather(meeting, links, seconds, deadline, abandoned)
    except BaseException:
        for link in links.values():
            link.socket.close()
        raise
    finally:
        meeting.over.set()
        for thread in threads:
            thread.join()
        server.close()
        while not meeting.found.empty():  # who has come too late
            if isinstance(late := meeting.found.get(), handshake.Link):
                late.socket.close()
    return links


def set_congestion(links: Mapping[int, handshake.Link], name: str | None) -> None:
    """Sets the kernel's congestion control of connections, such as 'cubic'; where there is none, the system's stays.

    Examples:
        >>> set_congestion({}, "cubic")
    """
    for link in links.values() if name and hasattr(socket, "TCP_CONGESTION") else ():
        with contextlib.suppress(OSError):  # the kernel has no such module
            link.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, str(name).encode())


def on_loopback(workers: Sequence[str]) -> bool:
    """Tells by their addresses whether all workers are on this machine and nothing else can reach them.

    Examples:
        >>> on_loopback(["127.0.0.1:5000", "127.0.0.1:5001"])
        True
    """
    hosts = [split(worker)[0] for worker in workers]
    with contextlib.suppress(ValueError):  # a name
        return all(host == "localhost" or ipaddress.ip_address(host).is_loopback for host in hosts)
    return False


@dataclasses.dataclass(frozen=True, eq=False)
class _Meeting:
    """What the threads of a worker that meets the others share."""

    own: handshake.Worker
    found: queue.SimpleQueue[handshake.Link | UserError] = dataclasses.field(default_factory=queue.SimpleQueue)
    reasons: dict[int, str] = dataclasses.field(default_factory=dict)  # why one is still missing, by rank
    said: set[tuple[int, str]] = dataclasses.field(default_factory=set)
    over: threading.Event = dataclasses.field(default_factory=threading.Event)

    def unproven(self, rank: int, reason: str) -> None:
        """Says at once that somebody proves nothing; a few times, for strangers could have it said for ever."""
        if not 0 <= rank < len(self.own.workers):
            return
        self.reasons[rank] = reason
        if (rank, reason) not in self.said and sum(each == rank for each, _ in list(self.said)) < _LINES:
            self.said.add((rank, reason))
            say(f"worker {self.own.rank} waits for worker {rank}: {reason}", sys.stderr)


def _gather(
    meeting: _Meeting,
    links: dict[int, handshake.Link],
    seconds: float,
    deadline: float,
    abandoned: Callable[[], bool],
) -> None:
    """Waits until there is a link to each other worker."""
    rank, workers, reasons = meeting.own.rank, meeting.own.workers, meeting.reasons
    silent_until = min(deadline, time.monotonic() + _PATIENCE_SECONDS)
    # One that has come and ended may come again.
    while missing := [k for k in range(len(workers)) if k != rank and (k not in links or _ended(links[k].socket))]:
        try:
            arrival = meeting.found.get(timeout=min(_RETRY_SECONDS, max(0.0, silent_until - time.monotonic())))
        except queue.Empty:
            if time.monotonic() < silent_until and not abandoned():
                continue
            late = ", ".join(f"worker {k} ({workers[k]}{f': {reasons[k]}' if k in reasons else ''})" for k in missing)
            if abandoned():
                raise Fault(f"given up: {late}") from None
            if silent_until == deadline:
                raise Fault(
                    f"missing after {seconds:g} s: {late}; this is worker {rank} ({workers[rank]}); see their own "
                    "output, and that TCP to these addresses is not blocked; replicas.start_seconds waits longer"
                ) from None
            silent_until = deadline
            say(f"worker {rank} waits for {late}", sys.stderr)
            continue
        if isinstance(arrival, UserError):
            raise arrival
        before = links.pop(arrival.rank, None)
        # An attacker in between can make a worker call again, and keep its first connection open.
        twice = before and before.process != arrival.process and not _ended(before.socket)
        if before:
            before.socket.close()
        if twice:
            arrival.socket.close()
            where = workers[arrival.rank]
            raise UserError(f"worker {arrival.rank} ({where}) has been started twice: give each its own index")
        links[arrival.rank] = arrival
        reasons.pop(arrival.rank, None)


def _listen(rank: int, workers: Sequence[str], deadline: float, abandoned: Callable[[], bool]) -> socket.socket:
    host, port = split(workers[rank])
    while True:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            own = str(address[0])
            if own != host and ipaddress.ip_address(own).is_loopback and {split(w)[0] for w in workers} != {host}:
                raise UserError(
                    f"worker {rank}: {host} is {own} on this host itself, where no other worker can reach it: fix "
                    "/etc/hosts, or name the workers by their addresses"
                )
            server = socket.create_server((own, port), family=family, backlog=len(workers) + 128)
            server.settimeout(_RETRY_SECONDS)
            return server
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(
                    f"worker {rank} cannot listen on {workers[rank]}, which is no address of this host: see the index "
                    "and the addresses in TF_CONFIG"
                ) from None
            # A name that is not known yet, or a port that the worker before this one has yet to leave.
            if time.monotonic() > deadline or abandoned():
                raise Fault(f"worker {rank} cannot listen on {workers[rank]}: {error}") from None
            time.sleep(_RETRY_SECONDS)


def _call(other: int, meeting: _Meeting) -> None:
    """Calls a worker of a lower rank until it answers, and again if it ends before all have met."""
    address = meeting.own.workers[other]
    while not meeting.over.is_set():
        try:
            connection = socket.create_connection(split(address), timeout=2.0)
        except OSError as error:
            meeting.reasons[other] = error.strerror or str(error)
        else:
            try:
                meeting.found.put(handshake.call(connection, meeting.own, other))
                while not meeting.over.is_set() and not _ended(connection):
                    meeting.over.wait(_RETRY_SECONDS)
            except handshake.Unproven as error:
                connection.close()
                meeting.unproven(error.rank, f"what answers at {address} {error}")
            except UserError as error:
                connection.close()
                return meeting.found.put(error)
            except (OSError, ValueError) as error:
                connection.close()
                meeting.reasons[other] = str(error)
        meeting.over.wait(_RETRY_SECONDS)


def _take_in(server: socket.socket, meeting: _Meeting) -> None:
    """Answers whoever calls: in a thread each, as one that is silent must not keep the others waiting."""
    unproven: dict[socket.socket, threading.Thread] = {}  # oldest first

    def answer(connection: socket.socket, host: str) -> None:
        arrival: handshake.Link | UserError | None = None
        try:
            arrival = handshake.answer(connection, meeting.own)
        except handshake.Unproven as error:
            meeting.unproven(error.rank, f"who calls from {host} and says that it is worker {error.rank} {error}")
        except UserError as error:
            arrival = error
        except (OSError, ValueError):
            pass  # a stranger; if it was a worker, it will call again
        wanted = unproven.pop(connection, None) and not meeting.over.is_set()  # or it was dropped, or is too late
        if not (wanted and isinstance(arrival, handshake.Link)):
            connection.close()
        if wanted and arrival:
            meeting.found.put(arrival)

    while not meeting.over.is_set():
        try:
            connection, address = server.accept()
        except TimeoutError:  # nobody has called
            continue
        except OSError as error:
            if error.errno in _NO_MORE:  # accept would fail again, at once
                if oldest := _drop_oldest(unproven):
                    oldest.join(_PAUSE_SECONDS)
                else:
                    meeting.over.wait(_PAUSE_SECONDS)
            continue
        unproven[connection] = threading.Thread(target=answer, args=(connection, address[0]), daemon=True)
        unproven[connection].start()
        # Not the newest: it may be the worker that is waited for, and needs but a moment.
        if len(unproven) > _UNPROVEN + len(meeting.own.workers):
            _drop_oldest(unproven)
    while thread := _drop_oldest(unproven):
        thread.join()


def _drop_oldest(unproven: dict[socket.socket, threading.Thread]) -> threading.Thread | None:
    """Ends a connection, and so its thread, which closes it."""
    for connection in list(unproven):
        if thread := unproven.pop(connection, None):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            return thread
    return None


def _ended(connection: socket.socket) -> bool:
    """Whether there is nobody at its other end any more."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:  # it is there, and has not said anything yet
        return False
    except OSError:
        return True
