"""What depends on the other examples of a batch is said where a batch is divided, and nothing else is."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from dist_partial.data import ArraySource
from dist_partial.errors import UserError
from dist_partial.step import losses
from dist_partial.step.objective import prepare
from dist_partial.training import loop
from dist_partial.training.batch_coupling import coupling_notes
from tests.helpers.against_fit import check_against_fit, features, settings
from tests.helpers.files import trained

OUTPUTS = "run.model's outputs for an example depend on the others of its batch"
LOSS = "what layers add to the loss (add_loss) is not the mean of what they add for a batch's parts"
WIDTH = 7


class Centred(layers.Layer):
    """Takes the mean of the batch away, as a user's own normalization does."""

    def __init__(self, always=True):
        super().__init__()
        self.always = always

    def call(self, x, training=False):
        return x - ops.mean(x, axis=0) if self.always or training else x


class Experts(layers.Layer):
    """Sends each example to one of some experts, which takes as many as it has room for, the first ones."""

    def __init__(self, capacity, experts=3):
        super().__init__()
        self.capacity, self.experts = capacity, experts
        self.router = layers.Dense(experts, name="router")
        self.inner = [layers.Dense(WIDTH, name=f"expert_{number}") for number in range(experts)]

    def call(self, x):
        gates = ops.softmax(self.router(x))
        chosen = ops.one_hot(ops.argmax(gates, axis=-1), self.experts, dtype=gates.dtype)
        place = ops.cumsum(chosen, axis=0) * chosen
        kept = chosen * gates * ops.cast(place <= self.capacity, gates.dtype)
        return x + sum(kept[:, number, None] * expert(x) for number, expert in enumerate(self.inner))


class Penalty(layers.Layer):
    """Adds something to the loss."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        self.add_loss(self.function(x))
        return x


class Matched(keras.Model):
    """Two views of an example are to be more alike than views of others."""

    def __init__(self, among_others=True):
        super().__init__()
        self.among_others, self.tower = among_others, layers.Dense(4, name="tower")

    def call(self, x):
        return self.tower(x), self.tower(2 * x + 1)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        left, right = (ops.normalize(each, axis=-1) for each in y_pred)
        alike = ops.matmul(left, ops.transpose(right))
        own = ops.diagonal(alike)
        return ops.mean((ops.logsumexp(alike, axis=-1) if self.among_others else 1) - own)


class InBatchNegatives(keras.Model):
    """Gives the scores of each example with all of its batch."""

    def __init__(self):
        super().__init__()
        self.tower = layers.Dense(4, name="tower")

    def call(self, x):
        return ops.matmul(self.tower(x), ops.transpose(self.tower(x + 1)))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(ops.logsumexp(y_pred, axis=-1) - ops.diagonal(y_pred))


class Sampled(layers.Layer):
    """Draws random numbers in inference, too."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def call(self, x):
        return x + keras.random.normal(ops.shape(x), seed=self.generator)


def stack(*inner, dtype=None):
    def build():
        made = [layer() for layer in inner]
        return keras.Sequential([keras.Input((WIDTH,)), *made, layers.Dense(1, name="d", dtype=dtype)])

    return build


MEAN = lambda: Penalty(lambda x: ops.mean(ops.square(x)))  # noqa: E731
L2 = keras.regularizers.L2(0.1)

COUPLED = {
    "mean": (stack(Centred), OUTPUTS),
    "mean in training": (stack(lambda: Centred(always=False)), OUTPUTS),
    "experts": (stack(lambda: Experts(capacity=2)), OUTPUTS),
    "in-batch negatives": (InBatchNegatives, OUTPUTS),
    "sum of add_loss": (stack(lambda: Penalty(lambda x: ops.sum(ops.square(x)))), LOSS),
    "beside dropout and BatchNorm": (stack(layers.BatchNormalization, lambda: layers.Dropout(0.5), Centred), OUTPUTS),
}

