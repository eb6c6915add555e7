"""One attempt of a run: its workers, from their start until all have ended, but those that `replacements` replaces."""

import math
import signal
import time

from dist_partial.errors import AGAIN, INTERRUPTED
from dist_partial.launch import workers
from dist_partial.launch.agent import exit_code
from dist_partial.launch.output import Console
from dist_partial.launch.replacements import Replacements
from dist_partial.launch.workers import Worker

FINISH = 60.0  # seconds in which the others may end after one has ended well; the first worker still saves
_POLL = 0.05  # seconds


class Attempt:
    """Runs the workers of a run until all have ended.

    Attributes:
        ended: the exit codes of those that have ended, in the order in which they did.

    Args:
        replacements: which start the workers.
        console: shows what they print.
    """

    def __init__(self, replacements: Replacements, console: Console) -> None:
        self._replacements, self._console = replacements, console
        self.ended: dict[Worker, int] = {}

    @property
    def workers(self) -> list[Worker]:
        """Those that have a place in the run now, by their numbers."""
        return self._replacements.workers

    def run(self, signals: list[int], grace_seconds: float, settle: float) -> dict[Worker, int]:
        """Starts the workers, and waits until all have ended, or long enough; returns `ended`.

        Args:
            signals: that have come, and come, to this process.
            grace_seconds: what workers may take to end after SIGTERM.
            settle: seconds in which the others may end by themselves after one has failed.
        """
        self._replacements.start()
        until, heard = math.inf, 0
        while len(self.ended) < len(self.workers) and time.monotonic() < until:
            time.sleep(_POLL)
            for signum in signals[heard:]:
                heard += 1
                if signals[:heard].count(signal.SIGINT) > 1:
                    return self.ended
                until = min(until, self._forward(signum, grace_seconds))
            now = time.monotonic()
            new = self._new(now)
            if new and set(signals) <= {signal.SIGINT}:
                well = set(new.values()) <= {0, INTERRUPTED}
                until = min(until, now + (max(FINISH, grace_seconds) if well else settle))
        return self.ended

    def stop(self) -> None:
        """Kills what still runs, and waits for all that was printed."""
        self._replacements.stop()

    def _forward(self, signum: int, grace_seconds: float) -> float:
        """Passes a signal on; returns until when the workers may end."""
        for worker in self.workers:
            workers.tell(worker, "INT" if signum == signal.SIGINT else "TERM")
        self._replacements.cancel()
        if signum == signal.SIGINT:
            self._console.say("stopping: the workers save and end; another Ctrl-C kills them")
            return math.inf
        self._console.say(f"{signal.Signals(signum).name}: the workers have {grace_seconds:g} s to save and end")
        return time.monotonic() + grace_seconds

    def _new(self, now: float) -> dict[Worker, int]:
        """Who has ended since, and is not replaced."""
        replacements = self._replacements
        replacements.hear(now)
        there = [worker for worker in self.workers if worker not in self.ended and worker not in replacements.gone]
        new = {worker: exit_code(code) for worker in there if (code := worker.process.poll()) is not None}
        for worker, code in list(new.items()):
            if not self.ended and replacements.replaces(worker, code, now):
                del new[worker]
        if replacements.over:  # whose place is still empty has none
            empty = [each for each in self.workers if each in replacements.gone and each not in self.ended]
            new |= {worker: exit_code(worker.process.returncode) for worker in empty}
        # Of those that end together, one with AGAIN has probably lost one of the others.
        self.ended.update(sorted(new.items(), key=lambda each: each[1] == AGAIN))
        replacements.go_on(now, active=not self.ended)
        return new
