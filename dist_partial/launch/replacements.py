"""Has another process come in place of a lost worker, while the others stay: does what a `roster` says."""

import collections
import dataclasses
import functools
import itertools
import json
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_partial.distributed.cluster import JOINS, SECRET
from dist_partial.errors import INTERRUPTED
from dist_partial.launch import roster, workers
from dist_partial.launch.agent import exit_code, kill_group
from dist_partial.launch.output import Console
from dist_partial.launch.restarts import EXCEPTION, MISTAKES, Progress, Restarts
from dist_partial.launch.workers import Command, Worker

_LONGEST = (
    0.5  # seconds between two looks that count: where the launcher itself was stopped, answers are yet to be read
)


class Replacements:
    """Follows what workers say, and starts processes in place of those that are lost, or gives the place to a spare.

    Attributes:
        workers: those that have a place in the run now, by their numbers.
        gone: those of them that have ended, and in whose place another comes.
        over: whether nobody is replaced any more.

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
        self.gone: set[Worker] = set()
        self.over = False
        self._roster: roster.Roster | None = None  # once all can go on when another is lost
        self._staying: set[Worker] = set()  # who can
        self._spares: list[Worker] = []
        self._ready: set[Worker] = set()  # who has said that it can take a place
        self._numbers = itertools.count()  # of spares
        self._former: list[Worker] = []
        self._replaced = Restarts()
        self._in_vain: collections.Counter[str] = collections.Counter()  # starts of the late and of spares, since
        self._lost: list[str] = []  # since all went on last
        self._since = 0.0
        self._met: Sequence[Worker] = ()  # in the epoch that has begun last
        self._due: list[tuple[float, Callable[[float], None]]] = []  # when which process starts
        self._clock, self._looked = 0.0, time.monotonic()

    def start(self) -> None:
        """Starts the workers; spares start once all workers stay when another is lost."""
        for place, command in enumerate(each for each in self._commands() if not each.spare):
            self.workers.append(workers.start(place, place, command, self._folder, self._console))

    def hear(self, now: float) -> None:
        """Reads what workers have said."""
        for worker in [*self.workers, *self._spares]:
            while worker.output.messages:
                self._hear(worker, worker.output.messages.popleft(), now)

    def replaces(self, worker: Worker, code: int, now: float) -> bool:
        """Has another come in place of a worker that has ended, and returns True, if the others stay; else not."""
        if self.over or self._roster is None:
            return False
        if self._is_late(worker):
            self._lose_late(worker, code, now)
            return True
        if code in (0, INTERRUPTED, EXCEPTION, *MISTAKES) or not self._roster.can_lose(worker):
            return False
        return self._lose(worker, code, now)

    def go_on(self, now: float, active: bool) -> None:
        """Does what is due; if `active`, also for the workers, of which none has ended for good."""
        self._clock += min(now - self._looked, _LONGEST)
        self._looked = now
        if self.over:
            self._due.clear()
        if self._roster and active and not self.over:
            self._do(self._roster.tick(self._clock), now)
        for each in [each for each in self._due if active and each[0] <= now]:
            self._due.remove(each)
            each[1](now)
        for spare in [each for each in self._spares if each.process.poll() is not None]:
            self._lose_spare(spare, now)

    def cancel(self) -> None:
        """Replaces nobody any more: the workers have got a signal to end."""
        self.over = True
        for spare in self._spares:
            workers.tell(spare, json.dumps({"end": True}))
        self._former += self._spares
        self._spares.clear()
        if self._roster and self._roster.broken:  # they wait for others, and look at no signal
            self._end()

    def stop(self) -> None:
        """Kills what still runs, and waits for all that was printed."""
        workers.stop([*self.workers, *self._spares, *self._former])

    def _hear(self, worker: Worker, message: dict[str, Any], now: float) -> None:
        if "stays" in message:
            self._staying.add(worker)
            if self._roster is None and self._staying == set(self.workers):
                self._roster = roster.Roster(self.workers, message.get("fewer", ()))
                for place in range(len(self.workers), len(self._commands())):
                    self._start_spare(place, now)
        if {"left", "ready", "waited"} & message.keys() and (self._roster is None or self.over):
            workers.tell(worker, json.dumps({"end": True}))
            return
        if self._roster is None:
            return
        if "ends" in message:
            self.over = True
            if self._roster.broken:
                self._end()
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
                self._in_vain.clear()
                self._since = 0.0

    def _is_late(self, worker: Worker) -> bool:
        """Whether the others have gone on without a worker, or the one that comes in its place."""
        return self._roster is not None and self.workers.index(worker) not in self._roster.ranks

    def _lose(self, worker: Worker, code: int, now: float) -> bool:
        """Has another come in place of a worker that has ended, or gives up where too many did."""
        assert self._roster is not None
        step, line = self._roster.step, worker.output.error
        if reason := self._replaced.refusal(code, line, Progress(step, step), self._limit):
            self._console.say(f"{worker.name}: no other in its place: {reason.replace('a new checkpoint', 'a step')}")
            self._end()
            return False
        self.gone.add(worker)
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
        return True

    def _lose_late(self, worker: Worker, code: int, now: float) -> None:
        """Has another come, later, in place of one that has ended before it came; the others train without it."""
        assert self._roster is not None
        self.gone.add(worker)
        self._in_vain[worker.name] += 1
        wait, line = self._delay(self._in_vain[worker.name]), worker.output.error
        actions, comes = self._roster.ended(worker), f"another starts in {wait:g} s"
        if code in (EXCEPTION, *MISTAKES):
            actions, comes = [each for each in actions if not isinstance(each, roster.Start)], "no other starts"
        self._console.say(f"{_how(worker, code)}{line and f': {line}'}; {comes}, the others go on without it")
        self._do(actions, now + wait)

    def _lose_spare(self, spare: Worker, now: float) -> None:
        self._spares.remove(spare)
        self._former.append(spare)
        self._in_vain["spares"] += 1
        again = self._in_vain["spares"] <= self._limit and not self.over
        wait = self._delay(self._in_vain["spares"])
        line = spare.output.error or f"exit code {exit_code(spare.process.returncode)}"
        self._console.say(f"{spare.name} has ended ({line}); {f'another in {wait:g} s' if again else 'no other'}")
        if again:
            self._due.append((now + wait, functools.partial(self._start_spare, spare.place)))

    def _do(self, actions: Sequence[roster.Action], now: float) -> None:
        """Does what the roster says; what is to start does so at `now`, which may be later."""
        for action in actions:
            match action:
                case roster.Leave(process, epoch):
                    workers.tell(process, json.dumps({"leave": epoch}))
                case roster.Ask(process):
                    workers.tell(process, json.dumps({"ask": True}))
                case roster.Start(number) if now <= time.monotonic():
                    self._fill(number, now)
                case roster.Start(number):
                    self._due.append((now, functools.partial(self._fill, number)))
                case roster.Kill(process):
                    self._console.say(f"{process.name} does not answer: it is stopped, or cut off")
                    kill_group(process.process.pid)
                case roster.Begin(epoch, processes):
                    self._meet(epoch, processes)
                case roster.GiveUp():
                    self._end()

    def _meet(self, epoch: int, processes: Sequence[Worker]) -> None:
        """Has workers meet, in rank order."""
        before, self._met = self._met or self.workers, processes
        of_all = f"{len(processes)} of {len(self.workers)}"
        if len(processes) < len(before):
            missing = ", ".join(each.name for each in self.workers if each not in processes)
            self._console.say(f"nobody has come in place of {missing}: the others go on, {of_all}")
        elif len(processes) > len(before):
            self._lost.append(f"{', '.join(each.name for each in processes if each not in before)} came")
            self._console.say(f"{self._lost[-1]}: all meet, {of_all}")
        elif not self._lost:
            self._lost.append("a connection between them broke")
            self._console.say("the workers meet again: a connection between them broke")
        commands = self._commands()
        meeting = {"epoch": epoch, "workers": [commands[each.place].address for each in processes]}
        meeting |= {"secret": commands[0].order["environment"][SECRET]}
        for rank, process in enumerate(processes):
            workers.tell(process, json.dumps(meeting | {"rank": rank}))

    def _end(self) -> None:
        """Has all that are left end: nobody comes in place of who is lost."""
        self.over = True
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
            self._start_spare(lost.place, now)
        else:
            worker = self._started(lost.place, number)
        self.workers[number] = worker
        self._roster.started(number, worker)
        if worker in self._ready:
            self._do(self._roster.ready(worker), now)

    def _spare(self) -> Worker | None:
        """A spare, one that is ready if there is one."""
        return max(self._spares, key=lambda spare: spare in self._ready, default=None)

    def _start_spare(self, place: int, now: float) -> None:
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
