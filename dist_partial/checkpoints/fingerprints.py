"""Fingerprints: digests of a model's variables, and of everything that must not change under a run folder."""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.compat import is_generator
from dist_partial.data.functions import other_python
from dist_partial.errors import UserError
from dist_partial.selection.paths import own_names
from dist_partial.selection.plan import Plan
from dist_partial.validation import differences, shown

RUN_FILE = "run_fingerprint.json"
FROZEN_DIFFERS = "the frozen variable"  # begins what is said of one that has other values
INITIAL = "initial values"  # the key of the digests of all of them


def frozen_fingerprints(model: keras.Model, plan: Plan, moving: Sequence[Any]) -> dict[str, str]:
    """Computes the SHA-256 (first 16 hex digits) of everything that training leaves as it is, by path.

    Args:
        model: the model.
        plan: all that is ever trained.
        moving: what its layers change, see `layer_state.find`.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2, name="body"), keras.layers.Dense(1)])
        >>> plan = resolve([("freeze", "body/.*"), ("train", ".*")], model, AllReduce())
        >>> list(frozen_fingerprints(model, plan, moving=[]))
        ['body/kernel', 'body/bias']
    """
    prints = {}
    for entry in plan.entries:
        if entry.rule.rows is not None and entry.trained:
            others = np.delete(view(entry.variable), slice(*entry.rule.rows), axis=0)
            prints[f"{entry.path}[other rows]"] = digest(others)
        elif not entry.trained:
            prints[entry.path] = digest(view(entry.variable))
    known = {id(v) for v in [*moving, *(entry.variable for entry in plan.entries)]}
    beside = [v for v in model.variables if id(v) not in known]
    return prints | {name: digest(view(v)) for name, v in zip(own_names(model, beside), beside, strict=True)}


def check_frozen(before: dict[str, str], now: dict[str, str], step: int) -> None:
    """Raises UserError if what is frozen has moved, by its fingerprints at the start and after a step.

    Examples:
        >>> check_frozen({"body/kernel": "12ab"}, {"body/kernel": "12ab"}, step=10)
        >>> check_frozen({"body/kernel": "12ab"}, {"body/kernel": "34cd"}, step=10)
        Traceback (most recent call last):
        dist_partial.errors.UserError: 'body/kernel' is frozen and has changed by step 10; nothing is saved of it. ...
    """
    if moved := [path for path, print_ in before.items() if now[path] != print_]:
        raise UserError(
            f"{moved[0]!r} is frozen and has changed by step {step}; nothing is saved of it. Something other than the "
            "training step assigns it: a layer's call, a callback, another thread"
        )


def variables(model: keras.Model) -> dict[str, Any]:
    """Names all variables but the states of random generators, by path without the model's own leading name.

    Where several have one path, those after the first are called `path (2)`, `path (3)` and so on.

    Examples:
        >>> layers = [keras.layers.Dropout(0.1), keras.layers.BatchNormalization(center=False, name="norm")]
        >>> list(variables(keras.Sequential([keras.Input([4]), *layers])))
        ['norm/gamma', 'norm/moving_mean', 'norm/moving_variance']
    """
    kept = [v for v in model.variables if not is_generator(v)]
    return dict(zip(own_names(model, kept), kept, strict=True))


def model_fingerprints(model: keras.Model) -> dict[str, str]:
    """Computes the SHA-256 (first 16 hex digits) of the values of `variables`, by path.

    Examples:
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(2, name="head")])
        >>> before = model_fingerprints(model)
        >>> _ = model.layers[0].bias.assign([1.0, 0.0])
        >>> [path for path, print_ in model_fingerprints(model).items() if print_ != before[path]]
        ['head/bias']
    """
    return {path: digest(view(variable)) for path, variable in variables(model).items()}


def view(variable: Any) -> np.ndarray:
    """Gives the value that a variable has now, and will not have once it is assigned another.

    On the CPU nothing is copied: TensorFlow assigns in new memory as long as somebody has the old.

    Examples:
        >>> variable = keras.Variable([1.0, 2.0])
        >>> before = view(variable)
        >>> _ = variable.assign_add([1.0, 1.0])
        >>> before.tolist(), view(variable).tolist()
        ([1.0, 2.0], [2.0, 3.0])
    """
    return np.asarray(tf.convert_to_tensor(variable))


