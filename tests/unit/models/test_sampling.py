"""Sampling against NumPy, and generation: the cache, the seed, the traces, the strategies."""

import gc
import itertools
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.errors import UserError
from dist_partial.models import byte_transformer, sampling, two_dense
from dist_partial.models.sampling import Generation, draw, generate, temper, truncate

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kept_ids(row, top_k, top_p):
    """The ids that stay, found one after another; of equal logits the lower id comes first."""
    ids = sorted(range(len(row)), key=lambda i: (-row[i], i))[:top_k]
    probabilities = softmax(np.array([row[i] for i in ids], np.float64))
    kept, mass = set(), 0.0
    for i, probability in zip(ids, probabilities, strict=True):
        if mass >= top_p and top_p < 1:
            break
        kept.add(i)
        mass += probability
    return kept


def small_model(**changes):
    keras.utils.set_random_seed(5)
    model = byte_transformer(**dict(layers=2, width=16, heads=2, vocabulary=11) | changes)
    # Far from uniform logits, so that each part of the text matters.
    for v in model.trainable_variables:
        v.assign(tf.random.stateless_normal(v.shape, (2, len(v.path)), stddev=0.5))
    return model


@pytest.fixture(scope="module")
def model():
    """Shared and never changed, so that its loops are compiled once for all tests here."""
    return small_model()


@pytest.mark.parametrize("ties", [False, True])
def test_truncate_keeps_what_numpy_keeps(ties):
    logits = np.random.default_rng(0).normal(scale=2, size=(40, 12)).astype(np.float32)
    if ties:
        logits = np.round(logits)
    for top_k, top_p in itertools.product([1, 3, 12, 50], [1e-40, 1e-7, 0.3, 0.9, 1.0]):
        cut = truncate(tf.constant(logits), top_k, top_p).numpy()
        for row, cut_row in zip(logits, cut, strict=True):
            expected = np.full(12, -np.inf, np.float32)
            kept = sorted(kept_ids(row, top_k, top_p))
            expected[kept] = row[kept]
            np.testing.assert_array_equal(cut_row, expected)


def test_top_p_of_1_drops_nothing_of_a_long_tail():
    logits = tf.random.stateless_normal((4, 50_000), (1, 2), stddev=4.0)
    np.testing.assert_array_equal(truncate(logits, 50_000, 1.0), logits)


def test_the_nucleus_ends_where_its_mass_is_reached():
    """Of two that are equally likely one alone has half of the mass."""
    np.testing.assert_array_equal(truncate(tf.zeros((1, 2)), 2, 0.5), [[0.0, -np.inf]])


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature):
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    expected = softmax(logits / temperature)
    np.testing.assert_allclose(tf.nn.softmax(temper(tf.constant(logits), temperature)), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 6, 1.0), (0.5, 6, 1.0), (2.0, 3, 1.0), (1.0, 6, 0.7)]
)
def test_frequencies_are_the_probabilities(temperature, top_k, top_p):
    row = np.array([1.0, 0.2, -0.5, 1.5, -1.0, 0.6], np.float32)
    draws = 40_000
    ids = draw(tf.tile(row[None], (draws, 1)), temperature, top_k, top_p, seed=9, position=4).numpy()
    kept = sorted(kept_ids(row / temperature, top_k, top_p))
    expected = np.zeros(6)
    expected[kept] = softmax(row[kept] / temperature)
    counts = np.bincount(ids, minlength=6)
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts[kept] - draws * expected[kept]) ** 2 / (draws * expected[kept])).sum()
    assert chi_square < 20.5  # The 0.999 quantile of 5 degrees of freedom; fewer only make it stricter.


def test_draws_at_other_positions_and_seeds_are_independent():
    logits = tf.zeros((5000, 4))
    first = draw(logits, 1.0, 4, 1.0, seed=0, position=1).numpy()
    for seed, position in ((1, 0), (0, 2), (1, 1)):
        again = draw(logits, 1.0, 4, 1.0, seed, position).numpy()
        assert abs((first == again).mean() - 0.25) < 0.03


# Below 1.2e-38 a float32 is subnormal, which some kernels take for 0 and others do not.
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-38, 1e-40, 1e-46])
def test_no_temperature_is_argmax(temperature, compiled):
    logits = np.random.default_rng(0).normal(scale=50, size=(64, 9)).astype(np.float32)
    logits[0] = 1.0
    function = tf.function(draw) if compiled else draw
    given = tf.constant(temperature, tf.float32) if compiled else temperature
    ids = function(tf.constant(logits), given, 9, 1.0, seed=0, position=0).numpy()
    # Equal logits stay a draw at any temperature above 0.
    rows = slice(1, None) if temperature else slice(None)
    np.testing.assert_array_equal(ids[rows], logits.argmax(-1)[rows])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("temperature", [1.0, 3e38, 1e39, float("inf")])
