"""Pages of the documentation that mkdocs makes while it builds: bindings, Python API, benchmarks, changes.

They are written nowhere else: their sources are the docstrings, the result files of the benchmarks and CHANGELOG.md.
"""

import dataclasses
import inspect
import json
import logging
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for tests.benchmarks.tables
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from dist_partial import synonyms  # noqa: E402
from tests.benchmarks import tables  # noqa: E402
from tests.conformance import results as conformance  # noqa: E402

_LOG = logging.getLogger("mkdocs.hooks.dist_partial")  # a warning fails `mkdocs build --strict`
# Sections of the page of bindings, by the part of the package that defines what is bound.
SECTIONS = {
    "config": "The run",
    "distributed": "Replicas",
    "selection": "Rules",
    "reductions": "Reductions",
    "schedules": "Schedules",
    "step": "Optimizers",
    "trackers": "Trackers",
    "models": "Models",
    "data": "Data",
}
# Sections of the page of the API: what one finds there, and the modules, or packages, that have it. Where only some
# names are of use to others, they are in brackets.
MODULES: dict[str, tuple[str, ...]] = {
    "Train from Python": ("api[train,devices,Result,History]",),
    "The rules for `model.fit`": ("fit",),
    "Settings and gin files": ("config.settings", "config.gin_files"),
    "The loop": ("training.loop",),
    "Rules and plans": ("selection[Rule,Plan,VariablePlan,Payload,paths_of,nic_bytes]",),
    "Reductions": ("reductions",),
    "Schedules": ("schedules",),
    "Data": (
        "data[Dataset,Source,ArraySource,Mapped,Mixed,mix,Stream,reading,Codec,fingerprint]",
        "data.corpus[stdlib_corpus,stdlib_shapes]",
        "data.tokens",
        "data.prepared[tfds_dataset]",
        "data.tfrecords[TFRecordSource,tfrecord_dataset]",
        "data.images[ImageFolderSource,image_folder]",
        "data.adapt[dataset,source_of]",
        "data.map_source[MapSource]",
        "data.py_dataset[PyDatasetSource]",
        "data.tables[csv_dataset,parquet_dataset]",
    ),
    "Models": (
        "models.byte_transformer[byte_transformer]",
        "models.two_dense",
        "models.hub[hub_model,hub_tokenizer]",
        "models.smollm2[smollm2,smollm2_tokenizer]",
        "models.keras_file",
    ),
    "Sampling": ("models.sampling[generate,Generation]",),
    "Replicas": (
        "distributed.replicas[Replicas,ReplicaOptions,create,over]",
        "distributed.worker_backend[WorkerBackend]",
        "distributed.backend[Backend]",
    ),
    "Metrics": ("training.metric_writer",),
    "Trackers": ("trackers[Tracker,Row,Following,MLflow,WandB,Trackio,Prometheus]",),
    "What was trained": ("export.delta", "export.restore", "export.peft", "export.hugging_face"),
    "Exceptions": ("errors[UserError,Fault,Interrupted,Raised]",),
}
# Page: title, files of results, pictures.
BENCHMARKS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "step": ("Step time and sampling", ("step", "before", "fit", "trackers", "saving", "sampling"), ()),
    "wire": ("Network", ("wire", "collectives", "tls"), ()),
    "few_bits": ("Few bits", ("few_bits",), ()),
    "quality": ("Bytes and quality", ("long", "quality"), ("quality.png",)),
    "schedules": ("Schedules", ("schedules", "switch"), ("schedules.png",)),
    "activation_cache": ("Activation cache", ("cache",), ()),
    "fine_tuning": ("Fine-tuning", ("finetune",), ()),
    "records": ("TFRecords", ("records",), ()),
    "faults": ("Faults", ("faults",), ()),
    "plan": ("The plan's prediction", ("plan",), ()),
    "simulation": ("The simulated run", ("simulation",), ()),
}
_REMOTE = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    pages = {"reference/bindings.md": bindings_page(), "reference/api.md": api_page()}
    pages |= {f"benchmarks/{name}.md": benchmark_page(name) for name in BENCHMARKS}
    if (ROOT / "CHANGELOG.md").is_file():
        pages["changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    for _, _, pictures in BENCHMARKS.values():
        for name in pictures:
            files.append(File.generated(config, f"benchmarks/{name}", abs_src_path=str(tables.RESULTS / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Puts tables of results where a page names them."""
    for place, table in TABLES.get(page.file.src_uri, dict)().items():
        if place not in markdown:
            _LOG.warning("%s has no %s", page.file.src_uri, place)
        markdown = markdown.replace(place, table)
    return markdown


def _conformance() -> dict[str, str]:
    kinds, known = conformance.tables(conformance.load())
    header = ("models", "cases", *conformance.COLUMNS.values())
    every = ("case", "kind", *conformance.COLUMNS.values())
    return {
        "<!-- cases -->": tables.markdown(every, conformance.cases(conformance.load()), words=2),
        "<!-- kinds -->": tables.markdown(header, kinds),
        "<!-- known -->": tables.markdown(("case", "why", "difference"), known, words=3),
    }


def _collectives() -> dict[str, str]:
    return {"<!-- collectives -->": tables.text("collectives", heading="###")}


# By page: the tables in place of its comments.
TABLES = {"reference/conformance.md": _conformance, "explanation/collectives.md": _collectives}


def on_post_page(output: str, page: Any, config: MkDocsConfig) -> str:
    """Warns of what a browser would fetch from another host to show the page."""
    for address in sorted(set(_REMOTE.findall(output))):
        _LOG.warning("%s fetches %s", page.file.src_uri, address)
    return output


def benchmark_page(name: str) -> str:
    """The introduction, the tables, the pictures, and how they are made again."""
    title, results, pictures = BENCHMARKS[name]
    intro = ROOT / "docs" / "benchmarks" / "intro" / f"{name}.md"
    parts = [intro.read_text(encoding="utf-8").strip() if intro.is_file() else f"# {title}"]
    for result in results:
        found = json.loads((tables.RESULTS / f"{result}.json").read_text(encoding="utf-8"))
        parts.append(tables.text(result, found))
        setting = found.get("setting") or found.get("model")
        parts.append(f"Measured by `{found['command']}`" + (f": {setting}." if setting else "."))
    parts += [f"![{title}]({picture})" for picture in pictures]
    return "\n\n".join(parts) + "\n"


def bindings_page() -> str:
    """Every name that a gin file can bind, with its type, its default and what it is."""
    parts = [
        "# Bindings",
        "What a gin file, or `--gin_param`, can bind. A *factory* is bound without parentheses "
        "(`run.model = @two_dense`), everything else that begins with `@` with them (`run.reduction = @top_k()`). "
        "Names of Keras's optimizers, schedules of learning rates, losses, metrics, callbacks, applications, "
        "initializers and regularizers can be bound as well, and those of each module that the file imports.",
    ]
    section = ""
    for name, value in _bound().items():
        title = SECTIONS[value.__module__.split(".")[1]]
        if title != section:
            parts.append(f"## {title}")
            section = title
        parts += [f"### {name}", _about(value)[0]]
        if rows := list(_rows(name, value)):
            parts.append(tables.markdown(("binding", "type", "default", ""), rows, words=4))
    parts += ["## Names from elsewhere", "A message about one of the names on the left says what it is called here."]
    parts.append(tables.markdown(("elsewhere", "here", ""), list(_synonyms()), words=3))
    return "\n\n".join(parts) + "\n"


def _synonyms() -> Iterator[tuple[str, str, str]]:
    names: dict[tuple[str, str], list[str]] = {}
    for theirs, meant in synonyms.SYNONYMS.items():
        names.setdefault(meant, []).append(theirs)
    for (ours, differs), theirs in names.items():
        yield ", ".join(map("`{}`".format, theirs)), f"`{ours}`", differs.lstrip(", ")


def api_page() -> str:
    """The public names, and a section for each module that users import."""
    import dist_partial

    parts = [
        "# Python API",
        "Importing `dist_partial` imports no TensorFlow; its names are loaded when they are first used.",
        tables.markdown(
            ("name", ""),
            [(f"[`dist_partial.{name}`][{_path(home, name)}]", _line(name)) for name, home in homes()],
            words=2,
        ),
    ]
    assert [name for name, _ in homes()] == dist_partial.__all__
    for title, modules in MODULES.items():
        parts.append(f"## {title}")
        for module in modules:
            name, _, members = module.rstrip("]").partition("[")
            options = "\n    options:\n      show_root_heading: false"
            options += f"\n      members: [{members}]" if members else ""
            parts.append(f"::: dist_partial.{name}{options}")
    return "\n\n".join(parts) + "\n"


def homes() -> list[tuple[str, str]]:
    """The public names with the modules that define them."""
    import dist_partial

    return sorted(dist_partial._HOMES.items())


def _line(name: str) -> str:
    """What a public name is for, in one line."""
    import dist_partial

    line = inspect.cleandoc(getattr(dist_partial, name).__doc__ or "").partition("\n")[0]
    if not line:
        _LOG.warning("dist_partial.%s has no docstring", name)
    return line


def _path(home: str, name: str) -> str:
    return f"dist_partial.{home}" if home.endswith(f".{name}") else f"dist_partial.{home}.{name}"


def _bound() -> dict[str, Callable[..., Any]]:
    from dist_partial.config import gin_files

    order = list(SECTIONS)
    return dict(sorted(gin_files._OURS.items(), key=lambda item: order.index(item[1].__module__.split(".")[1])))


def _rows(name: str, value: Callable[..., Any]) -> Iterator[tuple[str, str, str, str]]:
    about = _about(value)[1]
    for parameter in inspect.signature(value).parameters.values():
        if name == "run" and parameter.name in ("replicas", "sampling"):
            continue  # bound by names of their own
        default = _default(value, parameter)
        text = " ".join(about.get(parameter.name, "").split())
        if not text:
            _LOG.warning("the docstring of %s says nothing about %s", name, parameter.name)
        yield f"`{name}.{parameter.name}`", _type(parameter.annotation), default, text


def _about(value: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The text of a docstring, and what it says of each parameter; of a class, also what its bases say."""
    text, parameters = "", {}
    classes = [base for base in inspect.getmro(value) if base is not object] if inspect.isclass(value) else [value]
    for each in reversed(classes):
        for section in griffe.Docstring(inspect.cleandoc(each.__doc__ or "")).parse("google", warnings=False):
            if section.kind is griffe.DocstringSectionKind.text and each is value:
                text = text or section.value
            elif section.kind in (griffe.DocstringSectionKind.attributes, griffe.DocstringSectionKind.parameters):
                parameters |= {item.name: item.description for item in section.value}
    return text, parameters


def _type(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Annotated:  # with what it is checked by
        annotation = typing.get_args(annotation)[0]
    text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    text = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)
    text = re.sub(r"Callable\[(?:\[\]|\.\.\.), \w+\]", "factory", text)
    return "" if text in ("Any", "Optional[Any]") else f"`{text}`"


def _default(value: Callable[..., Any], parameter: inspect.Parameter) -> str:
    from dist_partial.config import gin_files

    default = parameter.default
    if default is parameter.empty:
        return "**required**"
    if dataclasses.is_dataclass(value):
        field = next(field for field in dataclasses.fields(value) if field.name == parameter.name)
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
    names = {id(bound): name for name, bound in gin_files._OURS.items()}
    if id(type(default)) in names:
        return f"`@{names[id(type(default))]}()`"
    if id(default) in names:
        return f"`@{names[id(default)]}`"
    if inspect.isclass(default) and default.__module__.startswith("keras."):
        return f"`@keras.{default.__module__.split('.')[2]}.{default.__name__}`"
    if callable(default) or dataclasses.is_dataclass(default):
        return (inspect.getdoc(default) or "").split("\n\n")[0].rstrip(".")
    return f"`{default!r}`"
