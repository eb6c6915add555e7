"""Whether all workers run the same: compared before anything depends on it, so that a difference hangs nobody."""

import hashlib
import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.distributed.worker_backend import WorkerBackend
from dist_partial.errors import UserError
from dist_partial.validation import differences, shown

_SHOWN = 3  # differences in the message


def check(backend: WorkerBackend, facts: dict[str, Any]) -> None:
    """Compares the facts of all workers, which all call it at the same point.

    Args:
        backend: connects them.
        facts: names and JSON values.

    Raises:
        UserError: they differ; the same message on every worker says where.
    """
    text = json.dumps(facts, sort_keys=True).encode()
    if len(set(backend.gather(hashlib.sha256(text).digest()))) == 1:
        return
    everyone = [json.loads(each) for each in backend.gather(text)]
    for rank, theirs in enumerate(everyone):
        if found := differences(everyone[0], theirs):
            first = "; ".join(_in_words(*each) for each in found[:_SHOWN])
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            drawn = any(name.startswith(("initial", "frozen")) for name, _, _ in found)
            seed = ", and draw the same weights by keras.utils.set_random_seed(0) above the model" if drawn else ""
            raise UserError(
                f"{names(backend, [rank])} runs something else than {names(backend, [0])}: {first}{more}; start all "
                f"workers with the same files, data and versions{seed}"
            )


def _in_words(name: str, here: Any, there: Any) -> str:
    if all(re.fullmatch(r"[0-9a-f]{16,}", str(value)) for value in (here, there)):  # digests, which say no more
        return f"{name} differs"
    return f"{name}: {shown(there)} against {shown(here)}"


def everyone(backend: WorkerBackend | None, value: int) -> list[int]:
    """Gathers every worker's value, in rank order; all call it at the same point.

    Examples:
        >>> everyone(None, 5)  # without other workers
        [5]
    """
    if backend is None:
        return [value]
    own = np.zeros(backend.size, np.int64)
    own[backend.rank] = value
    return backend.sum(own).tolist()  # one message, where `gather` takes two


def names(backend: WorkerBackend | None, ranks: Sequence[int]) -> str:
    """Names workers as messages do.

    Examples:
        >>> names(None, [0])  # without other workers
        'this process'
    """
    return ", ".join(f"worker {rank} ({backend.workers[rank]})" if backend else "this process" for rank in ranks)


def versions() -> dict[str, str]:
    """Collects the versions of Python and of packages whose numbers could differ, and a digest of this source.

    Examples:
        >>> versions()["numpy"] == np.__version__, len(versions()["dist_partial's source"])
        (True, 16)
    """
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        source.update(path.read_bytes())
    packages = {module.__name__: module.__version__ for module in (tf, keras, np)}
    return {"python": platform.python_version(), **packages, "dist_partial's source": source.hexdigest()[:16]}
