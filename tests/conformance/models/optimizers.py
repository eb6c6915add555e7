"""One model for each way to update weights: optimizers, clipping, averages, decay, learning rate schedules."""

import keras
from keras import layers

from tests.conformance import toy_data
from tests.conformance.case import Case


def classifier():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="gelu", name="hidden"),
            layers.LayerNormalization(name="norm"),
            layers.Dense(3, name="head"),
        ],
        name="classifier",
    )


def embedded():
    """Ids that repeat within a batch, so that rows of the embedding get several gradients, and others none."""
    x = keras.Input((4,), dtype="int32", name="x")
    y = layers.Flatten(name="flatten")(layers.Embedding(12, 3, name="embedding")(x))
    return keras.Model(x, layers.Dense(3, name="head")(y), name="embedded")


def labelled():
    x = toy_data.features(0, 6)
    return x, toy_data.classes(x, 3)


def labelled_ids():
    x = toy_data.ids(1, 12, 4)
    return x, (x.sum(1) % 3).astype(x.dtype)


def decay_without_biases():
    optimizer = keras.optimizers.AdamW(1e-2, weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    return optimizer


def warm_cosine():
    return keras.optimizers.schedules.CosineDecay(1e-3, 15, warmup_target=5e-2, warmup_steps=5)


def steps_down():
    return keras.optimizers.schedules.PiecewiseConstantDecay([5, 12], [1e-1, 3e-2, 1e-2])


OPTIMIZERS = {
    "sgd_nesterov": lambda: keras.optimizers.SGD(5e-2, momentum=0.9, nesterov=True),
    "sgd_clipvalue": lambda: keras.optimizers.SGD(1e-1, clipvalue=0.01),
    "sgd_schedule": lambda: keras.optimizers.SGD(steps_down(), momentum=0.5),
    "adam_clipnorm": lambda: keras.optimizers.Adam(1e-2, clipnorm=0.05),
    "adam_global_clipnorm": lambda: keras.optimizers.Adam(1e-2, global_clipnorm=0.1),
    "adam_amsgrad": lambda: keras.optimizers.Adam(1e-2, amsgrad=True),
    "adam_average": lambda: keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.8),
    "adam_average_overwrites": lambda: keras.optimizers.Adam(
        1e-2, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=4
    ),
    "adam_accumulates": lambda: keras.optimizers.Adam(1e-2, gradient_accumulation_steps=4),
    "adamw_schedule": lambda: keras.optimizers.AdamW(warm_cosine(), weight_decay=0.01),
    "adamw_excludes": decay_without_biases,
    "adamax": lambda: keras.optimizers.Adamax(1e-2),
    "nadam": lambda: keras.optimizers.Nadam(1e-2),
    "rmsprop_centered": lambda: keras.optimizers.RMSprop(1e-2, momentum=0.5, centered=True),
    "adagrad": lambda: keras.optimizers.Adagrad(1e-1),
    "adadelta": lambda: keras.optimizers.Adadelta(1.0),
    "adafactor": lambda: keras.optimizers.Adafactor(1e-2),
    "ftrl": lambda: keras.optimizers.Ftrl(5e-2, l1_regularization_strength=0.001),
    "lion": lambda: keras.optimizers.Lion(1e-2),
    "lamb": lambda: keras.optimizers.Lamb(1e-2),
    "muon": lambda: keras.optimizers.Muon(1e-2, exclude_layers=["head"]),
}

SPARSE = lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)  # noqa: E731
ACCURACY = lambda: ["accuracy"]  # noqa: E731

CASES = [
    *(
        Case(f"optimizer_{name}", classifier, labelled, SPARSE, metrics=ACCURACY, optimizer=factory)
        for name, factory in OPTIMIZERS.items()
    ),
    *(
        Case(f"embedding_{name}", embedded, labelled_ids, SPARSE, metrics=ACCURACY, optimizer=OPTIMIZERS[name])
        for name in ("sgd_nesterov", "adam_amsgrad", "adagrad")
    ),
]
