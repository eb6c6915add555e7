"""The README's commands run as they are printed, its tables name what there is, and the docstrings make a reference."""

import re
import shutil
import subprocess
import sys

import gin
import pytest

from dist_partial.config import gin_files
from tests import ROOT

pytestmark = pytest.mark.slow

TEXT = (ROOT / "README.md").read_text()
# What is run elsewhere: `.ci/run` makes an environment for the first two; SmolLM2 takes minutes and 93 MB of weights.
ELSEWHERE = {"quickstart", "tests", "smollm2"}
START = r"(?:\.venv/bin/python|python|launch/\w+|PYTHON=\S+ launch/\w+) "


def commands() -> list[str]:
    """Lines of the README that are commands, in its order, but for what is marked and those of a general form."""
    text = re.sub(r"<!-- (\w+) -->\n```sh\n.*?```", lambda m: "" if m[1] in ELSEWHERE else m[0], TEXT, flags=re.S)
    lines = [line.strip() for line in re.findall(rf"^(?:    )?({START}.*)$", text, flags=re.M)]
    return [line for line in lines if not re.search(r"=(F|DIR|N)\b| \.\.\.", line)]


def test_commands_are_found():
    found = commands()
    for module in ("train", "sample", "plan", "export", "report"):
        assert any(f"-m dist_partial.{module} " in line for line in found), module
    assert any(line.startswith("PYTHON=.venv/bin/python launch/local ") for line in found)
    marked = re.findall(r"<!-- (\w+) -->\n```sh", TEXT)
    assert set(marked) == ELSEWHERE


def test_commands_run(tmp_path):
    """One after the other in one folder, after a short run of the quickstart, on which most of them build."""
    for name in ("gin_configs", "launch", "dist_partial"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    short = "--gin_param='run.steps = 20' --gin_param='run.eval_examples = 32' --gin_param='sample.length = 20'"
    first = f".venv/bin/python -m dist_partial.train --gin_file=gin_configs/quickstart.gin {short}"
    for line in [first, *commands()]:
        line = re.sub(r"^python ", ".venv/bin/python ", line)
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    snippet = re.search(r"<!-- delta -->\n```python\n(.*?)```", TEXT, flags=re.S)
    assert snippet is not None
    code = snippet[1] + "assert len(mine.arrays) > 3 and mine.step == 20"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = re.findall(r"held-out loss ([\d.]+)", done.stdout)
    assert (tmp_path / "report.html").stat().st_size > 10_000, losses


def test_configurations_and_bindings_exist():
    for name in set(re.findall(r"`(\w+\.gin)`", TEXT)) - {"operative_config.gin"}:
        assert (ROOT / "gin_configs" / name).is_file(), name
    gin_files._register()
    known = {name.split(".")[-1] for name, _ in gin.config._REGISTRY.items()}
    for name in re.findall(r"`@([a-z_]+)(?:\(\))?`", TEXT):
        assert name in known, name
    fields = {field.name for field in __import__("dataclasses").fields(__import__("dist_partial").Settings)}
    for name in re.findall(r"`run\.(\w+)", TEXT):
        assert name in fields, name


def test_results_are_there():
    for path in re.findall(r"\]\((tests/[^)]+)\)", TEXT):
        assert (ROOT / path).is_file(), path
    for marker in re.findall(r"<!-- /(\w+) -->", TEXT):
        assert re.search(rf"<!-- {marker} -->\n\n\|", TEXT), f"the table {marker} is empty"


def test_the_reference_builds_without_warnings(tmp_path):
    command = [sys.executable, "-W", "error::UserWarning:pdoc", "-m", "pdoc", "dist_partial", "-o", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warn" not in done.stderr, done.stderr[-2000:]
    assert "first match wins" in (tmp_path / "dist_partial" / "selection.html").read_text()
