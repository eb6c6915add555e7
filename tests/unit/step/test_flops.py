import keras
import pytest
import tensorflow as tf

from dist_partial.step.flops import flops

BATCH = 4


def gradients(model, shape, of=None):
    """A model's traced gradients of some variables, or all, on a batch."""

    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True) ** 2)
        return tape.gradient(loss, of or model.trainable_variables)

    return tf.function(step).get_concrete_function(tf.TensorSpec([BATCH, *shape]))


def test_what_is_frozen_below_costs_the_way_forth_alone():
    model = keras.Sequential([keras.Input([160]), keras.layers.Dense(64), keras.layers.Dense(10)])
    first, second = 2 * BATCH * 160 * 64, 2 * BATCH * 64 * 10
    # Nothing wants the gradient of the input.
    assert flops(gradients(model, [160]), loop=False) == 2 * first + 3 * second
    head = model.layers[-1].trainable_variables
    assert flops(gradients(model, [160], head), loop=False) == first + 2 * second


def test_convolutions():
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input([16, 16, 3]),
            layers.Conv2D(8, 3, padding="same"),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.Conv2D(8, 3, strides=2, groups=2),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    first, apart = BATCH * 16 * 16 * 8 * 3 * 3 * 3, BATCH * 16 * 16 * 8 * 3 * 3
    groups, last = BATCH * 7 * 7 * 8 * 3 * 3 * 4, BATCH * 7 * 7 * 8 * 10
    assert flops(gradients(model, [16, 16, 3]), loop=False) == 2 * (2 * first + 3 * (apart + groups + last))


@pytest.mark.parametrize(
    "equation, shapes, products",
    [
        ("abc,cd->abd", ([2, 3, 5], [5, 7]), 2 * 3 * 5 * 7),
        ("...c,cd->...d", ([2, 3, 5], [5, 7]), 2 * 3 * 5 * 7),
    ],
)
def test_einsum(equation, shapes, products):
    function = tf.function(lambda x, y: tf.raw_ops.Einsum(inputs=[x, y], equation=equation))
    assert flops(function.get_concrete_function(*map(tf.TensorSpec, shapes)), loop=False) == 2 * products


@pytest.mark.parametrize("transposed", [False, True])
def test_transposed_and_batched_products(transposed):
    left = tf.TensorSpec([3, 5, 2] if transposed else [3, 2, 5])
    function = tf.function(lambda x, y: tf.matmul(x, y, transpose_a=transposed))
    assert flops(function.get_concrete_function(left, tf.TensorSpec([3, 5, 7])), loop=False) == 2 * 3 * 2 * 5 * 7


def test_of_branches_the_larger_one_counts():
    def either(x):
        return tf.cond(x[0, 0] > 0, lambda: tf.matmul(x, x), lambda: tf.matmul(tf.matmul(x, x), x))

    assert flops(tf.function(either).get_concrete_function(tf.TensorSpec([4, 4])), loop=False) == 2 * 2 * 4**3


def test_loops_and_shapes_that_are_not_known():
    lstm = keras.Sequential([keras.Input([6, 3]), keras.layers.LSTM(8)])
    assert flops(gradients(lstm, [6, 3]), loop=False) is None  # how many turns is not in its graph
    square = tf.function(lambda x: tf.matmul(x, x, transpose_b=True))
    assert flops(square.get_concrete_function(tf.TensorSpec([None, 4])), loop=False) is None

    def turns(n, x):
        return tf.while_loop(lambda i, x: i < n, lambda i, x: (i + 1, tf.matmul(x, x)), (0, x))

    function = tf.function(turns).get_concrete_function(tf.TensorSpec([], tf.int32), tf.TensorSpec([4, 4]))
    assert flops(function, loop=True) == 2 * 4**3
    assert flops(function, loop=False) is None
