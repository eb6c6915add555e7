"""Draws ids from a model's logits: temperature, top-k, top-p, and the loop that writes a text."""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial.errors import UserError
from dist_partial.models.output_logits import as_logits
from dist_partial.validation import Above, AtLeast, AtMost, check

NOT_FINITE = "logits are not finite"  # what the assertion in `draw` says
_FLOAT32 = np.finfo(np.float32)


def temper(logits: tf.Tensor, temperature: tf.Tensor | float) -> tf.Tensor:
    """Divides float32 logits [B, V] by the temperature; 0 leaves them as they are.

    The largest logit of a row is moved to 0 first, so that no small temperature overflows.

    Examples:
        >>> temper(tf.constant([[1.0, 2.0]]), tf.constant(0.5)).numpy().tolist()
        [[-2.0, 0.0]]
    """
    shifted = logits - tf.reduce_max(logits, axis=-1, keepdims=True)
    # Processors may take a number below `tiny` for 0, and -inf / inf is NaN.
    divisor = tf.clip_by_value(tf.cast(temperature, tf.float32), _FLOAT32.tiny, _FLOAT32.max)
    return shifted / tf.where(temperature > 0.0, divisor, 1.0)


def truncate(logits: tf.Tensor, top_k: tf.Tensor | int, top_p: tf.Tensor | float) -> tf.Tensor:
    """Keeps the likely ids of a row: the top k, then their nucleus of mass p (Holtzman et al. 2020).

    Args:
        logits: Float32 [B, V]. Of equal logits the lower id counts as the larger.
        top_k: How many ids stay at most, >= 1; V or more keeps all.
        top_p: The fewest of the likeliest ids whose probabilities add up to it stay, in (0, 1]; 1 keeps all. The
            likeliest one always stays.

    Returns:
        The logits [B, V], -inf where an id is dropped.

    Examples:
        >>> truncate(tf.constant([[-2.0, 0.0, -1.0]]), tf.constant(1), tf.constant(1.0)).numpy().tolist()
        [[-inf, 0.0, -inf]]
    """
    order = tf.argsort(logits, direction="DESCENDING", stable=True)
    ranks = tf.argsort(order)
    kept = tf.where(ranks < top_k, logits, -np.inf)
    probabilities = tf.nn.softmax(tf.gather(kept, order, batch_dims=1))
    mass_before = tf.cumsum(probabilities, axis=-1, exclusive=True)
    # The running sum may round up to 1 before the last id, which a top_p of 1 must not drop.
    in_nucleus = (mass_before < top_p) | (top_p >= 1.0)
    in_nucleus |= tf.range(tf.shape(logits)[-1]) == 0  # a top_p that float32 takes for 0 would drop all
    return tf.where(tf.gather(in_nucleus, ranks, batch_dims=1), kept, -np.inf)


def draw(
    logits: tf.Tensor,
    temperature: tf.Tensor | float,
    top_k: tf.Tensor | int,
    top_p: tf.Tensor | float,
    seed: tf.Tensor | int,
    position: tf.Tensor | int,
) -> tf.Tensor:
    """Draws one id a row by the Gumbel-max trick (Maddison et al. 2014).

    The noise depends on the seed, the position and the row alone: not on the device or the number of rows.

    Args:
        logits: [B, V] of any float type; -inf forbids an id.
        temperature: >= 0; 0 takes the largest logit.
        top_k: See `truncate`.
        top_p: See `truncate`.
        seed: int64.
        position: Where in the text the id will stand.

    Returns:
        int32 ids [B].

    Raises:
        InvalidArgumentError: (when it runs) a logit is NaN or infinite, or all of a row are -inf: `NOT_FINITE`.

    Examples:
        >>> logits = tf.constant([[0.0, 5.0, 1.0], [0.0, -np.inf, 1.0]])
        >>> draw(logits, temperature=0.0, top_k=3, top_p=1.0, seed=0, position=0).numpy().tolist()
        [1, 2]
    """
    logits = tf.cast(logits, tf.float32)
    good = tf.reduce_all(logits < np.inf) & tf.reduce_all(tf.reduce_any(logits > -np.inf, axis=-1))
    with tf.control_dependencies([tf.debugging.assert_equal(good, True, NOT_FINITE)]):
        likely = truncate(temper(tf.identity(logits), temperature), top_k, top_p)
    key = tf.stack([tf.cast(seed, tf.int64), tf.cast(position, tf.int64)])
    # Philox by name: "auto_select" would take another generator on another kind of device.
    # log(0) would forbid an id.
    uniform = tf.random.stateless_uniform(tf.shape(likely), key, minval=_FLOAT32.tiny, alg="philox")
    noise = tf.where(temperature > 0.0, -tf.math.log(-tf.math.log(uniform)), 0.0)
    return tf.argmax(likely + noise, axis=-1, output_type=tf.int32)


