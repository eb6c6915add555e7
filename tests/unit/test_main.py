"""The command dist-partial: it knows its subcommands, and each of them is the module of that name."""

import importlib
import importlib.metadata
import os
import subprocess
import sys

import pytest

from dist_partial import __main__ as main
from dist_partial import cli


def test_help_lists_the_commands(capsys):
    assert main.main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, line in main.COMMANDS.items():
        assert f"  {name} " in listed and line in listed


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_subcommand_is_the_module_of_its_name(name, capsys):
    assert main.main([name, "--help"]) == 0
    ours = capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", f"dist_partial.{name}", "--help"], capture_output=True, text=True, check=True
    )
    # The heading of the flags is the name of the module that defines them, which is __main__ where it is run.
    flags = [line for line in done.stdout.splitlines() if line.startswith("  -")]
    assert set(flags) <= set(ours.splitlines())
    assert done.stdout.splitlines()[0] == ours.splitlines()[0]


@pytest.mark.parametrize("name", main.COMMANDS)
def test_the_usage_begins_with_the_name_that_was_typed(name, monkeypatch, capsys):
    for program, words in (
        ("/x/bin/dist-partial", f"dist-partial {name} "),
        (f"/x/dist_partial/{name}.py", f"python -m dist_partial.{name} "),
    ):
        monkeypatch.setattr(sys, "argv", [program])
        assert main.main([name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(words)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [[], *([name] for name in main.COMMANDS), ["launch", "local"]], ids=" ".join)
def test_a_reader_that_leaves_is_no_error(arguments, unbuffered):
    """As `dist-partial train --help | head -1` does."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dist_partial", *arguments, "--help"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_is_an_error():
    with pytest.raises(BrokenPipeError), cli.ending():
        raise BrokenPipeError


def test_an_interrupt_before_anything_is_saved_says_what_is_kept(capsys):
    with cli.ending() as ended:
        raise KeyboardInterrupt
    assert ended.code == 130
    assert capsys.readouterr().err.startswith("stopped before anything more was saved: the same command begins again, ")


@pytest.mark.parametrize(
    "arguments, line",
    [
        (
            [],
            "error: no command: write train, sample, plan, export, launch, selfcheck, report "
            "(dist-partial --help lists them)\n",
        ),
        (["trian"], "error: no command 'trian'; nearest: 'train' (dist-partial --help lists them)\n"),
        (["--gin_file=a.gin"], "error: no command '--gin_file=a.gin': write train, sample, plan, export, launch, "),
        (["sample"], "error: no --run_dir: name the folder of a run"),
    ],
)
def test_mistakes_have_code_2(arguments, line, capsys):
    assert main.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(line)


def test_gin_files_import_from_the_working_directory(tmp_path, monkeypatch):
    """As under `python -m`, though a script's path begins with its own folder."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    monkeypatch.chdir(tmp_path)
    assert main.main(["sample"]) == 2 and sys.path[0] == str(tmp_path)


def test_the_script_is_this_function():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="dist-partial")
    assert script.load() is main.main


def test_as_a_module_without_tensorflow():
    command = [sys.executable, "-X", "importtime", "-m", "dist_partial", "plan", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "dist_partial.plan" in done.stdout
    assert "tensorflow" not in done.stderr and "keras" not in done.stderr
