"""Images: classification, segmentation, detection, key points, video."""

import keras
import numpy as np
from keras import layers, ops

from tests.conformance import toy_data
from tests.conformance.case import ROWS, WITHOUT_KEY_BIAS, Case


def labelled_images(seed=0, size=8, channels=1):
    x = toy_data.images(seed, size, channels)
    return x, toy_data.quadrants(x)


def conv_classifier():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(6, 3, activation="relu", name="conv1"),
            layers.MaxPooling2D(2, name="pool1"),
            layers.Conv2D(8, 2, activation="relu", name="conv2"),
            layers.Flatten(name="flatten"),
            layers.Dense(4, activation="softmax", name="head"),
        ],
        name="conv_classifier",
    )


def second_best(y_true, y_pred):
    """Whether the label is among the two best: [n]; Keras's own top-k accuracy takes no float64."""
    label = ops.take_along_axis(y_pred, ops.cast(ops.reshape(y_true, (-1, 1)), "int32"), axis=-1)
    return ops.cast(ops.sum(ops.cast(y_pred > label, "int32"), axis=-1) < 2, y_pred.dtype)


def residual_group_norm():
    image = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="stem")(image)
    for number, (filters, stride) in enumerate([(4, 1), (8, 2)]):
        name = f"block{number}"
        shortcut = layers.Conv2D(filters, 1, stride, name=f"{name}_shortcut")(x) if stride > 1 else x
        x = layers.GroupNormalization(2, name=f"{name}_norm1")(x)
        x = layers.Activation("relu", name=f"{name}_relu1")(x)
        x = layers.Conv2D(filters, 3, stride, padding="same", name=f"{name}_conv1")(x)
        x = layers.GroupNormalization(2, name=f"{name}_norm2")(x)
        x = layers.Activation("relu", name=f"{name}_relu2")(x)
        x = layers.Conv2D(filters, 3, padding="same", name=f"{name}_conv2")(x)
        x = layers.Add(name=f"{name}_add")([x, shortcut])
    x = layers.GlobalAveragePooling2D(name="pool")(layers.GroupNormalization(2, name="norm")(x))
    return keras.Model(image, layers.Dense(4, name="logits")(x), name="residual_group_norm")


def separable_conv():
    image = keras.Input((8, 8, 3), name="image")
    x = layers.SeparableConv2D(6, 3, padding="same", activation="relu", name="separable")(image)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.DepthwiseConv2D(3, strides=2, padding="same", activation="gelu", name="depthwise")(x)
    x = layers.Conv2D(8, 1, name="pointwise")(x)
    x = layers.Concatenate(name="pools")(
        [layers.GlobalAveragePooling2D(name="average")(x), layers.GlobalMaxPooling2D(name="maximum")(x)]
    )
    return keras.Model(image, layers.Dense(4, activation="softmax", name="head")(x), name="separable_conv")


def separable_data():
    x, y = labelled_images(1, channels=3)
    return x, toy_data.one_hot(y, 4)


def synchronized_batch_norm():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, use_bias=False, name="conv"),
            layers.BatchNormalization(momentum=0.8, synchronized=True, name="norm"),
            layers.ReLU(name="relu"),
            layers.GlobalAveragePooling2D(name="pool"),
            layers.Dense(4, name="head"),
        ],
        name="synchronized_batch_norm",
    )


def unet():
    image = keras.Input((8, 8, 1), name="image")
    down1 = layers.Conv2D(4, 3, padding="same", activation="relu", name="down1")(image)
    down2 = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="down2")(down1)
    middle = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="middle")(down2)
    up2 = layers.Conv2DTranspose(6, 3, strides=2, padding="same", activation="relu", name="up2")(middle)
    up2 = layers.Concatenate(name="skip2")([up2, down2])
    up1 = layers.UpSampling2D(2, name="enlarge")(layers.Conv2D(4, 3, padding="same", name="mix")(up2))
    up1 = layers.Concatenate(name="skip1")([up1, down1])
    return keras.Model(image, layers.Conv2D(3, 1, name="classes")(up1), name="unet")


def pixel_labels(x):
    """0 for the background, 1 or 2 for a square in the upper or the lower half: [n, height, width]."""
    bright = x[..., 0] > 0.5
    lower = np.arange(x.shape[1])[None, :, None] >= x.shape[1] // 2
    return (bright * (1 + lower)).astype(np.int32)


def segmentation_data():
    x = toy_data.images(2)
    return x, pixel_labels(x)


def segmentation_with_unlabelled_pixels():
    x, y = segmentation_data()
    y[toy_data.rng(3).random(y.shape) < 0.2] = 255
    return x, y


def segmentation_with_pixel_weights():
    x, y = segmentation_data()
    return x, y, np.where(y == 0, 0.25, 1.0)


def detector():
    """Class scores and a box for each of four cells."""
    image = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(6, 3, strides=2, padding="same", activation="relu", name="conv1")(image)
    x = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="conv2")(x)
    outputs = {
        "classes": layers.Reshape((4, 3), name="classes")(layers.Conv2D(3, 1, name="class_head")(x)),
        "boxes": layers.Reshape((4, 4), name="boxes")(layers.Conv2D(4, 1, name="box_head")(x)),
    }
    return keras.Model(image, outputs, name="detector")


