"""The model of a run, tried on some examples of its data."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import compat
from dist_partial.config.settings import Settings
from dist_partial.data import Dataset, fetch, looks, some_inputs
from dist_partial.data.source import described
from dist_partial.errors import UserError, first_line, own_line
from dist_partial.models.inputs import check_asked, check_ids, check_inputs
from dist_partial.step import layer_state
from dist_partial.step.objective import Batch

_TRIED = 8  # examples on which a model is tried, at least


def make_model(settings: Settings, data: Dataset, strategy: tf.distribute.Strategy) -> tuple[keras.Model, Batch, Any]:
    """Makes the model, with its variables, in the strategy's scope; some examples, and what it gives for them.

    Raises:
        UserError: it is none, or not one that a run trains as Keras would, or it does not fit the data.

    Examples:
        >>> from dist_partial.data import stdlib_corpus
        >>> from dist_partial.models import two_dense
        >>> settings = Settings([("train", ".*")], two_dense, stdlib_corpus)
        >>> make_model(settings, stdlib_corpus(window=16), tf.distribute.get_strategy())
        Traceback (most recent call last):
        dist_partial.errors.UserError: stdlib_corpus has 256 symbols and run.model gives logits for 10: bind ...
    """
    model = settings.model()
    if not isinstance(model, keras.Model):
        raise UserError(f"run.model made a {type(model).__name__}: its factory must return a keras.Model")
    for name in ("train_step", "test_step"):
        if compat.overrides(model, name):
            raise UserError(
                f"run.model has a {name} of its own ({type(model).__name__}), which a run does not call: train it by "
                "model.fit with dist_partial.partial, or give it its loss by a compute_loss of its own"
            )
    x = data.train.spec[0]
    generators = [variable for variable in model.variables if compat.is_generator(variable)]
    generators += layer_state.recurrent(model)
    inputs = getattr(model, "inputs", None)
    if (
        isinstance(x, tf.TensorSpec)
        and x.dtype.is_floating
        and inputs
        and len(inputs) == 1
        and "int" in inputs[0].dtype
    ):
        raise UserError(  # Keras would cut the fractions off
            f"run.model reads ids ({inputs[0].dtype}) and not {_example(data.name, x)}: bind a model of features, or "
            "other data"
        )
    check_inputs(model, data.name, x)
    if any(isinstance(layer, keras.layers.Embedding) for layer in compat.layers(model)):
        for source in (data.train, data.evaluation):
            check_ids(model, data.name, *some_inputs(source))
    with taking(data.name, x), layer_state.untouched(strategy, generators):
        batch, outputs = _tried(model, data)
    if data.codec is not None and tf.is_tensor(outputs):
        _check_symbols(model, data.name, data.codec.size, outputs.shape[-1])
    return model, batch, outputs


def with_compiled(settings: Settings) -> tuple[Settings, list[str]]:
    """Takes what the model was compiled with, where the factory of the model has it as `compiled`; says what that is.

    Examples:
        >>> from dist_partial.data import stdlib_shapes
        >>> from dist_partial.models import two_dense
        >>> class Compiled:
        ...     compiled = {"loss": "mse", "metrics": ["mae"], "optimizer": keras.optimizers.SGD}
        ...     __call__ = staticmethod(two_dense)
        >>> with_compiled(Settings([("train", ".*")], Compiled(), stdlib_shapes))[1]
        ["of model.compile: optimizer SGD, learning rate 0.01; loss 'mse'; metrics ['mae']"]
        >>> with_compiled(Settings([("train", ".*")], two_dense, stdlib_shapes))[1]
        []
    """
    compiled = getattr(settings.model, "compiled", {})
    if not compiled:
        return settings, []
    words = {name: _named(value) for name, value in compiled.items() if name not in ("optimizer", "loss_weights")}
    if "optimizer" in compiled:
        one = compiled["optimizer"]()
        words = {"optimizer": f"{type(one).__name__}, learning rate {float(one.learning_rate):.4g}"} | words
    said = "; ".join(f"{name} {value}" for name, value in words.items())
    return dataclasses.replace(settings, **compiled), [f"of model.compile: {said}"]


def _named(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name!r}: {_named(each)}' for name, each in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_named, value))}]"
    return repr(value) if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)


def _tried(model: keras.Model, data: Dataset) -> tuple[Batch, Any]:
    """Calls a model, which makes the variables of a subclassed one, on a number of examples that is no other size.

    Else targets [n] and outputs [n, n] would go together by broadcasting.
    """
    fixed, own = layer_state.batch_size(model), compat.overrides(model, "compute_loss")
    count = fixed or (_TRIED if own else 2)
    sizes = {size for one in tf.nest.flatten(data.train.spec) for size in one.shape}
    for _ in range(2):  # there are models whose outputs have the number of examples as another size
        while count in sizes and not fixed:
            count += 1
        batch = tf.nest.map_structure(tf.constant, fetch(data.train, np.resize(looks(data.train), count)))
        outputs = model(batch[0], training=False)
        sizes |= {size for output in tf.nest.flatten(outputs) for size in output.shape[1:]}
        if fixed or count not in sizes:
            break
    return batch, outputs


def _check_symbols(model: keras.Model, name: str, symbols: int, outputs: int) -> None:
    """Raises UserError unless a model reads and writes all symbols of the data set of that name."""
    if outputs < symbols:
        raise UserError(
            f"{name} has {symbols:,} symbols and run.model gives logits for {outputs:,}: bind a tokenizer of the "
            "model's own, or a model of that size"
        )
    for layer in compat.layers(model):  # Keras encodes an id beyond its tokens as nothing, without a word
        if isinstance(layer, keras.layers.CategoryEncoding) and layer.num_tokens < symbols:
            raise UserError(
                f"{name} has {symbols:,} symbols and {layer.name!r} of run.model encodes {layer.num_tokens:,}: bind a "
                "model that reads all of them"
            )


@contextlib.contextmanager
def taking(name: str, x: Any) -> Iterator[None]:
    """Turns what a model says of the examples of the data set of that name into a mistake of the user's.

    Examples:
        >>> with taking("mine", tf.TensorSpec([4], tf.float32)):
        ...     raise ValueError("expected axis -1 to have value 5")
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.model does not take one of mine's examples, float32 [4]: expected ...
    """
    try:
        yield
    except KeyError as error:
        check_asked(name, x, error)
        raise
    except (ValueError, TypeError, tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
        texts = any(each.dtype == tf.string for each in tf.nest.flatten(x))
        cure = "make numbers of texts in Dataset.map" if texts else "bind sizes that fit each other"
        raise UserError(
            f"run.model does not take {_example(name, x)}: {first_line(error).rstrip('.')}{own_line(error)}; {cure}"
        ) from error


def _example(name: str, x: Any) -> str:
    return f"one of {name}'s examples, {described(x)}"
