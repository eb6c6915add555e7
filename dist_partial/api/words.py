"""Messages in the words of Python: `steps=5` where a gin file has `run.steps = 5`."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

from dist_partial.config.settings import Sampling, Settings
from dist_partial.distributed.replicas import ReplicaOptions
from dist_partial.errors import Ending, Interrupted

_NAMES = {
    prefix: "|".join(field.name for field in dataclasses.fields(owner))
    for prefix, owner in (("run", Settings), ("sample", Sampling), ("replicas", ReplicaOptions))
}
_NAMED = "|".join(rf"{prefix}\.(?:{names})" for prefix, names in _NAMES.items())
_WORDS = (
    (r" \(in a gin file [^)]*\)|,? in a gin file [^;:]*", ""),
    (r"\breplicas\.cpu = ", "replicas="),
    (rf"\b(?=(?:{_NAMED})\b)\w+\.(\w+) = ", r"\1="),
    (rf"\b(?=(?:{_NAMED})\b)\w+\.(?=\w)", ""),
    (r"(?<![\w.])@(?=[a-z_])", ""),
    (r"\bbind\b", "give"),
    (r"--run_dir\b", "folder"),
    (r"\brun the same (?:training )?command again\b", "call train again with the same folder"),
)


def in_python(message: str) -> str:
    """Says for Python what a message says for gin files and commands.

    Examples:
        >>> in_python("run.steps is 0: it must be a whole number of at least 1")
        'steps is 0: it must be a whole number of at least 1'
        >>> in_python("run.loss is None: give a class, in a gin file @mine; or bind run.clip_norm = 1.0")
        'loss is None: give a class; or give clip_norm=1.0'
    """
    for pattern, words in _WORDS:
        message = re.sub(pattern, words, message)
    return message


@contextlib.contextmanager
def spoken() -> Iterator[None]:
    """Turns the messages of what ends a run into those of Python.

    Examples:
        >>> from dist_partial.errors import UserError
        >>> with spoken():
        ...     raise UserError("run.best is 'acc'; choose another --run_dir")
        Traceback (most recent call last):
        dist_partial.errors.UserError: best is 'acc'; choose another folder
    """
    try:
        yield
    except (Ending, Interrupted) as error:
        error.args = (in_python(str(error)), *error.args[1:])
        raise