def test_what_minus_infinity_forbids_is_never_drawn(dtype, temperature):
    """However hot; at an endless temperature all others are equally likely."""
    logits = tf.tile(tf.cast([[-np.inf, 2.0, -np.inf, 1.0, 3.0]], dtype), (3000, 1))
    function = tf.function(draw)
    for top_p in (1.0, 1e-40):
        ids = function(logits, tf.constant(temperature, tf.float32), 5, tf.constant(top_p), seed=1, position=2).numpy()
        expected = softmax(np.array([2.0, 1.0, 3.0]) / temperature) if top_p == 1 else [0, 0, 1]
        counts = np.bincount(ids, minlength=5)
        assert counts[[0, 2]].sum() == 0
        if top_p == 1 or temperature == 1:
            np.testing.assert_allclose(counts[[1, 3, 4]] / 3000, expected, atol=0.04)


@pytest.mark.parametrize("top_p", [1e-40, 1e-38, 1e-7])
def test_the_likeliest_id_always_stays(top_p):
    logits = tf.constant([[0.0, 1.0, 3.0, 2.0], [0.0, 4.0, 4.0, 2.0]])
    for function in (draw, tf.function(draw)):
        for seed in range(5):
            ids = function(logits, 1.0, 4, tf.constant(top_p, tf.float32), seed=seed, position=0).numpy()
            assert ids.tolist() == [2, 1]  # of equal logits the lower id


