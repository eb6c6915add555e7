"""python -m dist_partial.launch.script SCRIPT [arguments of the script]

Runs a Python script as Python does, as one of several workers: what ends `dist_partial.train` in it is one line and the
exit code that a launcher knows.
"""

import atexit
import os
import runpy
import sys
from collections.abc import Sequence

from dist_partial import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a script; returns the exit code that it ends with, or that of what `dist_partial.train` has raised."""
    sys.argv = list(sys.argv[1:] if argv is None else argv)
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    with cli.ending() as ended:
        cli.import_tensorflow_quietly()
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as exit_:
            text = exit_.code if isinstance(exit_.code, str) else ""
            print(end=text and f"{text}\n", file=sys.stderr)
            ended.code = 1 if text else int(exit_.code or 0)
            if ended.code:
                sys.last_value = exit_
        except BaseException as error:
            sys.last_value = error  # as Python sets it; `fit.workers` says it to the other workers at exit
            raise
    return ended.code


if __name__ == "__main__":
    code = main()
    if code:
        # Python would destroy what the exception refers to while it shuts down, and an iterator of tf.data that reads
        # by Python code would wait for that code without end (TensorFlow 2.21).
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
