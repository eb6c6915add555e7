"""A decoder-only transformer over bytes, with a key-value cache for sampling.

Pre-norm blocks (Xiong et al. 2020) of causal attention and a squared-ReLU MLP (So et al. 2021), RMS
normalisation (Zhang & Sennrich 2019), rotary positions (Su et al. 2021), and no biases.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import keras
import numpy as np
from keras import ops

from dist_partial.errors import UserError
from dist_partial.validation import AtLeast, Below, check_arguments

Size = Annotated[int, AtLeast(1)]

Tensor = Any  # a tensor, or Keras's symbolic stand-in for one
Shape = tuple[int | None, ...]
Rotary = tuple[Tensor, Tensor]
LayerCache = tuple[Tensor, Tensor]
Cache = tuple[LayerCache, ...]


def byte_transformer(
    layers: Size = 4,
    width: Size = 128,
    heads: Size = 4,
    mlp_ratio: Size = 4,
    vocabulary: Size = 256,
    tied: bool = False,
    dropout: Annotated[float, AtLeast(0), Below(1)] = 0.0,
) -> keras.Model:
    """Builds a byte-level language model in Keras's current dtype policy.

    Args:
        layers: How many blocks.
        width: Size of the residual stream.
        heads: Attention heads; each has `width / heads` channels, an even number.
        mlp_ratio: Hidden units of the MLP, in widths.
        vocabulary: How many ids there are.
        tied: Whether the logits use the transposed embeddings (Press & Wolf 2017) instead of a head.
        dropout: Share of activations dropped after the embedding and each branch, in training.

    Returns:
        A built model named `byte_transformer`: int ids [batch, time] to logits [batch, time, vocabulary]
        in the compute dtype, of any batch and time.

    Raises:
        UserError: A size is below 1, the width does not split into heads of even size, or the dropout is
            outside [0, 1).

    Examples:
        >>> import numpy as np
        >>> model = byte_transformer(layers=1, width=16, heads=2)
        >>> model(np.zeros([1, 5], np.int32)).shape
        TensorShape([1, 5, 256])
    """
    check_arguments(byte_transformer, locals())
    if width % (2 * heads):
        raise UserError(
            f"byte_transformer.width is {width} with {heads} heads: the width must be a multiple of "
            f"{2 * heads}, as rotary positions need heads of one even size"
        )
    sizes = dict(layers=layers, width=width, heads=heads, mlp_ratio=mlp_ratio, vocabulary=vocabulary)
    model = ByteTransformer(**sizes, tied=tied, dropout=dropout, name="byte_transformer")
    model.build((None, None))
    return model


@keras.saving.register_keras_serializable("dist_partial")
class ByteTransformer(keras.Model):
    """Computes what `byte_transformer` builds; its arguments are described there.

    Examples:
        >>> model, ids = byte_transformer(layers=1, width=16, heads=2), np.array([[100, 101, 102]])
        >>> _, cache = model.decode(ids[:, :2], model.make_cache(batch=1, length=3), 0)
        >>> last, _ = model.decode(ids[:, 2:], cache, 2)
        >>> np.allclose(last[:, 0], model(ids)[:, 2], atol=1e-5)
        True
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        mlp_ratio: int,
        vocabulary: int,
        tied: bool,
        dropout: float,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.arguments: dict[str, Any] = dict(
            layers=layers,
            width=width,
            heads=heads,
            mlp_ratio=mlp_ratio,
            vocabulary=vocabulary,
            tied=tied,
            dropout=dropout,
        )
        self.heads = heads
        self.head_size = width // heads
        self.embedding = keras.layers.ReversibleEmbedding(
            vocabulary, width, embeddings_initializer=_initializer(width), name="embedding"
        )
        self.dropout = keras.layers.Dropout(dropout, name="dropout")
        branches = 2 * layers  # Each block adds two to the residual stream.
        names = [f"block_{i}" for i in range(layers)]
        self.blocks = [Block(width, heads, mlp_ratio, dropout, branches, name=name) for name in names]
        self.final_norm = keras.layers.RMSNormalization(name="final_norm")
        self.head = None if tied else _dense("head", vocabulary, width)

    def build(self, input_shape: Shape) -> None:
        hidden = (*input_shape, self.arguments["width"])
        self.embedding.build(input_shape)
        for layer in (*self.blocks, self.final_norm):
            layer.build(hidden)
        if self.head is not None:
            self.head.build(hidden)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*input_shape, self.arguments["vocabulary"])

    def stages(self) -> list[tuple[list[keras.layers.Layer], Callable[[Tensor, bool], Tensor]]]:
        """The layers of which `call` is the composition, each with its function (x, training) -> x."""

        def through(block: Block, x: Tensor, training: bool) -> Tensor:
            positions = ops.arange(ops.shape(x)[1], dtype="int32")
            return block(x, *self._tables(positions, positions), None, positions[0], training=training)[0]

        last = [self.final_norm, self.embedding if self.head is None else self.head]
        return [
            ([self.embedding, self.dropout], self._embedded),
            *[([block], functools.partial(through, block)) for block in self.blocks],
            (last, lambda x, _: self._logits(x)),
        ]

    def call(self, tokens: Tensor, training: bool | None = None) -> Tensor:
        """Logits [B, T, vocabulary] of the id that follows each of `tokens` [B, T]."""
        positions = ops.arange(ops.shape(tokens)[1], dtype="int32")
        return self._forward(tokens, None, positions, positions, training)[0]

    def make_cache(self, batch: int, length: int) -> Cache:
        """An empty cache: for each block, keys and values [batch, heads, length, head_size]."""
        shape = (batch, self.heads, length, self.head_size)
        empty = ops.zeros(shape, self.compute_dtype)
        return tuple((empty, empty) for _ in self.blocks)

    def decode(self, tokens: Tensor, cache: Cache, position: Tensor | int) -> tuple[Tensor, Cache]:
        """Reads some more ids after those in the cache.

        Args:
            tokens: Int ids [B, T], at the positions [position, position + T).
            cache: What `make_cache` or the last call of `decode` returned; `length` >= position + T.
            position: How many ids the cache holds, a scalar.

        Returns:
            Logits [B, T, vocabulary], equal to those of the whole text in one call, and the new cache.
        """
        positions = position + ops.arange(ops.shape(tokens)[1], dtype="int32")
        cached = ops.arange(cache[0][0].shape[2], dtype="int32")
        return self._forward(tokens, cache, positions, cached, training=False)

    def get_config(self) -> dict[str, Any]:
        """The arguments; a loaded copy takes the dtype policy that is current then."""
        return {"name": self.name, **self.arguments}

    def _forward(
        self,
        tokens: Tensor,
        cache: Cache | None,
        query_positions: Tensor,
        key_positions: Tensor,
        training: bool | None,
    ) -> tuple[Tensor, Cache]:
        rotary, bias = self._tables(query_positions, key_positions)
        x = self._embedded(tokens, training)
        updated = []
        for block, layer_cache in zip(self.blocks, cache or [None] * len(self.blocks), strict=True):
            x, layer_cache = block(x, rotary, bias, layer_cache, query_positions[0], training=training)
            updated.append(layer_cache)
        return self._logits(x), tuple(updated)

    def _embedded(self, tokens: Tensor, training: bool | None) -> Tensor:
        return self.dropout(self.embedding(tokens), training=training)

    def _tables(self, query_positions: Tensor, key_positions: Tensor) -> tuple[Rotary, Tensor]:
        # Of constant positions (a static T) TensorFlow folds the tables and the mask once, into constants.
        rotary = rotary_tables(query_positions, self.head_size, _at_least_float32(self.compute_dtype))
        visible = ops.expand_dims(query_positions, 1) >= key_positions
        # Added rather than selected by `where`: the gradient of an addition is free.
        return rotary, ops.where(visible, 0.0, -float("inf"))

    def _logits(self, x: Tensor) -> Tensor:
        x = self.final_norm(x)
        return self.embedding(x, reverse=True) if self.head is None else self.head(x)


