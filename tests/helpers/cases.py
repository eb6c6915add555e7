"""Models, data and a plain Keras loop on one device: what the trainer is compared with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dist_partial import reductions, selection
from dist_partial.data import ArraySource, Dataset, fingerprint
from dist_partial.distributed import traffic
from dist_partial.distributed.backend import Backend
from dist_partial.distributed.collectives import Collectives
from dist_partial.distributed.tensorflow_backend import TensorFlowBackend
from dist_partial.models import byte_transformer, two_dense
from dist_partial.reductions.reduce_gradients import make_states
from dist_partial.step import batch_norm, losses, optimizers
from dist_partial.step.objective import Objective, prepare
from dist_partial.step.train_step import StepOptions, StepSpec, train_step

STEPS = 20
GLOBAL_BATCH = 24


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, the rules under which a part of it is trained, and its data: `x(rng, n)`, `y(rng, n)`."""

    model: Callable[[], keras.Model]
    rules: list[Any]
    x: Callable[[np.random.Generator, int], np.ndarray]
    y: Callable[[np.random.Generator, int], np.ndarray]
    statistics_bytes: Callable[[int], int] = lambda itemsize: 0


def convolutional(synchronized: bool) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(6, 3, use_bias=False, name="conv1"),  # the norm takes a bias away again
            keras.layers.BatchNormalization(synchronized=synchronized, name="norm1"),
            keras.layers.ReLU(),
            keras.layers.Conv2D(8, 3, name="conv2", kernel_regularizer=keras.regularizers.L2(1e-2)),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(5, name="head"),
        ],
        name="convolutional",
    )


LAYERS = ("a", "b", "c", "d")


def mlp(width: int = 6) -> keras.Model:
    """Dense layers of one width, with the names of LAYERS."""
    layers = [keras.layers.Dense(width, "tanh" if name != LAYERS[-1] else None, name=name) for name in LAYERS]
    return keras.Sequential([keras.Input((width,)), *layers])


def shared_embedding() -> keras.Model:
    """One embedding looked up twice, so that its sparse gradients add up."""
    embedding = keras.layers.Embedding(11, 6, name="embedding")
    left, right = keras.Input((4,), dtype="int32"), keras.Input((4,), dtype="int32")
    both = keras.layers.Concatenate()(
        [keras.layers.Flatten()(embedding(left)), keras.layers.Flatten()(embedding(right))]
    )
    inner = keras.Model([left, right], keras.layers.Dense(5, name="head")(both))
    tokens = keras.Input((8,), dtype="int32")
    return keras.Model(tokens, inner([tokens[:, :4], tokens[:, 4:]]), name="shared")


def masked() -> keras.Model:
    """Reads sequences of which 0 is no part: each batch divides its loss by another number."""
    layers = [keras.layers.Embedding(7, 6, mask_zero=True, name="embedding"), keras.layers.Dense(7, name="head")]
    return keras.Sequential([keras.Input((6,), dtype="int32"), *layers], name="masked")


def mobilenet() -> keras.Model:
    model = keras.applications.MobileNet(
        (32, 32, 3), alpha=0.25, dropout=0.0, weights=None, classes=5, classifier_activation=None
    )
    # With fresh statistics the signal dies out over 27 layers in inference mode, and all gradients with it.
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_variance.assign(0.05 * keras.ops.ones_like(layer.moving_variance))
    return model


