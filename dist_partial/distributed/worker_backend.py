"""Backends that join workers, each of which has a strategy of its own: its replicas add up before anything leaves."""

import abc
import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial.distributed.backend import ALL, BETWEEN, HOST, INSIDE, Exchanged, inside, joined
from dist_partial.distributed.per_replica import Topology
from dist_partial.distributed.tcp_arrays import add_up
from dist_partial.errors import Ending, UserError
from dist_partial.validation import counted

# Names of the graph ops that hand a tensor over; `traffic` counts bytes by them.
SUM_OP = "dist_partial_sum"
GATHER_OP = "dist_partial_gather"
ALL_TO_ALL_OP = "dist_partial_all_to_all"


class WorkerBackend(abc.ABC):
    """Joins workers: a `Backend`, and what a run says and compares outside of functions.

    A subclass sets the attributes and has a `gather`; all else follows from it. `sum` and `exchange` are there to be
    replaced by what sends less, or sooner, and `all_to_all` as well, with `has_all_to_all`.

    Attributes:
        rank: which of the workers this is, from 0; the first one writes the run folder.
        size: how many there are.
        workers: what messages call each, such as its 'host:port'.
        knows_rank: whether what was traced holds for this rank alone.
        waited: seconds in which this worker has waited for others so far, where that is known.

    Examples:
        >>> class Alone(WorkerBackend):
        ...     rank, size, workers = 0, 1, ["this one"]
        ...     def gather(self, data):
        ...         return [data]
        >>> Alone().sum(np.float32([1, 2])).tolist()
        [1.0, 2.0]
        >>> sums, gathered, _ = Alone().over_replicas([tf.constant([1.0])], [tf.constant([2])])
        >>> sums[0].numpy().tolist(), gathered[0].numpy().tolist()
        ([1.0], [[2]])
    """

    rank: int
    size: int
    workers: Sequence[str]
    knows_rank = False
    waited = 0.0
    two_levels = True
    has_all_to_all = False
    concurrent = False

    @abc.abstractmethod
    def gather(self, data: bytes) -> list[bytes]:
        """Every worker's bytes, of any length each, in rank order; all call it at the same point.

        It may run in any thread, one call after the other. Where a worker is lost it raises `errors.Fault`, after which
        launchers start all again.
        """

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum of an array [n] over the workers, added in rank order: the same bits on all; called as `gather`."""
        total = np.empty(array.size, array.dtype)
        add_up(self._rows(array), total)
        return total

    def all_to_all(self, array: np.ndarray) -> np.ndarray:
        """Of an array [size, n] row j goes to worker j: [size, n], where row i comes from worker i; called as `gather`.

        Here all rows go to all, which sends more than a gather of what each worker needs.
        """
        return self._stacked(array.reshape(-1)).reshape(self.size, self.size, -1)[:, self.rank]

    def exchange(
        self, sums: Sequence[tf.Tensor], gathers: Sequence[tf.Tensor], swaps: Sequence[tf.Tensor] = ()
    ) -> Exchanged:
        """Exchanges tensors between the workers; called by all in the same order, mostly while one is traced.

        Args:
            sums: [n] each, of static size; floats or integers.
            gathers: [n] each, of static size and any fixed-size dtype.
            swaps: [size, n] each, likewise; row j is for worker j.

        Returns:
            The sums [n], the same bits on all workers, the gathered [size, n], in rank order, and of each swap what the
            workers have sent to this one [size, n].
        """

        def called(function: Callable[[np.ndarray], np.ndarray], tensor: tf.Tensor, shape: Any, name: str) -> tf.Tensor:
            # TensorFlow runs what has side effects in the order in which it was traced: the same on all workers.
            result = tf.numpy_function(function, [tensor], tensor.dtype, name=name)
            # Not by an ensure_shape, with which TensorFlow rewrites what follows, so that it rounds in another way.
            result.set_shape(shape)
            return result

        return (
            [called(self.sum, tensor, tensor.shape, SUM_OP) for tensor in sums],
            [called(self._stacked, tensor, [self.size, *tensor.shape], GATHER_OP) for tensor in gathers],
            [
                called(self.all_to_all, tensor, tensor.shape, ALL_TO_ALL_OP if self.has_all_to_all else GATHER_OP)
                for tensor in swaps
            ],
        )

    @contextlib.contextmanager
    def traced_apart(self) -> Iterator[None]:
        """What is traced within runs beside other functions, where the backend is `concurrent`."""
        yield

    @contextlib.contextmanager
    def tracing(self, name: str) -> Iterator[None]:
        """Names what is traced within, as all workers do; what had the name before was forgotten, see `forget`."""
        yield

    def forget(self, name: str) -> None:  # noqa: B027 (there may be nothing to forget)
        """Forgets what was traced by a name and is no longer called; all do so before one of them uses it again."""

    def barrier(self) -> None:
        """Waits until all workers call it."""
        self.gather(b"")

    def finish(self) -> None:
        """Waits until all workers call it: none takes one that has ended before for lost."""
        self.barrier()

    def lost(self) -> Ending | None:
        """What has become of a worker that is gone, where that is known before anything waits for it, or None."""
        return None

    def close(self, reason: Ending | None = None) -> None:  # noqa: B027 (there may be nothing to close)
        """Ends this worker's part.

        Args:
            reason: why it ends before the others, who should hear of it.
        """

    def topology(self, strategy: tf.distribute.Strategy) -> Topology:
        """How many replicas all workers have, and which are this one's, whose strategy is given."""
        return Topology(strategy, self.size, self.rank, asked=self._asked)

    def _asked(self) -> None:
        self.knows_rank = True

    def over_replicas(
        self,
        sums: Sequence[tf.Tensor],
        gathers: Sequence[tf.Tensor],
        swaps: Sequence[tf.Tensor] = (),
        level: str = ALL,
    ) -> Exchanged:
        """Exchanges what the replicas of this worker have by TensorFlow, and what workers have by `exchange`."""
        context: Any = tf.distribute.get_replica_context()
        if level == INSIDE:
            return inside(sums, gathers, swaps)
        if context.num_replicas_in_sync == 1:
            with tf.device(HOST):
                return self.exchange(sums, gathers, swaps)
        counts, alike = (len(sums), len(gathers)), level == BETWEEN
        summed, gathered, swapped = context.merge_call(
            functools.partial(self._across, counts, alike), args=[*sums, *gathers, *swaps]
        )
        own = 0 if alike else context.replica_id_in_sync_group
        mine = [tf.reshape(each[:, :, own], own_.shape) for each, own_ in zip(swapped, swaps, strict=True)]
        return summed, gathered, mine

    def _across(
        self, counts: tuple[int, int], alike: bool, strategy: tf.distribute.Strategy, *values: Any
    ) -> Exchanged:
        """The swapped as [workers, their replicas that have sent, replicas of this worker, n]."""
        with tf.device(HOST):
            totals, stacked, apart = joined(counts, alike, strategy, *values)
            # [senders, workers * receivers, n] -> a row a worker, of what all replicas here send to all of its own.
            blocks = [tf.reshape(each, [each.shape[0], self.size, -1, each.shape[-1]]) for each in apart]
            rows = [tf.reshape(tf.transpose(each, [1, 0, 2, 3]), [self.size, -1]) for each in blocks]
            summed, gathered, swapped = self.exchange(totals, [tf.reshape(each, [-1]) for each in stacked], rows)
            return (
                summed,
                [tf.reshape(each, [-1, own.shape[-1]]) for each, own in zip(gathered, stacked, strict=True)],
                [
                    tf.reshape(each, [self.size, *own.shape[:1], *own.shape[2:]])
                    for each, own in zip(swapped, blocks, strict=True)
                ],
            )

    def _stacked(self, array: np.ndarray) -> np.ndarray:
        """Every worker's array [n]: [size, n]."""
        return np.stack(self._rows(array))

    def _rows(self, array: np.ndarray) -> list[np.ndarray]:
        rows = self.gather(array.tobytes())
        if (lengths := [len(row) for row in rows]) != [array.nbytes] * self.size:
            raise UserError(
                f"{type(self).__name__}.gather returned rows of {lengths} bytes, where each of "
                f"{counted(self.size, 'worker')} sends {array.nbytes}: it must return the bytes of all, in rank order, "
                "and all workers must run the same program and settings"
            )
        return [np.frombuffer(row, array.dtype) for row in rows]
