"""A worker's side of membership: what it says to the launcher when another worker is lost, and what it hears then.

The launcher alone says who is a member: it gives each time that the workers meet a number, addresses and a secret of
its own, an epoch (`launch.roster`). A worker that hears of a loss leaves its epoch, says so, and waits for the next;
one that comes in place of a lost one says that it is ready, and waits likewise. Nothing of an older epoch gets into a
newer one, for no connection of the former is left, and nobody who knows its secret alone can make one. An epoch may
have fewer workers than the one before it, where one does not come for long, and more again once it has.

Both speak in lines of JSON over a socket, whose other end the worker's agent holds:

    worker -> launcher   {"stays": true, "fewer": [1, 2]}      it can go on after a loss, also with so many workers
                         {"ready": true}                       it has built all, and comes in place of a lost one
                         {"answers": true}                     it is there
                         {"left": 3, "step": 120}              it has left epoch 3; it holds this step's state, or null
                         {"waited": true}                      it has waited long enough for who is not there
                         {"went": 4, "step": 120}              it has met the others, and goes on from this step
                         {"ends": true}                        all has been done, or saved; nobody is needed any more
    launcher -> worker   {"leave": 3}                          another worker of epoch 3 is lost
                         {"ask": true}                         is it there? Who is stopped does not answer
                         {"epoch": 4, "rank": 1, "workers": ["a:2222", ...], "secret": "..."}
                         {"end": true}                         there will be no other epoch
"""

import contextlib
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dist_partial.distributed.cluster import CONTROL
from dist_partial.distributed.handshake import Link
from dist_partial.distributed.tcp_backend import TCPBackend
from dist_partial.errors import Fault

_BEGINS_SECONDS = 15.0  # in which the launcher has those meet that are there, after who does not answer was killed


class Epoch(NamedTuple):
    """Describes a meeting of all workers.

    Attributes:
        number: counts them.
        rank: this worker's; one that comes in place of a lost one may have had another before.
        workers: 'host:port' of each, in rank order.
        secret: what they know and nobody else does.
    """

    number: int
    rank: int
    workers: Sequence[str]
    secret: str


def control() -> socket.socket | None:
    """Takes the socket to the launcher from the environment, so that no process that is started later has it.

    Examples:
        >>> print(control())  # without a launcher
        None
    """
    number = os.environ.pop(CONTROL, "")
    return socket.socket(fileno=int(number)) if number else None


class Membership:
    """Leaves an epoch, and meets the others in the next.

    Attributes:
        joins: whether this worker comes in place of a lost one, and has met nobody yet.
        buddy: whether each worker keeps a copy of what the one before it alone has.
        epoch: the number of the one that this worker has come to last.

    Args:
        control: the socket to the launcher.
        backend: what joins the workers.
        meet: connects this worker to all others of an epoch, unless the function that it is given says that this is
            over.
        seconds: how long to wait for the next epoch.
        joins: whether this worker comes in place of a lost one.
        buddy: whether each worker keeps a copy of what the one before it alone has.
    """

    def __init__(
        self,
        control: socket.socket,
        backend: TCPBackend,
        meet: Callable[[Epoch, Callable[[], bool]], dict[int, Link]],
        seconds: float,
        joins: bool,
        buddy: bool = False,
    ) -> None:
        self.joins, self.buddy = joins, buddy
        self._control, self._backend, self._meet, self._seconds = control, backend, meet, seconds
        self.epoch = 0
        self._step: int | None = None
        self._epochs: queue.SimpleQueue[Epoch | None] = queue.SimpleQueue()
        self._over = -1  # the newest epoch that is to be left
        self._closed = False  # there will be no other epoch
        threading.Thread(target=self._listen, name="membership", daemon=True).start()

    def stay(self, fewer: Sequence[int] = ()) -> None:
        """Says that this worker can go on when another is lost, also with so many workers as `fewer` has."""
        self._say({"stays": True, "fewer": list(fewer)})

    def ready(self) -> None:
        """Says that this worker, which comes in place of a lost one, has built all that it needs."""
        self._say({"ready": True})

    def leave(self, step: int | None) -> None:
        """Leaves the epoch, in which a worker is lost; `step` is the one whose state this worker holds, if any."""
        self._step = step
        self.joins = self.joins and step is None  # one that has got the state waits as the others do
        self._backend.leave()
        self._say({"left": self.epoch, "step": step})

    def rejoin(self) -> None:
        """Waits for the next epoch, and meets the others there; raises Fault where that fails.

        One that fails for another worker is lost in it is left, and the next one waited for.
        """
        until = time.monotonic() + self._seconds
        while True:
            epoch = self._next(until)
            if epoch is None:
                raise Fault("another worker is lost, and none comes in its place; run the same command again to go on")
            self.epoch, self._backend.rank = epoch.number, epoch.rank
            try:
                links = self._meet(epoch, self._is_over)
            except Fault:
                if self._closed or (time.monotonic() > until and not self.joins):
                    raise
                self._say({"left": epoch.number, "step": self._step})
                continue
            self._backend.rejoin(epoch.workers, links)
            if self._over >= epoch.number:
                self._backend.fail(Fault("another worker is lost"))
            return

    def _next(self, until: float) -> Epoch | None:
        """The next epoch; None if there will be no other. Raises Fault where it does not begin in time."""
        if self.joins:  # it may long be a spare
            return self._epochs.get()
        with contextlib.suppress(queue.Empty):
            return self._epochs.get(timeout=max(0.0, until - time.monotonic()))
        self._say({"waited": True})
        try:
            return self._epochs.get(timeout=_BEGINS_SECONDS)
        except queue.Empty:
            raise Fault(
                f"no worker has come in place of a lost one within {self._seconds:g} s (replicas.rejoin_seconds)"
            ) from None

    def _is_over(self) -> bool:
        return self._over >= self.epoch or self._closed

    def went(self, step: int) -> None:
        """Says that this worker goes on from a step."""
        self.joins = False
        self._say({"went": self.epoch, "step": step})

    def end(self) -> None:
        """Says that all workers are about to end, as they should."""
        self._say({"ends": True})

    def _say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the agent is gone, and this process is about to end
            self._control.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        try:
            with self._control.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if "epoch" in message:
                        self._epochs.put(
                            Epoch(message["epoch"], message["rank"], message["workers"], message["secret"])
                        )
                    elif "leave" in message:
                        self._over = message["leave"]
                        if self.epoch == self._over:
                            self._backend.fail(Fault("another worker is lost"))
                    elif "ask" in message:
                        self._say({"answers": True})
                    else:
                        self._closed = True
                        self._epochs.put(None)
        except OSError:  # the launcher's end was closed while there was something to read
            pass
        self._closed = True
        self._epochs.put(None)
