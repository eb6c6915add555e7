"""Replicas in this process: the CPU devices that `conftest.py` makes of one."""

import tensorflow as tf

from dist_partial.distributed.collectives import Collectives
from dist_partial.distributed.replicas import Replicas


def mirrored(replicas: int) -> tf.distribute.Strategy:
    """MirroredStrategy over that many simulated replicas."""
    # Two of different sizes in one process clash by the keys of their collectives (TensorFlow 2.21).
    tf.distribute.MirroredStrategy._collective_key_base += 100_000
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)])


def in_process(count: int = 1) -> Replicas:
    """That many replicas, as a run takes them; one is the default strategy."""
    strategy = mirrored(count) if count > 1 else tf.distribute.get_strategy()
    return Replicas(strategy, Collectives(), f"{count} replicas")
