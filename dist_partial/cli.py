"""What the commands share: reading flags, and errors in one line with exit code 2."""

import os
import sys
from collections.abc import Callable, Sequence

from absl import flags

from dist_partial.errors import UserError

__all__ = ["UserError", "call", "quiet_tensorflow"]


def quiet_tensorflow() -> None:
    """Keeps TensorFlow's start-up notes off the terminal; call it before TensorFlow is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def call(usage: str | None, values: flags.FlagValues, argv: Sequence[str] | None, command: Callable[[], int]) -> int:
    """Parses the flags and runs the command.

    Args:
        usage: what --help prints before the flags.
        values: the command's flags.
        argv: arguments without the program's name; None takes the process's own.
        command: returns an exit code; reads `values`.

    Returns:
        The command's exit code, or 2 after an error in the flags or a `UserError`.
    """
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
    try:
        rest = values([sys.argv[0], *(sys.argv[1:] if argv is None else argv)])[1:]
        if values.help:
            print(f"{usage}\n{values.main_module_help() or values.get_help()}")
            return 0
        if rest:
            raise UserError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
        return command()
    except (UserError, flags.Error) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
