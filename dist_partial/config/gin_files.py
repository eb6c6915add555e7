"""gin: what can be bound, and reading the files. No other module imports it."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import logging
import re
import sys
import tokenize
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gin

from dist_partial import data, models, schedules, session, trackers
from dist_partial.config import settings
from dist_partial.config.bindings import annotation, check_bindings, only_in_python, unbound, unknown, written
from dist_partial.distributed import replicas
from dist_partial.errors import UserError, own_line, raised
from dist_partial.reductions.all_reduce import AllReduce
from dist_partial.reductions.block_parallel import BlockParallel
from dist_partial.reductions.local_only import LocalOnly
from dist_partial.reductions.local_sgd import LocalSGD, nesterov
from dist_partial.reductions.power_sgd import PowerSGD
from dist_partial.reductions.quantized import Quantized
from dist_partial.reductions.top_k import TopK
from dist_partial.selection.rules import Rule
from dist_partial.step.keras_configs import exclude_from_weight_decay
from dist_partial.synonyms import OWNERS, renamed
from dist_partial.validation import check_value, nearest

_OURS: dict[str, Callable[..., Any]] = {
    "run": settings.Settings,
    "sample": settings.Sampling,
    "replicas": replicas.ReplicaOptions,
    "only_in_python": only_in_python,
    "Rule": Rule,
    "all_reduce": AllReduce,
    "power_sgd": PowerSGD,
    "top_k": TopK,
    "quantized": Quantized,
    "local_sgd": LocalSGD,
    "block_parallel": BlockParallel,
    "nesterov": nesterov,
    "exclude_from_weight_decay": exclude_from_weight_decay,
    "local_only": LocalOnly,
    "phases": schedules.Phases,
    "gradual_unfreezing": schedules.Gradual,
    "block_rotation": schedules.Rotation,
    "lisa": schedules.Lisa,
    "autofreeze": schedules.AutoFreeze,
    "budget": schedules.Budget,
    "MLflow": trackers.MLflow,
    "Prometheus": trackers.Prometheus,
    "Trackio": trackers.Trackio,
    "WandB": trackers.WandB,
    "two_dense": models.two_dense,
    "byte_transformer": models.byte_transformer,
    "hub_model": models.hub_model,
    "hub_tokenizer": models.hub_tokenizer,
    "keras_file": models.keras_file,
    "smollm2": models.smollm2,
    "smollm2_tokenizer": models.smollm2_tokenizer,
    "image_folder": data.image_folder,
    "kept_examples": data.kept_examples,
    "csv_dataset": data.csv_dataset,
    "parquet_dataset": data.parquet_dataset,
    "stdlib_corpus": data.stdlib_corpus,
    "stdlib_prose": data.stdlib_prose,
    "stdlib_shapes": data.stdlib_shapes,
    "tfds_dataset": data.tfds_dataset,
    "tfrecord_dataset": data.tfrecord_dataset,
    "tokenized_text": data.tokenized_text,
}
# Selectors of what users' modules hold. gin's registry is of the whole process, in which a notebook loads an edited
# module again, and the next file may import another one with functions of the same names.
_of_users: list[str] = []
_OPENED = "dist_partial:"  # before a path, so that gin leaves opening it to `_open`
_INCLUDE = re.compile(r"^(\s*include\s+)['\"](.+?)['\"]", re.MULTILINE)
_IMPORT = re.compile(r"^\s*(?:from\s+([\w.]+)\s+)?import\s+([\w.]+)", re.MULTILINE)
_REQUIRED = re.compile(r"Required bindings for `([\w.]+)` not provided in config: \[(.*?)\]")
# Bound before any file is read, so that `Adam.learning_rate` or `all_reduce.dtype` alone have their effect.
_DEFAULTS = ("run.optimizer = @keras.optimizers.Adam", "run.reduction = @all_reduce()")
_KERAS: tuple[str, ...] = ("optimizers", "optimizers.schedules", "losses", "metrics", "callbacks", "applications")
_KERAS += ("initializers", "regularizers")


@dataclasses.dataclass(frozen=True)
class Configuration:
    """Holds what the gin files say.

    Attributes:
        settings: of the run.
        operative: the bindings in use so far, as a gin file that reproduces the run alone.
        unused: the bindings that nothing has read so far.
        bindings: all that is bound, by name, as text.

    Examples:
        >>> needed = ["run.rules = [('train', '.*')]", "run.model = @two_dense", "run.data = @stdlib_corpus"]
        >>> found = load([], [*needed, "top_k.density = 0.5"])
        >>> found.bindings["dist_partial.run.model"], found.unused()
        ('@two_dense', ['top_k.density'])
    """

    settings: settings.Settings
    operative: Callable[[], str]
    unused: Callable[[], list[str]]
    bindings: dict[str, str]


def load(files: Sequence[str | Path], params: Sequence[str] = (), imports: bool = True) -> Configuration:
    """Reads gin files, then single bindings over them.

    A module that a file imports has its public functions and classes made bindable, without decorators:
    `import my_package` and then `run.model = @my_package.build_model`.

    Args:
        files: paths; each may include others, relative to itself.
        params: bindings such as `run.steps = 100`.
        imports: whether the files may import modules, which runs their code, and include other files.

    Raises:
        UserError: a missing file, a syntax error, an unknown or misspelt name, a bad value.
        Raised: a function of the user's own, whose result is bound, raised an exception.

    Examples:
        >>> rules = "run.rules = [('train', 'dense2/.*'), ('freeze', '.*')]"
        >>> bound = load([], [rules, "run.model = @two_dense", "run.data = @stdlib_corpus", "run.steps = 5"])
        >>> bound.settings.steps, bound.settings.rules
        (5, [('train', 'dense2/.*'), ('freeze', '.*')])
    """
    gin.clear_config()
    while _of_users:
        gin.config._REGISTRY.pop(_of_users.pop())
    _register()
    with session.numbered_afresh():  # modules may make layers, too
        for file in files:
            _prepare(Path(file), (), imports)
    current = ""
    logging.disable(logging.ERROR)  # gin's readers log an error for each file that another of them opens
    try:
        gin.parse_config(_DEFAULTS)
        for file in files:
            gin.parse_config_file(f"{_OPENED}{file}")
        for param in params:
            current = param
            _check_param(param)
            gin.parse_config(param)
        current = ""
        gin.config.find_missing_overrides_hook(gin.config._CONFIG)  # what is bound to %gin.REQUIRED
        known = {name: each.wrapped for name, each in gin.config._REGISTRY.items()}
        check_bindings({f"dist_partial.{name}" for name in _OURS}, known)
        run, sample, replicas = (gin.get_configurable(f"dist_partial.{name}") for name in ("run", "sample", "replicas"))
        options = replicas()
        options.prepare()  # @keras.metrics.AUC() makes variables
        bound = run(replicas=options.connect, sampling=sample())
        given = {name: getattr(bound, name) for name in ("model", "data", "loss", "optimizer")}
        # What has no name is made already, or describes several.
        factories = {name: _explained(value) for name, value in given.items() if hasattr(value, "__name__")}
    except UserError as error:  # to which gin adds lines with the names of its own functions
        raise UserError(str(error).splitlines()[0]) from error
    except Exception as error:  # gin raises whatever the file's mistake leads to
        innermost = traceback.extract_tb(error.__traceback__)[-1]
        if own_line(error) and not innermost.filename.startswith(str(Path(gin.__file__).parent)):
            raise raised("", error) from error  # of a function of the user's, such as @mine.rules()
        raise UserError(_explain(error, current)) from error
    finally:
        logging.disable(logging.NOTSET)
    return Configuration(dataclasses.replace(bound, **factories), gin.operative_config_str, _unused, _bindings())


def _check_param(param: str) -> None:
    """Raises UserError unless a single binding names something: a parameter, or a macro of the files."""
    if "." not in (name := param.split("=")[0].strip()) and (name, "gin.macro") not in gin.config._CONFIG:
        fields = [f"run.{field.name}" for field in dataclasses.fields(settings.Settings)]
        near = written(name) or f": a name has a dot{nearest(f'run.{name}', fields, always=True)}"
        raise UserError(f"{param!r} binds nothing{near}")


def _register() -> None:
    gin.config.register_file_reader(_open, lambda name: name.startswith(_OPENED))
    for name, value in _OURS.items():
        _make_bindable(value, name, "dist_partial")
    for package in _KERAS:
        for name, value in vars(importlib.import_module(f"keras.{package}")).items():
            # Of functions, Keras's applications alone are factories: deserialize() would load code by name.
            if not name.startswith("_") and (
                inspect.isclass(value) or (inspect.isfunction(value) and package == "applications")
            ):
                _make_bindable(value, name, f"keras.{package}")


def _make_bindable(value: Callable[..., Any], name: str, module: str) -> bool:
    """Returns whether it was not bindable before, by an earlier call or by gin's own decorator."""
    if f"{module}.{name}" in gin.config._REGISTRY:
        return False
    gin.external_configurable(value, name=name, module=module)
    return True


