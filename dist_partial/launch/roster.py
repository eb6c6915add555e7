"""Who is a member of a run in which epoch: the launcher's side of membership, without processes, sockets or clocks.

The workers of an epoch have met at addresses and by a secret of its own. Once one of them is lost the epoch is broken:
the others are asked to leave it, and a process is started in place of the lost one. When it has come, and all wait, the
next epoch begins. From the loss on until all go on again members are asked whether they are there: one that does not
answer is stopped or cut off, as good as lost, and killed.

Where one does not come for long, the others begin an epoch without it, if the run can go on with so many. Once it has
come, that epoch is left for one with it.

A `Roster` hears what happens, and answers with what is to be done. So at most one process has a rank, no epoch begins
before all have left the one before it, and none waits for one that does not come: whoever does not answer is replaced,
and where nobody is left who has the state of the run, or they meet again and again in vain, all start again. One that
is stopped while it starts is not asked: the others wait for it as long as workers do, `replicas.rejoin_seconds`.
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

EPOCHS = 20  # without a step in between, until all start again
ANSWER_SECONDS = 4.0  # in which a worker answers that is neither stopped nor cut off
BUILD_SECONDS = 12.0  # the same where all build again, by the user's code, which may keep Python from all else

Process = Any  # whatever names one


class Leave(NamedTuple):
    """Tells a member that the epoch is broken."""

    process: Process
    epoch: int


class Ask(NamedTuple):
    """Asks a member whether it is there."""

    process: Process


class Start(NamedTuple):
    """Starts a process in place of a lost one."""

    number: int


class Kill(NamedTuple):
    """Kills a process; `Roster.ended` hears of it later."""

    process: Process


class Begin(NamedTuple):
    """Has members meet, which are given in rank order; there may be more or fewer than in the epoch before."""

    epoch: int
    processes: Sequence[Process]


class GiveUp(NamedTuple):
    """Gives up: nobody is left who has the state of the run, or the run cannot go on with as many as there are."""


Action = Leave | Ask | Start | Kill | Begin | GiveUp


@dataclasses.dataclass(eq=False)
class _Member:
    process: Process
    inside: bool = False  # the epoch that has begun last
    waits: bool = False  # for the next epoch
    went: bool = False  # on, in the one that has begun last
    holds: bool = False  # the state of the run, where it waits; inside it may
    asked: float | None = None  # when it was asked whether it is there
    answered: bool = False
    killed: bool = False


class Roster:
    """Follows who is a member, and says what is to be done.

    Attributes:
        epoch: the number of the one that has begun last.
        broken: whether it was left.
        step: the furthest from which the workers went on.
        ranks: the numbers of those in the epoch that has begun last, in rank order.

    Args:
        processes: those that begin epoch 0, by their numbers; who comes in place of one has its number as well.
        fewer: with how many fewer the run can go on.

    Examples:
        >>> roster = Roster(["a", "b"])
        >>> roster.ended("b")
        [Leave(process='a', epoch=0), Start(number=1)]
        >>> roster.started(1, "c")
        >>> roster.left("a", epoch=0, step=40)
        []
        >>> roster.ready("c")
        [Begin(epoch=1, processes=['a', 'c'])]
    """

    def __init__(self, processes: Sequence[Process], fewer: Collection[int] = ()) -> None:
        self.epoch, self.broken, self.step = 0, False, 0
        self._counts = {*fewer, len(processes)}
        self._idle = 0  # epochs that have begun without a step in between
        self._members: list[_Member | None] = [_Member(each, inside=True, went=True) for each in processes]
        self.ranks = list(range(len(processes)))  # by rank: their numbers
        self._waited = False  # long enough for those that are not there
        self._answer_seconds = ANSWER_SECONDS

    def can_lose(self, process: Process) -> bool:
        """Whether another member has the state of the run."""
        return any(each and each.process != process and (each.holds or each.inside) for each in self._members)

    @property
    def all_went(self) -> bool:
        """Whether all members of the epoch have met, and gone on."""
        members = [self._members[number] for number in self.ranks]
        return not self.broken and all(each and each.went for each in members)

    def ended(self, process: Process) -> list[Action]:
        """A process has ended, or cannot be reached."""
        member = self._of(process)
        if member is None:
            return []
        number = self._members.index(member)
        self._members[number] = None
        broken = self._break() if number in self.ranks else []  # else it had not come yet
        # What may begin now waits for `tick`: a spare that is ready comes as well.
        return [*broken, Start(number) if self._is_held() else GiveUp()]

    def started(self, number: int, process: Process) -> None:
        """A process was started in place of a lost one."""
        assert self._members[number] is None
        self._members[number] = _Member(process)

    def ready(self, process: Process) -> list[Action]:
        """A process that was started in place of a lost one waits for the next epoch."""
        if (member := self._of(process)) and not member.inside:
            member.waits = True
        return self._go_on()

    def answered(self, process: Process) -> None:
        """A member says that it is there."""
        if member := self._of(process):
            member.answered = True

    def left(self, process: Process, epoch: int, step: int | None) -> list[Action]:
        """A member has left an epoch, and waits for the next.

        Args:
            process: which.
            epoch: the number of that which it has left.
            step: the one whose state it holds, or None.
        """
        member = self._of(process)
        if member is None or epoch != self.epoch or not member.inside or member.killed:
            return []
        member.inside, member.waits, member.holds = False, True, step is not None
        return [*self._break(), *([] if self._is_held() else [GiveUp()]), *self._go_on()]

    def waited(self, process: Process) -> list[Action]:
        """A member that waits has waited long enough for those that are not there."""
        if (member := self._of(process)) and member.waits and self.broken:
            self._waited = True
        return self._go_on()

    def went(self, process: Process, epoch: int, step: int) -> None:
        """A member has met the others in an epoch, and goes on from a step."""
        if (member := self._of(process)) and epoch == self.epoch:
            member.went = True
            self._idle = 0 if step > self.step else self._idle
            self.step = max(step, self.step)

    def tick(self, now: float) -> list[Action]:
        """Time has passed: asks whoever is waited for, and gives up who has not answered; `now` in seconds."""
        actions: list[Action] = []
        for each in self._members:
            if each is None or each.killed or not each.inside or (each.went and not self.broken):
                continue
            if each.asked is not None and now < each.asked + self._answer_seconds:
                continue
            if each.asked is not None and not each.answered:
                each.killed = True
                actions.append(Kill(each.process))
            else:
                each.asked, each.answered = now, False
                actions.append(Ask(each.process))
        return [*actions, *self._go_on()]

    def _break(self) -> list[Action]:
        if self.broken:
            return []
        self.broken = True
        inside = [each for each in self._members if each and each.inside]
        self._answer_seconds = ANSWER_SECONDS
        for each in inside:
            each.asked = None
        return [Leave(each.process, self.epoch) for each in inside]

    def _go_on(self) -> list[Action]:
        """Begins the next epoch if it can, or leaves this one for one of more."""
        ranks = self._next()
        if not self.broken:
            # Those that build what they need for this one could not stay.
            return self._break() if self.all_went and len(ranks) > len(self.ranks) else []
        if not self._is_held() or any(each and each.inside for each in self._members):
            return []
        if not ranks:
            return [GiveUp()] if self._waited else []
        if self._idle >= EPOCHS:
            return [GiveUp()]
        self.epoch, self.broken, self._idle = self.epoch + 1, False, self._idle + 1
        self._answer_seconds = ANSWER_SECONDS if ranks == self.ranks else BUILD_SECONDS
        self.ranks, self._waited = ranks, False
        for each in (members := [each for number in ranks if (each := self._members[number])]):
            each.inside, each.waits, each.went, each.asked = True, False, False, None
        return [Begin(self.epoch, [each.process for each in members])]

    def _next(self) -> list[int]:
        """The numbers of those in the next epoch, in rank order; none if it cannot begin yet.

        As many as before keep their ranks, which what they have compiled may know. Otherwise those that have the state
        come first, for the first one saves it.
        """
        there = [number for number, each in enumerate(self._members) if each and (each.waits or each.inside)]
        if {*self.ranks} <= {*there} or self._waited:
            if len(there) in self._counts and {*there} != {*self.ranks}:
                return sorted(there, key=lambda number: not self._has_state(number))
            if {*self.ranks} <= {*there}:
                return self.ranks
        return []

    def _has_state(self, number: int) -> bool:
        # One that has begun an epoch may have a copy by now; when it leaves it says so.
        return bool((each := self._members[number]) and (each.holds or each.inside))

    def _is_held(self) -> bool:
        return any(map(self._has_state, range(len(self._members))))

    def _of(self, process: Process) -> _Member | None:
        return next((each for each in self._members if each and each.process == process), None)
