"""Checkpoints of what is trained, and the fingerprints of everything else."""

from dist_partial.checkpoints.files import Checkpoint, newest, read, restore, save, steps
from dist_partial.checkpoints.fingerprints import (
    check_frozen,
    digest,
    frozen_fingerprints,
    model_fingerprints,
    variables,
)

__all__ = [
    "Checkpoint",
    "check_frozen",
    "digest",
    "frozen_fingerprints",
    "model_fingerprints",
    "newest",
    "read",
    "restore",
    "save",
    "steps",
    "variables",
]
