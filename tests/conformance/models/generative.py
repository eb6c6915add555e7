"""Models of the data itself: autoencoders, variational ones, codebooks, flows, diffusion."""

import keras
import numpy as np
from keras import layers, ops

from tests.conformance import toy_data
from tests.conformance.case import ROWS, Case

WIDTH, LATENT = 8, 2


def measurements(seed=0):
    """float64 [ROWS, WIDTH] near a curved surface of two dimensions, in [0, 1]."""
    angles = toy_data.features(seed, 2)
    bent = np.tanh(angles @ toy_data.rng(seed + 50).normal(size=(2, WIDTH)))
    return 0.5 + 0.45 * np.clip(bent + 0.02 * toy_data.features(seed + 1, WIDTH), -1, 1)


def itself():
    x = measurements()
    return x, x


def alone():
    return (measurements(),)


def autoencoder():
    return keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Dense(6, activation="relu", name="encoder"),
            layers.Dense(LATENT, name="code"),
            layers.Dense(6, activation="relu", name="decoder"),
            layers.Dense(WIDTH, activation="sigmoid", name="pixels"),
        ],
        name="autoencoder",
    )


def denoising():
    x = keras.Input((8, 8, 1), name="image")
    y = layers.GaussianNoise(0.2, seed=4, name="noise")(x)
    y = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu", name="encoder")(y)
    y = layers.Conv2DTranspose(4, 3, strides=2, padding="same", activation="relu", name="decoder")(y)
    return keras.Model(x, layers.Conv2D(1, 3, padding="same", name="pixels")(y), name="denoising")


def image_itself():
    x = toy_data.images(2)
    return x, x


class ReconstructionError(layers.Layer):
    """Adds the mean squared error of a reconstruction as a loss, and passes the reconstruction on."""

    def call(self, inputs):
        x, made = inputs
        self.add_loss(ops.mean(ops.square(x - made)))
        return made


def added_reconstruction():
    """No targets and no loss of `compile`: what the layers add is all there is."""
    x = keras.Input((WIDTH,), name="x")
    y = layers.Dense(4, activation="tanh", name="encoder")(x)
    y = layers.Dense(WIDTH, name="decoder")(y)
    return keras.Model(x, ReconstructionError(name="error")([x, y]), name="added_reconstruction")


class Variational(keras.Model):
    """A variational autoencoder that keeps its own means of both parts of the loss."""

    def __init__(self, name):
        super().__init__(name=name)
        self.encoder = layers.Dense(6, activation="relu", name="encoder")
        self.mean = layers.Dense(LATENT, name="mean")
        self.log_variance = layers.Dense(LATENT, name="log_variance")
        self.decoder = layers.Dense(6, activation="relu", name="decoder")
        self.pixels = layers.Dense(WIDTH, name="pixels")
        self.reconstruction = keras.metrics.Mean(name="reconstruction")
        self.divergence = keras.metrics.Mean(name="divergence")

    def noise_for(self, inputs):
        return inputs["noise"]

    def call(self, inputs):
        hidden = self.encoder(inputs["x"])
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean + ops.exp(0.5 * log_variance) * self.noise_for(inputs)
        return {"pixels": self.pixels(self.decoder(code)), "mean": mean, "log_variance": log_variance}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        logits, mean, log_variance = y_pred["pixels"], y_pred["mean"], y_pred["log_variance"]
        nats = ops.sum(ops.softplus(logits) - x["x"] * logits, axis=-1)
        divergence = -0.5 * ops.sum(1 + log_variance - ops.square(mean) - ops.exp(log_variance), axis=-1)
        self.reconstruction.update_state(nats)
        self.divergence.update_state(divergence)
        return ops.mean(nats + divergence)


class RandomVariational(Variational):
    """The same, drawing its noise."""

    def __init__(self, name):
        super().__init__(name=name)
        self.seed = keras.random.SeedGenerator(11)

    def noise_for(self, inputs):
        return keras.random.normal((ops.shape(inputs["x"])[0], LATENT), seed=self.seed)


def measurements_and_noise():
    return ({"x": measurements(), "noise": toy_data.features(3, LATENT)},)


def measurements_by_name():
    return ({"x": measurements()},)


class Codebook(layers.Layer):
    """Replaces each vector by the nearest of a trained list, with a straight-through gradient."""

    def __init__(self, entries, **arguments):
        super().__init__(**arguments)
        self.entries = entries

    def build(self, shape):
        self.codes = self.add_weight(
            shape=(self.entries, shape[-1]), initializer=keras.initializers.RandomUniform(-1, 1, seed=8), name="codes"
        )

    def call(self, x):
        distances = ops.sum(ops.square(x[:, None] - self.codes), axis=-1)
        chosen = ops.take(self.codes, ops.argmin(distances, axis=-1), axis=0)
        self.add_loss(ops.mean(ops.square(ops.stop_gradient(x) - chosen)))
        self.add_loss(0.25 * ops.mean(ops.square(x - ops.stop_gradient(chosen))))
        return x + ops.stop_gradient(chosen - x)


