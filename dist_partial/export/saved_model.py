"""Writes a whole model as a SavedModel for TensorFlow Serving."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from dist_partial.errors import UserError, first_line
from dist_partial.models import sampling
from dist_partial.training.build import Trainer

# What `generate` takes: shape, dtype and name.
_GENERATE: tuple[tuple[list[None], str, str], ...] = (
    ([None, None], "int32", "prompt"),
    ([], "int32", "length"),
    ([], "float32", "temperature"),
    ([], "int64", "seed"),
)


def write_saved_model(path: Path, built: Trainer, max_length: int | None) -> str:
    """Writes a SavedModel with the signatures `serving_default` and, where the run samples text, `generate`.

    `serving_default` takes `x` (of `run.data`'s shape; of any time where the model has a cache) and gives `outputs`.
    `generate` takes `prompt` (int32 [b, t]), `length` (int32), `temperature` (float32) and `seed` (int64), and gives
    `ids` (int32 [b, length]).
    """
    tf.get_logger().setLevel("ERROR")  # it says where it writes assets, which is not where they will be
    model, data = built.model, built.data
    x = data.train.spec[0]
    named = tf.nest.map_structure(lambda one: tf.TensorSpec([None, *one.shape], one.dtype), x)

    def serve(x: Any) -> dict[str, Any]:
        outputs = model(x, training=False)
        return outputs if isinstance(outputs, dict) else {"outputs": outputs}

    notes = ""
    archive = keras.export.ExportArchive()
    archive.track(model)
    text = data.codec is not None or hasattr(model, "decode")
    if isinstance(x, tf.TensorSpec):
        named = tf.TensorSpec([None, None] if hasattr(model, "decode") else [None, *x.shape], x.dtype, "x")
    archive.add_endpoint("serving_default", serve, [named])
    if text and isinstance(x, tf.TensorSpec):
        capacity = _capacity(model, max_length)
        archive.add_endpoint(
            "generate", _generator(model, data.window, capacity), [tf.TensorSpec(*spec) for spec in _GENERATE]
        )
        notes = ", with generate(prompt, length, temperature, seed)"
        notes += f" of up to {capacity} ids" if capacity else ""
    try:
        with _slices_without_xla():
            archive.write_out(str(path), verbose=False)
    except tf.errors.OpError as error:
        raise OSError(error.message.splitlines()[0]) from error
    except UserError:
        raise
    except Exception as error:  # whatever the model's own code raises where it needs a size that is not known yet
        raise UserError(
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
        except UserError:
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
