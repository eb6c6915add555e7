"""The tests: see README.md here for where each kind is."""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
