"""The documentation tells the truth: its snippets run, its names exist, and the pages that are made say something."""

import contextlib
import dataclasses
import importlib.util
import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gin
import pytest

import dist_partial
from dist_partial import __main__ as commands
from dist_partial.config import gin_files
from tests import ROOT
from tests.helpers import snippets
from tests.helpers.marks import in_turns
from tests.helpers.shared import once
from tests.helpers.snippets import Block

PAGES = snippets.pages()
BLOCKS = [block for page in PAGES for block in snippets.blocks(page)]
RUNNING = [page for page in PAGES if any(b.runs and b.language != "gin" for b in BLOCKS if b.page == page)]
# Those that are not written in docs/, and link to what is.
LINKING = [ROOT / "README.md", *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / name).exists())]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def problem(block: Block) -> str:
    """What is wrong with the form of a block, or ""."""
    if block.language not in snippets.LANGUAGES:
        return f"its language is {block.language!r}: write one of {', '.join(snippets.LANGUAGES)}"
    for note in block.notes:
        if note.startswith("over: ") and block.language == "gin":
            if not (ROOT / block.over).is_file():
                return f"there is no {block.over}"
        elif note not in snippets.ELSEWHERE and not re.fullmatch(r"not run: .{5,}", note):
            return f"what is {note!r}? write <!-- not run: REASON --> or, before gin, <!-- over: FILE -->"
    if block.language == "python":
        compile(block.code, str(block.page), "exec")
    return ""


def test_blocks_have_a_language_and_reasons():
    assert {f"{block}: {why}" for block in BLOCKS if (why := problem(block))} == set()
    fences = sum(len(re.findall(r"^ *(?:```|~~~)", page.read_text(), re.M)) for page in PAGES)
    assert fences == 2 * len(BLOCKS), "a fence is not closed, or closed with another indentation"
    for page in PAGES:
        prose = snippets.FENCE.sub("", page.read_text())
        # Four spaces make a block of code, but for what goes on a list or an admonition.
        for before, line in re.findall(r"^(\S.*)\n\n( {4,}\S.*)$", prose, re.M):
            assert re.match(r"[-*!?]|\d+\.", before), f"{page}: {line!r} is a block without a language"


def test_the_readme_is_short_and_marks_what_ci_runs():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    marked = [note for block in snippets.blocks(ROOT / "README.md") for note in block.notes]
    assert sorted(note for note in marked if note in snippets.ELSEWHERE) == sorted(snippets.ELSEWHERE)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.runs and b.language == "gin"], ids=str)
def test_gin_blocks_load(block, tmp_path):
    file = tmp_path / "block.gin"
    file.write_text(block.code)
    gin_files.load([ROOT / block.over, file])


PROGRAM = (
    r"dist-partial |python -m dist_partial(?:\.(?P<name>\w+))? |"
    r"(?:sbatch )?launch/(?P<script>local|hosts|slurm\.sbatch) "
)


def command_lines() -> list[tuple[Block, list[str]]]:
    """The words of each command of ours in a sh block, from the subcommand on, also of those that are not run."""
    found = []
    for block in BLOCKS:
        for line in block.code.replace("\\\n", " ").splitlines() if block.language == "sh" else []:
            for part in re.split(r" (?:&&|\|\||\||;) ", line):
                if command := re.match(rf"(?:\w+=\S+ )*(?:\S*/)?(?:{PROGRAM})(.*)", part.strip()):
                    name = command["name"] or ("launch" if command["script"] else "")
                    found.append((block, [name, *command[3].split()] if name else command[3].split()))
    return found