def detection_data():
    x = toy_data.images(4)
    there = toy_data.rng(5).random((ROWS, 4)) < 0.4
    labels = np.where(there, toy_data.ids(6, 3, 4, least=1), 0).astype(np.int32)
    boxes = toy_data.rng(7).random((ROWS, 4, 4))
    return x, {"classes": labels, "boxes": boxes}, {"classes": np.ones((ROWS, 4)), "boxes": there.astype(np.float64)}


class ClassToken(layers.Layer):
    """Puts a learned vector before the patches, and adds learned positions."""

    def build(self, shape):
        self.token = self.add_weight(shape=(1, 1, shape[-1]), initializer="zeros", name="token")
        self.positions = self.add_weight(shape=(1, shape[1] + 1, shape[-1]), name="positions")

    def call(self, patches):
        token = ops.broadcast_to(self.token, (ops.shape(patches)[0], 1, patches.shape[-1]))
        return ops.concatenate([token, patches], axis=1) + self.positions


def vision_transformer():
    image = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(8, 4, strides=4, name="patches")(image)
    x = ClassToken(name="class_token")(layers.Reshape((4, 8), name="rows")(x))
    for number in range(2):
        y = layers.LayerNormalization(name=f"norm_a{number}")(x)
        x = x + layers.MultiHeadAttention(2, 4, name=f"attention{number}")(y, y)
        y = layers.LayerNormalization(name=f"norm_b{number}")(x)
        y = layers.Dense(16, activation="gelu", name=f"wide{number}")(y)
        x = x + layers.Dense(8, name=f"narrow{number}")(y)
    x = layers.LayerNormalization(name="norm")(x)[:, 0]
    return keras.Model(image, layers.Dense(4, name="head")(x), name="vision_transformer")


def mlp_mixer():
    image = keras.Input((8, 8, 1), name="image")
    x = layers.Reshape((4, 8), name="rows")(layers.Conv2D(8, 4, strides=4, name="patches")(image))
    for number in range(2):
        y = layers.Permute((2, 1), name=f"turn{number}")(layers.LayerNormalization(name=f"norm_a{number}")(x))
        y = layers.Permute((2, 1), name=f"back{number}")(layers.Dense(4, activation="gelu", name=f"tokens{number}")(y))
        x = layers.Add(name=f"add_a{number}")([x, y])
        y = layers.Dense(8, activation="gelu", name=f"channels{number}")(
            layers.LayerNormalization(name=f"norm_b{number}")(x)
        )
        x = layers.Add(name=f"add_b{number}")([x, y])
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    return keras.Model(image, layers.Dense(4, activation="softmax", name="head")(x), name="mlp_mixer")


def key_points():
    image = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(6, 3, activation="swish", name="conv1")(image)
    x = layers.AveragePooling2D(2, name="pool")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(image, layers.Dense(2, name="point")(x), name="key_points")


def key_point_data():
    x = toy_data.images(8)
    grid = np.arange(8) / 7
    light = np.clip(x[..., 0], 0, None)
    total = light.sum((1, 2))
    return x, np.stack([(light.sum(2) @ grid) / total, (light.sum(1) @ grid) / total], axis=1)


def peak_signal_to_noise(y_true, y_pred):
    error = ops.mean(ops.square(y_true - y_pred), axis=(1, 2, 3))
    return -10.0 * ops.log(error + 1e-6) / 2.302585092994046


def super_resolution():
    image = keras.Input((4, 4, 1), name="image")
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="conv1")(image)
    x = layers.Conv2D(4, 3, padding="same", name="conv2")(x)
    x = ops.reshape(ops.transpose(ops.reshape(x, (-1, 4, 4, 2, 2)), (0, 1, 3, 2, 4)), (-1, 8, 8, 1))
    return keras.Model(image, x, name="super_resolution")


def super_resolution_data():
    sharp = toy_data.images(9)
    return sharp.reshape(ROWS, 4, 2, 4, 2, 1).mean((2, 4)), sharp


def augmented():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.RandomFlip("horizontal", seed=1, name="flip"),
            layers.RandomTranslation(0.1, 0.1, seed=2, name="shift"),
            layers.Conv2D(4, 3, activation="relu", name="conv"),
            layers.Flatten(name="flatten"),
            layers.Dropout(0.1, seed=3, name="dropout"),
            layers.Dense(2, name="head"),
        ],
        name="augmented",
    )


def augmented_data():
    x, y = labelled_images(10)
    return x, y // 2


def byte_images():
    image = keras.Input((10, 10, 3), dtype="uint8", name="image")
    x = layers.Rescaling(1 / 255, name="rescale")(image)
    x = layers.CenterCrop(8, 8, name="crop")(x)
    x = layers.Conv2D(4, 3, activation="relu", name="conv")(x)
    return keras.Model(image, layers.Dense(1, name="head")(layers.Flatten(name="flatten")(x)), name="byte_images")


