"""What ends a training: interruptions, lost workers, and errors of the user's code, each in one line."""

import contextlib
import re
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

import keras
import numpy as np
import tensorflow as tf

from dist_partial.data import Source, failing_example, fetch, trait
from dist_partial.data.draws import draws
from dist_partial.data.order import places
from dist_partial.distributed.replicas import Replicas
from dist_partial.errors import Ending, Fault, UserError, of_graph, raised
from dist_partial.step.loss_scale import LossScale


@contextlib.contextmanager
def ended_together(replicas: Replicas) -> Iterator[None]:
    """Tells the other workers why this one ends, in one line, and closes the connections to them."""
    backend = contextlib.closing(replicas.backend) if replicas.backend else contextlib.nullcontext()
    with backend, connected(replicas), explained():
        yield


@contextlib.contextmanager
def connected(replicas: Replicas, stays: bool = False) -> Iterator[None]:
    """Turns what a lost worker leads to into what has become of it, and tells the others why this one ends.

    With `stays` it may not end where another is lost: see `recovery`.
    """
    backend = replicas.backend
    if backend is None:
        yield
        return
    try:
        try:
            yield
        except tf.errors.OpError as error:
            # TensorFlow's own collectives may hear of it first.
            until = time.monotonic() + 2.0
            while not backend.lost() and time.monotonic() < until:
                time.sleep(0.05)
            if lost := backend.lost():
                raise lost from error
            # TensorFlow's collectives end like this on the workers that are left.
            if isinstance(error, (tf.errors.UnavailableError, tf.errors.AbortedError)):
                what = error.message.splitlines()[0]
                raise Fault(
                    f"another worker is gone ({what}): its own output says why; run the same command again"
                ) from error
            raise
    except (Exception, SystemExit) as error:
        if not (stays and isinstance(error, Fault) and replicas.membership):
            backend.close(error if isinstance(error, Ending) else raised("", error))
        raise


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turns what TensorFlow says, after many lines, of ids out of range, of XLA or of Python code in a graph into one.

    Examples:
        >>> with explained():
        ...     raise tf.errors.InvalidArgumentError(None, None, "indices[0,3] = 300 is not in [0, 256)")
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.data has the id 300, and run.model has 256 of them, from 0 on: bind sizes ...
    """
    try:
        yield
    except tf.errors.OpError as error:
        ids = "run.data has the {} {}, and run.model has {} of them, from 0 on: bind sizes that fit each other"
        for pattern, what in (
            (r"label value of (-?\d+) which is outside the valid range of \[0, (\d+)\)", "class id"),
            (r"indices\[[\d,]+\] = (-?\d+) is not in \[0, (\d+)\)", "id"),
        ):
            if found := re.search(pattern, error.message):
                raise UserError(ids.format(what, found[1], found[2])) from error
        if found := re.search(r"Detected unsupported operations when trying to compile.*?: (\w+) ", error.message):
            raise UserError(
                f"run.jit_compile: XLA cannot compile run.model or run.loss ({found[1]}), as none that reads text or "
                "looks words up: leave out run.jit_compile"
            ) from error
        if reason := failing_example(error) or of_graph(error.message):
            raise reason from error
        raise


def check_finite(
    losses: np.ndarray,
    norms: np.ndarray,
    done: int,
    kept: Callable[[], str],
    scale: LossScale | None,
    blamed: Callable[[int], str] = lambda step: "",
) -> None:
    """Raises UserError if one of the steps after `done` has spoilt the weights.

    Args:
        losses: of the steps.
        norms: of their gradients.
        done: steps before them.
        kept: says which checkpoint is the newest.
        scale: the loss scale, or None.
        blamed: says what is not finite of the examples of a step, counted from 0; '' if all is.

    Examples:
        >>> kept = lambda: "the checkpoint of step 5 is kept"
        >>> check_finite(np.array([2.0, np.nan]), np.array([1.0, 1.0]), done=10, kept=kept, scale=None)
        Traceback (most recent call last):
        dist_partial.errors.UserError: the loss is not finite at step 12 (loss nan, gradient norm 1); the ...
    """
    good = finite_steps(losses, norms, scale)
    if good < len(losses):
        what = "loss" if not np.isfinite(losses[good]) else "gradient"
        found = blamed(done + good)
        cure = "correct or leave out that example" if found else "lower the learning rate or bind run.clip_norm"
        raise UserError(
            f"the {what} is not finite at step {done + good + 1} (loss {losses[good]:.4g}, gradient norm "
            f"{norms[good]:.4g}){found and f', and {found}'}; {kept()}; {cure}"
        )
    if scale is not None and scale.exhausted(norms):
        raise UserError(
            f"the gradient overflowed in every step up to {done + len(losses)}, though the loss is no longer scaled: "
            "bind run.precision = 'mixed_bfloat16'"
        )


def not_finite(source: Source, step: int, global_batch: int, seed: int) -> str:
    """Says which number of the examples of a step is not finite; '' if all are, or the examples cannot be read again.

    Args:
        source: the training examples.
        step: counted from 0.
        global_batch: examples of a step.
        seed: of the order.

    Examples:
        >>> from dist_partial.data import ArraySource
        >>> not_finite(ArraySource(np.array([0.5, np.nan, 2.0])), step=0, global_batch=3, seed=0)
        'x of example 1 is nan'
    """
    if trait(source, "streamed", False):
        return ""
    indices, epochs = places(source, step * global_batch + tf.range(global_batch, dtype=tf.int64), seed)
    indices, epochs = indices.numpy(), epochs.numpy()
    try:
        parts = fetch(source, indices, draws(seed, epochs, indices))
    except Ending:  # what was to be said is the step
        return ""
    place = trait(source, "place") or "example {:,}".format
    for name, arrays in zip(("x", "y", "weight"), parts, strict=False):
        for path, array in keras.tree.flatten_with_path(arrays):
            if array.dtype.kind == "f" and not (good := np.isfinite(array)).all():
                row, *_ = first = np.unravel_index(np.argmin(good), array.shape)
                key = "".join(f"[{each!r}]" for each in path)
                return f"{name}{key} of {place(int(indices[row]))} is {array[first]}"
    return ""


def finite_steps(losses: np.ndarray, norms: np.ndarray, scale: LossScale | None) -> int:
    """Counts the steps before the first that has spoilt the weights.

    Under a loss scale an update whose sum overflowed was skipped, and has spoilt nothing.

    Examples:
        >>> finite_steps(np.array([2.0, 3.0]), np.array([1.0, np.inf]), None)
        1
    """
    bad = ~np.isfinite(losses) if scale is not None else ~(np.isfinite(losses) & np.isfinite(norms))
    return int(np.argmax(bad)) if bad.any() else len(losses)


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Decorates a function whose exceptions are to hold nothing of what its frames hold, see `let_go`.

    As a decorator and not within the function: a frame that still runs cannot be cleared.

    Examples:
        >>> import weakref
        >>> @released()
        ... def fails():
        ...     held = {1, 2}
        ...     seen.append(weakref.ref(held))
        ...     raise ValueError
        >>> seen = []
        >>> try:
        ...     fails()
        ... except ValueError:
        ...     print(seen[0]())
        None
    """
    try:
        yield
    except BaseException as error:
        let_go(error)
        raise


def let_go(error: BaseException | None) -> None:
    """Lets go of what the frames of an exception and of its causes hold: iterators, for one.

    An iterator that is destroyed while Python shuts down waits for ever where its thread waits in Python code, as one
    that fetches examples ahead does (TensorFlow 2.21).

    Examples:
        >>> import weakref
        >>> def fails():
        ...     held = {1, 2}
        ...     seen.append(weakref.ref(held))
        ...     raise ValueError
        >>> seen = []
        >>> try:
        ...     fails()
        ... except ValueError as error:
        ...     let_go(error)
        ...     print(seen[0]())
        None
    """
    while error is not None:
        for called, _ in traceback.walk_tb(error.__traceback__):
            frame: FrameType | None = called
            # Of the frames that TensorFlow hides from a traceback, too; those that still run cannot be cleared.
            with contextlib.suppress(RuntimeError):
                while frame is not None:
                    frame.clear()
                    frame = frame.f_back
        error = error.__cause__ or error.__context__
