"""A profile of some steps, for TensorBoard."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from dist_partial.terminal import say


class Profile:
    """Has TensorFlow write a profile of the steps `first` to `last` into `tensorboard/` of the run folder.

    Its tab in TensorBoard needs the package tensorboard-plugin-profile. Calls that make several steps end where it
    begins and ends, so that no other step is in it. Where TensorFlow cannot profile, a line says why.

    Args:
        steps: the first and the last, counted from 1; None writes nothing.
        folder: the run folder.

    Examples:
        >>> profile = Profile((3, 5), Path("runs/mine"))
        >>> [profile.next_due(step) for step in (0, 2, 4)], profile.next_due(5) > 10**9
        ([2, 5, 5], True)
    """

    def __init__(self, steps: Sequence[int] | None, folder: Path) -> None:
        self._before, self._last = (steps[0] - 1, steps[1]) if steps else (-1, -1)
        self._folder = folder / "tensorboard"
        self._running = False

    def next_due(self, step: int) -> int:
        """Gives the first step after `step` that a call has to end with; one far away where there is none."""
        return next((due for due in (self._before, self._last) if due > step), 2**62)

    def of(self, done: int) -> contextlib.AbstractContextManager[Any]:
        """Begins or ends where that is due after `done` steps; the context is that of a call that makes more."""
        if self._running and done >= self._last:
            self._end()
        if not self._running and self._before <= done < self._last:
            self._begin(done)
        if not self._running:
            return contextlib.nullcontext()
        return tf.profiler.experimental.Trace("train", step_num=done + 1, _r=1)  # what its overview calls a step

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._end()

    def _begin(self, done: int) -> None:
        try:
            tf.profiler.experimental.start(str(self._folder))
        except tf.errors.OpError as error:  # another one of this process, such as a callback's
            self._last = -1
            say(f"no profile: {error.message}")
        else:
            self._running, self._first = True, done + 1

    def _end(self) -> None:
        self._running = False
        tf.profiler.experimental.stop()
        say(f"steps {self._first} to {self._last}: a profile is in {self._folder}")
