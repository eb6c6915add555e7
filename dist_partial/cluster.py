"""Which workers there are and which of them this is: TF_CONFIG, read and checked."""

import json
from typing import Any

from dist_partial.errors import UserError


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
