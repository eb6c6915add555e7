"""Goes on after another worker is lost: from the last call of the step that all have made, and without a checkpoint.

After each call of the compiled step a worker keeps what it needs to be there again: its variables' values, which stay
where they are until a step writes others, and the numbers beside them. Where an exchange fails for a worker is lost,
those that are left go back to it, meet again (`distributed.membership`), and give a copy to the one that has come.

A call ends with a sum over all workers, of losses and votes. Whoever has that sum knows that all have made the call;
one that was cut off from it gets it when they meet again. So all go on from the same step, and none is made twice.

Where as many have not come for long, fewer meet; or more again, later. What was compiled is of no use then: the first
saves the state from which all go on, and all build again, as they would in another process.

What a worker alone has, such as residuals, it sends to the next one before that sum, if `replicas.buddy` says so: who
has the sum knows that all have the copies, too.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.membership import Membership
from dist_partial.distributed.per_replica import PerReplica
from dist_partial.errors import Ending, Fault
from dist_partial.step.outer_step import Fragment
from dist_partial.training.build import Trainer
from dist_partial.training.checks import check_workers
from dist_partial.training.snapshots import Snapshot, Snapshots
from dist_partial.training.state import TrainState
from dist_partial.validation import counted

_HEARS_SECONDS = 2.0  # in which it is known here why an exchange has failed


class Rejoined(Exception):
    """Ends what was under way, for the workers have met again.

    Attributes:
        state: from which all go on.
    """

    def __init__(self, state: TrainState) -> None:
        super().__init__(f"at step {state.step}")
        self.state = state


class Resized(Exception):
    """Ends what was under way, for more or fewer workers have met, who have to build again.

    Attributes:
        state: from which all go on; None on a worker that does not have it.
        own: bytes of what each worker of before alone had, by rank, as far as it is known.
        workers: how many there were before.
    """

    def __init__(self, state: TrainState | None, own: Mapping[int, bytes], workers: int) -> None:
        super().__init__("another number of workers")
        self.state, self.own, self.workers = state, own, workers


@dataclasses.dataclass(eq=False)
class _Call:
    """A call of the step that this worker has made, before it is known that all have."""

    step: int
    finish: Callable[[np.ndarray], TrainState]
    copy: bytes  # of what the worker before this one alone has, after the call


class Recovery:
    """Keeps what a worker goes back to when another is lost, and takes it there.

    Where the workers cannot stay (see `stays`), it keeps nothing, and a loss ends the run as any other fault.

    Attributes:
        lost: what the metrics say of the last loss, or None.
        gone: what was lost with the workers, in words; empty if nothing was.
        copied: bytes that were sent to the next worker in the last call.

    Args:
        trainer: of the run.
        bindings: what the user has bound, which must be the same on all workers.
        before: that of the same run before another number of workers has met.
    """

    def __init__(self, trainer: Trainer, bindings: Mapping[str, str], before: "Recovery | None" = None) -> None:
        self._trainer, self._bindings = trainer, bindings
        self._member: Membership | None = trainer.replicas.membership if stays(trainer.fragments) else None
        self._snapshots = Snapshots(trainer)
        self._kept: Snapshot | None = None
        self._call: _Call | None = None
        self._copy = b""  # that has come in the call that has just ended
        self.lost: dict[str, Any] | None = None
        self.gone = ""
        self.copied = 0
        # For which all was compiled; once it is stale, it can no longer be used.
        self._rank, self._workers, self._stale = trainer.replicas.rank, trainer.replicas.workers, False
        self._began, self._losses, self._seconds = time.monotonic(), 0, 0.0
        self._kept_at = 0.0  # when the call ended after which the last loss was
        if before is not None:
            self.lost, self.gone, self._kept_at = before.lost, before.gone, before._kept_at
            self._began, self._losses, self._seconds = before._began, before._losses, before._seconds

    def sum(self, value: np.ndarray, step: int, finish: Callable[[np.ndarray], TrainState]) -> np.ndarray:
        """Sums what ends a call of the step over the workers.

        Args:
            value: this worker's part.
            step: at which the call has ended.
            finish: completes the call, given the sum.
        """
        self._copy = self._exchanged()
        self._call = _Call(step, finish, self._copy)
        sums = self._trainer.replicas.sum(value)
        self._call = None
        return sums

    def keep(
        self,
        state: TrainState,
        votes: np.ndarray,
        sums: np.ndarray | None = None,
        rows: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Notes the state after a call that all workers have made, or at the start.

        Args:
            state: the state.
            votes: of all workers to stop, for `Stopping.count`.
            sums: what has ended the call.
            rows: that it has added to the metrics.
        """
        if self._member is not None:
            self._kept = self._snapshots.take(state, votes, sums, rows, self._copy)

    def begin(self, state: TrainState) -> None:
        """Notes the state with which the run begins; from here on this worker stays when another is lost."""
        if self._member is not None and self._kept is None:
            self._copy = self._exchanged()
            self.keep(state, np.zeros(2))
            if self._member.epoch:  # others have gone on before, with more workers or fewer
                self._member.went(state.step)
            else:
                replicas, batch = self._trainer.replicas, self._trainer.settings
                parts = replicas.topology.local * batch.accumulate
                self._member.stay([k for k in range(1, replicas.workers) if not batch.global_batch % (k * parts)])

    def end(self) -> None:
        """Notes that nothing is left to do: from here on a loss ends this worker, too."""
        if self._member is not None:
            self._member.end()
        self._member = self._kept = None

    def goodput(self) -> str:
        """Says which part of the time was not lost with workers; nothing if none was lost."""
        if not self._losses or self._member is None:
            return ""
        passed = time.monotonic() - self._began
        return (
            f"goodput: {100 * (1 - self._seconds / passed):.1f} % of {passed:.0f} s; {self._seconds:.1f} s went by in "
            f"{counted(self._losses, 'interruption')}"
        )

    def went_on(self) -> dict[str, Any]:
        """What the metrics say of the last loss; from here on steps are made again."""
        assert self.lost is not None
        seconds = time.monotonic() - self._kept_at
        self._seconds += seconds
        return self.lost | {"seconds": round(seconds, 3)}

    @property
    def stays(self) -> bool:
        """Whether a loss does not end this worker."""
        return self._member is not None and self._kept is not None

    @property
    def votes(self) -> np.ndarray:
        """What all workers have voted in the last call, to stop."""
        return self._kept.votes if self._kept else np.zeros(2)

    @property
    def rows(self) -> Sequence[dict[str, Any]]:
        """What the last call has added to the metrics."""
        return self._kept.rows if self._kept else ()

    @property
    def owes(self) -> bool:
        """Whether what follows a call of the step is to be made yet, at the step from which the run goes on."""
        return self._kept is not None and self._kept.sums is not None

    def arrays(self, met: Resized) -> dict[str, np.ndarray]:
        """The values of the state that this worker has gone back to, as a checkpoint has them."""
        assert self._kept is not None
        return self._snapshots.arrays(self._kept, met.own, met.workers, self._rank)

    def join(self) -> TrainState:
        """Meets the others, in place of a worker that is lost; returns the state from which they go on."""
        assert self._member is not None
        self._member.ready()
        return self._met()

    def rejoined(self, error: Exception, before: Callable[[], None] = lambda: None) -> TrainState:
        """Meets the others again after an error that a lost worker has led to; returns the state to go on from.

        Args:
            error: which ended what was under way.
            before: what this worker has to end first, for it may be another one that writes the run folder from then
                on; what it raises ends this worker.

        Raises:
            Exception: the error, if it came from something else, or this worker cannot stay.
            Fault: the others have not come.
        """
        if self._member is None or self._kept is None or not self._for_a_loss(error):
            raise error
        before()
        return self._met(leaves=True)

    def _for_a_loss(self, error: Exception) -> bool:
        backend = self._trainer.replicas.backend
        assert backend is not None
        if not isinstance(error, (Fault, tf.errors.OpError)):
            return False
        until = time.monotonic() + (_HEARS_SECONDS if isinstance(error, tf.errors.OpError) else 0.0)
        while not (lost := backend.lost()) and time.monotonic() < until:
            time.sleep(0.01)
        return isinstance(lost, Fault)

    def _met(self, leaves: bool = False) -> TrainState:
        """Meets the others, as often as it takes; returns the state from which all go on."""
        member, backend = self._member, self._trainer.replicas.backend
        assert member is not None and backend is not None
        while True:
            if leaves:
                member.leave(None if self._kept is None else self._kept.state.step)
            leaves = True
            member.rejoin()
            replicas = self._trainer.replicas
            self._stale |= replicas.workers != self._workers
            self._stale |= self._kept is not None and replicas.rank != self._rank
            try:
                state = self._agreed()
            except Ending as error:
                if not self._for_a_loss(error):
                    raise
                continue
            member.went(state.step)
            return state

    def _agreed(self) -> TrainState:
        """Goes to the furthest step that one has, with those whose state is there; the others get a copy."""
        trainer, kept, replicas = self._trainer, self._kept, self._trainer.replicas
        check_workers(replicas, trainer.fingerprint, self._bindings)
        now = time.monotonic()
        own: dict[str, Any] = {"stale": self._stale, "rank": self._rank}
        if kept is not None:
            own |= {"step": kept.state.step, "since": now - kept.time, "passed": now - self._began}
            own |= {"losses": self._losses, "seconds": self._seconds}
        everyone = [json.loads(each) for each in replicas.gather(json.dumps(own).encode())]
        holders = [rank for rank, each in enumerate(everyone) if "step" in each]
        if not holders:
            raise Fault("no worker is left that has the state of the run; run the same command again to go on")
        step = max(everyone[rank]["step"] for rank in holders)
        source = next(rank for rank in holders if everyone[rank]["step"] == step)
        behind = [rank for rank in holders if everyone[rank]["step"] < step]
        if behind:
            sums = kept.sums if kept is not None and replicas.rank == source else None
            data = self._copied(b"" if sums is None else sums.tobytes(), source, behind)
            if replicas.rank in behind:
                assert self._call is not None and self._call.step == step
                sums, self._copy = np.frombuffer(data, np.float64), self._call.copy
                self._call.finish(sums)  # which keeps the state
        self._call, kept = None, self._kept
        if kept is not None:
            self._snapshots.go_back(kept)
        self._note_loss(step, everyone[source], max(everyone[rank]["since"] for rank in holders))
        if any(each["stale"] for each in everyone):
            raise self._resized(kept, step, [each["rank"] for each in everyone if "step" in each])
        joining = [rank for rank in range(replicas.workers) if rank not in holders]
        if joining:
            packed = self._snapshots.packed(kept, self._rank) if kept is not None and replicas.rank == source else b""
            packed = self._copied(packed, source, joining)
            kept = self._snapshots.unpacked(packed) if replicas.rank in joining else kept
        assert kept is not None
        gone = [rank for rank in joining if not self._given_back(rank, joining, kept)]
        if joining:  # others are next to whom now
            kept = self._snapshots.retaken(kept, self._exchanged())
        self._kept = kept
        self.gone = _gone(kept.state, gone, "is another", "start from zero", "are a copy of another worker's")
        self._rank = replicas.rank
        self.lost = {"step": step, "split": "fault", "workers": joining}
        return kept.state

    def _note_loss(self, step: int, source: dict[str, Any], seconds: float) -> None:
        """Notes when the call ended from which all go on, and what the one that has its state knows of losses."""
        now = time.monotonic()
        self._losses, self._seconds = source["losses"] + 1, source["seconds"]
        self._began, self._kept_at = now - source["passed"], now - seconds

    def _resized(self, kept: Snapshot | None, step: int, ranks: Sequence[int]) -> Resized:
        """Collects what all need to build again; `ranks` had before those that have the state."""
        replicas, member = self._trainer.replicas, self._member
        assert member is not None
        self._stale, member.joins = True, False
        own = b"" if kept is None else self._snapshots.own()
        number = self._workers if kept is not None else 0
        number = int(max(replicas.sum(replicas.alone(number))))
        found = {}
        for rank, copy in zip(ranks, self._of_holders(b"" if kept is None else kept.copy, kept), strict=True):
            found[(rank - 1) % number] = copy
        found |= dict(zip(ranks, self._of_holders(own, kept), strict=True))
        missing = [rank for rank in range(number) if rank not in ranks]
        gone = [rank for rank in missing if not found.get(rank)]
        self.lost = {"step": step, "split": "fault", "workers": missing, "of": number, "now": replicas.workers}
        self.gone = _gone(self._trainer.state(), gone, "is lost", "are gone", "are gone")
        return Resized(
            None if kept is None else kept.state, {rank: data for rank, data in found.items() if data}, number
        )

    def _of_holders(self, data: bytes, kept: Snapshot | None) -> list[bytes]:
        """The bytes of each that has the state."""
        rows = self._trainer.replicas.gather((b"" if kept is None else b"+") + data)
        return [row[1:] for row in rows if row]

    def _given_back(self, rank: int, joining: Sequence[int], kept: Snapshot) -> bool:
        """Gives a worker that has come what the lost one alone had; whether the next one has a copy of it."""
        replicas = self._trainer.replicas
        buddy = (rank + 1) % replicas.workers
        data = self._copied(kept.copy if replicas.rank == buddy and buddy not in joining else b"", buddy, [rank])
        if replicas.rank == rank:
            self._snapshots.take_own(data)
        return bool(replicas.sum(np.array([len(data)], np.int64))[0])

    def _exchanged(self) -> bytes:
        """Sends what this worker alone has to the next one; returns what has come from the one before."""
        backend = self._trainer.replicas.backend
        alone = self._trainer.replicas.workers == 1
        if alone or self._member is None or not self._member.buddy or not (data := self._snapshots.own()):
            return b""
        self.copied = len(data)
        return backend.shift(data)  # type: ignore[union-attr]

    def _copied(self, data: bytes, source: int, to: Sequence[int]) -> bytes:
        replicas, backend = self._trainer.replicas, self._trainer.replicas.backend
        size = int(replicas.sum(np.array([len(data)], np.int64))[0])
        return backend.copy(data, size, source, to) if replicas.rank in (source, *to) else b""  # type: ignore[union-attr]


def stays(fragments: Sequence[Fragment]) -> bool:
    """Tells whether a state can be kept after each call: not where something travels meanwhile, or has one owner.

    Examples:
        >>> stays([])
        True
    """
    return not any(fragment.reduction.delay or fragment.reduction.divided for fragment in fragments)


def _gone(state: TrainState, ranks: Sequence[int], what: str, residuals: str, weights: str) -> str:
    """What no other worker had of the state of those that are lost, in words, and what becomes of both kinds of it."""
    found = [(name, v.when_fewer) for name, v in state.variables.items() if isinstance(v, PerReplica)]
    # What else a reduction keeps, such as factors, is alike on all.
    own = {kind for name, kind in found if kind in ("sum", "chunks") or not name.startswith("reductions/")}
    words = [
        text
        for kinds, text in (
            ({"sum", "chunks"}, f"its residuals, what it had not sent yet, {residuals}"),
            ({"mean", "own"}, f"its own weights and slots since the last exchange {weights}"),
        )
        if kinds & own
    ]
    return f"worker {', '.join(map(str, ranks))} {what}: {'; '.join(words)}" if words and ranks else ""
