"""States of a run that are held in memory: what a worker goes back to, and gives to another.

A snapshot has the values of all variables that training changes, which stay where they are until a step writes others,
and the numbers beside them.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import checkpoints
from dist_partial.checkpoints import safetensors_file
from dist_partial.distributed import traffic
from dist_partial.distributed.per_replica import PerReplica
from dist_partial.errors import Fault
from dist_partial.step import layer_state, optimizers
from dist_partial.training.build import Trainer
from dist_partial.training.state import TrainState

_SUMS = "sums"  # no variable has this name


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """Holds a state, and what is known of the call of the step that has led to it.

    Attributes:
        state: the numbers, and the live variables.
        allocated: numbers of the groups that have slots.
        values: of this worker's copies of its variables.
        votes: of all workers to stop, in the call.
        sums: which ended the call; None if there was none.
        rows: that it has added to the metrics.
        copy: bytes of what the worker before this one alone has.
        time: when it was taken, by `time.monotonic`.
    """

    state: TrainState
    allocated: Sequence[int]
    values: Sequence[tf.Tensor]
    votes: np.ndarray
    sums: np.ndarray | None
    rows: Sequence[dict[str, Any]]
    copy: bytes
    time: float


class Snapshots:
    """Takes snapshots of a run, goes back to one, and makes bytes of one for another worker.

    Args:
        trainer: of the run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._strategy = trainer, trainer.replicas.strategy
        self._read: Any = None
        self._key: Any = None  # of the variables that it reads
        self._found: tuple[list[int], list[Any], list[tf.Variable]] | None = None  # what this worker alone has

    def take(
        self,
        state: TrainState,
        votes: np.ndarray,
        sums: np.ndarray | None = None,
        rows: Sequence[dict[str, Any]] = (),
        copy: bytes = b"",
    ) -> Snapshot:
        """Takes a snapshot; the arguments are its attributes."""
        allocated = [number for number, group in enumerate(self._trainer.optimizers) if group.state]
        return Snapshot(state, allocated, self._values(state, allocated), votes, sums, rows, copy, time.monotonic())

    def retaken(self, snapshot: Snapshot, copy: bytes) -> Snapshot:
        """The same of the variables' present values, with another copy."""
        values = self._values(snapshot.state, snapshot.allocated)
        return dataclasses.replace(snapshot, values=values, copy=copy)

    def go_back(self, snapshot: Snapshot) -> None:
        """Gives the variables the values of a snapshot."""
        with self._strategy.scope():
            self._allocate(snapshot.allocated)
            for copy, value in zip(self._copies(snapshot.state, snapshot.allocated), snapshot.values, strict=True):
                copy.assign(value)
        self._write_rows()

    def own(self) -> bytes:
        """What this worker alone has: its values of what differs between workers."""
        return b"".join(copy.numpy().tobytes() for copy in self._own())

    def take_own(self, data: bytes) -> None:
        """Takes what another has returned as `own`; nothing, if that is empty."""
        start = 0
        for copy in self._own() if data else ():
            dtype, count = np.dtype(copy.dtype.as_numpy_dtype), copy.shape.num_elements()
            copy.assign(np.frombuffer(data, dtype, count, start).reshape(copy.shape))
            start += count * dtype.itemsize
        self._write_rows()

    def arrays(self, snapshot: Snapshot, own: Mapping[int, bytes], workers: int, rank: int) -> dict[str, np.ndarray]:
        """The values as a checkpoint has them, once the variables have them.

        Args:
            snapshot: that they are of.
            own: what each worker has returned as `own`, by rank; those that are lost may be missing.
            workers: how many there were.
            rank: with which this worker has computed.
        """
        found, start = dict(self._variables(snapshot.state, snapshot.allocated)), 0
        for name, variable in found.items():
            if isinstance(variable, PerReplica):
                shape = (variable.topology.local, *variable.shape[1:])
                rows = {
                    k: np.frombuffer(data, variable.dtype, math.prod(shape), start).reshape(shape)
                    for k, data in own.items()
                }
                if variable.when_fewer == "chunks":  # where a chunk is tells which it is
                    rows = {k: rows.get(k, np.zeros(shape, variable.dtype)) for k in range(workers)}
                found[name] = np.concatenate([rows[k] for k in sorted(rows)])
                start += math.prod(shape) * variable.dtype.itemsize
        return self._of_first(checkpoints.read(found, self._trainer.replicas.gather), rank)

    def packed(self, snapshot: Snapshot, rank: int) -> bytes:
        """The snapshot as bytes, once the variables have its values, for a worker that has none of them.

        Args:
            snapshot: which.
            rank: with which this worker has computed.
        """
        arrays = {
            name: _of_another(variable) if isinstance(variable, PerReplica) else keras.ops.convert_to_numpy(variable)
            for name, variable in self._variables(snapshot.state, snapshot.allocated).items()
        }
        arrays = self._of_first(arrays, rank) | ({} if snapshot.sums is None else {_SUMS: snapshot.sums})
        beside = {
            "metadata": snapshot.state.metadata() | {"step": snapshot.state.step},
            "allocated": list(snapshot.allocated),
            "votes": snapshot.votes.tolist(),
            "rows": list(snapshot.rows),
        }
        return b"".join(safetensors_file.pieces(arrays, {"beside": json.dumps(beside)}))

    def unpacked(self, data: bytes) -> Snapshot:
        """Gives the variables the values of a snapshot that another worker has packed; returns it.

        Raises:
            Fault: the other has other variables.
        """
        arrays, texts = safetensors_file.parse(data)
        beside, sums = json.loads(texts["beside"]), arrays.pop(_SUMS, None)
        metadata, allocated = beside["metadata"], beside["allocated"]
        with self._strategy.scope():
            self._allocate(allocated)
            state = self._trainer.state()
            variables = self._variables(state, allocated)
            if variables.keys() != arrays.keys():
                raise Fault(f"the workers that are left have another state: {sorted(variables.keys() ^ arrays)[:3]}")
            for name, variable in variables.items():
                variable.assign(arrays[name])
        layer_state.spread(self._trainer.replicas.topology, self._trainer.layer_state.generators)
        self._write_rows()
        sent = np.array([metadata[name] for name in traffic.SENT])
        state = dataclasses.replace(state, step=metadata["step"], sent=sent, schedule=metadata.get("schedule"))
        state = dataclasses.replace(state, judged=metadata.get("judged"))
        values, votes = self._values(state, allocated), np.array(beside["votes"])
        return Snapshot(state, allocated, values, votes, sums, beside["rows"], b"", time.monotonic())

    def _own(self) -> list[tf.Variable]:
        slots = [variable for group in self._trainer.optimizers for variable in group.state.values()]
        if self._found is None or self._found[0] != list(map(id, slots)):
            own = [v for v in self._trainer.state().variables.values() if isinstance(v, PerReplica)]
            copies = [copy for v in own for copy in v.copies()]
            self._found = list(map(id, slots)), slots, copies  # the slots live, so that no others have their ids
        return self._found[2]

    def _local(self, variable: Any) -> Sequence[tf.Variable]:
        return self._strategy.experimental_local_results(variable)

    def _allocate(self, allocated: Sequence[int]) -> None:
        """Has slots where there were some, and others as they begin."""
        for number, group in enumerate(self._trainer.optimizers):
            if number in allocated:
                group.allocate()
            elif group.state:
                group.reset()

    def _write_rows(self) -> None:
        for group in self._trainer.optimizers:
            optimizers.write_rows(self._strategy, group.members)

    def _values(self, state: TrainState, allocated: Sequence[int]) -> Sequence[tf.Tensor]:
        """The values of the copies, as they are: a step that writes others leaves these where they are."""
        slots = [variable for number in allocated for variable in self._trainer.optimizers[number].state.values()]
        key = tuple(map(id, slots))
        if key != self._key:
            copies = self._copies(state, allocated)
            self._read = tf.function(lambda: [copy.read_value() for copy in copies], autograph=False)
            self._key, self._slots = key, slots  # which live, so that no other has one's id
        return self._read()

    def _copies(self, state: TrainState, allocated: Sequence[int]) -> list[tf.Variable]:
        """This worker's variables of a state, in the order of their names."""
        variables = self._variables(state, allocated).values()
        return [copy for variable in variables for copy in self._local(_inner(variable))]

    def _variables(self, state: TrainState, allocated: Sequence[int]) -> dict[str, Any]:
        """Those of a state, of which these groups have slots."""
        slots = {f"slots/{name}" for number in allocated for name in self._trainer.optimizers[number].state}
        return {name: v for name, v in state.variables.items() if name in slots or not name.startswith("slots/")}

    def _of_first(self, arrays: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
        """Values with the states of generators that the first replica of all has."""
        first = rank * self._trainer.replicas.topology.local
        return arrays | {
            name: layer_state.seed_of_first(array, first)
            for name, array in arrays.items()
            if name.startswith("generators/")
        }


def _inner(variable: Any) -> Any:
    if isinstance(variable, PerReplica):
        return variable.variable
    return variable.value if isinstance(variable, keras.Variable) else variable


def _of_another(own: PerReplica) -> np.ndarray:
    """What a replica has in place of values that were another worker's alone.

    A residual is what was not sent yet, and lost with it: zeros. Weights of its own are as good as this worker's.
    """
    values = np.stack([copy.numpy() for copy in own.copies()])
    return np.zeros_like(values) if own.when_fewer in ("sum", "chunks") else values