APART = {
    "dense": stack(lambda: layers.Dense(3, activation="gelu")),
    "BatchNorm": stack(layers.BatchNormalization),
    "synchronised BatchNorm": stack(lambda: layers.BatchNormalization(synchronized=True)),
    "dropout": stack(lambda: layers.Dropout(0.5), lambda: layers.GaussianNoise(1.0)),
    "random numbers in inference": stack(lambda: Sampled(keras.random.SeedGenerator(3)), MEAN),
    "random numbers of a fixed seed": stack(lambda: Sampled(3)),
    "recurrent dropout": stack(
        lambda: layers.Reshape((WIDTH, 1)), lambda: layers.LSTM(3, dropout=0.3, recurrent_dropout=0.3)
    ),
    "experts with room": stack(lambda: Experts(capacity=100)),
    "regularisers": stack(lambda: layers.Dense(3, kernel_regularizer=L2, activity_regularizer=L2)),
    "mean of add_loss": stack(MEAN),
    "own loss": lambda: Matched(among_others=False),
    "half precision": stack(lambda: layers.Dense(64, dtype="mixed_bfloat16"), dtype="mixed_bfloat16"),
}


def notes(build, replicas=2, micro_batches=1):
    keras.utils.set_random_seed(0)
    model = build()
    own = isinstance(model, (Matched, InBatchNegatives))
    x = features(WIDTH).astype(np.float32)
    batch = (x,) if own else (x, x[:, :1])
    outputs = model(x[:2])
    loss = None if own else losses.made("mse")
    objective = prepare(model, tuple(each[:2] for each in batch), outputs, {"loss": loss})
    before = [np.array(variable) for variable in model.variables]
    found = coupling_notes(objective, ArraySource(*batch), replicas, micro_batches)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)
    assert all(layer.trainable for layer in model.layers)
    return found


@pytest.mark.parametrize("name", COUPLED)
def test_what_depends_on_the_batch_is_said(name):
    build, words = COUPLED[name]
    [note] = notes(build)
    assert note.startswith(f"{words}, and each of 2 replicas has a part of its own")
    assert "\n" not in note
    [note] = notes(build, replicas=3, micro_batches=2)
    assert "each of 3 replicas x 2 micro-batches (run.accumulate) has" in note
    assert notes(build, replicas=1) == []


@pytest.mark.parametrize("name", APART)
def test_of_others_nothing_is_said(name):
    assert notes(APART[name]) == []


class Squares(keras.Model):
    """Its loss is no mean over examples, and reads x."""

    def __init__(self, function):
        super().__init__()
        self.function, self.tower = function, layers.Dense(1, name="tower")

    def call(self, x):
        return self.tower(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return self.function(ops.square(y - y_pred) + ops.square(self.tower(x + 1)))


OWN = {
    "contrastive": (Matched, (features(WIDTH),)),
    "root": (lambda: Squares(lambda each: ops.sqrt(ops.mean(each))), (features(WIDTH), features(1))),
    "sum": (lambda: Squares(ops.sum), (features(WIDTH), features(1))),
}


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("name", OWN)
def test_a_compute_loss_that_is_no_mean_is_that_of_the_whole_batch(name, replicas, tmp_path):
    model, data = OWN[name]
    check_against_fit(tmp_path / "run", model, data, None, replicas=replicas, steps=3)


def test_a_compute_loss_that_is_no_mean_is_refused_where_the_batch_cannot_be_whole(tmp_path):
    with pytest.raises(UserError, match=r"the compute_loss of run\.model makes .* run\.accumulate divides it"):
        loop.run(settings(Matched, (features(WIDTH),), None, accumulate=3), tmp_path / "run")


def test_what_differs_from_call_to_call_is_left_alone():
    def random(x):
        import tensorflow as tf

        return x + tf.random.normal(tf.shape(x), dtype=x.dtype)

    assert notes(stack(lambda: layers.Lambda(random))) == []


def test_it_is_true(tmp_path, capsys):
    """One replica trains to the weights of plain Keras, and two, of which the run says so, do not."""
    data, build, loss = (features(WIDTH), features(1)), stack(Centred), keras.losses.MeanSquaredError
    check_against_fit(tmp_path / "one", build, data, loss, replicas=1)
    assert OUTPUTS not in capsys.readouterr().out
    loop.run(settings(build, data, loss, replicas=2), tmp_path / "two")
    assert capsys.readouterr().out.count(OUTPUTS) == 1
    one, two = (trained(tmp_path / folder, 20) for folder in ("one", "two"))
    assert max(np.abs(one[each] - two[each]).max() for each in one) > 1e-3
