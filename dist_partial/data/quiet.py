"""Keeps tfds from talking to the user about what is no concern of theirs."""

import contextlib
import io
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Silences the progress bars, banners and warnings of tfds 4.9 (errors are exceptions, and still are).

    It warns of every data set that is not prepared yet or has no registered config, and prints to stdout.

    Examples:
        >>> with quiet_tfds():
        ...     print("a banner")
    """
    import tensorflow_datasets as tfds

    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logger.setLevel(level)
