"""Which workers there are and which of them this is: TF_CONFIG, read and checked, or made of what a scheduler says."""

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_partial.errors import UserError
from dist_partial.validation import nearest

SECRET = "DIST_PARTIAL_SECRET"  # the environment variable; the launchers draw one

# Environment variables of workers that a launcher has started, see `membership`.
CONTROL = "DIST_PARTIAL_CONTROL"  # the number of the socket to the launcher
JOINS = "DIST_PARTIAL_JOINS"  # is set where a worker comes in place of a lost one

_PORT = 2222  # of a worker whose address names none; TensorFlow's own documents and Kubeflow use it

# Where a Slurm job's ports begin without DIST_PARTIAL_PORT: below 32768, from where on Linux hands out ports to whoever
# asks for any. Two jobs of up to 64 tasks a node meet only if their ids are a multiple of 352 apart.
_FIRST_PORT, _PORTS_OF_A_JOB, _BLOCKS = 10000, 64, 352


def tf_config(kind: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """Makes the content of TF_CONFIG from the variables that a scheduler gives each worker.

    Args:
        kind: 'slurm' (the variables that srun sets for a task; see srun(1), "OUTPUT ENVIRONMENT VARIABLES") or
            'kubernetes' (JOB_COMPLETION_INDEX, which Kubernetes sets in the pods of an indexed Job, and
            DIST_PARTIAL_HOSTS, a comma-separated list of 'host' or 'host:port', one for each index).
        environ: the worker's environment. On Slurm DIST_PARTIAL_PORT is the port of a node's first worker; without it
            one is derived from the job's id, so that two jobs on one node do not meet.

    Returns:
        `{"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index"}}`, as `read_tf_config` does.

    Raises:
        UserError: a variable is missing or malformed; the message names it.

    Examples:
        >>> config = tf_config("kubernetes", {"JOB_COMPLETION_INDEX": "1", "DIST_PARTIAL_HOSTS": "a,b:5000"})
        >>> config["cluster"], config["task"]["index"]
        ({'worker': ['a:2222', 'b:5000']}, 1)
    """
    if kind not in ("slurm", "kubernetes"):
        raise UserError(f"unknown kind of cluster {kind!r}: write 'slurm' or 'kubernetes'")
    workers, index, source = (_slurm if kind == "slurm" else _kubernetes)(environ)
    config = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
    try:
        read_tf_config(json.dumps(config))
    except UserError as error:
        raise UserError(f"{source} make no valid TF_CONFIG: {error}") from None
    return config


def _slurm(environ: Mapping[str, str]) -> tuple[list[str], int, str]:
    import tensorflow as tf

    advice = "start the workers by srun, as launch/slurm.sbatch does"
    job, local, tasks, _ = (
        _whole_number(environ, name, advice)
        for name in ("SLURM_JOB_ID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")
    )
    nodes, tasks_per_node, node = (
        _variable(environ, name, advice)
        for name in ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURMD_NODENAME")
    )
    source = f"SLURM_STEP_NODELIST={nodes!r} and SLURM_STEP_TASKS_PER_NODE={tasks_per_node!r}"
    port = _FIRST_PORT + job % _BLOCKS * _PORTS_OF_A_JOB
    if environ.get("DIST_PARTIAL_PORT"):
        port = _whole_number(environ, "DIST_PARTIAL_PORT", "write the port of a node's first worker, such as 20000")
        source += f" and DIST_PARTIAL_PORT={port}"
    try:
        with _environment(environ):  # which is all that the resolver reads
            # It deals a node's GPUs out to its tasks: by itself it would run nvidia-smi, and fail where there is none.
            # srun does that (--gpus-per-task), so the numbers only have to be enough for any number of tasks.
            resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
                port_base=port, gpus_per_node=2**16, gpus_per_task=1, auto_set_gpu=False
            )
            workers = resolver.cluster_spec().as_dict().get("worker", [])
    except (ValueError, RuntimeError) as error:
        raise UserError(f"{source} and SLURM_STEP_NUM_TASKS={tasks} do not fit together ({error}): {advice}") from None
    # Not SLURM_PROCID: the resolver (TensorFlow 2.21) sorts nodes by name, node10 before node9, and Slurm does not, nor
    # need ranks go along the nodes (--distribution=cyclic). Each worker must be at the address that has its index.
    here = f"{node}:{port + local}"
    if here not in workers:
        raise UserError(f"SLURMD_NODENAME={node!r} and SLURM_LOCALID={local} are no task of {source}: {advice}")
    return workers, workers.index(here), source


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Adds variables to the process's environment for a while."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _kubernetes(environ: Mapping[str, str]) -> tuple[list[str], int, str]:
    hosts = _variable(environ, "DIST_PARTIAL_HOSTS", "list a 'host' or 'host:port' for each index, separated by commas")
    index = _whole_number(environ, "JOB_COMPLETION_INDEX", "give the Job completionMode: Indexed")
    workers = [host.strip() for host in hosts.split(",")]
    # A colon in brackets is of an IPv6 address.
    workers = [host if not host or ":" in host.rpartition("]")[2] else f"{host}:{_PORT}" for host in workers]
    return workers, index, f"JOB_COMPLETION_INDEX={index} and DIST_PARTIAL_HOSTS={hosts!r}"


def _variable(environ: Mapping[str, str], name: str, advice: str) -> str:
    if not environ.get(name, "").strip():
        raise UserError(f"{name} is not set: {advice}")
    return environ[name]


def _whole_number(environ: Mapping[str, str], name: str, advice: str) -> int:
    text = _variable(environ, name, advice).strip()
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{name} is {text!r}, not a whole number: {advice}")
    return int(text)


def read_tf_config(text: str) -> dict[str, Any] | None:
    """Parses and checks TF_CONFIG.

    Args:
        text: the variable's value; empty, or without a cluster, means that there is none.

    Returns:
        `{"cluster": {"worker": ["host:port", ...]}, "task": {"type", "index"}}`, or None.

    Raises:
        UserError: it is not JSON, or names no valid task of a valid cluster.

    Examples:
        >>> text = '{"cluster": {"worker": ["10.0.0.1:5000", "10.0.0.2:5000"]}, "task": {"type": "worker", "index": 1}}'
        >>> read_tf_config(text)["task"]["index"]
        1
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


def split(address: str) -> tuple[str, int]:
    """Splits a worker's address into host and port; an IPv6 address loses its brackets.

    Examples:
        >>> split("[::1]:5000")
        ('::1', 5000)
    """
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _is_address(address: Any) -> bool:
    host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65536


def unresolved(host: str) -> str:
    """Says why a host's name has no address on this machine, and which names are near; '' if it has one.

    Examples:
        >>> unresolved("127.0.0.1")
        ''
    """
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"{error.strerror}{near(host)}"
    return ""


def near(host: str) -> str:
    """Lists the names like it in this machine's own lists, as the end of a message, or ''."""
    names: set[str] = set()
    for path in (Path("/etc/hosts"), Path("~/.ssh/config").expanduser()):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            if re.match(r"\s*(Host\s|[0-9a-fA-F.:]+\s)", line):
                names.update(line.partition("#")[0].split()[1:])
    return nearest(host, sorted(names))