class _Text(io.StringIO):
    name: str  # gin reads it for its messages


def _open(name: str) -> _Text:
    """Reads a file for gin, with the files it includes named by their place beside it.

    gin itself looks for them in the working directory, and then in one list of folders for all files.
    """
    file = Path(name.removeprefix(_OPENED))

    def placed(include: re.Match[str]) -> str:
        return include[1] + repr(f"{_OPENED}{file.parent / include[2]}")

    text = _Text(_INCLUDE.sub(placed, file.read_text(encoding="utf-8")))
    text.name = str(file)
    return text


def _prepare(file: Path, including: tuple[Path, ...], imports: bool) -> None:
    """Checks what the file includes, and makes bindable what it imports.

    Args:
        file: a gin file.
        including: the files that led to this one.
        imports: whether it may import modules.
    """
    if not file.is_file():
        raise UserError(f"no gin file {file}{_near(file, file.parent)}")
    if file.resolve() in including:
        raise UserError(f"{file} includes itself: remove the include")
    try:
        text = file.read_text(encoding="utf-8")
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not text in UTF-8: {error}") from None
    except tokenize.TokenError as error:  # gin passes it on without the file's name
        raise UserError(f"{file}: {error.args[0]}: a bracket or a quote is not closed") from None
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}: {error.msg}") from None
    # By token, for no way of writing it may slip through.
    reached = [token for token in tokens if token.type == tokenize.NAME and token.string in ("import", "include")]
    if reached and not imports:
        raise UserError(
            f"{file}, line {reached[0].start[0]}: {reached[0].line.strip()!r} can run code that this folder names: "
            "give --allow_imports if you trust where it comes from"
        )
    for _, included in _INCLUDE.findall(text):
        if not (file.parent / included).is_file():
            near = _near(file.parent / included, Path(included).parent)
            raise UserError(f"{file} includes {included!r}, which is looked for beside it and is not there{near}")
        _prepare(file.parent / included, (*including, file.resolve()), imports)
    for package, name in _IMPORT.findall(text):
        if package == "__gin__":
            continue
        name = f"{package}.{name}".lstrip(".")
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"{file} imports {name}: {error}; run where Python finds it, or set PYTHONPATH") from error
        for attribute, value in vars(module).items():
            ours = getattr(value, "__module__", "").split(".")[0] == name.split(".")[0]
            if ours and attribute in _OURS:  # or `run.steps` could mean either
                text = f"{name}.{attribute} cannot be bound: {attribute} is a name of dist_partial's own"
                print(text, file=sys.stderr)
            elif ours and not attribute.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                # gin makes a subclass, which some classes (enumerations) do not allow; they are no factories either.
                with contextlib.suppress(AttributeError, TypeError, ValueError):
                    if _make_bindable(value, attribute, name):
                        _of_users.append(f"{name}.{attribute}")


