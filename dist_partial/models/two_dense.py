"""The smallest model worth selecting in: two dense layers over a window of symbols or features."""

from typing import Annotated

import keras

from dist_partial.validation import AtLeast, check_arguments


def two_dense(
    window: Annotated[int, AtLeast(1)] = 16,
    symbols: Annotated[int | None, AtLeast(1)] = 10,
    hidden: Annotated[int, AtLeast(1)] = 64,
    classes: Annotated[int, AtLeast(1)] = 10,
) -> keras.Model:
    """Builds a classifier of two dense layers: `dense1`, `dense2`, each a kernel and a bias.

    It is made of Keras's own layers only, so a saved copy loads without this package.

    Args:
        window: How many ids, or features, one example has.
        symbols: How many ids there are; each becomes a one-hot vector. None: the inputs are features.
        hidden: Units of `dense1`.
        classes: Units of `dense2`.

    Returns:
        A model named `two_dense`: int ids [batch, window] in [0, symbols), or float features
        [batch, window], to logits [batch, classes].

    Raises:
        UserError: A size is below 1.

    Examples:
        >>> [(v.path, tuple(v.shape)) for v in two_dense().weights]
        [('dense1/kernel', (160, 64)), ('dense1/bias', (64,)), ('dense2/kernel', (64, 10)), ('dense2/bias', (10,))]
    """
    check_arguments(two_dense, locals())
    if symbols is None:
        inputs = features = keras.Input((window,), name="features")
    else:
        inputs = keras.Input((window,), dtype="int32", name="ids")
        one_hot = keras.layers.CategoryEncoding(symbols, output_mode="one_hot", name="one_hot")(inputs)
        features = keras.layers.Flatten(name="flatten")(one_hot)
    activations = keras.layers.Dense(hidden, activation="relu", name="dense1")(features)
    logits = keras.layers.Dense(classes, name="dense2")(activations)
    return keras.Model(inputs, logits, name="two_dense")
