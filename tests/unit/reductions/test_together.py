"""What one reduction sums together is what it sums one by one, to the bit."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from dist_partial.distributed.collectives import Collectives
from dist_partial.reductions import AllReduce, Quantized, TopK
from dist_partial.reductions.together import Term, reduce_together
from dist_partial.selection.payload import Peers
from tests.helpers import cases
from tests.unit.reductions.test_compressors import Simulated, draw

# One value goes whole; what does not divide by 256 or by the values of a byte is filled up.
SHAPES = [(12, 20), (300,), (1,), (1000, 3), (257,), (16, 16)]
REDUCTIONS = [Quantized(1.6), Quantized(4, decay=0.9), Quantized(8), Quantized(1), TopK(1 / 16, 16, 8)]


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
def test_together_as_one_by_one(reduction, replicas, mirrored):
    """Also where packs are so small that few fit in one; residuals too."""
    members, gradients = [(reduction, shape) for shape in SHAPES], [draw(replicas, shape, steps=3) for shape in SHAPES]
    together = Simulated(mirrored(replicas), members, "float32")
    in_small_packs = Simulated(mirrored(replicas), members, "float32", Collectives(pack_bytes=200))
    one_by_one = [Simulated(mirrored(replicas), [member], "float32") for member in members]
    assert not one_by_one[2].states[0]
    for t in range(3):
        given = [each[t] for each in gradients]
        alone = [each.step([own])[0] for each, own in zip(one_by_one, given, strict=True)]
        for found in (together.step(given), in_small_packs.step(given)):
            assert [each.tobytes() for each in found] == [each.tobytes() for each in alone]
    for i, each in enumerate(one_by_one):
        for other in (together, in_small_packs):
            assert other.states[i].keys() == each.states[0].keys()
            for name, variable in each.states[0].items():
                wanted = cases.copies(each.strategy, variable)
                assert np.array_equal(cases.copies(other.strategy, other.states[i][name]), wanted), (i, name)


@pytest.mark.parametrize(("replicas", "rounded"), [(2, 1), (3, 2)])
def test_many_tensors_are_encoded_at_once(replicas, rounded, mirrored):
    """Once in a gather, twice in two hops: tensors of one dtype, and one reduction."""
    members = [(Quantized(1.6), shape) for shape in [(300,), (12, 20), (256,)] * 4]
    graph = Simulated(mirrored(replicas), members).traced().graph
    names = [
        op.type for each in (graph, *graph._functions.values()) for op in getattr(each, "graph", each).get_operations()
    ]
    assert names.count("Round") == rounded * replicas


def test_what_cannot_be_encoded_together_is_not():
    """Another reduction, another dtype, what is summed as it is, and a subclass with a `reduce` of its own."""
    rng = np.random.default_rng(0)
    kinds = [
        (Quantized(4), "float64", 300),
        (Quantized(4), "float32", 300),
        (Quantized(8), "float32", 300),
        (Doubled(4), "float32", 300),
        (Doubled(4), "float32", 300),
        (AllReduce(), "float32", 3),
        (Quantized(4), "float32", 257),
    ]
    terms = [
        Term(each, tf.constant(rng.normal(size=size), dtype), {"residual": tf.Variable(tf.zeros(size, dtype))}, [size])
        for each, dtype, size in kinds
    ]

    def reduced(chosen):
        for term in chosen:
            term.state["residual"].assign(tf.zeros_like(term.value))
        return [each.numpy().tobytes() for each in reduce_together(Collectives(), chosen)]

    alone = [reduced([term])[0] for term in terms]
    assert alone[3] != alone[4]
    for order in (range(len(terms)), reversed(range(len(terms))), rng.permutation(len(terms))):
        places = list(order)
        assert reduced([terms[i] for i in places]) == [alone[i] for i in places]
    assert Quantized(4).together([1], "float32", Peers(16)) is None


@dataclasses.dataclass(frozen=True)
class Doubled(Quantized):
    """A user's."""

    def reduce(self, value, state):
        return 2 * (yield from super().reduce(value, state))
