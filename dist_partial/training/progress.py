"""Says what keeps a run from its first step, where that takes longer than a few seconds."""

import threading
import time

from dist_partial.terminal import say

_SECONDS = 3.0


class Progress:
    """Says what a process is busy with once it has taken a few seconds, and at the end how long it took.

    A context manager: what has not ended when it is left has failed, and nothing more is said of it.

    Args:
        active: whether this process says anything.
        seconds: after which it does.

    Examples:
        >>> with Progress(active=True) as progress:
        ...     progress.begin("compiling the step")  # nothing is said if the next line follows soon
        ...     progress.end()
    """

    def __init__(self, active: bool, seconds: float = _SECONDS) -> None:
        self._active, self._seconds = active, seconds
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()  # between what ends and the thread that is about to say that it has begun
        self._begun = 0.0
        self._said = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def begin(self, what: str) -> None:
        """Begins something, such as 'compiling the step'; what was begun before has ended."""
        self.end()
        if self._active:
            self._begun = time.monotonic()
            timer = self._timer = threading.Timer(self._seconds, lambda: self._say(timer, what))
            timer.daemon = True
            timer.start()

    def end(self) -> None:
        """Says how long it took, if it was said that it began."""
        if self._stop():
            say(f"done in {time.monotonic() - self._begun:.0f} s")

    def _say(self, timer: threading.Timer, what: str) -> None:
        with self._lock:
            if timer is self._timer:
                self._said = True
                say(f"{what}...")

    def _stop(self) -> bool:
        """Ends it without a word; whether it was said that it began."""
        with self._lock:
            timer, self._timer = self._timer, None
            said, self._said = self._said, False
        if timer is not None:
            timer.cancel()
        return said
