"""Messages in the words of Python, `steps=5`, where a gin file has `run.steps = 5`: the one place that translates."""

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Iterator

from dist_partial.config.gin_files import _OURS
from dist_partial.config.settings import Sampling, Settings
from dist_partial.distributed.replicas import ReplicaOptions
from dist_partial.errors import Ending, Interrupted
from dist_partial.terminal import speaking

_NAMES = {
    prefix: "|".join(field.name for field in dataclasses.fields(owner))
    for prefix, owner in (("run", Settings), ("sample", Sampling), ("replicas", ReplicaOptions))
}
_NAMED = "|".join(rf"{prefix}\.(?:{names})" for prefix, names in _NAMES.items())
# Of reductions and schedules, such as `block_rotation`, which is Rotation.
_CLASSES = {name: each.__name__ for name, each in _OURS.items() if inspect.isclass(each) and name not in _NAMES}
_WORDS = (
    (r" \(in a gin file [^)]*\)|,? in a gin file [^;:]*", ""),
    # What `synonyms` has under a name that is no argument of `train`.
    (r"\bwrite run\.data, what makes the Dataset, whose evaluation these are", "write evaluation=..."),
    (r"\bwrite dist-partial train --run_dir", "write folder=..."),
    (r"\bwrite replicas\.cpu,", "write replicas=...,"),
    (r"\bwrite replicas\.(\w+),", r"write replicas=ReplicaOptions(\1=...),"),
    (r"\bwrite sample\.(\w+)", r"write sampling=Sampling(\1=...)"),
    (r"\bwrite Rule\.(\w+)", r"write Rule(..., \1=...)"),
    (r"\bwrite (Adam\w*)\.(\w+)", r"write optimizer=keras.optimizers.\1(\2=...)"),
    (r"\breplicas\.cpu = ", "replicas="),
    (rf"\b(?=(?:{_NAMED})\b)\w+\.(\w+) = ", r"\1="),
    (rf"\b(?=(?:{_NAMED})\b)\w+\.(?=\w)", ""),
    (r"(?<![\w.])@(?=[A-Za-z_])", ""),
    (r"\bbind (\w+) to more than", r"give \1 more than"),
    (r"\bbind\b", "give"),
    (r"\bbound\b", "given"),
    (r"--run_dir\b", "folder"),
    (r"\brun the same (?:training )?command again\b", "call train again with the same folder"),
    *((rf"(?<![\w./]){name}(?=[.(]\w*)", kind) for name, kind in _CLASSES.items()),
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
    """Turns what is said, and the message of what ends a run, into the words of Python.

    Examples:
        >>> from dist_partial.errors import UserError
        >>> with spoken():
        ...     raise UserError("run.best is 'acc'; choose another --run_dir")
        Traceback (most recent call last):
        dist_partial.errors.UserError: best is 'acc'; choose another folder
    """
    with speaking(in_python):
        try:
            yield
        except (Ending, Interrupted) as error:
            error.args = (in_python(str(error)), *error.args[1:])
            raise
