"""Reduces many tensors in the same rounds, those of one reduction by the same operations."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from dist_partial.distributed.collectives import Collectives, run_rounds
from dist_partial.reductions.encoded_sum import EncodedSum


class Term(NamedTuple):
    """Holds what one replica adds to a sum.

    Attributes:
        reduction: how the sum is made.
        value: a tensor, or IndexedSlices where the reduction takes them.
        state: what the reduction keeps of it, from `make_states`.
        shape: of what `value` is the gradient.
    """

    reduction: Any
    value: Any
    state: dict[str, Any]
    shape: Sequence[int]


def reduce_together(collectives: Collectives, terms: Sequence[Term], more: Iterable[Any] = ()) -> list[Any]:
    """Sums terms over the replicas, in the same rounds with other exchanges.

    An `EncodedSum` is handed its terms together, up to what travels as one pack: later gradients may
    still be computed while that is under way.

    Args:
        collectives: how replicas reach each other.
        terms: in the order in which they are ready.
        more: generators, as `run_rounds` takes them.

    Returns:
        The sum of each term, then what `more` return.

    Examples:
        >>> from dist_partial.reductions import Quantized
        >>> terms = [Term(Quantized(1), tf.constant([each] * 100), {"residual": tf.Variable(tf.zeros(100))}, [100])
        ...          for each in (1.0, 2.0)]
        >>> [float(found[0]) for found in reduce_together(Collectives(), terms)]
        [1.0, 2.0]
    """
    batches = _batches(collectives, terms)
    exchanges = [_exchange([terms[i] for i in batch]) for batch in batches]
    results = run_rounds(collectives, [*exchanges, *more])
    sums: list[Any] = [None] * len(terms)
    for batch, found in zip(batches, results, strict=False):
        for i, each in zip(batch, found if len(batch) > 1 else [found], strict=True):
            sums[i] = each
    return sums + results[len(batches) :]


def _exchange(terms: Sequence[Term]) -> Any:
    reduction, value, state, shape = terms[0]
    if len(terms) > 1:
        return reduction.reduce_several([term.value for term in terms], [term.state for term in terms])
    if isinstance(value, tf.IndexedSlices):
        return reduction.reduce_lookups(value, shape)
    return reduction.reduce(value, state)


def _batches(collectives: Collectives, terms: Sequence[Term]) -> list[list[int]]:
    """The terms' numbers, those together that are reduced together."""
    peers = collectives.peers
    batches: list[list[int]] = []
    unfilled: dict[Hashable, tuple[list[int], int]] = {}
    for i, (reduction, value, *_) in enumerate(terms):
        # A subclass may have a `reduce` of its own, of which `reduce_several` knows nothing.
        own = getattr(type(reduction), "reduce", None) is EncodedSum.reduce
        several = own and isinstance(reduction, Hashable) and not isinstance(value, tf.IndexedSlices)
        way = reduction.together(value.shape, value.dtype.name, peers) if several else None
        if way is None:
            batches.append([i])
            continue
        key, size = (reduction, way, value.dtype), reduction.payloads(value.shape, value.dtype.name, peers)[0].bytes
        batch, filled = unfilled.get(key, ([], collectives.pack_bytes))
        if not batch or filled + size > collectives.pack_bytes:
            batch, filled = [], 0
            batches.append(batch)
        batch.append(i)
        unfilled[key] = batch, filled + size
    return batches
