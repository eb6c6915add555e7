"""The words of the project: those of the field, in code, configurations and documentation; docstrings that say what."""

import ast
import importlib
import inspect
import re

import pytest

from tests import ROOT

# What was renamed, as it would be written. The changelog alone tells both.
OLD = {
    r"\bEveryStep\b|@every_step\b|every_step\.": "AllReduce, @all_reduce()",
    r"@never\b|\bNever\(": "@local_only(), LocalOnly",
    r"local_sgd\.(steps|outer|exchange|keep)\b(?!_)": "sync_every, outer_optimizer, compressor, keep_residual_local",
    r"run\.frozen\b|run\.cache\b": "run.frozen_dtype, run.activation_cache",
    r"\bCourse\b|\bLeg\b": "ScheduleRunner, CompiledPhase",
    r"\bWire\b|\bMesh\b|\bMeshStrategy\b": "Collectives, TCPBackend, HostBridge",
    r"\bJournal\b": "MetricWriter",
    r"\bcard_bytes\b|network cards?\b": "network interface, nic_bytes",
    r"\bidentity\.json\b": "run_fingerprint.json",
    r"\bkeepers?\b": "agent",
    r"\bforetold\b|\bforetells?\b": "predicted, predicts",
    r"\bmends?\b|\bmended\b": "fix",
    r"\bheeds?\b": "handle",
    r"\banew\b": "again",
    r"\btold\b": "reported",
    r"\bstands\b": "is",
    r"\bthe prefix\b|\bprefix (cache|of the model)": "the lower part, the activation cache",
    r"\bof another run\b": "belongs to another run",
}


def files() -> list:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "mkdocs.yml"]
    for folder in ("dist_partial", "gin_configs", "launch", "docs"):
        found += [
            path for path in (ROOT / folder).rglob("*") if path.suffix in ("", ".py", ".gin", ".md", ".yaml", ".html")
        ]
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]


def public() -> list:
    """(module, name, docstring) of what other modules may use."""
    found = []
    for path in sorted((ROOT / "dist_partial").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                found.append((module, node.name, ast.get_docstring(node) or ""))
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_old_words_are_gone(path):
    text = path.read_text()
    found = [
        f"line {text[: match.start()].count(chr(10)) + 1}: {match[0]!r}: write {new}"
        for old, new in OLD.items()
        for match in re.finditer(old, text)
    ]
    assert not found, "\n".join(found)


def test_first_lines_begin_with_a_verb():
    wrong = [
        f"{module}.{name}: {doc.splitlines()[:1]}"
        for module, name, doc in public()
        if not re.match(r"(Mis)?[A-Z][a-z]+s\b", doc) or not doc.splitlines()[0].endswith((".", ":"))
    ]
    assert not wrong, "\n".join(wrong)


def test_what_users_bind_or_import_has_an_example():
    """The example itself runs as a doctest."""
    import dist_partial
    from dist_partial.config import gin_files

    names = {**gin_files._OURS, **{name: getattr(dist_partial, name) for name in dir(dist_partial)}}
    for path in (ROOT / "dist_partial").glob("*/__init__.py"):
        package = importlib.import_module(f"dist_partial.{path.parent.name}")
        names |= {f"{package.__name__}.{name}": getattr(package, name) for name in getattr(package, "__all__", ())}
    assert set(names) > {"run", "Rule", "partial", "quantized", "stdlib_corpus", "dist_partial.schedules.Unit"}
    made = {name: value for name, value in names.items() if inspect.isclass(value) or inspect.isfunction(value)}
    assert not {name for name, value in made.items() if ">>>" not in (inspect.getdoc(value) or "")}


def test_every_package_says_what_it_is_for():
    for path in (ROOT / "dist_partial").rglob("__init__.py"):
        module = importlib.import_module(".".join(path.parent.relative_to(ROOT).parts))
        assert module.__doc__, path
