"""Which strategy: one device, GPUs, simulated CPU replicas, or the workers of TF_CONFIG."""

import json
import os
from typing import Any

import tensorflow as tf

from dist_partial.errors import UserError

KINDS = ("auto", "default", "mirrored", "multi_worker")


def create(kind: str = "auto", cpu: int = 1) -> tuple[tf.distribute.Strategy, str]:
    """Makes the distribution strategy.

    Call it before TensorFlow has run any op: devices cannot be added later.

    Args:
        kind: 'default' (one device), 'mirrored' (all GPUs of this host, or `cpu` simulated replicas where it has
            none), 'multi_worker' (the cluster in TF_CONFIG), or 'auto': multi_worker if TF_CONFIG names a cluster,
            else mirrored if there are several GPUs or `cpu` > 1, else default.
        cpu: how many logical CPU devices act as replicas where there is no GPU.

    Returns:
        The strategy, and one line that says what was picked and why.

    Raises:
        UserError: unknown kind, malformed TF_CONFIG, or devices that cannot be made.
    """
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
        return _multi_worker(cluster, reason)
    if kind == "default":
        return tf.distribute.get_strategy(), f"replicas: 1, default strategy{reason}"
    devices = [f"GPU:{i}" for i in range(gpus)] or _simulated(cpu)
    what = f"{gpus} GPUs" if gpus else f"{cpu} simulated on the CPU"
    return tf.distribute.MirroredStrategy(devices), f"replicas: {len(devices)}, MirroredStrategy over {what}{reason}"


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


def read_tf_config(text: str) -> dict[str, Any] | None:
    """Parses and checks TF_CONFIG.

    Args:
        text: the variable's value; empty, or without a cluster, means that there is none.

    Returns:
        `{"cluster": {"worker": ["host:port", ...]}, "task": {"type", "index"}}`, or None.

    Raises:
        UserError: it is not JSON, or names no valid task of a valid cluster.
    """
    if not text.strip():
        return None
    example = '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"TF_CONFIG is not JSON ({error}): write e.g. {example}") from None
    if not isinstance(config, dict):
        raise UserError(f"TF_CONFIG is a JSON {type(config).__name__}: write e.g. {example}")
    cluster, task = config.get("cluster"), config.get("task")
    if not cluster:
        return None
    if not isinstance(cluster, dict) or not set(cluster) <= {"chief", "worker", "evaluator", "ps"}:
        raise UserError(
            f"TF_CONFIG's cluster is {cluster!r}: it maps 'worker' (and 'chief') to addresses, e.g. {example}"
        )
    if set(cluster) & {"evaluator", "ps"}:
        raise UserError("TF_CONFIG's cluster has an 'evaluator' or 'ps': only 'worker' and 'chief' take part here")
    for kind, addresses in cluster.items():
        if not isinstance(addresses, list) or not all(_is_address(address) for address in addresses):
            raise UserError(f"TF_CONFIG's cluster[{kind!r}] is {addresses!r}: write a list of 'host:port'")
    everyone = [address for addresses in cluster.values() for address in addresses]
    for address in everyone:
        if everyone.count(address) > 1:
            raise UserError(f"TF_CONFIG names {address} twice: every worker has an address of its own")
    if not isinstance(task, dict) or task.get("type") not in list(cluster) or type(task.get("index")) is not int:
        raise UserError(
            f"TF_CONFIG's task is {task!r}: write its type ({' or '.join(cluster)}) and index, e.g. {example}"
        )
    if not 0 <= task["index"] < len(cluster[task["type"]]):
        raise UserError(
            f"TF_CONFIG's task index is {task['index']}, but the cluster has {len(cluster[task['type']])} of type "
            f"{task['type']!r}: count from 0"
        )
    return {"cluster": cluster, "task": task}


def _is_address(address: Any) -> bool:
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65536


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


def _multi_worker(cluster: dict[str, Any] | None, reason: str) -> tuple[tf.distribute.Strategy, str]:
    if cluster is None:
        raise UserError("replicas.kind is 'multi_worker', but TF_CONFIG names no cluster: set it on every worker")
    workers = sum(len(addresses) for addresses in cluster["cluster"].values())
    task = cluster["task"]
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    return strategy, (
        f"replicas: {strategy.num_replicas_in_sync}, MultiWorkerMirroredStrategy over {workers} workers, this is "
        f"{task['type']} {task['index']}{reason}"
    )
