"""Each test of the Python door has a folder of its own to work in."""

import pytest


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