def _ids(high: int, *shape: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda rng, n: rng.integers(0, high, (n, *shape)).astype(np.int32)


def _images(size: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    return lambda rng, n: rng.normal(size=(n, size, size, 3))


CASES = {
    "two_dense": Case(two_dense, [("train", r"dense[12]/kernel"), ("freeze", r".*")], _ids(10, 16), _ids(10)),
    "byte_transformer": Case(
        lambda: byte_transformer(layers=2, width=16, heads=2, vocabulary=17),
        [("train", r"embedding/.*"), ("train", r"block_1/.*"), ("train", r"head/kernel:0"), ("freeze", r".*")],
        _ids(17, 6),
        _ids(17, 6),
    ),
    "batch_norm_synchronised": Case(
        lambda: convolutional(synchronized=True),
        [("train", r".*")],
        _images(8),
        _ids(5),
        # Keras 3.15 sums five vectors of 6 channels over the replicas, forward and backward together.
        statistics_bytes=lambda itemsize: 5 * 6 * itemsize,
    ),
    "batch_norm_untrained": Case(
        lambda: convolutional(synchronized=False),
        [("train", r"conv1/kernel"), ("train", r"head/.*"), ("freeze", r".*")],
        _images(8),
        _ids(5),
    ),
    "shared_embedding": Case(
        shared_embedding, [selection.Rule(r"embedding/.*", rows=(2, 9)), ("train", r"head/.*")], _ids(11, 8), _ids(5)
    ),
    "masked": Case(
        masked,
        [("train", r".*")],
        lambda rng, n: np.where(np.arange(6) < rng.integers(1, 7, (n, 1)), _ids(7, 6)(rng, n), 0),
        _ids(7, 6),
        statistics_bytes=lambda itemsize: itemsize,  # how many targets there are
    ),
    "mobilenet": Case(
        mobilenet,
        [("train", r"conv_pw_1[23]/.*"), ("train", r"conv_preds/.*"), ("freeze", r".*")],
        _images(32),
        _ids(5),
    ),
}

OPTIMIZERS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "momentum": lambda **kw: keras.optimizers.SGD(**{"learning_rate": 0.05, "momentum": 0.9, **kw}),
    "adam": lambda **kw: keras.optimizers.Adam(**{"learning_rate": 0.01, **kw}),
    "adamw": lambda **kw: keras.optimizers.AdamW(**{"learning_rate": 0.01, "weight_decay": 0.02, **kw}),
}


@dataclasses.dataclass(frozen=True)
class Options:
    clip_norm: float | None = None
    accumulate: int = 1
    weight_decay: float | None = None


OPTIONS = {
    "plain": Options(),
    "clip": Options(clip_norm=0.05),
    "accumulate": Options(accumulate=2),
    "all": Options(clip_norm=0.05, accumulate=2, weight_decay=0.03),
}

# Every model once, and every optimizer and option among them. Batch statistics of a part of a batch are not those of
# the whole, so the synchronised model does not accumulate.
ROTATION = [
    ("two_dense", "adamw", "all"),
    ("byte_transformer", "adam", "clip"),
    ("batch_norm_synchronised", "momentum", "clip"),
    ("batch_norm_untrained", "momentum", "all"),
    ("shared_embedding", "adam", "accumulate"),
    ("masked", "adamw", "all"),
    ("mobilenet", "momentum", "plain"),
]


def dataset(name: str, *columns: np.ndarray) -> Dataset:
    """The same examples to train on and to evaluate."""
    source = ArraySource(*columns)
    return Dataset(name, source, source, fingerprint(*columns))


def loss(y: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    return keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)


def objective(model: keras.Model, x: Any, y: Any, loss: Any = loss) -> Objective:
    """The loss alone, tried on some examples; call it in the strategy's scope."""
    x, y = (tf.nest.map_structure(tf.constant, each) for each in (x, y))
    return prepare(model, (x, y), model(x, training=False), {"loss": losses.made(loss)})


def set_precision(dtype: str) -> None:
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)


def batches(case: Case, dtype: str, steps: int = STEPS) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(5)
    pairs = [(case.x(rng, GLOBAL_BATCH), case.y(rng, GLOBAL_BATCH)) for _ in range(steps)]
    return [(x.astype(dtype) if x.dtype.kind == "f" else x, y) for x, y in pairs]


def build(case: Case) -> keras.Model:
    keras.utils.set_random_seed(3)
    return case.model()


def optimizer(name: str, options: Options) -> keras.optimizers.Optimizer:
    decay = {} if options.weight_decay is None else {"weight_decay": options.weight_decay}
    return OPTIMIZERS[name](**decay)


def reference(case: Case, name: str, options: Options, dtype: str) -> dict[str, np.ndarray]:
    """Trains as plain Keras on one device would, and returns all variables by path.

    Selected rows are trained by zeroing the other rows' gradients and putting their values back, which is the
    same thing for optimizers that work on each element alone.
    """
    model = build(case)
    rules = selection.parse_rules(case.rules)
    chosen = []
    for path, variable in zip(selection.variable_paths(model), model.trainable_variables, strict=True):
        rule = rules[selection.first_match(rules, path)]
        if rule.train:
            chosen.append((variable, rule.rows))
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = any(layer.gamma is variable for variable, _ in chosen)
    variables = [variable for variable, _ in chosen]
    keras_optimizer = optimizer(name, options)
    keras_optimizer.build(variables)

    @tf.function(autograph=False)
    def one_step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            total = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, model(x, training=True))
            if model.losses:
                total += tf.add_n(model.losses)
        gradients = [tf.convert_to_tensor(g) for g in tape.gradient(total, [v.value for v in variables])]
        gradients = [
            g if rows is None else tf.concat([0 * g[: rows[0]], g[rows[0] : rows[1]], 0 * g[rows[1] :]], axis=0)
            for g, (_, rows) in zip(gradients, chosen, strict=True)
        ]
        if options.clip_norm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, options.clip_norm)
        before = [tf.identity(variable.value) for variable in variables]
        with tf.control_dependencies(before):
            keras_optimizer.apply(gradients, variables)
        for (variable, rows), old in zip(chosen, before, strict=True):
            if rows is not None:
                variable.assign(tf.concat([old[: rows[0]], variable[rows[0] : rows[1]], old[rows[1] :]], axis=0))

    for x, y in batches(case, dtype):
        one_step(tf.constant(x), tf.constant(y))
    return weights(model)


def weights(model: keras.Model) -> dict[str, np.ndarray]:
    kept = [v for v in model.variables if v.name != "seed_generator_state"]
    names = selection.paths_of(model, kept)
    return {name: keras.ops.convert_to_numpy(v) for name, v in zip(names, kept, strict=True)}