BAD_LOGITS = {
    "nan": [0.0, np.nan, 1.0, 2.0],
    "nan beside what is forbidden": [-np.inf, np.nan, -np.inf, -np.inf],
    "infinity": [0.0, np.inf, 1.0, 2.0],
    "nothing is allowed": [-np.inf] * 4,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", BAD_LOGITS)
def test_logits_that_are_not_finite_draw_nothing(name, temperature):
    logits = tf.constant([[0.0, 1.0, 2.0, 3.0], BAD_LOGITS[name]])
    for function in (draw, tf.function(draw)):
        with pytest.raises(tf.errors.InvalidArgumentError, match="logits are not finite"):
            function(logits, temperature, 4, 1.0, seed=0, position=0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_says_in_one_line_that_logits_are_not_finite(use_cache):
    model = small_model(layers=1)
    model.head.kernel.assign(model.head.kernel * np.nan)
    with pytest.raises(UserError, match=r"^the model's logits are not finite .* byte_transformer") as error:
        generate(model, PROMPT, Generation(2, 3), use_cache=use_cache)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("temperature", [1e-46, 1e-40, 1e39])
def test_generate_takes_every_positive_temperature(model, temperature):
    ids = generate(model, PROMPT, Generation(1, 8, temperature))
    if temperature < 1:
        np.testing.assert_array_equal(ids, generate(model, PROMPT, Generation(1, 8, 0.0)))
    assert len(set(ids[0])) > 1


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_text_is_the_argmax_of_its_own_prefix(model, use_cache):
    ids = generate(model, PROMPT, Generation(2, 12, 0.0), use_cache=use_cache)
    assert ids.shape == (2, 12) and ids.dtype == np.int32
    np.testing.assert_array_equal(ids[0], ids[1])
    text = np.concatenate([PROMPT, ids[0]])
    best = model(text[None]).numpy()[0].argmax(-1)
    np.testing.assert_array_equal(text[len(PROMPT) :], best[len(PROMPT) - 1 : -1])


@pytest.mark.parametrize(("prompt", "length"), [(PROMPT, 12), (PROMPT[:1], 1)])
def test_the_cache_changes_no_text(model, prompt, length):
    generation = Generation(2, length, 0.9, top_k=8, top_p=0.95, seed=1)
    with_cache = generate(model, prompt, generation)
    np.testing.assert_array_equal(with_cache, generate(model, prompt, generation, use_cache=False))


def test_the_seed_makes_the_text_and_the_count_does_not_change_it(model):
    text = generate(model, PROMPT, Generation(2, 12, seed=4))
    np.testing.assert_array_equal(text, generate(model, PROMPT, Generation(2, 12, seed=4)))
    np.testing.assert_array_equal(text[:1], generate(model, PROMPT, Generation(1, 12, seed=4)))
    assert (text != generate(model, PROMPT, Generation(2, 12, seed=5))).any()
    assert (text[0] != text[1]).any()


def test_other_settings_weights_and_prompts_of_one_length_trace_once():
    model = small_model(layers=1)
    first = generate(model, PROMPT, Generation(2, 6))
    generate(model, PROMPT, Generation(2, 6, temperature=0.5))
    generate(model, PROMPT + 1, Generation(2, 6, temperature=0.0))
    generate(model, PROMPT, Generation(2, 6, temperature=2.0, top_k=3, top_p=0.5, seed=8))
    model.head.kernel.assign(-model.head.kernel)
    assert (generate(model, PROMPT, Generation(2, 6)) != first).any()
    writer, _ = sampling._writers[model]
    assert writer.experimental_get_tracing_count() == 1


def test_a_dropped_model_is_freed_with_its_compiled_loop():
    model = small_model(layers=1)
    generate(model, PROMPT, Generation(1, 2))
    kernel = weakref.ref(model.head.kernel)
    del model
    keras.utils.clear_session()
    gc.collect()
    assert kernel() is None


def test_one_text_under_any_number_of_replicas(mirrored):
    weights = small_model(layers=1).get_weights()
    texts = []
    for replicas in (1, 2, 4):
        with mirrored(replicas).scope():
            model = small_model(layers=1)
        model.set_weights(weights)
        texts.append(generate(model, PROMPT, Generation(2, 12, 0.8, top_p=0.9, seed=2)))
    np.testing.assert_array_equal(texts[0], texts[1])
    np.testing.assert_array_equal(texts[0], texts[2])


@pytest.mark.parametrize("policy", ["mixed_float16", "float64"])
def test_every_dtype_generates(policy):
    keras.config.set_dtype_policy(policy)
    ids = generate(small_model(layers=1), PROMPT, Generation(2, 6))
    assert ids.shape == (2, 6) and ids.min() >= 0 and ids.max() < 11


def test_a_window_model_reads_the_last_ids_and_repeats_a_short_prompt():
    keras.utils.set_random_seed(0)
    model = two_dense(window=4, symbols=10, hidden=32, classes=10)
    ids = generate(model, [7, 2, 9], Generation(1, 8, 0.0))[0]
    text = [9, 7, 2, 9]
    for _ in ids:
        text.append(int(model(np.array([text[-4:]], np.int32)).numpy().argmax()))
    np.testing.assert_array_equal(ids, text[4:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(top_k=0), "top_k is 0"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(count=0), "count is 0"),
        (dict(length=0), "length is 0"),
        (dict(prompt_ids=[]), "the prompt is empty"),
        (dict(prompt_ids=[1, 11]), "the id 11: byte_transformer knows 0 to 10"),
        (dict(prompt_ids=[-1]), "the id -1"),
    ],
)
def test_mistakes_are_the_users_to_mend(model, changes, words):
    arguments = dict(prompt_ids=PROMPT, count=1, length=2) | changes
    prompt = arguments.pop("prompt_ids")
    with pytest.raises(UserError, match=words) as error:
        generate(model, prompt, Generation(**arguments))
    assert "\n" not in str(error.value)


def test_window_of_a_model_that_does_not_tell_it():
    """A subclassed model has no input shape; its first layer still takes exactly `window` ids."""

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = two_dense(window=4, symbols=10)

        def call(self, x, training=None):
            return self.inner(x)

    keras.utils.set_random_seed(0)
    net = Net()
    net(np.zeros([1, 4], np.int32))
    generation = Generation(2, 6, seed=3)
    np.testing.assert_array_equal(
        generate(net, [1, 2, 3], generation, window=4), generate(net.inner, [1, 2, 3], generation)
    )


@pytest.mark.parametrize("behind", ["softmax", "reshaped", "divided"])
def test_a_model_that_gives_probabilities_writes_what_its_logits_would(behind):
    """The softmax of a softmax would be nearly uniform."""
    ids = keras.Input((None,), dtype="int32")
    hidden = keras.layers.Dense(11, name="head", kernel_initializer=keras.initializers.RandomNormal(stddev=3.0))(
        keras.layers.Embedding(11, 8, embeddings_initializer="normal")(ids)
    )
    keras.utils.set_random_seed(1)
    plain = keras.Model(ids, hidden)
    probabilities = keras.layers.Softmax()(hidden)
    if behind == "reshaped":
        probabilities = keras.layers.Reshape((-1, 11))(probabilities)
    if behind == "divided":
        probabilities = probabilities / keras.ops.sum(probabilities, -1, keepdims=True)
    model = keras.Model(ids, probabilities)
    wanted, found = (generate(each, PROMPT, Generation(3, 20, 0.7, seed=1)) for each in (plain, model))
    assert len(set(wanted.reshape(-1).tolist())) > 3 and np.array_equal(wanted, found)
