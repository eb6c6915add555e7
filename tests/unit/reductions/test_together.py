"""What one reduction sums together is what it sums one by one, to the bit."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from dist_partial.distributed.collectives import Collectives
from dist_partial.reductions import AllReduce, Quantized, TopK
from dist_partial.reductions.together import Term, reduce_together
from dist_partial.selection.payload import Peers
from tests.helpers import cases
from tests.unit.reductions.test_compressors import Simulated, draw

# Of one dtype; a bias goes whole, what does not divide by 256 or by the values of a byte is filled up.
SHAPES = [(12, 20), (300,), (2,), (1000, 3), (257,), (16, 16)]
REDUCTIONS = [Quantized(1.6), Quantized(4, decay=0.9), Quantized(8), Quantized(1), TopK(1 / 16, 16, 8)]


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
def test_together_as_one_by_one(reduction, replicas, mirrored):
    """Also where packs are so small that few fit in one; residuals too."""
    members, gradients = [(reduction, shape) for shape in SHAPES], [draw(replicas, shape, steps=3) for shape in SHAPES]
    together = Simulated(mirrored(replicas), members)
    in_small_packs = Simulated(mirrored(replicas), members, collectives=Collectives(pack_bytes=200))
    one_by_one = [Simulated(mirrored(replicas), [member]) for member in members]
    for t in range(3):
        given = [each[t] for each in gradients]
        alone = [each.step([own])[0] for each, own in zip(one_by_one, given, strict=True)]
        for found in (together.step(given), in_small_packs.step(given)):
            assert [each.tobytes() for each in found] == [each.tobytes() for each in alone]
    for i, each in enumerate(one_by_one):
        assert together.states[i].keys() == each.states[0].keys()
        for name, variable in each.states[0].items():
            wanted = cases.copies(each.strategy, variable)
            assert np.array_equal(cases.copies(together.strategy, together.states[i][name]), wanted), (i, name)


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
    """Another reduction, another dtype, another way, and what has no way to be summed together."""
    values = [tf.ones([300], "float64"), tf.ones([300]), tf.ones([2]), tf.ones([300])]
    zeros = [{"residual": tf.Variable(tf.zeros_like(each))} for each in values]
    reductions = [Quantized(4), Quantized(4), Quantized(4), Quantized(8)]
    assert Quantized(4).together([2], "float32", Peers(16)) is None
    terms = [
        Term(each, value, state, value.shape) for each, value, state in zip(reductions, values, zeros, strict=True)
    ]
    terms.append(Term(AllReduce(), tf.fill([3], 2.0), {}, [3]))
    for order in itertools.permutations(range(len(terms))):
        found = reduce_together(Collectives(), [terms[i] for i in order])
        assert [each.shape for each in found] == [terms[i].value.shape for i in order]
        assert [each.dtype for each in found] == [terms[i].value.dtype for i in order]
