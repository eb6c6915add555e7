"""Who is a member of a run in which epoch: the launcher's side of membership, without processes, sockets or clocks.

The workers of an epoch have met at addresses and by a secret of its own. Once one of them is lost the epoch is broken:
the others are told to leave it, and a process is started in place of the lost one. When there is a member for each
rank, and all of them wait, the next epoch begins. A member that is told to leave and does not answer is stopped or cut
off, and as good as lost: it is killed.

What happens is told to a `Roster`; it answers with what is to be done. So at most one process has a rank, no epoch
begins before all have left the one before it, and none waits for one that does not come: whoever does not answer is
replaced, and where nobody is left who has the state of the run, all start again.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

ANSWER_SECONDS = 2.0  # in which a worker answers that is neither stopped nor cut off

Process = Any  # whatever names one


class Leave(NamedTuple):
    """A member is to be told that the epoch is broken."""

    process: Process
    epoch: int


class Start(NamedTuple):
    """A process is to be started in place of a lost one."""

    rank: int


class Kill(NamedTuple):
    """A process is to be killed; that it has ended is told later."""

    process: Process


class Begin(NamedTuple):
    """All members are to meet, given in rank order."""

    epoch: int
    processes: Sequence[Process]


class GiveUp(NamedTuple):
    """Nobody is left who has the state of the run."""


Action = Leave | Start | Kill | Begin | GiveUp


@dataclasses.dataclass(eq=False)
class _Member:
    process: Process
    inside: bool = False  # the epoch that has begun last
    waits: bool = False  # for the next epoch
    answered: bool = True  # that it leaves the broken one, or was not asked
    holds: bool = False  # the state of the run
    killed: bool = False


class Roster:
    """Follows who is a member, and says what is to be done.

    Attributes:
        epoch: the number of the one that has begun last.
        broken: whether it was left.
        step: the furthest from which the workers went on.

    Args:
        processes: those that begin epoch 0, in rank order.

    Examples:
        >>> roster = Roster(["a", "b"])
        >>> roster.ended("b", now=0.0)
        [Leave(process='a', epoch=0), Start(rank=1)]
        >>> roster.started(1, "c")
        >>> roster.answered("a", epoch=0), roster.left("a", epoch=0, step=40, now=0.1)
        ([], [])
        >>> roster.ready("c")
        [Begin(epoch=1, processes=['a', 'c'])]
    """

    def __init__(self, processes: Sequence[Process]) -> None:
        self.epoch, self.broken, self.step = 0, False, 0
        self._members: list[_Member | None] = [_Member(each, inside=True, holds=True) for each in processes]
        self._since = 0.0

    def member(self, process: Process) -> bool:
        """Whether a process is one."""
        return self._of(process) is not None

    def can_lose(self, process: Process) -> bool:
        """Whether another member has the state of the run."""
        return any(each and each.holds and each.process != process for each in self._members)

    @property
    def all_went(self) -> bool:
        """Whether all members have met in this epoch, and gone on."""
        return all(each and each.inside and each.holds for each in self._members)

    def ended(self, process: Process, now: float) -> list[Action]:
        """A process has ended, or cannot be reached."""
        member = self._of(process)
        if member is None:
            return []
        rank = self._members.index(member)
        self._members[rank] = None
        return [*self._break(now), Start(rank) if self._is_held() else GiveUp()]

    def started(self, rank: int, process: Process) -> None:
        """A process was started in place of a lost one."""
        assert self._members[rank] is None
        self._members[rank] = _Member(process)

    def ready(self, process: Process) -> list[Action]:
        """A process that was started in place of a lost one waits for the next epoch."""
        if member := self._of(process):
            member.waits = True
        return self._begin()

    def answered(self, process: Process, epoch: int) -> list[Action]:
        """A member says that it will leave an epoch."""
        if (member := self._of(process)) and epoch == self.epoch:
            member.answered = True
        return []

    def left(self, process: Process, epoch: int, step: int | None, now: float) -> list[Action]:
        """A member has left an epoch, and waits for the next.

        Args:
            process: which.
            epoch: the number of that which it has left.
            step: the one whose state it holds, or None.
            now: seconds.
        """
        member = self._of(process)
        if member is None or epoch != self.epoch or not member.inside:
            return []
        member.inside, member.waits, member.answered = False, True, True
        actions = self._break(now)
        member.holds = step is not None
        return [*actions, *([] if self._is_held() else [GiveUp()]), *self._begin()]

    def went(self, process: Process, epoch: int, step: int) -> None:
        """A member has met the others in an epoch, and goes on from a step."""
        if (member := self._of(process)) and epoch == self.epoch:
            member.holds, self.step = True, max(step, self.step)

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        if not self.broken or now < self._since + ANSWER_SECONDS:
            return []
        late = [each for each in self._members if each and not each.answered and not each.killed]
        for each in late:
            each.killed = True
        return [Kill(each.process) for each in late]

    def _break(self, now: float) -> list[Action]:
        if self.broken:
            return []
        self.broken, self._since = True, now
        asked = [each for each in self._members if each and each.inside]
        for each in asked:
            each.answered = False
        return [Leave(each.process, self.epoch) for each in asked]

    def _begin(self) -> list[Action]:
        members = [each for each in self._members if each and each.waits]
        if not self.broken or len(members) < len(self._members) or not self._is_held():
            return []
        self.epoch, self.broken = self.epoch + 1, False
        for each in members:
            each.inside, each.waits = True, False
        return [Begin(self.epoch, [each.process for each in members])]

    def _is_held(self) -> bool:
        return any(each and each.holds for each in self._members)

    def _of(self, process: Process) -> _Member | None:
        return next((each for each in self._members if each and each.process == process), None)
