"""The one kind of error that is the user's to mend."""

import contextlib
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """A mistake in what the user wrote or pointed at.

    The message is one line: it names the thing, shows what was near it and says what to do. The
    command line prints it without a traceback and exits with 2.
    """


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure of the file system (full, read-only, no permission) into a `UserError` that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {path}: {reason}; free some space or choose another --run_dir") from None