@dataclasses.dataclass(frozen=True)
class Trained:
    strategy: tf.distribute.Strategy
    model: keras.Model
    plan: selection.Plan
    optimizers: tuple[optimizers.GroupOptimizer, ...]
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]
    losses: np.ndarray
    traced: Any
    collectives: list[traffic.Collective]
    bytes_per_step: int


def train(
    strategy: tf.distribute.Strategy,
    case: Case,
    name: str = "adam",
    options: Options = Options(),
    dtype: str = "float64",
    steps_per_call: int = 7,
    all_reduce: reductions.AllReduce = reductions.AllReduce(),  # noqa: B008 (frozen)
    jit_compile: bool = False,
    data: list[tuple[np.ndarray, np.ndarray]] | None = None,
    collectives: Collectives | None = None,
    total: Callable[[Any], np.ndarray] = np.asarray,
) -> Trained:
    """Trains under the strategy with the package's own step; `total` sums over the workers."""
    data = batches(case, dtype) if data is None else data
    with strategy.scope():
        model = build(case)
        plan = selection.resolve(case.rules, model, all_reduce)
        batch_norm.set_modes(batch_norm.layers(model), plan, everywhere=False)
        groups = optimizers.build(plan, lambda: optimizer(name, options))
        states = make_states(plan)
        measured = objective(model, *(column[:2] for column in data[0]))
    before = weights(model)
    spec = StepSpec(
        strategy,
        collectives or Collectives(),
        model,
        measured,
        plan,
        groups,
        states,
        StepOptions(options.clip_norm, options.accumulate, jit_compile),
    )
    compiled = train_step(spec)

    iterator = worker_iterator(strategy, data, spec.collectives.backend)
    traced = compiled.function.get_concrete_function(iterator, tf.constant(1))
    losses = []
    for done in range(0, len(data), steps_per_call):
        result = compiled.function(iterator, tf.constant(min(steps_per_call, len(data) - done)))
        losses.append(total(result["loss"]))
    return Trained(
        strategy,
        model,
        plan,
        groups,
        before,
        weights(model),
        np.concatenate(losses),
        traced,
        traffic.collectives(traced),
        traffic.total(traffic.in_step(traced)),
    )


def worker_iterator(
    strategy: tf.distribute.Strategy,
    data: list[tuple[np.ndarray, np.ndarray]],
    backend: Backend = TensorFlowBackend(),  # noqa: B008 (it has no state)
) -> Any:
    """This worker's part of each batch, over and over."""
    context = backend.topology(strategy).input_context
    parts = [[np.split(column, context.num_input_pipelines)[context.input_pipeline_id] for column in b] for b in data]
    return iter(tf.data.Dataset.from_tensor_slices(tuple(np.stack(c) for c in zip(*parts, strict=True))).repeat())


def assert_equal(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Every variable within `tolerance` of its norm."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        distance = np.linalg.norm(actual[name] - value)
        assert distance <= tolerance * max(np.linalg.norm(value), 1e-12), (name, distance, np.linalg.norm(value))


def assert_replicas_agree(trained: Trained) -> None:
    """Every copy of every variable and slot has the same bits."""
    slots = [v for group in trained.optimizers for v in group.optimizer.variables]
    rows = [member.variable for group in trained.optimizers for member in group.members]
    for variable in [*trained.model.variables, *slots, *rows]:
        copies = [np.asarray(copy) for copy in trained.strategy.experimental_local_results(variable.value)]
        for copy in copies[1:]:
            assert copy.tobytes() == copies[0].tobytes(), variable.path


def assert_nothing_else_moved(trained: Trained) -> None:
    """Unselected variables and rows have their old bits, and there is no slot for them."""
    selected = {entry.path for entry in trained.plan.trained}
    for entry in trained.plan.entries:
        old, new = trained.before[entry.path], trained.after[entry.path]
        if entry.path not in selected:
            assert old.tobytes() == new.tobytes(), entry.path
        else:
            assert not np.array_equal(old, new), f"{entry.path} is selected and did not move"
            if entry.rule.rows is not None:
                start, stop = entry.rule.rows
                assert (
                    np.delete(old, slice(start, stop), 0).tobytes() == np.delete(new, slice(start, stop), 0).tobytes()
                )
    for group in trained.optimizers:
        allowed = sorted(member.entry.trained_shape for member in group.members)
        per_slot = [tuple(v.shape) for name, v in group.state.items() if not name.startswith("group_")]
        assert set(per_slot) == set(allowed)
        assert {name.rsplit("/", 1)[0] for name in group.state if not name.startswith("group_")} <= selected


def copies(strategy: tf.distribute.Strategy, variable: Any) -> list[np.ndarray]:
    """The values that this process's replicas have of a Keras or TensorFlow variable."""
    value = variable.value if isinstance(variable, keras.Variable) else variable
    return [np.asarray(copy) for copy in strategy.experimental_local_results(value)]
