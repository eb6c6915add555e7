"""python -m dist_partial.train --gin_file=F [--gin_file=G ...] [--gin_param='a.b=c' ...] [--run_dir=DIR]

Trains the variables that the rules select, evaluates, samples and saves; the same command again goes on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dist_partial import cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 2 for a mistake of the user's, 130 after Ctrl-C."""
    values = flags.FlagValues()
    flags.DEFINE_multi_string("gin_file", [], "gin file; may be given several times", flag_values=values)
    flags.DEFINE_multi_string("gin_param", [], "binding over the files, such as run.steps=100", flag_values=values)
    flags.DEFINE_string("run_dir", None, "run folder; default: runs/<name of the last gin file>", flag_values=values)

    def command() -> int:
        if not values.gin_file:
            raise cli.UserError("no --gin_file: try --gin_file=gin_configs/quickstart.gin")
        cli.import_tensorflow_quietly()
        from dist_partial import config, run

        configuration = config.load(values.gin_file, values.gin_param)
        folder = Path(values.run_dir or Path("runs") / Path(values.gin_file[-1]).stem)
        try:
            run.run(configuration.settings, folder, configuration.operative, configuration.unused)
        except run.Interrupted as interrupted:
            print(interrupted)
            return cli.INTERRUPTED
        return 0

    return cli.call(__doc__, values, argv, command)


if __name__ == "__main__":
    sys.exit(main())
