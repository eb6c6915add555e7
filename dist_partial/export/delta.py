"""What a training has changed, as one small file, and several such on one base model in memory.

The file is a safetensors file: arrays by variable path, in the variables' dtypes, and metadata as JSON strings. It
holds digests of every variable of the model as it was before the training, so that no other model can take it.

    base = Base(model)                # the model as its factory makes it, with the run's seed
    base.use(read("cats.safetensors"))
    base.use({cats: 0.5, dogs: 0.5})  # base + the weighted sum of (delta - base)
    base.use(None)                    # the base again, bit for bit

A run folder's is written by `dist_partial.export`; that of a model which `model.fit` has trained with `partial` by
`write("cats.safetensors", of(model))`.
"""

import dataclasses
import json
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from dist_partial import fit
from dist_partial.checkpoints import safetensors_file
from dist_partial.checkpoints.fingerprints import digest, model_fingerprints, variables
from dist_partial.distributed import consistency
from dist_partial.errors import UserError, first_line
from dist_partial.files import existing
from dist_partial.selection.plan import Plan
from dist_partial.validation import nearest

FORMAT = "1"
_FIELDS = ("base", "rules", "rows", "step", "versions")


@dataclasses.dataclass(frozen=True, eq=False)
class Delta:
    """Holds what a training has changed of a model.

    Attributes:
        arrays: the trained values, and the statistics that moved, by key: a variable's path, or `path[start:stop]`.
        rows: of the keys that are rows of a variable: its path, and which rows, as (path, start, stop).
        base: digest of every variable of the model before the training, by path.
        rules: the rules that chose what is trained, as text.
        step: updates until then.
        versions: of the packages that made it.
        name: what messages call it, such as the file that it was read from.

    Examples:
        >>> delta = Delta({"head/kernel": np.zeros([2, 1])}, {}, {}, ("train head/.*",), 10, {})
        >>> delta.place("head/kernel")
        ('head/kernel', Ellipsis)
    """

    arrays: dict[str, np.ndarray]
    rows: dict[str, tuple[str, int, int]]
    base: dict[str, str]
    rules: tuple[str, ...]
    step: int
    versions: dict[str, str]
    name: str = "the delta"

    def __repr__(self) -> str:
        size = sum(array.nbytes for array in self.arrays.values())
        return (
            f"<Delta {self.name!r}: {len(self.arrays)} of {len(self.base)} variables, {size:,} bytes, step {self.step}>"
        )

    def place(self, key: str) -> tuple[str, Any]:
        """The path of a key's variable, and the index of its rows, which is `...` for all."""
        if key not in self.rows:
            return key, ...
        path, start, stop = self.rows[key]
        return path, slice(start, stop)


def of(
    model: keras.Model, plan: Plan | None = None, base: Mapping[str, str] | None = None, step: int | None = None
) -> Delta:
    """Collects what a training has changed.

    A model that is compiled with an optimizer from `partial` knows the rest: its base is what it was when `partial` was
    called. Of another training, plan, base and step have to be given.

    Args:
        model: as it is now.
        plan: all that is ever trained.
        base: `model_fingerprints` of the model before the training.
        step: updates since then.

    Returns:
        The delta: what the plan trains, and of what no rule covers (moving statistics) that which has changed.

    Raises:
        UserError: the model alone is given, and is not compiled with such an optimizer.

    Examples:
        >>> from dist_partial import partial
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1, name="head")])
        >>> model.compile(partial("sgd", [("train", ".*/kernel"), ("freeze", ".*")], model), "mse")
        >>> _ = model.fit(np.ones([8, 4]), np.ones([8, 1]), batch_size=4, verbose=0)
        >>> of(model)
        <Delta 'the delta': 1 of 2 variables, 16 bytes, step 2>
    """
    if plan is None or base is None or step is None:
        plan, base, step = _of_fit(model)
    entries = {id(entry.variable): entry for entry in plan.entries}
    arrays, rows = {}, {}
    for path, variable in variables(model).items():
        entry = entries.get(id(variable))
        value = None if entry is not None and not entry.trained else _value(variable)
        if value is None or (entry is None and digest(value) == base[path]):
            continue
        key = path
        if entry is not None and entry.rule.rows is not None:
            start, stop = entry.rule.rows
            key, value = f"{path}[{start}:{stop}]", value[start:stop]
            rows[key] = (path, start, stop)
        arrays[key] = np.array(value)
    return Delta(arrays, rows, dict(base), tuple(dict.fromkeys(map(str, plan.rules))), step, consistency.versions())


def plan_of_fit(model: keras.Model) -> Plan:
    """Returns the plan of a model that is compiled with an optimizer from `partial`.

    Raises:
        UserError: it is compiled with none.

    Examples:
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)], name="mine")
        >>> plan_of_fit(model)
        Traceback (most recent call last):
        dist_partial.errors.UserError: model 'mine' is not compiled with an optimizer from dist_partial.partial, ...
    """
    return _of_fit(model)[0]