def vector_quantized():
    x = keras.Input((WIDTH,), name="x")
    code = Codebook(6, name="codebook")(layers.Dense(LATENT, name="encoder")(x))
    y = layers.Dense(6, activation="relu", name="decoder")(code)
    return keras.Model(x, layers.Dense(WIDTH, name="pixels")(y), name="vector_quantized")


class Coupling(keras.Model):
    """A normalizing flow of affine couplings; its loss is the negative log likelihood."""

    def __init__(self):
        super().__init__(name="flow")
        self.networks = [
            keras.Sequential(
                [layers.Dense(6, activation="tanh", name="hidden"), layers.Dense(WIDTH, name="out")],
                name=f"coupling{k}",
            )
            for k in range(2)
        ]

    def call(self, x):
        half, total = WIDTH // 2, 0.0
        for network in self.networks:
            kept, moved = x[:, :half], x[:, half:]
            scale, shift = ops.split(network(kept), 2, axis=-1)
            scale = ops.tanh(scale)
            x = ops.concatenate([moved * ops.exp(scale) + shift, kept], axis=-1)
            total = total + ops.sum(scale, axis=-1)
        return x, total

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        made, log_determinant = y_pred
        return ops.mean(0.5 * ops.sum(ops.square(made), axis=-1) - log_determinant)


class Diffusion(keras.Model):
    """Finds the noise in measurements that were mixed with it; reports its error by a metric of its own."""

    def __init__(self):
        super().__init__(name="diffusion")
        self.time = layers.Dense(6, activation="swish", name="time")
        self.inner = layers.Dense(10, activation="swish", name="inner")
        self.norm = layers.LayerNormalization(name="norm")
        self.out = layers.Dense(WIDTH, name="out")
        self.error = keras.metrics.MeanAbsoluteError(name="error")

    def call(self, inputs):
        x, noise, time = inputs
        angle = time[:, None] * (np.pi / 2)
        mixed = ops.cos(angle) * x + ops.sin(angle) * noise
        waves = ops.concatenate([ops.sin(4 * angle), ops.cos(4 * angle)], axis=-1)
        return self.out(self.norm(self.inner(ops.concatenate([mixed, self.time(waves)], axis=-1))))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        self.error.update_state(x[1], y_pred)
        return ops.mean(ops.square(x[1] - y_pred))


def diffusion_data():
    return ((measurements() * 2 - 1, toy_data.features(4, WIDTH), toy_data.rng(5).random(ROWS)),)


class MaskedAutoencoder(keras.Model):
    """Reads some of the measurements and is judged by the others: the weights are a part of x."""

    def __init__(self):
        super().__init__(name="masked_autoencoder")
        self.missing = self.add_weight(shape=(WIDTH,), initializer="zeros", name="missing")
        self.inner = layers.Dense(10, activation="relu", name="inner")
        self.out = layers.Dense(WIDTH, name="out")

    def call(self, inputs):
        x, seen = inputs["x"], inputs["seen"]
        return self.out(self.inner(seen * x + (1 - seen) * self.missing))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x=x, y=x["x"][..., None], y_pred=y_pred[..., None], sample_weight=1 - x["seen"])


def masked_measurements():
    seen = (toy_data.rng(6).random((ROWS, WIDTH)) < 0.7).astype(np.float64)
    return ({"x": measurements(), "seen": seen},)


class MaskedDense(layers.Layer):
    """A dense layer whose outputs see only the inputs before them (MADE)."""

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], shape[-1]), name="kernel")
        self.bias = self.add_weight(shape=(shape[-1],), initializer="zeros", name="bias")
        self.before = ops.triu(ops.ones((shape[-1], shape[-1])), k=1)

    def call(self, x):
        return ops.matmul(x, self.kernel * ops.cast(self.before, x.dtype)) + self.bias


def autoregressive():
    x = keras.Input((WIDTH,), name="x")
    return keras.Model(x, MaskedDense(name="made")(x), name="autoregressive")


def bits():
    x = (measurements() > 0.5).astype(np.float64)
    return x, x


CASES = [
    Case("autoencoder", autoencoder, itself, lambda: "binary_crossentropy", metrics=lambda: ["mae"]),
    Case(
        "denoising_autoencoder",
        denoising,
        image_itself,
        lambda: "mse",
        metrics=lambda: ["mae"],
        random="noise on the images",
    ),
    Case("added_loss_alone", added_reconstruction, alone),
    Case("variational_given_noise", lambda: Variational("variational"), measurements_and_noise),
    Case(
        "variational_random", lambda: RandomVariational("variational"), measurements_by_name, random="noise in the code"
    ),
    Case("vector_quantized", vector_quantized, itself, lambda: "mse", metrics=lambda: ["mae"]),
    Case("normalizing_flow", Coupling, alone),
    Case("diffusion", Diffusion, diffusion_data),
    Case("masked_autoencoder", MaskedAutoencoder, masked_measurements, lambda: "mse"),
    Case(
        "autoregressive_bits",
        autoregressive,
        bits,
        lambda: keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=lambda: [keras.metrics.BinaryAccuracy(threshold=0.0)],
    ),
]
