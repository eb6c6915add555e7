"""python -m dist_partial.export --run_dir=DIR --format=safetensors|keras|savedmodel --output=PATH [--overwrite] ...

Takes the newest checkpoint of a run folder home: what was trained alone (safetensors; see dist_partial.delta), or the
whole model, for Keras (keras) or for TensorFlow Serving (savedmodel).
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from dist_partial import cli
from dist_partial.errors import first_line

if TYPE_CHECKING:
    from dist_partial.build import Built

FORMATS = {"safetensors": ".safetensors", "keras": ".keras", "savedmodel": ""}
# What `generate` takes: shape, dtype and name.
_GENERATE: tuple[tuple[list[None], str, str], ...] = (
    ([None, None], "int32", "prompt"),
    ([], "int32", "length"),
    ([], "float32", "temperature"),
    ([], "int64", "seed"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for a mistake of the user's."""
    values = flags.FlagValues()
    flags.DEFINE_string("run_dir", None, "run folder", flag_values=values)
    flags.DEFINE_enum("format", None, list(FORMATS), "what to write", flag_values=values)
    flags.DEFINE_string("output", None, "the file, or for savedmodel the folder, to write", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "replace an output of the same format", flag_values=values)
    flags.DEFINE_integer("max_length", None, "savedmodel: ids that a cache of `generate` holds", flag_values=values)
    flags.DEFINE_bool("allow_imports", False, "import the modules that the run's gin file names", flag_values=values)

    def command() -> int:
        folder = cli.check_run_dir(values.run_dir)
        if not values.format:
            raise cli.UserError(f"no --format: write one of {', '.join(f'--format={name}' for name in FORMATS)}")
        output = _checked_output(values.output, values.format, values.overwrite)
        if values.max_length is not None and values.max_length < 2:
            raise cli.UserError(
                f"--max_length={values.max_length}: it must be at least 2, a prompt and what follows it"
            )
        cli.import_tensorflow_quietly()
        from dist_partial import delta, trained

        with trained.newest(folder, values.allow_imports) as (_, built, step):
            if values.format == "safetensors":
                changed = delta.of(built.model, built.plan, _base(folder, built), step)
                delta.write(output, changed)
                notes = f", {len(changed.arrays)} of {len(changed.base)} variables"
            else:
                for layer in built.batch_norms:
                    layer.trainable = True  # as the factory made it: the run alone had put it into inference mode
                whole = _write_keras if values.format == "keras" else _write_saved_model
                notes = _put(output, lambda path: whole(path, built, values.max_length))
        print(f"{output}: step {step} of {folder}, {_bytes(output):,} bytes{notes}")
        if values.format == "savedmodel":
            versions = output.parent if output.name.isdecimal() else Path("SOMEWHERE") / output.name
            move = "" if output.name.isdecimal() else f"move it to {versions}/1 and "
            print(f"TensorFlow Serving reads a folder of numbered versions: {move}give it --model_base_path={versions}")
        return 0

    return cli.call(__doc__, values, argv, command)


def _checked_output(given: str | None, form: str, overwrite: bool) -> Path:
    """The path of the output, at which there may be something only if it may be replaced."""
    suffix = FORMATS[form]
    if not given:
        raise cli.UserError(f"no --output: name what to write, such as --output=exported{suffix}")
    output = Path(os.path.abspath(given))
    if suffix and output.suffix != suffix:
        raise cli.UserError(f"--output={given} does not end in {suffix}: write --output={given}{suffix}")
    folder = next(parent for parent in output.parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):  # said now, and not after the work
        raise cli.UserError(f"cannot write {given}: {folder} is no folder that can be written; choose another --output")
    if not os.path.lexists(output):
        return output
    if not overwrite:
        raise cli.UserError(f"{given} is there already: choose another --output, or give --overwrite to replace it")
    if not (output.is_file() if suffix else (output / "saved_model.pb").is_file()):
        what = "file" if suffix else "SavedModel"
        raise cli.UserError(f"{given} is there and is no {what}, so it is not replaced: choose another --output")
    return output


def _base(folder: Path, built: "Built") -> dict[str, str]:
    """Digests of the values that the run began with, which the model as it was built has, too.

    Raises:
        UserError: the factories make others by now, so that no base would be known by them.
    """
    from dist_partial import identity, validation

    began = json.loads((folder / identity.FILE).read_text()).get(identity.START, {})
    if changed := validation.differences(began, built.identity[identity.START]):
        names = ", ".join(repr(name) for name, _, _ in changed[:3])
        raise cli.UserError(
            f"run.model does not make the weights that {folder} began with: {names} differ, so that no base would be "
            "known by this delta; restore what it reads, or export the whole model by --format=keras"
        )
    return began