def help_of(*words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        commands.main([*words, "--help"])
    return out.getvalue()


def test_commands_name_flags_and_files_that_exist():
    known = {name: help_of(name) for name in commands.COMMANDS}
    known["launch"] += help_of("launch", "local") + help_of("launch", "hosts") + known["train"]
    for block, (name, *words) in command_lines():
        assert name in (*known, "--help"), f"{block}: {name}"
        for word in words:
            if flag := re.match(r"--([a-z]\w*)", word):
                text = known[name]
                assert re.search(rf"--(\[no\])?{flag[1].removeprefix('no')}\b|--{flag[1]}\b", text), f"{block}: {word}"
            if file := re.fullmatch(r"--gin_file=(gin_configs/.*)", word):
                assert (ROOT / file[1]).is_file(), f"{block}: {word}"


def test_the_reference_lists_every_flag():
    text = (ROOT / "docs" / "reference" / "commands.md").read_text()
    launch = [("launch", "local"), ("launch", "hosts")]
    for words in [(name,) for name in commands.COMMANDS if name != "launch"] + launch:
        for flag in re.findall(r"^  (?:-\w,)?--(?:\[no\])?(\w+)", help_of(*words), re.M):
            if flag not in ("flagfile", "undefok"):  # absl's own
                assert f"--{flag}" in text or f"--[no]{flag}" in text, f"{' '.join(words)} --{flag}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_exist(page):
    text = page.read_text()
    for name in set(re.findall(r"`(?:gin_configs/)?(\w+\.gin)`", text)) - {"operative_config.gin", "my_task.gin"}:
        assert (ROOT / "gin_configs" / name).is_file(), name
    gin_files._register()
    known = {name.split(".")[-1] for name, _ in gin.config._REGISTRY.items()}
    for name in set(re.findall(r"`@([a-z_]+)(?:\(\))?`", text)) - {"name"}:
        assert name in known, name
    for prefix, value in (("run", dist_partial.Settings), ("sample", dist_partial.Sampling)):
        fields = {field.name for field in dataclasses.fields(value)}
        for name in re.findall(rf"`{prefix}\.(\w+)", text):
            assert name in fields, f"{prefix}.{name}"


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_of_other_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_binding_is_described(caplog):
    with caplog.at_level(logging.WARNING):
        page = hooks().bindings_page()
    assert caplog.messages == []
    for name in gin_files._OURS:
        assert f"\n### {name}\n\n" in page, name
    assert "| `run.steps` | `int` | `1000` |" in page
    assert re.search(r"\| `run.reduction` \| .* \| `@\w+\(\)` \|", page)
    assert re.search(r"\| .*`epochs`.* \| `run.steps` \| = epochs x examples / run.global_batch \|", page)


def test_every_public_name_has_its_line(caplog):
    with caplog.at_level(logging.WARNING):
        page = hooks().api_page()
    assert caplog.messages == [] and "train" in dist_partial.__all__
    for name in dist_partial.__all__:
        assert re.search(rf"^\| \[`dist_partial.{name}`\]\[[\w.]+\] \| [A-Z].{{20,}}\. \|$", page, re.M), name


def test_benchmark_pages_show_the_results():
    made = hooks()
    for name, (_, results, pictures) in made.BENCHMARKS.items():
        page = made.benchmark_page(name)
        assert page.startswith("# ") and page.count("\n| --") + page.count("\n| :-") >= len(results), name
        assert all((made.tables.RESULTS / picture).is_file() for picture in pictures)
    shown = {result for _, results, _ in made.BENCHMARKS.values() for result in results}
    assert shown == {path.stem for path in made.tables.RESULTS.glob("*.json")}


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """A folder like the repository's root, after a short run of the quickstart."""

    def make(folder):
        snippets.make_folder(folder)
        snippets.shell("dist-partial train --gin_file=gin_configs/quickstart.gin", folder)

    return once(tmp_path_factory, "quickstart", make)


@pytest.mark.parametrize("page", in_turns(RUNNING), ids=name_of)
def test_snippets_run(page, quickstart, tmp_path):
    folder = tmp_path / "root"
    shutil.copytree(quickstart, folder, symlinks=True)
    code = "import sys, pathlib; from tests.helpers import snippets; snippets.run(*map(pathlib.Path, sys.argv[1:]))"
    with open(tmp_path / "output", "w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code, page, folder],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            failed = process.wait(timeout=900)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        assert not failed, output.read()[-4000:]
