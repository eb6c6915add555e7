"""python -m dist_partial.train --gin_file=F [--gin_file=G ...] [--gin_param='a.b=c' ...] [--run_dir=DIR]

Trains the variables that the rules select, evaluates, samples and saves; the same command again goes on.

A gin file is a program: this imports the modules that it names. Read one that is not yours first.
"""

import sys
from collections.abc import Sequence

from absl import flags

from dist_partial import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    Returns:
        0; 1 after an exception of the user's own code, 2 after a mistake, 130 after Ctrl-C, 75 to try again.
    """
    values = flags.FlagValues()
    cli.define_gin_flags(values)
    flags.DEFINE_string("run_dir", None, "run folder; default: runs/<name of the last gin file>", flag_values=values)

    with cli.ending() as ended:
        cli.parse(__doc__, values, argv)
        cli.check_gin_file(values)
        cli.import_tensorflow_quietly()
        from dist_partial.config import gin_files
        from dist_partial.training import loop

        loaded = gin_files.load(values.gin_file, values.gin_param)
        folder = cli.run_folder(values.run_dir, values.gin_file)
        loop.run(loaded.settings, folder, loaded.operative, loaded.unused, loaded.bindings)
    return ended.code


if __name__ == "__main__":
    sys.exit(main())