def _of_fit(model: keras.Model) -> tuple[Plan, dict[str, str], int]:
    """The plan, the base and the updates of a model that is compiled with an optimizer from `partial`."""
    optimizer = fit.of(model)
    if optimizer is None:
        raise UserError(
            f"model {model.name!r} is not compiled with an optimizer from dist_partial.partial, which knows what it "
            "was before: export a run folder by dist_partial.export, or give plan, base and step"
        )
    # What the rules freeze is as it was, and need not have been looked at before.
    base = {path: optimizer.options.base.get(path) or digest(_value(v)) for path, v in variables(model).items()}
    return optimizer.plan, base, int(_value(optimizer.iterations))


def write(path: str | Path, delta: Delta) -> None:
    """Writes a delta, whole or not at all; makes the folder if need be.

    Raises:
        UserError: a value is not finite, or the file cannot be written.

    Examples:
        >>> import tempfile
        >>> delta = Delta({"head/kernel": np.ones([2, 1], np.float32)}, {}, {}, ("train head/.*",), 10, {})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(f"{folder}/mine.safetensors", delta)
        ...     print(read(f"{folder}/mine.safetensors").step)
        10
    """
    _check_finite(delta.name, delta.arrays)
    metadata = {name: json.dumps(getattr(delta, name), sort_keys=True) for name in _FIELDS}
    metadata["dist_partial_delta"] = FORMAT
    metadata["sha256"] = _checksum(delta.arrays, metadata)
    try:
        place = Path(path).expanduser()
        place.parent.mkdir(parents=True, exist_ok=True)
        safetensors_file.write(place, delta.arrays, metadata)
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: an empty name; RuntimeError: ~somebody
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {str(path)!r}: {reason}; choose another place") from None


def read(path: str | Path) -> Delta:
    """Reads a delta, and checks that it is the one that was written.

    Raises:
        UserError: there is no such file, or it is damaged, of another kind, or holds what is not finite.

    Examples:
        >>> read("missing.safetensors")
        Traceback (most recent call last):
        dist_partial.errors.UserError: the delta: no file 'missing.safetensors'; ...
    """
    path = existing("the delta", path)
    try:
        arrays, metadata = safetensors_file.read(path)
    except Exception as error:  # it raises its own, and NumPy's, and the file system's
        raise UserError(f"{path} is damaged, or no safetensors file: {first_line(error)[:200]}; get it again") from None
    if "dist_partial_delta" not in metadata:
        raise UserError(
            f"{path} is a safetensors file but no delta: write one by python -m dist_partial.export "
            "--format=safetensors"
        )
    if metadata["dist_partial_delta"] != FORMAT:
        raise UserError(
            f"{path} has the delta format {metadata['dist_partial_delta'][:20]!r}, and this version of dist_partial "
            f"reads {FORMAT!r}: use the version that wrote it"
        )
    if metadata.get("sha256") != _checksum(arrays, metadata):
        raise UserError(f"{path} is damaged: its content does not have its checksum; get it again")
    try:
        fields = {name: json.loads(metadata[name]) for name in _FIELDS}
        rows = {key: _row(key, row, arrays) for key, row in fields["rows"].items()}
        base, rules, step, versions = (fields[name] for name in ("base", "rules", "step", "versions"))
        texts = [*base.values(), *rules, *versions.values()]
        if not all(isinstance(text, str) for text in texts) or type(step) is not int or not isinstance(rules, list):
            raise ValueError("a value is of another type")
        delta = Delta(arrays, rows, base, tuple(rules), step, versions, str(path))
        places = [delta.place(key)[0] for key in arrays]
        if len(set(places)) < len(places):
            raise ValueError("it holds one variable twice")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is malformed: {first_line(error)[:200]}; write it again by dist_partial.export"
        ) from None
    _check_finite(str(path), arrays)
    return delta


