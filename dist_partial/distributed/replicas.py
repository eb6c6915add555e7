"""Which replicas (one device, GPUs, simulated on the CPU, the workers of TF_CONFIG), and how they reach each other."""

import contextlib
import dataclasses
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.distributed import handshake, membership, rendezvous, tls
from dist_partial.distributed.cluster import JOINS, SECRET, read_tf_config, split
from dist_partial.distributed.collectives import PACK_BYTES, Collectives
from dist_partial.distributed.host_bridge import HostBridge
from dist_partial.distributed.membership import Epoch, Membership
from dist_partial.distributed.per_replica import Topology
from dist_partial.distributed.tcp_backend import TCPBackend
from dist_partial.distributed.tensorflow_backend import TensorFlowBackend, outlive, workers_strategy
from dist_partial.distributed.worker_backend import WorkerBackend
from dist_partial.errors import UserError
from dist_partial.terminal import say
from dist_partial.validation import Above, AtLeast, OneOf, check, counted

KINDS = ("auto", "default", "mirrored", "multi_worker")
TRANSPORTS = ("auto", "tensorflow", "sockets")
_KEYS = 100_000  # collectives of one strategy
_collectives: "weakref.WeakKeyDictionary[tf.distribute.Strategy, Collectives]" = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True, eq=False)
class Replicas:
    """Holds the strategy, and how its replicas reach each other.

    Attributes:
        strategy: what computes on them.
        collectives: how they reach each other.
        description: one line that says what was picked and why.
        backend: what joins this worker to the others, outside of functions as well; None where it is the only one.
        host: this worker's name or address among several, or None.
        membership: by which this worker stays when another is lost, or comes in place of one; None where it cannot.

    Examples:
        >>> create("default").is_chief
        True
    """

    strategy: tf.distribute.Strategy
    collectives: Collectives
    description: str
    backend: WorkerBackend | None = None
    host: str | None = None
    membership: Membership | None = None

    @property
    def topology(self) -> Topology:
        """How many replicas there are, and which are this worker's."""
        return self.collectives.backend.topology(self.strategy)

    @property
    def is_chief(self) -> bool:
        """Whether this worker writes the run folder."""
        return self.rank == 0

    @property
    def rank(self) -> int:
        """The number of this worker, from 0."""
        return 0 if self.backend is None else self.backend.rank

    @property
    def workers(self) -> int:
        """How many processes the replicas are divided among."""
        return 1 if self.backend is None else self.backend.size

    def say(self, line: str) -> None:
        """Prints a line, on the worker that writes the run folder."""
        if self.is_chief:
            say(line)

    @property
    def waited(self) -> float:
        """Seconds in which this worker has waited for others so far, where that is known."""
        return 0.0 if self.backend is None else self.backend.waited

    def alone(self, value: float) -> np.ndarray:
        """A vector [workers] with this worker's value in its place, and zeros: summed it has the value of each."""
        return np.where(np.arange(self.workers) == self.rank, value, 0.0)

    def sum(self, value: Any) -> np.ndarray:
        """The sum of an array, or a number, over the workers; all call it at the same point."""
        array = np.asarray(value)
        return array if self.backend is None else self.backend.sum(array.ravel()).reshape(array.shape)

    def gather(self, data: bytes) -> list[bytes]:
        """Every worker's bytes, in rank order; all call it at the same point."""
        return [data] if self.backend is None else self.backend.gather(data)

    def tracing(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Names what is traced within, as all workers do; what had the name before was forgotten, see `forget`."""
        return contextlib.nullcontext() if self.backend is None else self.backend.tracing(name)

    def forget(self, name: str) -> None:
        """Forgets what was traced by a name and is no longer called; all do so before one of them uses it again."""
        if self.backend is not None:
            self.backend.forget(name)

    def again(self) -> "Replicas":
        """Makes them for as many workers as have met now; what was built with these is of no use any more."""
        assert self.backend is not None
        made = over(self.backend, self.topology.local, self.collectives.pack_bytes)
        (what, _, _), (_, _, how) = made.description.rpartition("; "), self.description.rpartition("; ")
        return dataclasses.replace(made, description=f"{what}; {how}", host=self.host, membership=self.membership)

    def finish(self) -> None:
        """Waits until all workers have done their part; all call it last, so that none takes another for lost."""
        if self.backend is None:
            return
        self.backend.finish()
        if self.is_chief and isinstance(self.strategy, tf.distribute.MultiWorkerMirroredStrategy):
            outlive(self.backend.workers[1:])


@dataclasses.dataclass(frozen=True)
class ReplicaOptions:
    """Says which replicas to make, and how workers reach each other; bound under `replicas.`.

    Attributes:
        kind: 'default' (one device), 'mirrored' (all GPUs of this host, or `cpu` simulated replicas where it has
            none), 'multi_worker' (the cluster in TF_CONFIG), or 'auto': multi_worker if TF_CONFIG names a cluster,
            else mirrored if there are several GPUs or `cpu` > 1, else default.
        cpu: how many logical CPU devices act as replicas where there is no GPU, on each worker.
        transport: what gradients travel by between workers: 'sockets' (connections of our own), 'tensorflow' (its
            collectives, and its server, which listens on all addresses; for fast networks between GPUs), or 'auto':
            sockets.
        pack_bytes: up to how many bytes of gradients travel as one.
        congestion: the kernel's congestion control for the sockets; None is the system's. Replicas in lock step wait
            for the slowest exchange, and on a shaped link cubic's are the steadiest; a lossy one may need 'bbr'.
        start_seconds: in which all workers must have started.
        patience_seconds: how long another worker may be silent until it is given up.
        rejoin_seconds: how long the workers that are left wait for one in place of a lost one, where launch/local or
            launch/hosts has started them; then they go on without it, where the batch divides, until it comes. 0: all
            start again at once, from the last checkpoint.
        buddy: whether each worker keeps a copy of what the one before it alone has, such as residuals, and gives it to
            the one that comes in its place; it is sent after each call of the step. Otherwise that is lost.
        seal: whether all that travels over the sockets has tags, by which a change on the way is noticed; it costs
            about 1.6 ms of one core a MiB, half of it on each side. None: where the workers know a secret and are not
            all on loopback addresses and do without TLS.
        tls: whether the sockets are encrypted, by TLS 1.3: True, where the secret that all workers know makes the
            certificates, or a folder with a worker's own `tls.crt`, `tls.key` and `ca.crt`; about 1 ms of one core a
            MiB, half of it on each side.
        allow_no_secret: whether workers on other addresses may do without a secret, so that whoever reaches them
            while they start can pass for one.

    Raises:
        UserError: a value is not one of these.

    Examples:
        >>> ReplicaOptions(cpu=0)
        Traceback (most recent call last):
        dist_partial.errors.UserError: replicas.cpu is 0: it must be a whole number of at least 1
    """

    kind: Annotated[str, OneOf(*KINDS)] = "auto"
    cpu: Annotated[int, AtLeast(1)] = 1
    transport: Annotated[str, OneOf(*TRANSPORTS)] = "auto"
    pack_bytes: Annotated[int, AtLeast(1)] = PACK_BYTES
    congestion: str | None = "cubic"
    start_seconds: Annotated[float, Above(0)] = 300.0
    patience_seconds: Annotated[float, Above(0)] = 60.0
    rejoin_seconds: Annotated[float, AtLeast(0)] = 120.0
    buddy: bool = False
    seal: bool | None = None
    tls: Annotated[bool | str, "write True, False or a folder of tls.crt, tls.key and ca.crt"] = False
    allow_no_secret: bool = False

    def __post_init__(self) -> None:
        check(self, "replicas")

    def prepare(self) -> None:
        """Makes what `connect` needs of TensorFlow, before anything else starts it, as a metric does."""
        _add_threads(self.transport)
        if self.cpu > 1 and not tf.config.list_physical_devices("GPU"):
            with contextlib.suppress(UserError):  # `connect` raises it, if they are needed
                simulated(self.cpu)

    def connect(self) -> Replicas:
        """Makes the distribution strategy, and connects the workers.

        Call it before TensorFlow has run any op: devices cannot be added later.

        Raises:
            UserError: malformed TF_CONFIG, no secret where one is needed, unfit certificates, or devices that cannot
                be made.
            Fault: workers are missing when `start_seconds` are over.
        """
        _add_threads(self.transport)
        cluster = read_tf_config(os.environ.get("TF_CONFIG", ""))
        gpus = len(tf.config.list_logical_devices("GPU")) if tf.config.list_physical_devices("GPU") else 0
        kind, reason = self.kind, ""
        if kind == "auto":
            kind, reason = _chosen(bool(cluster), gpus, self.cpu)
        if kind == "multi_worker":
            return _multi_worker(self, cluster, reason)
        if self.transport == "sockets":
            raise UserError(
                "replicas.transport = 'sockets' connects the workers of TF_CONFIG; here there is one process"
            )
        collectives = Collectives(pack_bytes=self.pack_bytes)
        if kind == "default":
            return Replicas(tf.distribute.get_strategy(), collectives, f"replicas: 1, default strategy{reason}")
        devices, what = _devices(self.cpu)
        description = f"replicas: {len(devices)}, MirroredStrategy over {what}{reason}"
        return Replicas(_mirrored(tuple(devices)), collectives, description)


def over(backend: WorkerBackend, cpu: int = 1, pack_bytes: int = PACK_BYTES) -> Replicas:
    """Makes the replicas of this worker, which a backend joins to those of the others.

    Args:
        backend: what joins the workers.
        cpu: how many logical CPU devices act as replicas of this worker, where it has no GPU.
        pack_bytes: up to how many bytes of gradients travel as one.

    Examples:
        >>> class Alone(WorkerBackend):
        ...     rank, size, workers = 0, 1, ["this one"]
        ...     def gather(self, data):
        ...         return [data]
        >>> print(over(Alone()).description)
        replicas: 1, 1 worker with the CPU each, this is worker 0; gradients travel by Alone
    """
    devices, what = _devices(cpu)
    strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=HostBridge(backend))
    _collectives[strategy] = collectives = Collectives(backend, pack_bytes)
    return Replicas(
        strategy,
        collectives,
        f"replicas: {len(devices) * backend.size}, {counted(backend.size, 'worker')} with {what} each, this is worker "
        f"{backend.rank}; gradients travel by {type(backend).__name__}",
        backend,
    )


def collectives_of(strategy: tf.distribute.Strategy) -> Collectives:
    """Finds out how the replicas of a strategy reach each other, and those of other workers that it was connected to.

    Examples:
        >>> collectives_of(tf.distribute.get_strategy()).backend.two_levels  # TensorFlow's collectives
        False
    """
    return _collectives.get(strategy) or Collectives()


def joined_by(strategy: tf.distribute.Strategy) -> WorkerBackend | None:
    """Finds out what joins this worker's strategy to those of the others; None where nothing does.

    Examples:
        >>> print(joined_by(tf.distribute.get_strategy()))
        None
    """
    backend = collectives_of(strategy).backend
    return backend if isinstance(backend, WorkerBackend) else None


def create(kind: str = "auto", cpu: int = 1, **options: Any) -> Replicas:
    """Makes the replicas and connects the workers: `ReplicaOptions(kind, cpu, **options).connect()`.

    Examples:
        >>> print(create("default").description)
        replicas: 1, default strategy
    """
    return ReplicaOptions(kind, cpu, **options).connect()


@functools.cache
def _mirrored(devices: tuple[str, ...]) -> tf.distribute.Strategy:
    compat.skip_collective_keys(_KEYS)  # those of an earlier run of this process, or of the user's own strategy
    return tf.distribute.MirroredStrategy(list(devices))


def _devices(cpu: int) -> tuple[list[str], str]:
    """The devices of this process's replicas, and what they are."""
    if gpus := tf.config.list_physical_devices("GPU"):
        names = [f"GPU:{i}" for i in range(len(tf.config.list_logical_devices("GPU")))]
        return names, counted(len(gpus), "GPU")
    return simulated(cpu), f"{cpu} simulated on the CPU" if cpu > 1 else "the CPU"


def _chosen(cluster: bool, gpus: int, cpu: int) -> tuple[str, str]:
    """The kind that 'auto' means here, and why."""
    if cluster:
        return "multi_worker", " (TF_CONFIG names a cluster)"
    if gpus > 1 or (gpus == 0 and cpu > 1):
        return "mirrored", f" ({gpus} GPUs here)" if gpus else f" (no GPU here, replicas.cpu = {cpu})"
    return "default", " (one GPU here)" if gpus else " (no GPU here, replicas.cpu = 1)"


def simulated(count: int) -> list[str]:
    """Makes at least so many logical devices on the CPU, before TensorFlow has started; returns the names of these.

    Examples:
        >>> simulated(1)
        ['CPU:0']

    Raises:
        UserError: TensorFlow has started with fewer.
    """
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        if len(tf.config.get_logical_device_configuration(cpu) or [None]) < count:
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError:
        raise UserError(
            f"replicas.cpu = {count} comes too late: TensorFlow has started with fewer CPU devices; restart Python, or "
            f"the notebook's kernel, and call dist_partial.devices({count}) before anything else uses TensorFlow"
        ) from None
    return [f"CPU:{i}" for i in range(count)]


def _add_threads(transport: str) -> None:
    """Lets TensorFlow have two threads more than cores, where sockets join workers and nobody has said how many.

    What a step needs of other workers holds one thread while it travels, and a delayed exchange another; with as many
    threads as cores, steps would have fewer to compute with.
    """
    if not os.environ.get("TF_CONFIG") or transport == "tensorflow":
        return
    if not (os.environ.get("TF_NUM_INTEROP_THREADS") or tf.config.threading.get_inter_op_parallelism_threads()):
        with contextlib.suppress(RuntimeError):  # TensorFlow has started
            tf.config.threading.set_inter_op_parallelism_threads(len(os.sched_getaffinity(0)) + 2)


def _multi_worker(options: ReplicaOptions, cluster: dict[str, Any] | None, reason: str) -> Replicas:
    if cluster is None:
        raise UserError("replicas.kind is 'multi_worker', but TF_CONFIG names no cluster: set it on every worker")
    everyone = [address for kind in ("chief", "worker") for address in cluster["cluster"].get(kind, [])]
    task = cluster["task"]
    rank = everyone.index(cluster["cluster"][task["type"]][task["index"]])
    tensorflow = options.transport == "tensorflow"
    if tensorflow and options.tls is not False:
        raise UserError("replicas.tls encrypts the sockets, and replicas.transport is 'tensorflow': unbind one of them")
    cpu = 1 if tensorflow else options.cpu  # its strategy takes one CPU
    _, what = _devices(cpu)  # which may fail: before anybody waits for the others
    started = threading.Event()  # before, TensorFlow has no collectives to abort, and would make others then
    control = None if tensorflow or not options.rejoin_seconds else membership.control()
    joins = control is not None and JOINS in os.environ
    secret = os.environ.get(SECRET, "")
    connected = TCPBackend(
        rank,
        everyone,
        None if joins else _connect(options, rank, everyone, secret),
        options.patience_seconds,
        lambda reason: _abort(reason) if started.is_set() else None,
    )
    if tensorflow:
        strategy = workers_strategy(options.patience_seconds)
        started.set()
        if lost := connected.lost():
            _abort(str(lost))
        made = Replicas(strategy, Collectives(TensorFlowBackend(), options.pack_bytes), "", connected)
        how = "MultiWorkerMirroredStrategy, by TensorFlow's collectives (replicas.transport = 'tensorflow')"
        how += f", which take one CPU each, and not replicas.cpu = {options.cpu}" if options.cpu > cpu else ""
    else:
        made = over(connected, cpu, options.pack_bytes)
        auto = ", for they need no server that listens (replicas.transport = 'auto')"
        encrypted = "" if options.tls is False else " in TLS 1.3"
        how = f"direct connections{encrypted}{auto if options.transport == 'auto' else ''}"
    count = made.topology.replicas
    description = (
        f"replicas: {count}, {counted(len(everyone), 'worker')} with {what} each, this is {task['type']} "
        f"{task['index']}{reason}; gradients travel by {how}"
    )
    member = None
    if control is not None:

        def meet(epoch: Epoch, abandoned: Callable[[], bool]) -> dict[int, handshake.Link]:
            soon = dataclasses.replace(options, start_seconds=min(options.start_seconds, options.rejoin_seconds))
            return _connect(soon, connected.rank, epoch.workers, epoch.secret, abandoned)

        member = Membership(control, connected, meet, options.rejoin_seconds, joins, options.buddy)
    host = everyone[rank].rpartition(":")[0].strip("[]")
    return dataclasses.replace(made, description=description, host=host, membership=member)


def _connect(
    options: ReplicaOptions,
    rank: int,
    workers: Sequence[str],
    secret: str,
    abandoned: Callable[[], bool] = lambda: False,
) -> dict[int, handshake.Link]:
    """Connects by a secret; without one only on loopback, or where that is allowed."""
    loopback = rendezvous.on_loopback(workers)
    if not secret and len(workers) > 1:
        what = (
            f"no {SECRET}: whoever reaches {workers[rank]} while workers start can pass for one; set the "
            "same on all, such as `openssl rand -hex 32` draws"
        )
        if not (loopback or options.allow_no_secret):
            raise UserError(f"{what}, or bind replicas.allow_no_secret = True")
        say(f"warning: {what}", sys.stderr)
    credentials = tls.credentials(options.tls, secret, split(workers[rank])[0]) if len(workers) > 1 else None
    seal = bool(secret) and not (loopback or credentials) if options.seal is None else options.seal
    links = rendezvous.connect(rank, workers, options.start_seconds, secret, seal, credentials, abandoned)
    rendezvous.set_congestion(links, options.congestion)
    return links


def _abort(reason: str) -> None:
    compat.abort_collectives(reason)  # which would wait for the lost worker for ever, or for half a minute
