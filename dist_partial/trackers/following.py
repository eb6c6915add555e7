"""Reports to trackers what happens in a run, from threads of their own."""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dist_partial.errors import first_line
from dist_partial.files import write_json
from dist_partial.trackers.base import Row, Tracker

_BETWEEN = 1.0  # seconds between two calls of a tracker's `log`, of which each takes what has come meanwhile
_MOST = 100_000  # calls that wait for a tracker; of more rows the newest are left out
_IDS = "trackers.json"


class Following:
    """Reports to each tracker in a thread of its own, so that no step waits for it.

    A tracker that raises gets nothing more, one that is slow gets rows together, and one that hangs is left behind
    at the end: of each a line is said, and the run goes on. What they know the run by is kept in trackers.json of the
    run folder, so that the same command goes on there, too.

    Args:
        trackers: who gets reports.
        folder: the run folder.
        say: prints a line.
        seconds: how long the end waits for all of them.

    Examples:
        >>> import tempfile
        >>> class Failing(Tracker):
        ...     def log(self, rows):
        ...         raise ConnectionError("no route to host")
        >>> with tempfile.TemporaryDirectory() as folder, Following([Failing()], Path(folder), print) as following:
        ...     following.log([Row(1, {"train/loss": 2.5})])
        Failing gets nothing more: ConnectionError: no route to host
    """

    def __init__(
        self, trackers: Sequence[Tracker], folder: Path, say: Callable[[str], None], seconds: float = 30.0
    ) -> None:
        self._folder, self._say, self._seconds = folder, say, seconds
        self._calls = {_name(tracker, trackers): (tracker, queue.Queue[tuple[Any, ...]](_MOST)) for tracker in trackers}
        self._threads: dict[str, threading.Thread] = {}
        self._failed: set[str] = set()
        self._noting, self._ending = threading.Lock(), threading.Event()

    def log(self, rows: Sequence[Row]) -> None:
        """Reports numbers."""
        if rows:
            self._report("log", list(rows))

    def text(self, name: str, text: str, step: int) -> None:
        """Reports a text."""
        self._report("text", name, text, step)

    def __enter__(self) -> "Following":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits until all is reported, and says who has not taken it in time."""
        outcome = "finished" if kind is None else "stopped" if issubclass(kind, KeyboardInterrupt) else "failed"
        until = time.monotonic() + self._seconds
        self._ending.set()
        for name in sorted(self._threads.keys() - self._failed):
            with contextlib.suppress(queue.Full):  # of one that hangs
                self._calls[name][1].put(("end", outcome), timeout=max(until - time.monotonic(), 0))
        for name, thread in self._threads.items():
            thread.join(max(until - time.monotonic(), 0))
            if thread.is_alive():
                self._say(f"{name} has not taken everything within {self._seconds:g} s, and is left")

    def _report(self, *call: Any) -> None:
        for name, (tracker, calls) in self._calls.items():
            if name not in self._threads:  # not before there is something: a run that is complete begins nothing
                following = threading.Thread(
                    target=self._follow, args=(name, tracker, calls), name=f"tracker {name}", daemon=True
                )
                self._threads[name] = following
                following.start()
            if name not in self._failed:  # for whom nothing may pile up
                with contextlib.suppress(queue.Full):
                    calls.put_nowait(call)

    def _follow(self, name: str, tracker: Tracker, calls: "queue.Queue[tuple[Any, ...]]") -> None:
        ended = False
        try:
            known = self._ids().get(name, "")
            if (now := tracker.begin(self._folder, known)) != known:
                self._note(name, now)
            while not ended:
                for method, *arguments in _together(calls):
                    ended |= method == "end"
                    getattr(tracker, method)(*arguments)
                    if method == "log":
                        self._ending.wait(_BETWEEN)
        except BaseException as error:  # a library may even call sys.exit
            self._failed.add(name)
            kind, line = type(error).__name__, first_line(error)
            self._say(f"{name} gets nothing more: {kind}{f': {line}' if line != kind else ''}")

    def _ids(self) -> dict[str, str]:
        path = self._folder / _IDS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _note(self, name: str, known: str) -> None:
        with self._noting:
            write_json(self._folder / _IDS, self._ids() | {name: known})


def _name(tracker: Tracker, trackers: Sequence[Tracker]) -> str:
    """The class's name, with a number where there are several."""
    same = [each for each in trackers if type(each) is type(tracker)]
    number = next(i for i, each in enumerate(same, 1) if each is tracker)
    return type(tracker).__name__ + (f" ({number})" if number > 1 else "")


def _together(calls: "queue.Queue[tuple[Any, ...]]") -> Iterator[tuple[Any, ...]]:
    """Waits for a call; gives what is there by then, rows that follow each other in one call."""
    rows: list[Row] = []
    found = [calls.get()]
    while not calls.empty():
        found.append(calls.get())
    for method, *arguments in found:
        if method == "log":
            rows += arguments[0]
            continue
        if rows:
            yield "log", rows
            rows = []
        yield method, *arguments
    if rows:
        yield "log", rows