class Block(keras.layers.Layer):
    """Computes x + attention(norm(x)), then x + mlp(norm(x)).

    Examples:
        >>> block = Block(width=4, heads=1, mlp_ratio=4, dropout=0.0, branches=2)
        >>> x, rotary = ops.ones([1, 2, 4]), rotary_tables(np.arange(2), 4, "float32")
        >>> block.build(x.shape)
        >>> for variable in (block.attention.output_projection.kernel, block.mlp.down.kernel):
        ...     _ = variable.assign(ops.zeros(variable.shape))  # the ends of both branches
        >>> np.array_equal(block(x, rotary, ops.zeros([2, 2]), None, ops.zeros([]))[0], x)
        True
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int, dropout: float, branches: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.attention_norm = keras.layers.RMSNormalization(name="attention_norm")
        self.attention = Attention(width, heads, branches, name="attention")
        self.mlp_norm = keras.layers.RMSNormalization(name="mlp_norm")
        self.mlp = Mlp(width, mlp_ratio * width, branches, name="mlp")
        self.dropout = keras.layers.Dropout(dropout, name="dropout")

    def build(self, input_shape: Shape) -> None:
        for layer in (self.attention_norm, self.attention, self.mlp_norm, self.mlp):
            layer.build(input_shape)

    def call(
        self,
        x: Tensor,
        rotary: Rotary,
        bias: Tensor,
        cache: LayerCache | None,
        position: Tensor,
        training: bool | None = None,
    ) -> tuple[Tensor, LayerCache | None]:
        attended, cache = self.attention(self.attention_norm(x), rotary, bias, cache, position)
        x = x + self.dropout(attended, training=training)
        x = x + self.dropout(self.mlp(self.mlp_norm(x)), training=training)
        return x, cache


class Attention(keras.layers.Layer):
    """Attends causally to itself with rotary positions (Vaswani et al. 2017, Su et al. 2021).

    Examples:
        >>> attention = Attention(width=4, heads=1, branches=1)
        >>> x = ops.reshape(ops.arange(8.0), [1, 2, 4])
        >>> itself = ops.where(ops.eye(2) > 0, 0.0, -np.inf)  # a bias by which each position sees itself alone
        >>> y, _ = attention(x, rotary_tables(np.arange(2), 4, "float32"), itself, None, ops.zeros([]))
        >>> np.allclose(y, attention.output_projection(attention.value(x)))
        True
    """

    def __init__(self, width: int, heads: int, branches: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.heads = heads
        self.query = _dense("query", width, width)
        self.key = _dense("key", width, width)
        self.value = _dense("value", width, width)
        self.output_projection = _dense("output", width, width, branches)

    def build(self, input_shape: Shape) -> None:
        for layer in (self.query, self.key, self.value, self.output_projection):
            layer.build(input_shape)

    def call(
        self, x: Tensor, rotary: Rotary, bias: Tensor, cache: LayerCache | None, position: Tensor
    ) -> tuple[Tensor, LayerCache | None]:
        """x [B, T, width], bias [T, S], cache of S positions or None (S = T) -> [B, T, width], new cache."""
        query = rotate(self._split_heads(self.query(x)), rotary)
        key = rotate(self._split_heads(self.key(x)), rotary)
        value = self._split_heads(self.value(x))
        if cache is not None:
            start = (0, 0, position, 0)
            key = ops.slice_update(cache[0], start, key)
            value = ops.slice_update(cache[1], start, value)
            cache = (key, value)
        scores = ops.matmul(query * query.shape[-1] ** -0.5, ops.swapaxes(key, 2, 3))  # [B, heads, T, S]
        scores = ops.cast(scores, _at_least_float32(self.compute_dtype))
        weights = ops.softmax(scores + ops.cast(bias, scores.dtype))
        mixed = ops.matmul(ops.cast(weights, self.compute_dtype), value)
        mixed = ops.reshape(ops.swapaxes(mixed, 1, 2), ops.shape(x))
        return self.output_projection(mixed), cache

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, heads, T, head_size]."""
        batch, time, width = ops.shape(x)
        return ops.swapaxes(ops.reshape(x, (batch, time, self.heads, width // self.heads)), 1, 2)


class Mlp(keras.layers.Layer):
    """Computes down(relu(up(x)) ** 2), with the activation of So et al. 2021.

    Examples:
        >>> mlp, x = Mlp(width=2, hidden=8, branches=1), np.array([[1.0, -2.0]], np.float32)
        >>> np.allclose(mlp(x), np.maximum(x @ mlp.up.kernel.numpy(), 0) ** 2 @ mlp.down.kernel.numpy())
        True
    """

    def __init__(self, width: int, hidden: int, branches: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.up = _dense("up", hidden, width)
        self.down = _dense("down", width, width, branches)

    def build(self, input_shape: Shape) -> None:
        self.up.build(input_shape)
        self.down.build((*input_shape[:-1], self.up.units))

    def call(self, x: Tensor) -> Tensor:
        return self.down(ops.square(ops.relu(self.up(x))))


def rotary_tables(positions: Tensor, head_size: int, dtype: str) -> Rotary:
    """Computes cosines and sines of the rotary angles (Su et al. 2021), base 10000.

    Args:
        positions: Int positions [T].
        head_size: Channels of a head, even.
        dtype: Of the tables.

    Returns:
        Two tables [T, head_size / 2]; channel i turns by 10000 ** (-2i / head_size) radians a position.

    Examples:
        >>> cos, sin = rotary_tables(np.array([0, 1]), 4, "float32")
        >>> np.round(sin, 4).tolist() == np.round(np.sin([[0, 0], [1, 0.01]]), 4).astype(np.float32).tolist()
        True
    """
    frequencies = 10000.0 ** (-np.arange(0, head_size, 2) / head_size)
    angles = ops.expand_dims(ops.cast(positions, dtype), 1) * ops.cast(frequencies, dtype)
    return ops.cos(angles), ops.sin(angles)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turns each pair of channels (i, i + head_size / 2) of x [..., T, head_size] by its angle.

    Examples:
        >>> quarter = ops.convert_to_tensor([[0.0]]), ops.convert_to_tensor([[1.0]])  # cosine and sine
        >>> rotate(ops.convert_to_tensor([[1.0, 2.0]]), quarter).numpy().tolist()
        [[-2.0, 1.0]]
    """
    cos, sin = (ops.cast(table, x.dtype) for table in rotary)
    first, second = ops.split(x, 2, axis=-1)
    return ops.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _dense(name: str, units: int, width: int, branches: int = 1) -> keras.layers.Dense:
    initializer = _initializer(width, branches)
    return keras.layers.Dense(units, use_bias=False, kernel_initializer=initializer, name=name)


def _initializer(width: int, branches: int = 1) -> keras.initializers.Initializer:
    """GPT-2's (Radford et al. 2019), whose 0.02 is for a width of 768, at this width.

    A kernel that ends one of several residual branches is smaller, so that their sum has the size of one.
    """
    return keras.initializers.RandomNormal(stddev=0.02 * (768 / width / branches) ** 0.5)


def _at_least_float32(dtype: str) -> str:
    return keras.backend.result_type(dtype, "float32")
