"""Four simulated CPU replicas for every test, and Keras's global switches put back after each."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import pytest
import tensorflow as tf

_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 4)


def mirrored_strategy(replicas: int) -> tf.distribute.Strategy:
    """MirroredStrategy over that many simulated replicas."""
    # Two of different sizes in one process clash by the keys of their collectives (TensorFlow 2.21).
    tf.distribute.MirroredStrategy._collective_key_base += 100_000
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


@pytest.fixture
def mirrored():
    return mirrored_strategy


@pytest.fixture(autouse=True)
def keras_defaults():
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    keras.utils.clear_session(free_memory=False)  # collecting garbage takes longer than most tests