def digest(array: np.ndarray, digits: int = 16) -> str:
    """Computes the SHA-256 of an array's dtype, shape and values: its first hex digits.

    Examples:
        >>> zeros = np.zeros(2, np.float32)
        >>> [digest(other) == digest(zeros) for other in (zeros.copy(), zeros.astype(np.float64), zeros[:, None])]
        [True, False, False]
    """
    content = hashlib.sha256(str((array.dtype, array.shape)).encode())
    content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return content.hexdigest()[:digits]


def check_run(folder: Path, fingerprint: dict[str, Any], may_differ: Collection[str] = ()) -> bool:
    """Compares a run's fingerprint with the one that the folder was made with.

    Args:
        folder: which may be absent.
        fingerprint: from `of_run`.
        may_differ: what of it is not compared.

    Returns:
        Whether the folder is a run folder; False if it is absent or empty.

    Raises:
        UserError: it belongs to another run (the differences are shown), damaged, or something else.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(check_run(Path(folder), {"rules": ["train .*"]}))
        ...     _ = Path(folder, RUN_FILE).write_text('{"rules": ["train head/.*"]}')
        ...     Path(folder, "checkpoints", "step-0000000010.safetensors").mkdir(parents=True)
        ...     check_run(Path(folder), {"rules": ["train .*"]})
        Traceback (most recent call last):
        dist_partial.errors.UserError: ... belongs to another run: rules.0 was 'train head/.*' and is now 'train .*'...
    """
    path = folder / RUN_FILE
    if not path.exists():
        # Hidden files are the lock, and what a killed write left.
        if folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
            raise UserError(f"{folder} is there and is not a run folder: choose another --run_dir")
        return False
    try:
        before = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): choose another --run_dir") from None
    if isinstance(before, dict):
        if not any((folder / "checkpoints").glob("step-*")):
            return True  # it has not come far enough to be another run
        before |= {name: value for name, value in fingerprint.items() if name == INITIAL or name in may_differ}
    if changed := [each for each in differences(before, fingerprint) if not other_python(*each[1:])]:
        first = "; ".join(_in_words(*each) for each in changed[:3])
        more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{folder} belongs to another run: {first}{more}; choose another --run_dir, or restore the configuration"
        )
    return True


def began(folder: Path) -> dict[str, Any]:
    """Returns the digests of the values that the run in a folder began with, if it has come as far as a checkpoint.

    A run that goes on may be given a model that has been trained in the meantime.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, RUN_FILE).write_text('{"initial values": {"head/bias": "12ab"}, "seed": 0}')
        ...     print(began(Path(folder)))
        ...     Path(folder, "checkpoints", "step-0000000010.safetensors").mkdir(parents=True)
        ...     began(Path(folder))
        {}
        {'initial values': {'head/bias': '12ab'}}
    """
    path = folder / RUN_FILE
    if not path.exists() or not any((folder / "checkpoints").glob("step-*")):
        return {}
    content = json.loads(path.read_text())
    return {INITIAL: content[INITIAL]} if INITIAL in content else {}


def _of_code(name: str, old: Any, new: Any) -> str:
    """Says a difference between the user's functions and classes: see `data.functions.of_classes`."""
    name = name.removesuffix(".code")
    if None in (old, new):
        return f"the code of {name} is {'new' if old is None else 'gone'}"
    if str(new).startswith("code "):
        return f"the code of {name} has changed"
    return f"{name} was {old} and is now {new}"


def _of_function(name: str, key: str = "", *, old: Any, new: Any) -> str:
    """Says a difference between functions of the data: see `data.functions.described`."""
    function = f"{name} of run.data"
    if not key:
        return f"{function} is new" if old is None else f"{function} is gone"
    if str(new or old).startswith("code "):
        of = key.removesuffix("code").rstrip(".")
        return f"{function} has other code" + (f" ({of})" if of else "")
    return f"{function}: {key} was {old} and is now {new}"


def _in_words(name: str, old: Any, new: Any) -> str:
    """Says a difference between two fingerprints; digests mean nothing to a reader."""
    part, _, path = name.partition(".")
    if part == "frozen":
        if old is None:
            return f"{path!r} is frozen now"
        return f"{path!r} is no longer frozen" if new is None else f"{FROZEN_DIFFERS} {path!r} has other values"
    if name == "data.fingerprint":
        return "the data has other examples"
    if name.startswith("data.functions."):
        return _of_function(*name.split(".", 3)[2:], old=old, new=new)
    if part == "code":
        return _of_code(path, old, new)
    if part in ("model", "rules") and None in (old, new):
        return f"{name}, {shown(new)}, is new" if old is None else f"{name}, {shown(old)}, is gone"
    return f"{name} was {shown(old)} and is now {shown(new)}"