@dataclasses.dataclass(frozen=True)
class Generation:
    """Says how many texts to write, how long, and how their ids are drawn.

    Attributes:
        count: how many continuations of the prompt.
        length: ids of each continuation.
        temperature: divides the logits; 0 is greedy.
        top_k: only the k likeliest ids, at least 1, or None for all.
        top_p: only the likeliest ids that together have this probability, in (0, 1], or None for all.
        seed: of the noise; the same seed gives the same ids.

    Raises:
        UserError: a value is out of its range.

    Examples:
        >>> Generation(count=2, length=5, temperature=-1.0)
        Traceback (most recent call last):
        dist_partial.errors.UserError: temperature is -1.0: it must be a number of at least 0
    """

    count: Annotated[int, AtLeast(1)]
    length: Annotated[int, AtLeast(1)]
    temperature: Annotated[float, AtLeast(0)] = 1.0
    top_k: Annotated[int | None, AtLeast(1)] = None
    top_p: Annotated[float | None, Above(0), AtMost(1)] = None
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, "", "")


# Of one generation, as tensors: temperature, top_k, top_p, seed.
Drawing = tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]


def generate(
    model: Any,
    prompt_ids: Sequence[int] | np.ndarray,
    generation: Generation,
    window: int | None = None,
    use_cache: bool = True,
) -> np.ndarray:
    """Writes continuations of one prompt, on one device; the same seed gives the same ids.

    A model with `make_cache` and `decode` (see `ByteTransformer`) reads each id once. Any other is called on
    the whole text again for each id, or on the last `window` ids if its input shape is fixed to
    [batch, window]; a prompt shorter than the window is then repeated until it fills it. Compiled once for a
    model, count, length and length of the prompt, whatever the other arguments.

    Args:
        model: int ids [B, T] to logits, or probabilities, [B, T, V] or [B, V] of the next id.
        prompt_ids: At least one id, [P].
        generation: How many texts, how long, and how ids are drawn.
        window: How many ids the model reads at once; None takes it from the model's input shape, if that is fixed.
        use_cache: False recomputes the whole text even where the model has a cache.

    Returns:
        int32 ids [count, length], without the prompt.

    Raises:
        UserError: The prompt is empty or holds an unknown id, or logits are not finite (-inf alone forbids an id).

    Examples:
        >>> from dist_partial.models import byte_transformer
        >>> model = byte_transformer(layers=1, width=16, heads=2)
        >>> [len(ids) for ids in generate(model, [100, 101, 102], Generation(count=2, length=5, seed=1))]
        [5, 5]
    """
    window = window or _window(model)
    writer, vocabulary = _compiled(model, window)
    prompt = _checked(np.asarray(prompt_ids, np.int32).reshape(-1), vocabulary, model.name)
    if window and prompt.size < window:
        prompt = np.tile(prompt, -(-window // prompt.size))[-window:]
    try:
        ids = writer(
            tf.constant(prompt),
            (
                tf.constant(generation.temperature, tf.float32),
                tf.constant(min(generation.top_k or vocabulary, vocabulary), tf.int32),
                tf.constant(generation.top_p or 1.0, tf.float32),
                tf.constant(generation.seed, tf.int64),
            ),
            count=generation.count,
            length=generation.length,
            window=window,
            cached=use_cache and hasattr(model, "decode"),
        )
    except tf.errors.InvalidArgumentError as error:
        if NOT_FINITE not in error.message:
            raise
        raise UserError(
            f"the model's {NOT_FINITE} (NaN, infinity, or -inf for every id), so {model.name} can write nothing: take "
            "weights from before they were spoilt, or a precision of more range"
        ) from None
    return ids.numpy()


def _checked(prompt: np.ndarray, vocabulary: int, name: str) -> np.ndarray:
    """The prompt; raises UserError if it is empty, or if the model of that name does not know one of its ids."""
    if not prompt.size:
        raise UserError("the prompt is empty: a text needs at least one id to go on from")
    unknown = prompt[(prompt < 0) | (prompt >= vocabulary)]
    if unknown.size:
        raise UserError(f"the prompt holds the id {unknown[0]}: {name} knows 0 to {vocabulary - 1}")
    return prompt


_writers: weakref.WeakKeyDictionary[Any, tuple[Callable[..., tf.Tensor], int]] = weakref.WeakKeyDictionary()


def _compiled(model: Any, window: int | None) -> tuple[Callable[..., tf.Tensor], int]:
    """The model's writer, a tf.function that is dropped with the model, and the size of its vocabulary."""
    if model not in _writers:
        output = model.compute_output_spec(keras.KerasTensor((1, window), "int32"))
        # Without autograph, as a model is trained and evaluated: tracing takes half the time.
        writer = tf.function(functools.partial(_write, weakref.ref(model)), autograph=False)
        _writers[model] = writer, output.shape[-1]
    return _writers[model]


def _window(model: Any) -> int | None:
    """T of a model whose inputs are fixed to [batch, T], else None."""
    shape = getattr(model, "input_shape", None)
    return shape[1] if isinstance(shape, tuple) and len(shape) == 2 else None


def _write(
    model_ref: weakref.ref,
    prompt: tf.Tensor,
    drawing: Drawing,
    *,
    count: int,
    length: int,
    window: int | None,
    cached: bool,
) -> tf.Tensor:
    """`generate` after its checks: prompt [P] to ids [count, length]."""
    temperature, top_k, top_p, seed = drawing

    def choose(logits: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
        return draw(logits, temperature, top_k, top_p, seed, position)

    capacity = prompt.shape[0] + length if cached else None
    return continued(model_ref(), tf.tile(prompt[None], (count, 1)), length, choose, window, capacity)


def continued(
    model: Any,
    prompt: tf.Tensor,
    length: Any,
    choose: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    window: int | None,
    capacity: int | None,
) -> tf.Tensor:
    """Writes ids in a loop of TensorFlow's ops alone; sizes may be known only when it runs.

    Args:
        model: see `generate`.
        prompt: int32 [b, t]; t is at least the window, if there is one.
        length: of what is written, an int or a scalar.
        choose: takes float32 logits [b, V] and the position of the id after them, and gives ids [b].
        window: how many ids the model reads at once, if that is fixed.
        capacity: ids that the model's cache is to hold, prompt included; None uses none.

    Returns:
        int32 ids [b, length], without the prompt.
    """
    batch, start = (known or size for known, size in zip(prompt.shape, tf.unstack(tf.shape(prompt), 2), strict=True))
    end = start + length

    def read(text: tf.Tensor, cache: Any, position: Any) -> tuple[tf.Tensor, Any]:
        """Logits [b, V] of the id after `position`, and the cache with the ids up to it."""
        if capacity is not None:
            logits, new = model.decode(text[position][:, None], cache, position)
            cache = tf.nest.map_structure(lambda old, new: tf.ensure_shape(new, old.shape), cache, new)
        elif window:
            recent = tf.transpose(text[position + 1 - window : position + 1])
            logits = model(tf.reshape(recent, (batch, window)), training=False)
        else:
            logits = model(tf.transpose(text[: position + 1]), training=False)
        logits = as_logits(logits)
        return tf.cast(logits if logits.shape.rank == 2 else logits[:, -1], tf.float32), cache

    def write(text: tf.Tensor, logits: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
        return tf.tensor_scatter_nd_update(text, [[position]], choose(logits, position)[None])

    def write_and_read(text: tf.Tensor, logits: tf.Tensor, cache: Any, position: tf.Tensor) -> tuple:
        text = write(text, logits, position)
        return text, *read(text, cache, position), position + 1

    text = tf.pad(tf.transpose(prompt), [(0, length), (0, 0)])  # [time, b], so that one position is one row
    if capacity is not None:
        logits, cache = model.decode(prompt, model.make_cache(batch, capacity), 0)
        logits = tf.cast(as_logits(logits)[:, -1], tf.float32)
    else:
        logits, cache = read(text, (), start - 1)
    text, logits, _, last = tf.while_loop(
        lambda text, logits, cache, position: position < end - 1,
        write_and_read,
        (text, logits, cache, tf.convert_to_tensor(start)),
        parallel_iterations=1,  # or weights that are stored in fewer bits are cast for ten ids at once
    )
    return tf.transpose(write(text, logits, last)[start:])
