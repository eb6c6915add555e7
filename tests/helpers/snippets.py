"""The code blocks of a page of the documentation, and a program that runs them.

python -m tests.helpers.snippets PAGE [PAGE ...]

Every block has a language. The `sh` and `python` blocks of a page run in order, in a folder that looks like the
repository's root and has a short run of the quickstart in runs/quickstart. The python blocks share one namespace, and
whatever trains takes few steps of few examples. A `gin` block loads over gin_configs/quickstart.gin. Comments directly
before a block:

    <!-- not run: REASON -->    the block is not run
    <!-- over: FILE -->         a gin block loads over this file instead
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

from tests import ROOT

RUN = ("sh", "gin", "python")
LANGUAGES = (*RUN, "text", "json", "yaml")
ELSEWHERE = ("quickstart", "tests")  # marks of the README's commands, which .ci/run runs in new environments
FEW = ("run.steps = 20", "run.eval_examples = 32", "sample.length = 20")
BATCH = "run.global_batch = 32", "run.global_batch = 8"  # of base.gin, and what a page's commands read in its place
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<language>[^\n`]*)\n(?P<code>.*?)^(?P=indent)(?P=fence) *$", re.M | re.S
)
_NOTES = re.compile(r"(?:^ *<!-- .* -->\n)+\Z", re.M)
# What `python` and `dist-partial` are on the PATH of a block: the interpreter that runs this, with few steps.
_SHIM = """#!/bin/sh
export PYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}{root}"
case " $*" in
  *" train "*|*"dist_partial.train "*|*"launch local "*|*"launch hosts "*) set -- "$@" {few} ;;
esac
exec {command} "$@"
"""


@dataclasses.dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: the file.
        line: of its first line of code.
        language: as the fence names it.
        code: its text, without the indentation of the fence.
        notes: the comments directly before it.
    """

    page: Path
    line: int
    language: str
    code: str
    notes: tuple[str, ...]

    @property
    def runs(self) -> bool:
        return self.language in RUN and not any(note in ELSEWHERE or note.startswith("not run") for note in self.notes)

    @property
    def over(self) -> str:
        """The gin file over which a gin block loads."""
        return next((note[6:] for note in self.notes if note.startswith("over: ")), "gin_configs/quickstart.gin")

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}, line {self.line}"


def pages() -> list[Path]:
    """The pages that people write."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        before = _NOTES.search(text[: match.start()])
        notes = tuple(re.findall(r"<!-- (.*) -->", before[0] if before else ""))
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(page, line, match["language"].strip(), textwrap.dedent(match["code"]), notes))
    return found


def page_module(page: str, name: str, folder: Path) -> ModuleType:
    """The module that a page has its reader save as `name`.py, saved in the folder and imported.

    Args:
        page: its path below docs/.
        name: of the module.
        folder: where it is saved.
    """
    code = "".join(block.code for block in blocks(ROOT / "docs" / page))
    [text] = re.findall(rf"^cat > {name}\.py <<'END'\n(.*?)^END$", code, re.M | re.S)
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def headings(block: Block) -> tuple[str, ...]:
    """The headings above a block, from that of the page down to its own."""
    above = "".join(block.page.read_text(encoding="utf-8").splitlines(keepends=True)[: block.line - 1])
    found: list[str] = []
    for marks, text in re.findall(r"^(#+) (.*)$", FENCE.sub("", above), re.M):
        found[len(marks) - 1 :] = [text]
    return tuple(found)


def make_folder(folder: Path) -> None:
    """Makes a folder that looks like the repository's root, with `bin` for the PATH of its commands."""
    for name in ("gin_configs", "launch"):
        shutil.copytree(ROOT / name, folder / name)
    base = folder / "gin_configs" / "base.gin"
    text = base.read_text()
    assert text.count(BATCH[0]) == 1
    base.write_text(text.replace(*BATCH))
    few = " ".join(f'"--gin_param={binding}"' for binding in FEW)
    for name, command in {"bin/python": "", "bin/dist-partial": "-m dist_partial", ".venv/bin/python": ""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = _SHIM.format(root=ROOT, few=few, command=f"{sys.executable} {command}".strip())
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def shell(code: str, folder: Path) -> None:
    """Runs a sh block in the folder.

    Raises:
        subprocess.CalledProcessError: a command of it failed.
    """
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=folder, env=environment, check=True)


def run(page: Path, folder: Path) -> None:
    """Runs the sh and python blocks of a page, in order, in the folder."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    sys.path.insert(0, str(folder))
    with contextlib.chdir(folder):
        for block in blocks(page):
            if not block.runs or block.language == "gin":
                continue
            print(f"--- {block}", flush=True)
            if block.language == "sh":
                shell(block.code, folder)
            else:
                exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_folder(folder)
        shell("dist-partial train --gin_file=gin_configs/quickstart.gin", folder)
        for page in sys.argv[1:]:
            run(Path(page).resolve(), folder)


if __name__ == "__main__":
    main()
