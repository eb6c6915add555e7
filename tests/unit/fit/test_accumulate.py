"""Several steps of `model.fit` in one update: against plain Keras on a large batch, the loop, and the traced graph."""

import re

import keras
import numpy as np
import pytest

from dist_partial import UserError, fit, partial
from dist_partial.distributed import traffic
from dist_partial.reductions import AllReduce, TopK
from dist_partial.schedules import Phases
from tests.helpers import cases
from tests.helpers.cases import CASES, GLOBAL_BATCH
from tests.helpers.files import same_bits
from tests.helpers.marks import quick

CASE = CASES["two_dense"]
STEPS = 6  # updates


def arrays(first=0, last=STEPS):
    found = cases.batches(CASE, "float64", last)[first:]
    return [np.concatenate(column) for column in zip(*found, strict=True)]


def built(accumulate, rules=None, optimizer=keras.optimizers.Adam, reduction=AllReduce(), case=CASE, **options):  # noqa: B008
    model = cases.build(case)
    wrapped = partial(optimizer(0.01), rules or case.rules, model, reduction, accumulate=accumulate)
    model.compile(wrapped, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return model


def fitted(model, accumulate, x, y, **options):
    model.fit(x, y, batch_size=GLOBAL_BATCH // accumulate, shuffle=False, verbose=0, **options)
    return cases.weights(model)


def plain(rules=None):
    """Keras on the large batches."""
    model = cases.build(CASE)
    for variable in model.variables:
        variable.trainable = bool(re.search(rules or r"dense[12]/kernel", variable.path))
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return fitted(model, 1, *arrays())


@pytest.mark.parametrize(("replicas", "accumulate"), quick([(1, 2), (1, 3), (2, 2), (2, 4)], (1, 3), (2, 2)))
def test_equals_a_large_batch(replicas, accumulate, mirrored):
    cases.set_precision("float64")
    with mirrored(replicas).scope():
        model = built(accumulate)
    after = fitted(model, accumulate, *arrays())
    cases.assert_equal(after, plain(), 1e-12)
    assert int(model.optimizer.iterations.numpy()) == STEPS


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"steps_per_execution": 5}, {"jit_compile": True}], ids=str)
def test_however_it_is_compiled(options):
    cases.set_precision("float64")
    cases.assert_equal(fitted(built(2, **options), 2, *arrays()), plain(), 1e-12)


@pytest.mark.parametrize("reduction", [AllReduce("bfloat16"), TopK(0.1)], ids=str)
def test_replicas_reduce_once_an_update_as_the_loop_does(reduction, mirrored):
    """What it would have sent of every part is another sum, rounded or chosen otherwise."""
    cases.set_precision("float64")
    with mirrored(2).scope():
        model = built(2, reduction=reduction)
    # A replica of the loop cuts its own half of the batch; a batch of fit is divided among the replicas.
    half, quarter = GLOBAL_BATCH // 2, GLOBAL_BATCH // 4
    order = np.arange(STEPS * GLOBAL_BATCH).reshape(STEPS, 2, half // quarter, quarter).swapaxes(1, 2).reshape(-1)
    after = fitted(model, 2, *(column[order] for column in arrays()))
    loop = cases.train(
        mirrored(2),
        CASE,
        options=cases.Options(accumulate=2),
        all_reduce=reduction,
        data=cases.batches(CASE, "float64", STEPS),
    )
    cases.assert_equal(after, loop.after, 1e-9)


@pytest.mark.slow
def test_what_is_saved_in_the_middle_of_an_update_goes_on_with_the_same_bits(mirrored, tmp_path):
    strategy = mirrored(2)
    x, y = arrays()
    middle = 3 * GLOBAL_BATCH // 2
    with strategy.scope():
        model, expected = built(2), built(2)
    expected = fitted(expected, 2, x, y)
    fitted(model, 2, x[:middle], y[:middle])
    model.save(tmp_path / "model.keras")
    with strategy.scope():
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.iterations.numpy()) == 1
    after = fitted(loaded, 2, x[middle:], y[middle:])
    assert all(same_bits((value, after[path])) for path, value in expected.items())
    # On another number of replicas, what was added up is left out.
    again = keras.saving.load_model(tmp_path / "model.keras")
    fitted(again, 2, x[middle:], y[middle:])
    assert int(again.optimizer.iterations.numpy()) == 1 + (2 * STEPS - 3) // 2


def test_an_overflow_in_one_part_skips_the_update(mirrored):
    keras.config.set_dtype_policy("mixed_float16")
    with mirrored(2).scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, name="dense")])
        optimizer = partial(keras.optimizers.SGD(0.1), [("train", ".*")], model, accumulate=2)
        model.compile(optimizer, loss=lambda y, outputs: keras.ops.sum(outputs, 1))
    x = np.ones([16, 1], np.float32)
    x[5] = np.inf  # the first part of the second update, on the second replica
    weights = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: weights.append(float(model.weights[0].numpy().squeeze()))
    )
    model.fit(x, np.zeros([16, 1]), batch_size=2, verbose=0, shuffle=False, callbacks=[record])
    np.testing.assert_allclose(np.diff(weights), [0, -0.1, 0, 0, 0, -0.1, 0], atol=1e-6)
    assert int(optimizer.iterations.numpy()) == 3 and float(optimizer.dynamic_scale.numpy()) == 2.0**14


def test_rows_and_a_schedule():
    """The switch is between updates."""
    cases.set_precision("float64")
    case, results = CASES["shared_embedding"], []
    schedule = Phases([(0, "head/.*"), (2, ".*")])
    x, y = (np.concatenate(column) for column in zip(*cases.batches(case, "float64", STEPS), strict=True))
    for accumulate in (1, 2):
        model = cases.build(case)
        optimizer = partial(keras.optimizers.Adam(0.01), case.rules, model, schedule=schedule, accumulate=accumulate)
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        before = cases.weights(model)
        results.append(fitted(model, accumulate, x, y, callbacks=[fit.SelectionScheduler(schedule)]))
    cases.assert_equal(results[1], results[0], 1e-12)
    moved = (before["embedding/embeddings"] != results[1]["embedding/embeddings"]).any(axis=1)
    assert moved.tolist() == [2 <= row < 9 for row in range(11)]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: built(0), "partial.accumulate is 0: it must be a whole number of at least 1"),
        (
            lambda: built(1, optimizer=lambda rate: keras.optimizers.SGD(rate, gradient_accumulation_steps=4)),
            "leave out gradient_accumulation_steps, and give partial accumulate=4",
        ),
    ],
)
def test_bad_input(act, words):
    with pytest.raises(UserError, match=re.escape(words)) as error:
        act()
    assert "\n" not in str(error.value)


def test_collectives_are_in_the_branch_of_the_update(mirrored):
    with mirrored(2).scope():
        model = built(2)
    fitted(model, 2, *arrays(last=1))
    sent = traffic.collectives(compiled(model))
    assert traffic.total(traffic._of_a_replica(sent)) == model.optimizer.plan.wire_bytes


def compiled(model):
    """The function that `fit` runs, which Keras keeps in a closure."""
    function = model.train_function
    inner = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))["multi_step_on_iterator"]
    [found] = inner.cell_contents._list_all_concrete_functions()
    return found
