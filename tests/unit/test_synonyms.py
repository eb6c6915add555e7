"""synonyms.py: what it says exists, in gin files, on command lines and in Python."""

import contextlib
import dataclasses
import inspect
import io
import re

import gin
import keras

from dist_partial import __main__ as commands
from dist_partial.config import gin_files
from dist_partial.config.settings import Sampling, Settings
from dist_partial.config.words import in_python
from dist_partial.distributed.replicas import ReplicaOptions
from dist_partial.synonyms import _LINES, SYNONYMS, meant

FIELDS = {
    owner: {field.name for field in dataclasses.fields(kind)}
    for owner, kind in (("run", Settings), ("sample", Sampling), ("replicas", ReplicaOptions))
}


def help_of(*words: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        commands.main([*words, "--help"])
    return out.getvalue()


def test_all_that_is_meant_can_be_bound():
    gin_files._register()
    for ours in sorted({ours for ours, _ in SYNONYMS.values()}):
        if ours.startswith("dist-partial "):
            *words, flag = ours.split()[1:]
            assert flag in help_of(*words), ours
        else:
            selector, _, name = ours.rpartition(".")
            assert name in inspect.signature(gin.config._REGISTRY.get_match(selector).wrapped).parameters, ours


def test_what_differs_names_what_can_be_bound():
    named = re.findall(r"\brun\.(\w+)", " ".join(differs for _, differs in SYNONYMS.values()))
    assert named and set(named) <= FIELDS["run"]


def test_names_from_elsewhere_are_there_once_and_not_ours():
    theirs = [name for _, _, names in _LINES for name in names.split()]
    assert len(theirs) == len(set(theirs)) == len(SYNONYMS)
    for name, (ours, _) in SYNONYMS.items():
        owner, _, argument = ours.rpartition(".")
        assert name == argument or owner not in FIELDS or name not in FIELDS[owner], (name, ours)


def test_python_writes_them_as_arguments():
    def exists(owner, name):
        return name in inspect.signature(owner).parameters

    def said(name):
        return in_python(meant(name))

    assert said("batch_size") == ": write global_batch, the examples of an update over all replicas"
    assert said("epochs") == ": write steps=epochs x examples / global_batch"
    assert said("lr").startswith(": write optimizer=keras.optimizers.Adam(learning_rate=...), ")
    assert said("max_tokens") == ": write sampling=Sampling(length=...), symbols to generate"
    assert said("lora_rank").startswith(": write Rule(..., lora=...), ")
    assert exists(keras.optimizers.Adam, "learning_rate")
    assert said("gpus").startswith(": write replicas=ReplicaOptions(kind=...), ")
    assert exists(ReplicaOptions, "kind")
    for name in SYNONYMS:
        assert "run." not in said(name) and "@" not in said(name), name


def test_names_are_found_however_they_are_written():
    assert meant("Batch-Size") == meant("batch_size") != ""
    assert meant("global_batch") == meant("") == ""