def byte_data():
    x = toy_data.ids(11, 256, 10, 10, 3)
    x[::2, :5] //= 4
    return x.astype(np.uint8), (np.arange(ROWS) % 2).astype(np.float64)


def video_classifier():
    video = keras.Input((3, 8, 8, 1), name="video")
    x = layers.TimeDistributed(layers.Conv2D(4, 3, strides=2, activation="relu", name="conv"), name="frames")(video)
    x = layers.TimeDistributed(layers.GlobalAveragePooling2D(name="pool"), name="pools")(x)
    return keras.Model(video, layers.Dense(2, name="head")(layers.GRU(6, name="gru")(x)), name="video_classifier")


def video_data():
    x = np.stack([toy_data.images(seed) for seed in (12, 13, 14)], axis=1)
    right = (np.arange(ROWS) % 2).astype(np.int32)
    x *= np.where(right, 1.5, 0.5)[:, None, None, None, None]
    return x, right


def conv3d():
    return keras.Sequential(
        [
            keras.Input((3, 8, 8, 1)),
            layers.Conv3D(4, (2, 3, 3), strides=(1, 2, 2), activation="elu", name="conv"),
            layers.GlobalAveragePooling3D(name="mean"),
            layers.Dense(1, activation="sigmoid", name="head"),
        ],
        name="conv3d",
    )


def video_with_column():
    x, y = video_data()
    return x, y[:, None]


SPARSE = lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True)  # noqa: E731

CASES = [
    Case(
        "conv_classifier",
        conv_classifier,
        labelled_images,
        lambda: "sparse_categorical_crossentropy",
        metrics=lambda: ["accuracy"],
    ),
    Case(
        "residual_group_norm",
        residual_group_norm,
        labelled_images,
        SPARSE,
        metrics=lambda: ["accuracy", second_best],
    ),
    Case(
        "separable_conv_label_smoothing",
        separable_conv,
        separable_data,
        lambda: keras.losses.CategoricalCrossentropy(label_smoothing=0.1),
        metrics=lambda: [keras.metrics.CategoricalAccuracy(), keras.metrics.F1Score("macro")],
    ),
    Case("synchronized_batch_norm", synchronized_batch_norm, labelled_images, SPARSE, metrics=lambda: ["accuracy"]),
    Case(
        "unet_segmentation",
        unet,
        segmentation_data,
        SPARSE,
        metrics=lambda: ["accuracy", keras.metrics.MeanIoU(3, sparse_y_pred=False, name="iou")],
    ),
    Case(
        "unet_unlabelled_pixels",
        unet,
        segmentation_with_unlabelled_pixels,
        lambda: keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255),
        metrics=lambda: [keras.metrics.MeanIoU(3, ignore_class=255, sparse_y_pred=False, name="iou")],
    ),
    Case(
        "unet_pixel_weights",
        unet,
        segmentation_with_pixel_weights,
        SPARSE,
        metrics=lambda: ["accuracy"],
        weighted_metrics=lambda: ["accuracy"],
    ),
    Case(
        "detector_masked_boxes",
        detector,
        detection_data,
        lambda: {"classes": SPARSE(), "boxes": keras.losses.Huber(0.5)},
        loss_weights={"classes": 1.0, "boxes": 2.0},
        metrics=lambda: {"classes": ["accuracy"]},
        weighted_metrics=lambda: {"boxes": [keras.metrics.MeanAbsoluteError(name="mae")]},
    ),
    Case(
        "vision_transformer",
        vision_transformer,
        labelled_images,
        SPARSE,
        metrics=lambda: ["accuracy"],
        rules=WITHOUT_KEY_BIAS,
    ),
    Case(
        "mlp_mixer",
        mlp_mixer,
        labelled_images,
        lambda: "sparse_categorical_crossentropy",
        metrics=lambda: [keras.metrics.SparseCategoricalAccuracy(name="right")],
    ),
    Case(
        "key_points",
        key_points,
        key_point_data,
        lambda: keras.losses.Huber(),
        metrics=lambda: [keras.metrics.MeanAbsoluteError(), keras.metrics.RootMeanSquaredError()],
    ),
    Case(
        "super_resolution",
        super_resolution,
        super_resolution_data,
        lambda: "mse",
        metrics=lambda: [peak_signal_to_noise],
    ),
    Case(
        "augmented_images",
        augmented,
        augmented_data,
        SPARSE,
        metrics=lambda: ["accuracy"],
        random="random flips, shifts and dropout",
    ),
    Case(
        "byte_images",
        byte_images,
        byte_data,
        lambda: keras.losses.BinaryCrossentropy(from_logits=True),
        metrics=lambda: [keras.metrics.BinaryAccuracy(threshold=0.0), keras.metrics.AUC(from_logits=True, name="auc")],
    ),
    Case("video_time_distributed", video_classifier, video_data, SPARSE, metrics=lambda: ["accuracy"]),
    Case(
        "video_conv3d",
        conv3d,
        video_with_column,
        lambda: "binary_crossentropy",
        metrics=lambda: [keras.metrics.Precision(name="precision"), keras.metrics.Recall(name="recall")],
    ),
]
