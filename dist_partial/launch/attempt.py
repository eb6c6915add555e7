"""One attempt of a run: its workers, of which lost ones are replaced where the others can stay (`roster`)."""

import collections
import dataclasses
import itertools
import json
import math
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_partial.distributed.cluster import JOINS, SECRET
from dist_partial.errors import AGAIN, INTERRUPTED
from dist_partial.launch import roster, workers
from dist_partial.launch.agent import exit_code, kill_group
from dist_partial.launch.output import Console
from dist_partial.launch.restarts import EXCEPTION, MISTAKES, Progress, Restarts
from dist_partial.launch.workers import Command, Worker

FINISH = 60.0  # seconds in which the others may end after one has ended well; the first worker still saves
_POLL = 0.05  # seconds


class Attempt:
    """Runs the workers of a run until all have ended.

    Attributes:
        workers: those that are members now, by their numbers; some may be late (`_is_late`).
        ended: the exit codes of those that have ended, in the order in which they did.

    Args:
        commands: what to start, each time with other addresses and another secret.
        folder: for the logs, or None.
        console: shows what workers print.
        limit: how many may be replaced in a row without a step in between.
        delay: seconds before one is replaced that has not trained yet, counted from 1.
    """

    def __init__(
        self,
        commands: Callable[[], Sequence[Command]],
        folder: Path | None,
        console: Console,
        limit: int,
        delay: Callable[[int], float],
    ) -> None:
        self._commands, self._folder, self._console = commands, folder, console
        self._limit, self._delay = limit, delay
        self.workers: list[Worker] = []
        self.ended: dict[Worker, int] = {}
        self._spares: list[Worker] = []
        self._ready: set[Worker] = set()  # those of the spares that wait for a rank
        self._spares_lost = 0  # since all went on last
        self._gone: set[Worker] = set()  # lost, and replaced or about to be
        self._former: list[Worker] = []
        self._staying: set[Worker] = set()  # who can go on when another is lost
        self._roster: roster.Roster | None = None
        self._replaced = Restarts()
        self._due: list[tuple[float, int]] = []  # when the next process starts in place of which worker
        self._due_spares: list[tuple[float, int]] = []  # when the next spare starts, and where
        self._numbers = itertools.count()  # of spares
        self._late: collections.Counter[int] = collections.Counter()  # that ended before they came, by number
        self._met: Sequence[Worker] = ()  # in the epoch that has begun last
        self._lost: list[str] = []  # since all went on last
        self._since = 0.0
        self._clock, self._looked = 0.0, time.monotonic()  # for who is asked
        self._over = self._stopping = False  # nobody is replaced any more

    def run(self, signals: list[int], grace_seconds: float, settle: float) -> dict[Worker, int]:
        """Starts the workers, and waits until all have ended, or long enough; returns `ended`.

        Args:
            signals: that have come, and come, to this process.
            grace_seconds: what workers may take to end after SIGTERM.
            settle: seconds in which the others may end by themselves after one has failed.
        """
        for place, command in enumerate(each for each in self._commands() if not each.spare):
            self.workers.append(workers.start(place, place, command, self._folder, self._console))
        until, heard = math.inf, 0
        while len(self.ended) < len(self.workers) and time.monotonic() < until:
            time.sleep(_POLL)
            for signum in signals[heard:]:
                heard += 1
                if signals[:heard].count(signal.SIGINT) > 1:
                    return self.ended
                until = min(until, self._forward(signum, grace_seconds))
            now = time.monotonic()
            new = self._new(now, bool(signals))
            if new and set(signals) <= {signal.SIGINT}:
                well = set(new.values()) <= {0, INTERRUPTED}
                until = min(until, now + (max(FINISH, grace_seconds) if well else settle))
        return self.ended

    def stop(self) -> None:
        """Kills what still runs, and waits for all that was printed."""
        workers.stop([*self.workers, *self._spares, *self._former])

    def _forward(self, signum: int, grace_seconds: float) -> float:
        """Passes a signal on; returns until when the workers may end."""
        self._stopping = True
        for spare in self._spares:
            workers.tell(spare, json.dumps({"end": True}))
        for worker in self.workers:
            workers.tell(worker, "INT" if signum == signal.SIGINT else "TERM")
            if self._roster and self._roster.broken:  # it waits for others, and looks at no signal
                workers.tell(worker, json.dumps({"end": True}))
        if signum == signal.SIGINT:
            self._console.say("stopping: the workers save and end; another Ctrl-C kills them")
            return math.inf
        self._console.say(f"{signal.Signals(signum).name}: the workers have {grace_seconds:g} s to save and end")
        return time.monotonic() + grace_seconds

    def _new(self, now: float, stopping: bool) -> dict[Worker, int]:
        """Who has ended since, and is not replaced; replaces those that are."""
        for worker in [*self.workers, *self._spares]:
            while worker.output.messages:
                self._hear(worker, worker.output.messages.popleft(), now)
        # Where this process itself was stopped, answers may have come that are yet to be read.
        self._clock += min(now - self._looked, 10 * _POLL)
        self._looked = now
        if self._roster and not (stopping or self._over or self.ended):
            self._do(self._roster.tick(self._clock), now)
        waited = [worker for worker in self.workers if worker not in self.ended and worker not in self._gone]
        new = {worker: exit_code(code) for worker in waited if (code := worker.process.poll()) is not None}
        for worker, code in list(new.items()):
            if not stopping and self._replaces(worker, code):
                self._lose(worker, code, now)
                if worker in self._gone:
                    del new[worker]
        if stopping or self._over:  # whose place is still empty has none
            self._due.clear()
            empty = [each for each in self.workers if each in self._gone and each not in self.ended]
            new |= {worker: exit_code(worker.process.returncode) for worker in empty}
        # Of those that end together, one with AGAIN has probably lost one of the others.
        self.ended.update(sorted(new.items(), key=lambda each: each[1] == AGAIN))
        for each in [each for each in self._due if each[0] <= now and not self.ended]:
            self._due.remove(each)
            self._fill(each[1], now)
        for each in [each for each in self._due_spares if each[0] <= now and not (stopping or self._over)]:
            self._due_spares.remove(each)
            self._start_spare(each[1])
        for spare in [each for each in self._spares if not stopping and each.process.poll() is not None]:
            self._lose_spare(spare, now)
        return new

    def _hear(self, worker: Worker, message: dict[str, Any], now: float) -> None:
        """Takes a message of a worker."""
        if "stays" in message:
            self._staying.add(worker)
            if self._roster is None and self._staying == set(self.workers):
                self._roster = roster.Roster(self.workers, message.get("fewer", ()))
                for place in range(len(self.workers), len(self._commands())):
                    self._start_spare(place)
        if "left" in message and (self._roster is None or self._over or self._stopping):
            workers.tell(worker, json.dumps({"end": True}))
        if self._roster is None:
            return
        if "ends" in message:
            self._over = True
            if self._roster.broken:
                self._give_up()
            for late in list(filter(self._is_late, self.workers)):
                self._former.append(late)
                self.workers.remove(late)
        elif "ready" in message:
            self._ready.add(worker)
            if worker in self._spares:
                self._console.say(f"{worker.name} is ready to come in place of a lost worker")
            self._do(self._roster.ready(worker), now)
        elif "answers" in message:
            self._roster.answered(worker)
        elif "left" in message:
            self._since = self._since or now
            self._do(self._roster.left(worker, message["left"], message["step"]), now)
        elif "waited" in message:
            self._do(self._roster.waited(worker), now)
        elif "went" in message:
            self._roster.went(worker, message["went"], message["step"])
            self._staying.add(worker)
            if self._lost and self._roster.all_went:
                what = ", ".join(self._lost)
                self._console.say(f"all go on from step {message['step']}, {now - self._since:.1f} s after: {what}")
                self._lost.clear()
                self._since = 0.0
                self._spares_lost = 0
                self._late.clear()

    def _replaces(self, worker: Worker, code: int) -> bool:
        """Whether another process is to be started in place of one that has ended, while the others stay."""
        if self._over or self._roster is None or self.ended:
            return False
        again = code not in (0, INTERRUPTED, EXCEPTION, *MISTAKES)
        return self._is_late(worker) or (again and self._roster.can_lose(worker))

    def _is_late(self, worker: Worker) -> bool:
        """Whether the others have gone on without a worker, or the one that comes in its place."""
        return self._roster is not None and self.workers.index(worker) not in self._roster.ranks

    def _lose(self, worker: Worker, code: int, now: float) -> None:
        """Has another come in place of a worker that has ended, or gives up where too many did."""
        assert self._roster is not None
        if self._is_late(worker):
            return self._lose_late(worker, code, now)
        step, line = self._roster.step, worker.output.error
        if reason := self._replaced.refusal(code, line, Progress(step, step), self._limit):
            self._console.say(f"{worker.name}: no other in its place: {reason.replace('a new checkpoint', 'a step')}")
            return self._give_up()
        self._gone.add(worker)
        self._since = self._since or now
        self._lost.append(_how(worker, code))
        count = self._replaced.count
        # The first since a step is replaced at once, and who is lost beside it; of those that come to nothing, as where
        # a disk is full, not all are started in a second.
        at_once = worker in self._staying and (count == 1 or self._roster.broken)
        wait = 0.0 if at_once else self._delay(count - (worker in self._staying))
        spare = self._spare()
        if spare is None:
            comes = f"another starts{f' in {wait:g} s' if wait else ''}"
        else:
            comes = f"{spare.name} takes its place{'' if spare in self._ready else ' once it is ready'}"
        self._console.say(f"lost: {self._lost[-1]}{line and f': {line}'}; {comes}")
        self._do(self._roster.ended(worker), now + (0.0 if spare else wait))

    def _lose_late(self, worker: Worker, code: int, now: float) -> None:
        """Has another come, later, in place of one that has ended before it came; the others train without it."""
        assert self._roster is not None
        self._gone.add(worker)
        self._late[worker.index] += 1
        wait, line = self._delay(self._late[worker.index]), worker.output.error
        actions, comes = self._roster.ended(worker), f"another starts in {wait:g} s"
        if code in (EXCEPTION, *MISTAKES):
            actions, comes = [each for each in actions if not isinstance(each, roster.Start)], "no other starts"
        self._console.say(f"{_how(worker, code)}{line and f': {line}'}; {comes}, the others go on without it")
        self._do(actions, now + wait)

    def _lose_spare(self, spare: Worker, now: float) -> None:
        self._spares.remove(spare)
        self._former.append(spare)
        self._spares_lost += 1
        again = self._spares_lost <= self._limit and not self._over
        wait = self._delay(self._spares_lost)
        line = spare.output.error or f"exit code {exit_code(spare.process.returncode)}"
        self._console.say(f"{spare.name} has ended ({line}); {f'another in {wait:g} s' if again else 'no other'}")
        if again:
            self._due_spares.append((now + wait, spare.place))

    def _do(self, actions: Sequence[roster.Action], now: float) -> None:
        for action in actions:
            match action:
                case roster.Leave(process, epoch):
                    workers.tell(process, json.dumps({"leave": epoch}))
                case roster.Ask(process):
                    workers.tell(process, json.dumps({"ask": True}))
                case roster.Start(number) if now <= time.monotonic():
                    self._fill(number, now)
                case roster.Start(number):
                    self._due.append((now, number))
                case roster.Kill(process):
                    self._console.say(f"{process.name} does not answer: it is stopped, or cut off")
                    kill_group(process.process.pid)
                case roster.Begin(epoch, processes):
                    self._meet(epoch, processes)
                case roster.GiveUp():
                    self._give_up()

    def _meet(self, epoch: int, processes: Sequence[Worker]) -> None:
        """Has workers meet, in rank order."""
        before, self._met = self._met or self.workers, processes
        names = [
            [each.name for each in several if each not in others]
            for several, others in ((self.workers, processes), (processes, before))
        ]
        if len(processes) < len(before):
            self._console.say(
                f"nobody has come in place of {', '.join(names[0])}: the others go on, "
                f"{len(processes)} of {len(self.workers)}"
            )
        elif len(processes) > len(before):
            self._lost.append(f"{', '.join(names[1])} came")
            self._console.say(f"{self._lost[-1]}: all meet, {len(processes)} of {len(self.workers)}")
        elif not self._lost:
            self._lost.append("a connection between them broke")
            self._console.say("the workers meet again: a connection between them broke")
        commands = self._commands()
        meeting = {"epoch": epoch, "workers": [commands[each.place].address for each in processes]}
        meeting |= {"secret": commands[0].order["environment"][SECRET]}
        for rank, process in enumerate(processes):
            workers.tell(process, json.dumps(meeting | {"rank": rank}))

    def _give_up(self) -> None:
        """Has all that are left end: nobody comes in place of who is lost."""
        self._over = True
        self._due.clear()
        for worker in self.workers:
            workers.tell(worker, json.dumps({"end": True}))

    def _fill(self, number: int, now: float) -> None:
        """Gives a lost worker's place to a spare, one that is ready if there is one, or to a process that it starts."""
        assert self._roster is not None
        lost = self.workers[number]
        self._former.append(lost)
        workers.stop([lost])  # it has ended
        if worker := self._spare():
            self._spares.remove(worker)
            worker.output.index, worker.name = number, re.sub(r"^spare \d+", f"worker {number}", worker.name)
            self._start_spare(lost.place)
        else:
            worker = self._started(lost.place, number)
        self.workers[number] = worker
        self._roster.started(number, worker)
        if worker in self._ready:
            self._do(self._roster.ready(worker), now)

    def _spare(self) -> Worker | None:
        """A spare, one that is ready if there is one."""
        return max(self._spares, key=lambda spare: spare in self._ready, default=None)

    def _start_spare(self, place: int) -> None:
        number = next(self._numbers)
        spare = self._started(place, len(self.workers) + number)
        spare.name = re.sub(r"^\w+ \d+", f"spare {number}", spare.name)
        self._spares.append(spare)

    def _started(self, place: int, index: int) -> Worker:
        """Starts a process that comes in place of a lost one, now or later; `index` is before its lines."""
        command = self._commands()[place]
        order = command.order | {"environment": command.order["environment"] | {JOINS: "1"}}
        number = sum(each.index == index for each in self._former)
        command = dataclasses.replace(command, order=order)
        return workers.start(place, index, command, self._folder, self._console, number)


def _how(worker: Worker, code: int) -> str:
    """How a worker has ended."""
    if code - 128 in set(signal.Signals):
        return f"{worker.name} was killed by {signal.Signals(code - 128).name}"
    return f"{worker.name} ended with exit code {code}"
