"""The models against NumPy, and what others rely on: paths, dtypes, causality, the cache."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_partial.errors import UserError
from dist_partial.models import byte_transformer, two_dense
from dist_partial.models.byte_transformer import rotary_tables, rotate


def relative_paths(model):
    return [v.path.removeprefix(model.name + "/") for v in model.trainable_variables]


def small_transformer(**changes):
    keras.utils.set_random_seed(7)
    arguments = dict(layers=2, width=16, heads=2, vocabulary=11) | changes
    model = byte_transformer(**arguments)
    # Larger than the initial weights, so that every term can be seen in the logits.
    for v in model.trainable_variables:
        v.assign(tf.random.stateless_normal(v.shape, (1, len(v.path)), stddev=0.5, dtype=v.dtype))
    return model


def random_ids(*shape, vocabulary=11, seed=0):
    return np.random.default_rng(seed).integers(0, vocabulary, shape, np.int32)


def reference_logits(weights, tokens, heads):
    """A byte_transformer with the weights {path: array}, one head and one query at a time: [T] -> [T, V]."""

    def norm(x, path):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weights[f"{path}/scale"]

    def turn(x):  # [T, head_size], as complex numbers
        half = x.shape[1] // 2
        angles = np.outer(np.arange(len(x)), [10000 ** (-2 * i / x.shape[1]) for i in range(half)])
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], 1)

    def attention(x, path):
        q, k, v = (x @ weights[f"{path}/{name}/kernel"] for name in ("query", "key", "value"))
        mixed = np.zeros_like(x)
        size = x.shape[1] // heads
        for part in (slice(h * size, (h + 1) * size) for h in range(heads)):
            turned_q, turned_k = turn(q[:, part]), turn(k[:, part])
            for t in range(len(x)):
                scores = np.exp(turned_k[: t + 1] @ turned_q[t] / np.sqrt(size))
                mixed[t, part] = scores / scores.sum() @ v[: t + 1, part]
        return mixed @ weights[f"{path}/output/kernel"]

    x = weights["embedding/embeddings"][tokens]
    block = 0
    while f"block_{block}/mlp_norm/scale" in weights:
        x = x + attention(norm(x, f"block_{block}/attention_norm"), f"block_{block}/attention")
        hidden = norm(x, f"block_{block}/mlp_norm") @ weights[f"block_{block}/mlp/up/kernel"]
        x = x + np.maximum(hidden, 0) ** 2 @ weights[f"block_{block}/mlp/down/kernel"]
        block += 1
    head = weights.get("head/kernel", weights["embedding/embeddings"].T)
    return norm(x, "final_norm") @ head


@pytest.mark.parametrize("tied", [False, True])
def test_byte_transformer_equals_numpy(tied):
    keras.config.set_dtype_policy("float64")
    model = small_transformer(tied=tied)
    weights = dict(zip(relative_paths(model), (v.numpy() for v in model.trainable_variables), strict=True))
    tokens = random_ids(2, 9)
    expected = np.stack([reference_logits(weights, row, heads=2) for row in tokens])
    np.testing.assert_allclose(model(tokens), expected, rtol=1e-11, atol=1e-11)


def test_byte_transformer_paths():
    paths = relative_paths(byte_transformer(layers=2, width=8, heads=2))
    block = [
        "attention_norm/scale",
        "attention/query/kernel",
        "attention/key/kernel",
        "attention/value/kernel",
        "attention/output/kernel",
        "mlp_norm/scale",
        "mlp/up/kernel",
        "mlp/down/kernel",
    ]
    assert paths == [
        "embedding/embeddings",
        *(f"block_0/{path}" for path in block),
        *(f"block_1/{path}" for path in block),
        "final_norm/scale",
        "head/kernel",
    ]


def test_tied_head_is_the_embedding():
    untied, tied = (byte_transformer(layers=1, width=8, heads=2, tied=tied) for tied in (False, True))
    assert relative_paths(tied) == relative_paths(untied)[:-1]


def test_kernels_start_different_from_each_other_and_follow_the_seed():
    def kernels():
        keras.utils.set_random_seed(3)
        return [v.numpy() for v in byte_transformer(layers=2, width=64, heads=2).trainable_variables]

    first, second = kernels(), kernels()
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    query, key = first[2], first[3]
    assert abs(np.corrcoef(query.ravel(), key.ravel())[0, 1]) < 0.1
    output = first[5]
    np.testing.assert_allclose(output.std() / query.std(), (2 * 2) ** -0.5, rtol=0.1)


def test_rotary_turns_each_pair_by_its_angle():
    x = np.random.default_rng(0).normal(size=(3, 5, 6))
    positions = np.array([0, 1, 2, 40, 1000])
    turned = rotate(tf.constant(x), rotary_tables(tf.constant(positions), 6, "float64")).numpy()
    for p, position in enumerate(positions):
        for i in range(3):
            angle = position * 10000 ** (-2 * i / 6)
            pair = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            np.testing.assert_allclose(turned[:, p, [i, i + 3]], x[:, p, [i, i + 3]] @ pair.T, atol=1e-12)


def test_a_later_id_changes_no_earlier_logit():
    model = small_transformer()
    tokens = random_ids(1, 8)
    changed = (tokens + np.eye(8, dtype=np.int32)) % 11  # Row t differs at position t alone.
    difference = np.abs(model(changed) - model(np.tile(tokens, (8, 1)))).max(-1)
    changes_later = np.triu(np.ones((8, 8), bool))
    assert (difference[~changes_later] == 0).all()
    assert (difference[changes_later] > 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_cached_logits_equal_the_whole_forward(dtype, tolerance):
    keras.config.set_dtype_policy(dtype)
    model = small_transformer()
    tokens = random_ids(3, 9)
    whole = model(tokens).numpy()
    for pieces in ([1] * 9, [4, 1, 3, 1]):
        cache = model.make_cache(3, 12)
        logits, position = [], 0
        for piece in pieces:
            step, cache = model.decode(tokens[:, position : position + piece], cache, position)
            logits.append(step)
            position += piece
        cached = np.concatenate(logits, 1)
        np.testing.assert_allclose(cached, whole, rtol=0, atol=tolerance * np.abs(whole).max())


def loss_gradients(model, tokens):
    with tf.GradientTape() as tape:
        logits = model(tokens, training=True)
        losses = keras.losses.sparse_categorical_crossentropy(tokens, tf.cast(logits, tf.float32), True)
        loss = tf.reduce_mean(losses)
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    return logits, [tf.convert_to_tensor(gradient) for gradient in gradients]


@pytest.mark.parametrize("policy", ["float64", "mixed_bfloat16", "mixed_float16"])
def test_every_dtype_trains_and_decodes(policy):
    keras.config.set_dtype_policy(policy)
    model = byte_transformer(layers=1, width=16, heads=2, dropout=0.1)
    tokens = random_ids(2, 8, vocabulary=256)
    logits, gradients = loss_gradients(model, tokens)
    assert logits.dtype == model.compute_dtype
    for value in [logits, *gradients]:
        assert np.isfinite(tf.cast(value, tf.float32).numpy()).all()
    cached, _ = model.decode(tokens, model.make_cache(2, 8), 0)
    np.testing.assert_allclose(tf.cast(cached, tf.float32), tf.cast(model(tokens), tf.float32), atol=0.05)


def test_xla_computes_the_same_gradients():
    model = small_transformer(layers=1)
    tokens = tf.constant(random_ids(2, 8))
    logits, gradients = loss_gradients(model, tokens)
    xla_logits, xla_gradients = tf.function(lambda ids: loss_gradients(model, ids), jit_compile=True)(tokens)
    np.testing.assert_allclose(xla_logits, logits, rtol=1e-4, atol=1e-4)
    for xla_gradient, gradient in zip(xla_gradients, gradients, strict=True):
        np.testing.assert_allclose(xla_gradient, gradient, rtol=1e-3, atol=1e-4)


def test_dropout_acts_in_training_only():
    model = byte_transformer(layers=1, width=16, heads=2, dropout=0.5)
    tokens = random_ids(2, 8)
    np.testing.assert_array_equal(model(tokens), model(tokens, training=False))
    assert np.abs(model(tokens, training=True) - model(tokens)).max() > 0


def test_replicas_of_a_strategy_read_the_same_model(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        model = small_transformer(dropout=0.1)
    tokens = random_ids(2, 8)
    rows = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(tokens[context.replica_id_in_sync_group][None])
    )
    logits = tf.function(lambda ids: strategy.run(model, (ids,), {"training": False}))(rows)
    logits = np.concatenate(strategy.experimental_local_results(logits))
    np.testing.assert_allclose(logits, model(tokens), rtol=1e-5, atol=1e-5)


def test_a_saved_byte_transformer_loads(tmp_path):
    model = small_transformer(tied=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert relative_paths(loaded) == relative_paths(model)
    np.testing.assert_array_equal(loaded(random_ids(1, 5)), model(random_ids(1, 5)))


@pytest.mark.parametrize("window", [1, 5])
@pytest.mark.parametrize("policy", ["float32", "float64"])
def test_two_dense_equals_numpy(policy, window):
    keras.config.set_dtype_policy(policy)
    model = two_dense(window=window, symbols=4, hidden=6, classes=3)
    assert relative_paths(model) == ["dense1/kernel", "dense1/bias", "dense2/kernel", "dense2/bias"]
    assert model.trainable_variables == model.variables
    for v in model.variables:
        v.assign(tf.random.stateless_normal(v.shape, (1, len(v.path)), dtype=v.dtype))
    kernel1, bias1, kernel2, bias2 = (v.numpy() for v in model.variables)
    ids = random_ids(7, window, vocabulary=4)
    features = np.eye(4)[ids].reshape(7, -1)
    expected = np.maximum(features @ kernel1 + bias1, 0) @ kernel2 + bias2
    assert model(ids).dtype == policy
    np.testing.assert_allclose(model(ids), expected, rtol=1e-5 if policy == "float32" else 1e-12)


def test_two_dense_of_features_equals_numpy():
    model = two_dense(window=5, symbols=None, hidden=6, classes=3)
    assert relative_paths(model) == ["dense1/kernel", "dense1/bias", "dense2/kernel", "dense2/bias"]
    kernel1, bias1, kernel2, bias2 = (v.numpy() for v in model.variables)
    features = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    expected = np.maximum(features @ kernel1 + bias1, 0) @ kernel2 + bias2
    np.testing.assert_allclose(model(features), expected, rtol=1e-4, atol=1e-6)


def test_two_dense_is_made_of_keras_alone(tmp_path):
    model = two_dense()
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    model.save(tmp_path / "model.keras")
    ids = random_ids(2, 16, vocabulary=10)
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras")(ids), model(ids))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: byte_transformer(width=130, heads=4), "width is 130 with 4 heads.*multiple of 8"),
        (lambda: byte_transformer(width=12, heads=4), "width is 12 with 4 heads.*even"),
        (lambda: byte_transformer(layers=0), "layers is 0"),
        (lambda: byte_transformer(heads=0), "heads is 0"),
        (lambda: byte_transformer(dropout=1.0), "dropout is 1.0"),
        (lambda: two_dense(hidden=0), "hidden is 0"),
        (lambda: two_dense(symbols=0), "symbols is 0"),
    ],
)
def test_a_size_that_cannot_be_is_the_users_to_mend(build, words):
    with pytest.raises(UserError, match=words) as error:
        build()
    assert "\n" not in str(error.value)
