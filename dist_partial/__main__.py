"""dist-partial COMMAND [flags]: one name for all commands; `python -m dist_partial COMMAND` is the same."""

import importlib.util
import os
import sys
from collections.abc import Sequence

from dist_partial import cli
from dist_partial.validation import nearest

# Each is a module `dist_partial.COMMAND` with a function `main(argv)`, or a package with that module's `__main__`.
COMMANDS = {
    "train": "Trains what the rules of a gin file select.",
    "sample": "Generates text from the newest checkpoint of a run folder.",
    "plan": "Prints what a step would send, hold and take, without training.",
    "export": "Writes what a run has trained: a delta, an adapter of PEFT, or a whole model.",
    "launch": "Starts the workers of a run, and starts them again after a fault.",
    "selfcheck": "Tries on this machine what a training needs, GPUs too, and prints a table.",
    "report": "Writes one HTML page about one or several run folders.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command with the arguments that follow its name.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        The exit code of the command; 2 if there is no such command.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help", "help"):
        with cli.ending() as ended:
            print(_help())
        return ended.code
    if name not in COMMANDS:
        what = f"no command {name!r}" if name else "no command"
        problem = f"{what}{nearest(name, COMMANDS) or ': write ' + ', '.join(COMMANDS)}"
        print(f"error: {problem} (dist-partial --help lists them)", file=sys.stderr)
        return 2
    if not {"", os.getcwd()} & set(sys.path):  # gin files import from here, as under `python -m`
        sys.path.insert(0, os.getcwd())
    spec = importlib.util.find_spec(f"dist_partial.{name}")
    assert spec is not None
    package = spec.submodule_search_locations is not None
    code: int = importlib.import_module(f"{spec.name}.__main__" if package else spec.name).main(rest)
    return code


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, line in COMMANDS.items()]
    return "\n".join(
        ["usage: dist-partial COMMAND [flags]", "", *lines, "", "dist-partial COMMAND --help lists the flags of one."]
    )


if __name__ == "__main__":
    sys.exit(main())
