"""Which replicas (one device, GPUs, simulated on the CPU, the workers of TF_CONFIG), and how they reach each other."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dist_partial import mesh
from dist_partial.cluster import read_tf_config
from dist_partial.errors import UserError
from dist_partial.wire import PACK_BYTES, Wire

KINDS = ("auto", "default", "mirrored", "multi_worker")
TRANSPORTS = ("auto", "tensorflow", "sockets")


@dataclasses.dataclass(frozen=True, eq=False)
class Replicas:
    """The replicas.

    Attributes:
        strategy: what computes on them.
        wire: how they reach each other.
        description: one line that says what was picked and why.
        host: this worker's name or address among several, or None.
    """

    strategy: tf.distribute.Strategy
    wire: Wire
    description: str
    host: str | None = None


def create(
    kind: str = "auto",
    cpu: int = 1,
    transport: str = "auto",
    pack_bytes: int = PACK_BYTES,
    congestion: str | None = "cubic",
) -> Replicas:
    """Makes the distribution strategy, and connects the workers.

    Call it before TensorFlow has run any op: devices cannot be added later.

    Args:
        kind: 'default' (one device), 'mirrored' (all GPUs of this host, or `cpu` simulated replicas where it has
            none), 'multi_worker' (the cluster in TF_CONFIG), or 'auto': multi_worker if TF_CONFIG names a cluster,
            else mirrored if there are several GPUs or `cpu` > 1, else default.
        cpu: how many logical CPU devices act as replicas where there is no GPU.
        transport: what gradients travel by: 'tensorflow' (its collectives), 'sockets' (connections of our own between
            workers that have one CPU replica each), or 'auto': sockets where they can be had.
        pack_bytes: up to how many bytes of gradients travel as one.
        congestion: the kernel's congestion control for the sockets; None is the system's. Replicas in lock step wait
            for the slowest exchange, and on a shaped link cubic's are the steadiest; a lossy one may need 'bbr'.

    Raises:
        UserError: unknown kind, malformed TF_CONFIG, or devices that cannot be made.
    """
    if transport not in TRANSPORTS:
        raise UserError(f"replicas.transport is {transport!r}: write one of {', '.join(map(repr, TRANSPORTS))}")
    if congestion is not None and not isinstance(congestion, str):
        raise UserError(f"replicas.congestion is {congestion!r}: write a name that the kernel knows, such as 'cubic'")
    if type(pack_bytes) is not int or pack_bytes < 1:
        raise UserError(f"replicas.pack_bytes is {pack_bytes!r}: write a whole number of bytes, such as {PACK_BYTES}")
    if kind not in KINDS:
        raise UserError(f"replicas.kind is {kind!r}: write one of {', '.join(map(repr, KINDS))}")
    if type(cpu) is not int or cpu < 1:
        raise UserError(f"replicas.cpu is {cpu!r}: write how many simulated replicas, 1 or more")
    cluster = read_tf_config(os.environ.get("TF_CONFIG", ""))
    gpus = len(tf.config.list_logical_devices("GPU")) if tf.config.list_physical_devices("GPU") else 0
    reason = ""
    if kind == "auto":
        if cluster:
            kind, reason = "multi_worker", " (TF_CONFIG names a cluster)"
        elif gpus > 1 or (gpus == 0 and cpu > 1):
            kind, reason = "mirrored", f" ({gpus} GPUs here)" if gpus else f" (no GPU here, replicas.cpu = {cpu})"
        else:
            kind, reason = "default", " (one GPU here)" if gpus else " (no GPU here, replicas.cpu = 1)"
    if kind == "multi_worker":
        return _multi_worker(cluster, reason, transport, pack_bytes, congestion)
    if transport == "sockets":
        raise UserError("replicas.transport = 'sockets' connects the workers of TF_CONFIG; here there is one process")
    wire = Wire(pack_bytes=pack_bytes)
    if kind == "default":
        return Replicas(tf.distribute.get_strategy(), wire, f"replicas: 1, default strategy{reason}")
    devices = [f"GPU:{i}" for i in range(gpus)] or _simulated(cpu)
    what = f"{gpus} GPUs" if gpus else f"{cpu} simulated on the CPU"
    description = f"replicas: {len(devices)}, MirroredStrategy over {what}{reason}"
    return Replicas(tf.distribute.MirroredStrategy(devices), wire, description)


def is_chief() -> bool:
    """Whether this process writes the run folder: the only process, or the first worker of the cluster."""
    cluster = read_tf_config(os.environ.get("TF_CONFIG", ""))
    if not cluster:
        return True
    task = cluster["task"]
    return task["type"] == "chief" or ("chief" not in cluster["cluster"] and task["index"] == 0)


def local_count(strategy: tf.distribute.Strategy) -> int:
    """How many of the replicas are this worker's."""
    # The default strategy has no list of its devices to ask for.
    return len(strategy.extended.worker_devices) if strategy.num_replicas_in_sync > 1 else 1


def input_context(strategy: tf.distribute.Strategy) -> tf.distribute.InputContext:
    """Which part of each global batch is this worker's."""
    workers = strategy.num_replicas_in_sync // local_count(strategy)
    index = 0
    if workers > 1:
        resolver = strategy.cluster_resolver
        chiefs = len(resolver.cluster_spec().as_dict().get("chief", []))
        index = resolver.task_id + (chiefs if resolver.task_type == "worker" else 0)
    return tf.distribute.InputContext(workers, index, strategy.num_replicas_in_sync)


