"""python -m dist_partial.report --run_dir=DIR [--run_dir=DIR2 ...] [--output=report.html]

Writes one HTML page that needs nothing but itself: loss, bytes sent, what was trained when, the plan and the
samples of one or several run folders, which may be of runs that go on.
"""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dist_partial import cli
from dist_partial.errors import Fault
from dist_partial.files import write_text


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for a mistake of the user's."""
    values = flags.FlagValues()
    flags.DEFINE_multi_string("run_dir", [], "run folder; may be given several times", flag_values=values)
    flags.DEFINE_string("output", "report.html", "the page that is written", flag_values=values)

    def command() -> int:
        if not values.run_dir:
            raise cli.UserError("no --run_dir: name the folder of a run, such as --run_dir=runs/quickstart")
        output = Path(values.output)
        if output.suffix.lower() not in (".html", ".htm"):
            raise cli.UserError(f"--output={output} is to be a page: give it a name that ends in .html")
        if not output.parent.is_dir():
            raise cli.UserError(f"--output={output}: there is no folder {output.parent}; make it, or choose another")
        try:
            import jinja2  # noqa: F401
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise cli.UserError(
                f"the report needs {error.name}, which is not installed: pip install 'dist_partial[report]'"
            ) from None
        from dist_partial.report import page, runs

        text = page.page(runs.read([Path(folder) for folder in values.run_dir]))
        try:
            write_text(output, text)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Fault(f"cannot write {output}: {error.strerror}; free some space") from None
            raise cli.UserError(f"cannot write {output}: {error.strerror}; choose another --output") from None
        print(f"{output}: {os.path.getsize(output):,} bytes, open it in a browser")
        return 0

    return cli.call(__doc__, values, argv, command)


if __name__ == "__main__":
    sys.exit(main())