def _near(file: Path, shown_in: Path) -> str:
    """Ends a message about a gin file that is not there."""
    return nearest(file.name, [path.name for path in file.parent.glob("*.gin")], folder=shown_in)


def _explained(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The same factory; what gin misses when it is called, such as in a function that it calls, is a UserError."""

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return factory(*args, **kwargs)
        except RuntimeError as error:
            if _REQUIRED.search(str(error)) is None:
                raise
            raise UserError(_explain(error, "")) from error

    return call


def _explain(error: Exception, param: str) -> str:
    """gin's message in one line, with the nearest known names and the file's line, or else with the single binding."""
    text, place = str(error), f" (in {param!r})" if param else ""
    if where := re.search(r'In file "(.+?)", line (\d+)', text):
        place = f" ({where[1]}, line {where[2]})"
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if isinstance(error, SyntaxError):
        first = error.msg.splitlines()[0].rstrip(".") + (f": {error.text.strip()!r}" if error.text else "")
        place = place or f" ({error.filename}, line {error.lineno})"
    if isinstance(error, SyntaxError) and (match := re.search(r"Failed to parse token '(.+)' \(", text)):
        first = _unquoted(match[1], error.text or "", shell=bool(param))
    elif isinstance(error, RecursionError):
        first = "a binding refers to itself, as in local_sgd.compressor = @local_sgd()"
    elif match := re.search(r"No configurable matching (?:reference )?'@?([\w./]+)", text):
        name = match[1].split("/")[-1]
        names = [selector for selector, _ in gin.config._REGISTRY.items() if not selector.startswith("gin.")]
        dotted = "." in name
        known = [s.removeprefix("dist_partial.") if dotted else s.split(".")[-1] for s in names]
        bound = re.search(rf"^\s*(?:[\w/]+/)?{re.escape(name)}\.(\w+)\s*=", f"{text}\n{param}", re.MULTILINE)
        ours = written(bound[1]) if bound and name in OWNERS else renamed(name)
        first = f"nothing is called {name!r}{ours or nearest(name, known)}"
    elif match := re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", text):
        parameters = list(inspect.signature(gin.config._REGISTRY.get_match(match[1]).wrapped).parameters)
        first = f"{match[1]} has no parameter {match[2]!r}{unknown(match[1], match[2], parameters)}"
    elif match := re.search(r"In call to configurable 'macro' .* in scope '([\w./]+)'", text):
        first = f"%{match[1]} is not defined: bind {match[1]} = ..."
    elif match := _REQUIRED.search(text):
        first = unbound([f"{match[1]}.{name}" for name in re.findall(r"'(\w+)'", match[2])])
    elif match := re.search(r"missing \d+ required positional arguments?: (.*)", text):
        missing = re.findall(r"'(\w+)'", match[1])
        # The innermost call comes first.
        caller = re.search(r"In call to configurable '([\w.]+)' \(.*?\)(?: in scope '([\w./]+)')?", text)
        prefix = f"{caller[2]}/{caller[1]}" if caller and caller[2] else caller[1] if caller else "run"
        first = unbound([f"{prefix}.{name}" for name in missing])
    return f"{first}{place}"


def _unquoted(word: str, statement: str, shell: bool) -> str:
    """Says what to write instead of a word that is no value: quotes, if it has none and a text fits there.

    Args:
        word: which gin cannot read.
        statement: the binding.
        shell: whether it comes from a shell, which takes quotes away.
    """
    name, _, value = (part.strip() for part in statement.partition("#")[0].partition("="))
    try:
        if value == word:
            check_value(name, word, annotation(gin.config._REGISTRY, name))
    except UserError as error:
        return str(error)
    if re.match(r"[rRbBuU]*['\"]", word):
        return f"{word!r} cannot be read as a text: for a backslash write two, or r before the quotes"
    fixed = re.sub(rf"(?<![\w'\"]){re.escape(word)}(?![\w'\"])", lambda _: repr(word), value)
    written = f"{name} = {fixed}" if value else repr(word)
    inside = f', also within the shell\'s: --gin_param="{written}"' if shell else f": {written}"
    return f"a text needs quotes{inside}"


def _bindings() -> dict[str, str]:
    return {
        f"{scope}/{selector}.{name}".lstrip("/"): repr(value)
        for (scope, selector), values in gin.config._CONFIG.items()
        for name, value in values.items()
    }


def bound(function: Callable[..., Any]) -> dict[str, str]:
    """Collects what is bound to a function or class under any scope: text by the name of the binding.

    Examples:
        >>> bound(max)
        {}
    """
    while isinstance(function, functools.partial) or hasattr(function, "__wrapped__"):
        function = function.func if isinstance(function, functools.partial) else function.__wrapped__
    names = {name for name, known in gin.config._REGISTRY.items() if inspect.unwrap(known.wrapped) is function}
    return {name: value for name, value in _bindings().items() if name.rpartition(".")[0].rpartition("/")[2] in names}


def _unused() -> list[str]:
    used: set[tuple[str, str, str]] = set()
    for (scope, selector), values in gin.config._OPERATIVE_CONFIG.items():
        parts = scope.split("/") if scope else []
        for i in range(len(parts) + 1):  # what is bound in an outer scope serves the inner ones
            used |= {("/".join(parts[:i]), selector, name) for name in values}
    names = []
    for (scope, selector), values in gin.config._CONFIG.items():
        for name in values:
            if (scope, selector, name) not in used:
                what = scope if selector == "gin.macro" else f"{selector.removeprefix('dist_partial.')}.{name}"
                names.append(f"{scope}/{what}" if scope and what != scope else what)
    return names