def _simulated(count: int) -> list[str]:
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        if len(tf.config.get_logical_device_configuration(cpu) or [None]) < count:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError:
        raise UserError(
            f"replicas.cpu = {count} comes too late: TensorFlow has started with fewer CPU devices; make the replicas "
            "before anything else uses TensorFlow"
        ) from None
    return [f"CPU:{i}" for i in range(count)]


def _multi_worker(
    cluster: dict[str, Any] | None, reason: str, transport: str, pack_bytes: int, congestion: str | None
) -> Replicas:
    if cluster is None:
        raise UserError("replicas.kind is 'multi_worker', but TF_CONFIG names no cluster: set it on every worker")
    workers = sum(len(addresses) for addresses in cluster["cluster"].values())
    task = cluster["task"]
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    connections = None
    how = "TensorFlow's collectives"
    if transport != "tensorflow" and workers > 1:
        connections, failure = _connect(strategy, cluster, congestion)
        if connections is None and transport == "sockets":
            raise UserError(f"replicas.transport = 'sockets': {failure}")
        how = "direct connections" if connections else f"{how}, as {failure}"
    return Replicas(
        strategy,
        Wire(connections, pack_bytes),
        f"replicas: {strategy.num_replicas_in_sync}, MultiWorkerMirroredStrategy over {workers} workers, this is "
        f"{task['type']} {task['index']}{reason}; gradients travel by {how}",
        _host(cluster["cluster"][task["type"]][task["index"]]) if workers > 1 else None,
    )


def _connect(
    strategy: tf.distribute.Strategy, cluster: dict[str, Any], congestion: str | None
) -> tuple[mesh.Mesh | None, str]:
    """Connects the workers with each other: all of them, or none and the reason."""
    if local_count(strategy) > 1 or tf.config.list_physical_devices("GPU"):
        return None, "workers with GPUs or several replicas use no sockets of our own"
    everyone = [address for kind in ("chief", "worker") for address in cluster["cluster"].get(kind, [])]
    hosts = [_host(address) for address in everyone]
    rank = input_context(strategy).input_pipeline_id
    connected, failure = None, ""
    try:
        connected = mesh.connect(rank, hosts, lambda data: _swap(strategy, data), congestion)
    except ConnectionError as error:
        failure = str(error)
    # What fails for one of them must not be used by any.
    failures = [
        text.rstrip(b"\0").decode(errors="replace")
        for text in _swap(strategy, failure.encode()[:400].ljust(400, b"\0"))
    ]
    if any(failures):
        if connected is not None:
            connected.close()
        return None, next(text for text in failures if text)
    return connected, ""


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]")


def _swap(strategy: tf.distribute.Strategy, data: bytes) -> list[bytes]:
    """Every worker's bytes, in the order of ranks; each hands over equally many."""
    words = np.frombuffer(data.ljust(-(-len(data) // 4) * 4, b"\0"), np.int32)

    @tf.function(autograph=False)
    def gathered(words: tf.Tensor) -> tf.Tensor:
        # The strategy takes no function's argument as it is, only what an op has made.
        return strategy.gather(strategy.run(lambda: tf.identity(words)[tf.newaxis]), axis=0)

    rows = gathered(tf.constant(words)).numpy()
    return [row.tobytes()[: len(data)] for row in rows]


@dataclasses.dataclass(frozen=True, eq=False)
class PerReplica:
    """A variable of which each replica has a value of its own, seen as one array [replicas, ...].

    Attributes:
        strategy: the replicas.
        variable: a mirrored variable, or one that is synchronised on read.
        when_fewer: what becomes of the values on another number of replicas: 'sum' keeps their sum and divides it
            evenly, 'mean' gives each replica their mean, 'own' deals them out.
    """

    strategy: tf.distribute.Strategy
    variable: Any
    when_fewer: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.strategy.num_replicas_in_sync, *self.variable.shape)

    @property
    def dtype(self) -> Any:
        return np.dtype(self.variable.dtype.as_numpy_dtype)

    def assign(self, array: np.ndarray) -> None:
        """Gives this worker's replicas their values; called in the cross-replica context.

        Args:
            array: [replicas, ...], of any number of replicas.
        """
        count = self.strategy.num_replicas_in_sync
        if len(array) == count:
            mine = array
        elif self.when_fewer == "own":
            mine = array[np.arange(count) % len(array)]
        else:
            divisor = count if self.when_fewer == "sum" else len(array)
            one = np.sum(array, axis=0, dtype=np.float64) / divisor
            mine = np.broadcast_to(one.astype(self.dtype), self.shape)
        first = input_context(self.strategy).input_pipeline_id * local_count(self.strategy)
        for i, copy in enumerate(self.strategy.experimental_local_results(self.variable)):
            copy.assign(mine[first + i])


def values(variables: Sequence[PerReplica]) -> list[np.ndarray]:
    """All replicas' values, [replicas, ...] each; all workers must call it, and send each other what they have."""
    if not variables:
        return []
    strategy = variables[0].strategy
    local = [[copy.numpy() for copy in strategy.experimental_local_results(v.variable)] for v in variables]
    if local_count(strategy) == strategy.num_replicas_in_sync:
        return [np.stack(copies) for copies in local]

    # One message, and not a gather for each of many small variables.
    data = b"".join(copy.tobytes() for copies in local for copy in copies)
    rows = _swap(strategy, data)
    found, start = [], 0
    for variable, copies in zip(variables, local, strict=True):
        size = sum(copy.nbytes for copy in copies)
        parts = [np.frombuffer(row[start : start + size], variable.dtype) for row in rows]
        found.append(np.concatenate(parts).reshape(variable.shape))
        start += size
    return found
