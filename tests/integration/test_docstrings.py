"""The examples in docstrings run and print what they say."""

import doctest
import importlib

import pytest

from tests import ROOT

# Modules without an example are not imported. To run those of one module alone: python -m doctest FILE.
MODULES = [path for path in sorted((ROOT / "dist_partial").rglob("*.py")) if ">>> " in path.read_text()]
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_in_docstrings(path, tmp_path, monkeypatch):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)  # where examples may write
    assert "Example:\n" not in path.read_text(), "write Examples: as the reference's pages take it for a section"
    failed, tried = doctest.testmod(module, optionflags=OPTIONS)
    assert tried and not failed