def _put(output: Path, write: Callable[[Path], str]) -> str:
    """Has a file or a folder written beside its name, then renames it; returns what `write` does."""
    partial = output.with_name(f".{os.getpid()}.partial.{output.name}")  # Keras goes by the name's end
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # of a killed process that had this one's number, or put there as a link
        try:
            notes = write(partial)
            for path in [partial, *partial.rglob("*")]:
                _sync(path)
            _replace(output, partial)
            _sync(output.parent)
            return notes
        finally:
            _remove(partial)
    except OSError as error:
        reason = error.strerror or str(error)
        raise cli.UserError(f"cannot write {output}: {reason}; free some space, or choose another --output") from None


def _replace(output: Path, new: Path) -> None:
    if not output.is_dir():
        new.rename(output)
        return
    aside = output.with_name(f".{os.getpid()}.replaced.{output.name}")  # a folder cannot be renamed over another
    output.rename(aside)
    try:
        new.rename(output)
    except OSError:
        aside.rename(output)
        raise
    _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in [path, *path.rglob("*")] if p.is_file())


def _write_keras(path: Path, built: "Built", _: int | None) -> str:
    """Writes a .keras file, and loads it again to see that it is the model; the model is not for training any more.

    Raises:
        UserError: the model cannot be written, or is another one when it is loaded.
    """
    import keras

    from dist_partial.adapters import lora, quantization

    def policies(model: Any) -> list[str]:
        return [layer.dtype_policy.name for layer in model._flatten_layers()]

    model, policy, floatx = built.model, keras.config.dtype_policy(), keras.config.floatx()
    quantization.widen(built.plan)  # or else what training has moved would be rounded away in the kernels
    lora.merge(model)  # or else the file would have factors of zero beside kernels that stay frozen
    hint = "give its classes get_config and keras.saving.register_keras_serializable, or write --format=savedmodel"
    if any(getattr(layer, "quantization_mode", None) for layer in model._flatten_layers()):
        hint = "Keras 3.15 cannot load all models with layers in int8: write --format=savedmodel or safetensors"
    name = f"model {model.name!r}"
    notes = ""
    try:
        model.save(path)
        keras.config.set_floatx("float32")  # as in a new process
        keras.config.set_dtype_policy("float32")
        # What a Lambda layer holds is this process's own code.
        loaded = keras.saving.load_model(path, compile=False, safe_mode=False)
        if policies(loaded) != policies(model):
            keras.config.set_floatx(floatx)
            keras.config.set_dtype_policy(policy)
            loaded = keras.saving.load_model(path, compile=False, safe_mode=False)
            notes = f"; call keras.config.set_dtype_policy({policy.name!r}) before loading it"
            if floatx != "float32":
                notes = f"; call keras.config.set_floatx({floatx!r}) and" + notes.removeprefix("; call")
    except OSError:
        raise
    except Exception as error:  # Keras raises this and that, and so may the classes of the user's
        raise cli.UserError(f"{name} cannot be written as a .keras file: {first_line(error)}; {hint}") from error
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)
    if policies(loaded) != policies(model) or not _same_outputs(built, loaded):
        raise cli.UserError(f"{name} is another model when its .keras file is loaded; {hint}")
    if lost := sorted({v.dtype for v in model.variables} - {v.dtype for v in loaded.variables}):
        notes += f"; what it holds in {', '.join(lost)} loads in the layers' own dtype"
    modules = {type(layer).__module__ for layer in model._flatten_layers()}
    modules = {module.split(".src.")[0] for module in modules if module.split(".")[0] != "keras"}
    return notes + (f"; import {', '.join(sorted(modules))} before loading it" if modules else "")


def _same_outputs(built: "Built", loaded: Any) -> bool:
    """Whether two models give the same on held-out examples."""
    import numpy as np

    from dist_partial import layer_state

    for state in layer_state.recurrent(built.model):  # Keras saves none
        state.assign(np.zeros(state.shape))
    count = layer_state.batch_size(built.model) or min(4, len(built.data.evaluation))
    x = built.data.evaluation.fetch(np.arange(count))[0]
    ours, theirs = (np.asarray(model(x, training=False), np.float64) for model in (built.model, loaded))
    rounding = 1e-2 if "16" in built.model.compute_dtype else 1e-4  # factors that were merged are rounded elsewhere
    return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() <= rounding * np.abs(ours).max())


