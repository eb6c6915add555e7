"""MultiWorkerMirroredStrategy whose workers reach each other over `tcp_backend` alone.

TensorFlow's own starts a gRPC server that listens on all addresses of the host and runs any graph that it is sent
(its SECURITY.md says so), waits for ever for a worker that never starts, and then handles no SIGTERM. For workers of
one CPU replica each nothing of it is needed: here every worker computes as a single one does, and what crosses workers
is a sum over the backend.

The only module that overrides private methods of TensorFlow's strategies; `compat.TCP_OVERRIDES` lists them.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from dist_partial import compat
from dist_partial.distributed.tcp_backend import TCPBackend


class TCPStrategy(tf.distribute.MultiWorkerMirroredStrategy):
    """Distributes over one CPU replica on each worker; TF_CONFIG says which worker this is.

    Initial values of variables are not broadcast: workers must make the same, and `consistency` checks it.
    """

    def __init__(self, backend: TCPBackend) -> None:
        tf.distribute.Strategy.__init__(self, _Extended(self, backend))


_CollectiveAllReduceExtended: Any = compat.collective_extended()


class _Extended(_CollectiveAllReduceExtended):
    def __init__(self, strategy: tf.distribute.Strategy, backend: TCPBackend) -> None:
        self._backend = backend
        super().__init__(strategy, None, tf.distribute.experimental.CommunicationOptions())

    def _initialize_strategy(self, cluster_resolver: Any, devices: Any) -> None:
        self._initialize_local(cluster_resolver)  # no server, no other worker's devices
        self._num_workers, self._id_in_cluster = self._backend.size, self._backend.rank
        self._is_chief = self._backend.rank == 0

    def _get_variable_creator_initial_value(self, *args: Any, **kwargs: Any) -> Any:
        return kwargs["initial_value"]

    def _replica_ctx_all_reduce(self, reduce_op: Any, value: Any, options: Any = None) -> Any:
        return tf.nest.pack_sequence_as(value, self._reduced(reduce_op, tf.nest.flatten(value)))

    def _batch_reduce_to(self, reduce_op: Any, value_destination_pairs: Any, options: Any) -> Any:
        local = [
            self._container_strategy().experimental_local_results(value)[0] for value, _ in value_destination_pairs
        ]
        return self._reduced(reduce_op, local)

    def _reduce_to(self, reduce_op: Any, value: Any, destinations: Any, options: Any) -> Any:
        return self._batch_reduce_to(reduce_op, [(value, destinations)], options)[0]

    def _gather_to_implementation(self, value: Any, destinations: Any, axis: int, options: Any) -> Any:
        raise NotImplementedError("gather tensors with Collectives.exchange")

    def _reduced(self, reduce_op: Any, tensors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        tensors = [tf.convert_to_tensor(tensor) for tensor in tensors]
        with tf.device(self.worker_devices[0]):  # as in a replica: bytes are counted by device
            sums, _ = self._backend.exchange([tf.reshape(tensor, [-1]) for tensor in tensors], [])
        sums = [tf.reshape(total, tensor.shape) for total, tensor in zip(sums, tensors, strict=True)]
        mean = reduce_op in (tf.distribute.ReduceOp.MEAN, "MEAN")
        return [total / self._backend.size for total in sums] if mean else sums
