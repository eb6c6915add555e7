"""Names of Keras and TensorFlow that are private, or known by convention alone: each once, with version and reason."""

from typing import Any


def is_generator(variable: Any) -> bool:
    """Whether it is the state of a random generator."""
    return variable.name == "seed_generator_state"