class Base:
    """Applies deltas to a model in place: swapped and averaged without building it again.

    It remembers the base values of what its deltas have overwritten, and of nothing else.

    Examples:
        >>> import keras
        >>> base = Base(keras.Sequential([keras.Input([4]), keras.layers.Dense(1)]))
        >>> base.use(None)  # the base itself; `base.use(read("mine.safetensors"))` applies a delta
    """

    def __init__(self, model: keras.Model) -> None:
        """Takes the model's present values for the base.

        Args:
            model: a built model; what has trained each delta, before it was trained.
        """
        self.model = model
        self._variables = variables(model)
        if not self._variables:
            raise UserError(f"model {model.name!r} has no variables yet: build it, or call it once, before Base(model)")
        self._digests = model_fingerprints(model)
        self._values: dict[str, np.ndarray] = {}  # base values of what has ever been overwritten
        self._overwritten: set[str] = set()

    def use(self, deltas: Delta | Mapping[Delta, float] | None) -> None:
        """Gives the model the weights: base + sum of weight * (delta - base).

        Everything is checked before anything is assigned. What a delta lacks counts as the base; one delta alone,
        of weight 1, is assigned bit for bit. The sum is of variables: of LoRA's factors, not of their products. What
        is assigned to the model by other means after the first `use` is not noticed.

        Args:
            deltas: one of them, or weights by delta (any finite numbers), or None for the base alone.

        Raises:
            UserError: a delta is of another base (the variables that differ are named), holds an unknown path, another
                shape or dtype, or what is not finite; or the base has been changed otherwise meanwhile.
        """
        weights = dict(deltas) if isinstance(deltas, Mapping) else {} if deltas is None else {deltas: 1.0}
        for delta, weight in weights.items():
            if not isinstance(delta, Delta):
                raise UserError(f"{delta!r:.100} is no delta: read it first, by dist_partial.export.delta.read(path)")
            if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not math.isfinite(weight):
                raise UserError(f"the weight of {delta.name} is {weight!r}: write a finite number, such as 0.5")
            self._check(delta)
        paths = {delta.place(key)[0] for delta in weights for key in delta.arrays}
        for path in paths - self._values.keys():
            value = np.array(_value(self._variables[path]))
            if digest(value) != self._digests[path]:
                raise UserError(f"{path} has been changed since Base(model) took its value: make the Base again")
            self._values[path] = value
        new = {path: self._combined(path, weights) for path in paths}
        _check_finite("the weighted sum", new)
        new |= {path: self._values[path] for path in self._overwritten - paths}
        for path, value in new.items():
            self._variables[path].assign(value)
        self._overwritten = paths

    def _combined(self, path: str, weights: Mapping[Delta, float]) -> np.ndarray:
        base = self._values[path]
        parts = []
        for delta, weight in weights.items():
            for key, array in delta.arrays.items():
                place, rows = delta.place(key)
                if place == path:
                    parts.append((rows, array, weight))
        if len(parts) == 1 and parts[0][2] == 1:  # not by the sum, which would round
            rows, array, _ = parts[0]
            value = base.copy()
            value[rows] = array
            return value
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not finite, and refused
            total = base.astype(np.float64)
            for rows, array, weight in parts:
                total[rows] += weight * (array.astype(np.float64) - base[rows].astype(np.float64))
            return (total if base.dtype.kind in "fV" else np.rint(total)).astype(base.dtype)

    def _check(self, delta: Delta) -> None:
        """Raises UserError unless the delta is of this base and fits its variables."""
        differ = [path for path, digest in delta.base.items() if self._digests.get(path, digest) != digest]
        lacking = [path for path in delta.base if path not in self._digests]
        more = [path for path in self._digests if path not in delta.base]
        found = [
            f"{_some(paths)} {what}"
            for paths, what in ((differ, "differ"), (lacking, "are not in the model"), (more, "are not in its base"))
            if paths
        ]
        if found:
            adapted = any("/lora_" in path for path in lacking)
            enable = "call dist_partial.adapters.lora.enable(rules, model, seed) with those of the run first; or else "
            first = enable if adapted else ""
            raise UserError(
                f"{delta.name} is of another base: {'; '.join(found)}; {first}make the model as the run did, by its "
                "factory after keras.utils.set_random_seed(run.seed), before any training"
            )
        for key, array in delta.arrays.items():
            path, rows = delta.place(key)
            if path not in self._variables:
                near = nearest(path, self._variables, always=True)
                raise UserError(f"{delta.name} holds {key[:200]!r}, which is no variable of the model{near}")
            variable = self._variables[path]
            shape = tuple(variable.shape)
            wanted = (rows.stop - rows.start, *shape[1:]) if key in delta.rows else shape
            if key in delta.rows and (not shape or rows.stop > shape[0]):
                raise UserError(f"{delta.name}: the rows of {key!r} lie beyond {path!r} of shape {shape}")
            if array.shape != wanted or array.dtype.name != variable.dtype:
                raise UserError(
                    f"{delta.name}: {key!r} is {array.dtype.name}{list(array.shape)} and the model's is "
                    f"{variable.dtype}{list(wanted)}; make the model with the run's precision and sizes"
                )
        _check_finite(delta.name, delta.arrays)


def _row(key: str, row: Any, arrays: Mapping[str, np.ndarray]) -> tuple[str, int, int]:
    path, start, stop = row
    if not isinstance(path, str) or type(start) is not int or type(stop) is not int or not 0 <= start < stop:
        raise ValueError(f"the rows of {key!r} are {row!r}"[:200])
    if arrays[key].shape[:1] != (stop - start,):
        raise ValueError(f"{key!r} has the shape {arrays[key].shape}")
    return path, start, stop


def _check_finite(name: str, arrays: Mapping[str, np.ndarray]) -> None:
    for key, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{name}: {key!r} is not finite, so no model can use it")


def _checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """SHA-256 of all arrays, in the order of their keys, and of the metadata beside it."""
    rest = {name: text for name, text in metadata.items() if name != "sha256"}
    return safetensors_file.checksum(arrays, rest, lambda array: digest(array, digits=64))


def _value(variable: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable)


def _some(names: list[str]) -> str:
    """A few of the names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name[:100]) for name in names[:3]) + more