def _write_saved_model(path: Path, built: "Built", max_length: int | None) -> str:
    """Writes a SavedModel with the signatures `serving_default` and, where the run samples text, `generate`.

    `serving_default` takes `x` (of `run.data`'s shape; of any time where the model has a cache) and gives `outputs`.
    `generate` takes `prompt` (int32 [b, t]), `length` (int32), `temperature` (float32) and `seed` (int64), and gives
    `ids` (int32 [b, length]).
    """
    import keras
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")  # it says where it writes assets, which is not where they will be
    model, data = built.model, built.data
    x, y = data.train.spec[:2]

    def serve(x: Any) -> dict[str, Any]:
        return {"outputs": model(x, training=False)}

    shape = [None, None] if hasattr(model, "decode") else [None, *x.shape]
    notes = ""
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serving_default", serve, [tf.TensorSpec(shape, x.dtype, "x")])
    if data.codec is not None or hasattr(model, "decode"):
        window = x.shape[0] if y.shape.rank < x.shape.rank else None
        capacity = _capacity(model, max_length)
        archive.add_endpoint(
            "generate", _generator(model, window, capacity), [tf.TensorSpec(*spec) for spec in _GENERATE]
        )
        notes = ", with generate(prompt, length, temperature, seed)"
        notes += f" of up to {capacity} ids" if capacity else ""
    try:
        with _slices_without_xla():
            archive.write_out(str(path), verbose=False)
    except tf.errors.OpError as error:
        raise OSError(error.message.splitlines()[0]) from error
    except cli.UserError:
        raise
    except Exception as error:  # whatever the model's own code raises where it needs a size that is not known yet
        raise cli.UserError(
            f"model {model.name!r} cannot be traced for any batch size, time and length: {first_line(error)}; it must "
            "take tensors of which these are unknown"
        ) from error
    return notes


@contextlib.contextmanager
def _slices_without_xla() -> Iterator[None]:
    """Has caches updated by an op that every TensorFlow runs.

    Keras 3.15 takes XlaDynamicUpdateSlice, which outside of XLA is compiled each time that it meets another size, and
    for which TensorFlow Serving has no compiler on GPUs (tensorflow/serving, issue 2217).
    """
    import keras
    import tensorflow as tf

    def slice_update(inputs: Any, start_indices: Any, updates: Any) -> Any:
        begin = tf.cast(tf.stack(start_indices), tf.int32)
        ends = begin + tf.shape(updates)
        return tf.raw_ops.TensorStridedSliceUpdate(
            input=inputs, begin=begin, end=ends, strides=tf.ones_like(begin), value=updates
        )

    keras_slice_update = keras.ops.slice_update
    keras.ops.slice_update = slice_update
    try:
        yield
    finally:
        keras.ops.slice_update = keras_slice_update


def _capacity(model: Any, given: int | None) -> int | None:
    """How many ids the model's cache is to hold: what is asked for, or as many as it can of 1024; None: it has none."""
    if not hasattr(model, "decode"):
        return None
    if given is not None:
        model.make_cache(1, given)  # a model that reads fewer says so
        return given
    capacity = 1024
    while capacity > 2:
        try:
            model.make_cache(1, capacity)
            break
        except cli.UserError:
            capacity //= 2
    return capacity


def _generator(model: Any, window: int | None, capacity: int | None) -> Callable[..., Any]:
    """`sampling.generate` of a batch of prompts, in TensorFlow's ops alone, of any size that is known only then.

    Args:
        model: as for `sampling.generate`.
        window: as there.
        capacity: ids that the cache holds, prompts included, where the model has one.

    Returns:
        A function (prompt [b, t], length, temperature, seed) -> {"ids": [b, length]}. Each row draws noise of its own;
        equal prompts give the rows that `sampling.generate` gives for `count=b`.
    """
    import tensorflow as tf

    from dist_partial import sampling

    window = window or sampling._window(model)

    def generate(prompt: Any, length: Any, temperature: Any, seed: Any) -> dict[str, Any]:
        checks = [
            tf.debugging.assert_positive(tf.size(prompt), "the prompt is empty"),
            tf.debugging.assert_positive(length, "length must be at least 1"),
            tf.debugging.assert_equal(
                (temperature >= 0.0) & tf.math.is_finite(temperature),
                True,
                "temperature must be 0 or a positive number",
            ),
        ]
        if capacity is not None:
            most = tf.shape(prompt)[1] + length
            message = f"prompt and length are more than the {capacity} ids of the cache"
            checks.append(tf.debugging.assert_less_equal(most, capacity, message))
        with tf.control_dependencies(checks):
            prompt = tf.identity(prompt)
        if window:  # a shorter prompt is repeated until it fills it
            given = tf.shape(prompt)[1]
            prompt = tf.tile(prompt, [1, -(-window // given)])[:, -tf.maximum(window, given) :]

        def choose(logits: Any, position: Any) -> Any:
            return sampling.draw(logits, temperature, logits.shape[-1], 1.0, seed, position)

        return {"ids": sampling.continued(model, prompt, length, choose, window, capacity)}

    return generate


if __name__ == "__main__":
    sys.exit(main())
