"""compat.py: private names of Keras and TensorFlow exist, are still needed, and no other module uses one."""

import ast
import inspect
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_partial
from dist_partial import compat
from dist_partial.distributed import traffic

PACKAGE = pathlib.Path(dist_partial.__file__).parent
# The package that imports gin uses private names of gin's, and no other module can (import-linter).
EXEMPT = {"compat.py": "it is where they belong"}
PYTHONS = {"os._exit", "atexit._run_exitfuncs"}  # that `launch.script` ends a process by
NAMEDTUPLE = {"_replace", "_asdict", "_fields", "_make"}


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path.name not in EXEMPT]


def of_keras_or_tensorflow(path, text=None):
    """(line, name) of the private attributes and modules in a file that the package does not define itself."""
    tree = ast.parse(path.read_text() if text is None else text)
    own, imported = set(NAMEDTUPLE), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)  # also the fields of a dataclass
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                own.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dist_partial"):
            imported |= {alias.asname or alias.name for alias in node.names}  # modules of the package
    for node in ast.walk(tree):
        name = base = None
        if isinstance(node, ast.Attribute):
            name, base = node.attr, node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            if node.func.id in ("getattr", "hasattr", "setattr", "delattr"):
                base, argument = node.args[:2]
                name = argument.value if isinstance(argument, ast.Constant) else None
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            names = [f"{node.module}.{each}" for each in names] if isinstance(node, ast.ImportFrom) else names
            yield from ((node.lineno, each) for each in names if {"src", "python"} & set(each.split(".")[1:2]))
        if name is None or not name.startswith("_") or name.startswith("__") or name in own:
            continue
        if (isinstance(base, ast.Name) and base.id in imported) or ast.unparse(base) == "gin.config":
            continue
        if f"{ast.unparse(base)}.{name}" in PYTHONS:
            continue
        yield node.lineno, name


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_module_uses_a_private_name(path):
    assert list(of_keras_or_tensorflow(path)) == []


@pytest.mark.parametrize(
    "line, name",
    [
        ("model._flatten_layers()", "_flatten_layers"),
        ("getattr(x, '_keras_mask', None)", "_keras_mask"),
        ("self._distribution_strategy.scope()", "_distribution_strategy"),
        ("variable._dtype = 'int8'", "_dtype"),
        ("from keras.src.backend import common", "keras.src.backend.common"),
        ("import tensorflow.python.eager.context", "tensorflow.python.eager.context"),
    ],
)
def test_a_private_name_would_be_noticed(line, name):
    assert [found for _, found in of_keras_or_tensorflow(PACKAGE / "session.py", line)] == [name]


def test_every_function_says_why():
    for name, function in inspect.getmembers(compat, inspect.isfunction):
        if not name.startswith("_"):
            text = inspect.getdoc(function)
            assert any(version in text for version in ("Keras 3.15:", "KerasHub 0.32:", "TensorFlow 2.21:")), name
            assert "Unnecessary" in text or "as for `" in text, name


def test_the_versions_are_those_that_it_names():
    assert keras.__version__.startswith("3.15.") and tf.__version__.startswith("2.21.")


def test_it_imports_neither_keras_nor_tensorflow():
    code = "import sys, dist_partial.compat; print({'tensorflow', 'keras'} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "none", done.stderr


# ------------------------------------------------------------------------------------------------- Keras: layers


class Outer(keras.layers.Layer):
    """A layer that is no model, with a layer of its own."""

    def __init__(self):
        super().__init__()
        self.inner = keras.layers.Dense(2)
        self.norm = keras.layers.BatchNormalization()

    def call(self, x):
        return self.norm(self.inner(x))


def test_layers():
    model = keras.Sequential([keras.Input((3,)), Outer()])
    (outer,) = model.layers
    found = [layer for layer in compat.layers(model) if not isinstance(layer, keras.layers.InputLayer)]
    assert found[:2] == [model, outer] and set(found[2:]) == {outer.inner, outer.norm}
    assert set(compat.direct_layers(outer)) == {outer.inner, outer.norm}
    assert model.layers == [outer] and not hasattr(outer, "layers")  # the public list has one level


def test_own_variables():
    layer = keras.layers.BatchNormalization()
    layer.build((None, 3))
    layer.trainable = False
    assert compat.own_weights(layer) == [layer.gamma, layer.beta]
    assert compat.own_variables(layer) == [layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance]
    assert layer.trainable_weights == []  # the public list forgets them
    outer = Outer()
    outer.build((None, 3))
    assert compat.own_variables(outer) == []


@pytest.mark.parametrize("kind", [keras.layers.Dense, keras.layers.Embedding])
def test_stored_kernel(kind):
    layer = kind(4) if kind is keras.layers.Dense else kind(4, 4)
    layer.build((None, 4))
    before = compat.stored_kernel(layer)
    public = "kernel" if kind is keras.layers.Dense else "embeddings"
    assert any(v is before for v in layer.variables)
    layer.enable_lora(2)
    assert compat.stored_kernel(layer) is before
    assert getattr(layer, public) is not before  # the public property computes


def test_is_generator():
    layer = keras.layers.Dropout(0.5)
    layer.build((2, 2))
    assert [compat.is_generator(v) for v in layer.variables] == [True]
    assert not compat.is_generator(keras.Variable([0, 1], name="statistics"))
    assert type(layer.variables[0]) is keras.Variable  # no mark but the name


# ----------------------------------------------------------------------------------------------- TensorFlow: data


def test_is_batched():
    examples = tf.data.Dataset.range(6).map(lambda i: (tf.stack([i, i]), i))
    batches = examples.batch(2, drop_remainder=True)
    for made in (batches, batches.prefetch(1).map(lambda x, y: (x + 1, y)).repeat(), examples.padded_batch(2)):
        assert compat.is_batched(made)
    for made in (examples, batches.unbatch().shuffle(2), examples.window(2).flat_map(lambda x, y: x.batch(2))):
        assert not compat.is_batched(made)
    # The public spec is the same for both.
    assert batches.element_spec == examples.map(lambda x, y: (tf.stack([x, x]), tf.stack([y, y]))).element_spec


def test_tensorflow_seed():
    tf.random.set_seed(5)
    tf.random.uniform([])
    wanted = float(tf.random.uniform([]))
    tf.random.set_seed(5)  # the public way begins again
    assert float(tf.random.uniform([])) != wanted
    tf.random.set_seed(5)
    tf.random.uniform([])
    before = compat.tensorflow_seed()
    tf.random.set_seed(6)
    compat.set_tensorflow_seed(before)
    assert float(tf.random.uniform([])) == wanted


# ------------------------------------------------------------------------------- Keras: variables and tensors


def test_initialize():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    with pytest.raises(ValueError):
        layer.kernel.assign(np.ones([1, 2], np.float32))  # the public way keeps the shape
    compat.initialize(layer.kernel, np.ones([1, 2]).astype("bfloat16"), "bfloat16")
    assert layer.kernel.shape == (1, 2) and layer.kernel.dtype == "bfloat16"
    assert layer.kernel.value.dtype == tf.bfloat16 and np.all(layer.kernel.numpy() == 1)


def test_mask():
    layer = keras.layers.Embedding(3, 2, mask_zero=True)
    assert compat.mask(layer(tf.constant([[0, 1]]))).numpy().tolist() == [[False, True]]
    assert compat.mask(tf.zeros([1])) is None
    assert not [name for name in dir(layer(tf.constant([[0, 1]]))) if "mask" in name and name[0] != "_"]


def test_graph_of_a_functional_model():
    x = keras.Input((3,))
    inner = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3)])
    y = keras.layers.Dense(2)(inner(x))
    model = keras.Model({"x": x}, y)
    assert compat.producer(y) is model.layers[-1]
    (before,) = compat.producer_inputs(y)
    assert compat.producer(before) is inner
    assert list(compat.inputs_structure(model)) == ["x"] and isinstance(model.inputs, list)  # the public one is flat
    called = []
    other = keras.Input((3,))
    compat.run_graph(model, {"x": other}, lambda op: called.append(op) or op)
    assert inner in called and compat.is_functional(model) and not compat.is_functional(model.layers[-1])
    # The public way makes new layers.
    assert keras.models.clone_model(model).layers[-1] is not model.layers[-1]


# ---------------------------------------------------------------------------------------------- Keras: losses, metrics


def tiny():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="d")])


def test_as_one_device(mirrored):
    strategy, loss = mirrored(2), keras.losses.MeanSquaredError()

    def value():
        return loss(tf.zeros([4, 1]), 3 * tf.ones([4, 1]))

    def inside():
        with compat.as_one_device():
            first = value()
            with compat.as_one_device():
                second = value()
            # Where replicas meet, the other thread goes on within it, or outside of it.
            met = tf.distribute.get_replica_context().all_reduce("sum", value())
            return first, second, met / 2, value()

    def values(function):
        found = tf.function(lambda: strategy.run(lambda: tf.stack(tf.nest.flatten(function()))))()
        return {float(each) for one in strategy.experimental_local_results(found) for each in tf.reshape(one, [-1])}

    assert values(value) == {4.5}  # no longer needed once it is 9
    assert values(inside) == {9.0}
    assert values(value) == {4.5}
    with pytest.raises(KeyError), compat.as_one_device():
        raise KeyError
    assert values(value) == {4.5}


class Without(keras.Model):
    """Whose `compute_loss` has no `training`, as the examples of Keras's guides."""

    def call(self, x):
        return x

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return keras.ops.sum(y_pred)


class With(Without):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.sum(y_pred) + (10.0 if training else 0.0)


def test_compute_loss():
    found = []
    for model in (Without(), With()):
        model.compile()
        found.append([float(compat.compute_loss(model, None, None, np.ones(2), None, mode)) for mode in (True, False)])
    assert found == [[2.0, 2.0], [12.0, 2.0]]
    model = Without()
    with pytest.raises(TypeError):  # the public method does not
        model.compute_loss(y_pred=np.ones(2), training=True)


def test_fixed_losses():
    penalty = keras.regularizers.L2(1.0)
    layers = [keras.layers.Dense(2, activity_regularizer=penalty, kernel_regularizer=penalty), Outer()]
    model = keras.Sequential([keras.Input((3,)), keras.Sequential(layers)])
    model(np.ones([2, 3], np.float32))
    outside = [float(loss) for loss in model.losses]
    assert len(outside) == 2
    with keras.StatelessScope([(v, v.value) for v in model.trainable_variables]):
        assert [float(loss) for loss in model.losses] == outside[1:]  # Keras forgets the other
    with compat.fixed_losses(model), keras.StatelessScope():
        assert [float(loss) for loss in model.losses] == outside
    model(np.zeros([2, 3], np.float32))
    assert [float(loss) for loss in model.losses] == [0.0, outside[1]]


def test_grows():
    with pytest.raises(AttributeError):
        keras.metrics.AUC().direction  # noqa: B018
    expected = {"AUC": True, "SparseCategoricalAccuracy": True, "MeanSquaredError": False, "Mean": False}
    assert {name: compat.grows(getattr(keras.metrics, name)()) for name in expected} == expected


def test_forget_compilation(tmp_path):
    class OfOneRun(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return y_pred[:, 0]

        def get_config(self):
            raise NotImplementedError

    model = tiny()
    model.compile(loss=OfOneRun(), metrics=["mae"])
    with pytest.raises(NotImplementedError):
        model.save(tmp_path / "compiled.keras")
    compat.forget_compilation(model)
    model.save(tmp_path / "model.keras")
    assert not keras.saving.load_model(tmp_path / "model.keras").compiled
    assert float(model.evaluate(np.zeros([2, 3]), np.zeros([2, 2]), verbose=0)[0]) == 0.0  # it computes as before


def test_overrides():
    assert compat.overrides(Without(), "compute_loss") and not compat.overrides(Without(), "compute_metrics")
    model = tiny()
    assert not compat.overrides(model, "train_step")
    model.train_step = lambda data: {}
    assert compat.overrides(model, "train_step")


def test_compiled_loss():
    model = tiny()
    assert not compat.compiled_loss(model)
    assert getattr(model, "loss", None) is None
    model.compile(metrics=["mse"])
    assert not compat.compiled_loss(model)
    model.compile(loss=["mae"], loss_weights=[0.5])
    assert compat.compiled_loss(model) == (["mae"], [0.5])
    assert not [name for name in dir(model) if "loss_weights" in name and name[0] != "_"]


def test_user_metrics():
    model = tiny()
    assert compat.user_metrics(model) == (None, None)
    model.compile(loss="mse", metrics=["mae"], weighted_metrics=["mse"])
    assert compat.user_metrics(model) == (["mae"], ["mse"])
    assert [metric.name for metric in model.metrics] == ["loss", "compile_metrics"]  # made of nothing yet


def test_loss_arguments():
    loss = keras.losses.Huber(delta=2.0)
    assert "delta" not in loss.get_config() and compat.loss_arguments(loss) == {"delta": 2.0}


def test_loss_function():
    def twice(y, outputs):
        assert outputs.dtype == y.dtype  # which Keras casts
        return 2 * keras.ops.abs(y - outputs)[:, 0]

    y, outputs = np.zeros([2, 1], np.int32), np.ones([2, 1], np.float32)
    loss = compat.loss_function(twice)
    assert float(loss(y, outputs)) == 2.0 and loss.name == "twice"
    model = keras.Sequential([keras.Input((1,)), keras.layers.Identity()])
    for function in (twice, lambda y, outputs: keras.ops.abs(y - outputs)):  # a scope cannot be named '<lambda>'
        model.compile(loss=function)
        expected = model.evaluate(outputs, y, verbose=0)
        loss = compat.loss_function(function)
        assert float(tf.function(lambda loss=loss: loss(y, outputs))()) == expected
    assert not hasattr(keras.losses, "LossFunctionWrapper")


def test_set_mask():
    losses = keras.losses.MeanSquaredError()
    outputs = tf.constant([[1.0], [5.0]])
    assert float(losses(tf.zeros([2, 1]), outputs)) == 13.0
    compat.set_mask(outputs, tf.constant([True, False]))
    assert float(losses(tf.zeros([2, 1]), outputs)) == 1.0
    assert compat.mask(outputs).numpy().tolist() == [True, False]
    assert not [name for name in dir(keras.ops) + dir(keras.tree) if "mask" in name]  # a public way


def test_compiled_metrics():
    x, own = keras.Input((2,)), keras.metrics.Mean(name="own")
    outputs = [keras.layers.Dense(1, name=name) for name in ("a", "b")]
    outputs[0].own = own
    model = keras.Model(x, [layer(x) for layer in outputs])
    model.compile(loss=["mse", "mae"], metrics=[["mae"], ["mse"]], weighted_metrics=[["mae"], None])
    inputs, y = np.ones([2, 2], np.float32), [np.ones([2, 1], np.float32)] * 2
    expected = model.evaluate(inputs, y, verbose=0, return_dict=True)
    found = dict(compat.compiled_metrics(model))
    assert found["own"] is own and set(found) == (set(expected) - {"loss"}) | {"own"}
    for name in set(expected) - {"loss"}:
        assert float(found[name].result()) == expected[name], name
    assert not {"a_mae", "b_mse"} & {metric.name for metric in model.metrics}  # the public list has one object


# ------------------------------------------------------------------------------------------------ Keras: optimizers


def updated(mirrored, prepare):
    """The number of sums over replicas in a step, and the weight after it, of gradients of 1 on two replicas."""
    strategy = mirrored(2)
    with strategy.scope():
        weight = keras.Variable(np.zeros([4], np.float32))
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build([weight])
    prepare(optimizer)

    @tf.function
    def step():
        strategy.run(lambda: optimizer.apply([tf.ones([4])], [weight]))

    step()
    return len(traffic.collectives(step.get_concrete_function())), weight.numpy()[0]


def test_sum_no_gradients(mirrored):
    sums, weight = updated(mirrored, lambda optimizer: None)
    assert sums > 0 and weight == -2  # Keras sums, with no option not to
    assert not [name for name in inspect.signature(keras.optimizers.SGD).parameters if "reduce" in name]
    assert updated(mirrored, compat.sum_no_gradients) == (0, -1)


def test_what_sum_no_gradients_leaves():
    optimizer = keras.optimizers.SGD(1.0)
    before = set(vars(optimizer))
    compat.sum_no_gradients(optimizer)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    compat.alias_variables(optimizer, [])
    assert set(vars(optimizer)) - before == compat.OPTIMIZER_ATTRIBUTES | compat.EXCLUSIONS
    with pytest.raises(RuntimeError, match="would be summed twice"):
        compat.sum_no_gradients(object())


def test_variable_key(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        weight, other = keras.Variable(np.zeros([1])), keras.Variable(np.zeros([1]))
        optimizer = keras.optimizers.SGD(1.0)
    seen = []

    def replica():
        seen.append(strategy.experimental_local_results(weight.value))
        return compat.variable_key(optimizer, weight)

    strategy.run(replica)
    keys = {compat.variable_key(optimizer, copy) for copy in strategy.experimental_local_results(weight.value)}
    assert keys == {compat.variable_key(optimizer, weight)} != {compat.variable_key(optimizer, other)}
    assert all(copy is not weight.value for copy in strategy.experimental_local_results(weight.value))


def test_weight_decay_exclusions():
    original, alias, other = (keras.Variable(np.ones([1]), name=name) for name in ("a", "b", "c"))
    optimizer = keras.optimizers.AdamW()
    before = dict(optimizer.get_config())
    assert compat.weight_decay_exclusions(optimizer) == ((), None)
    optimizer.exclude_from_weight_decay([original], ["bias"])
    given, pattern = compat.weight_decay_exclusions(optimizer)
    assert given == {compat.variable_key(optimizer, original)} and pattern.search("bias")
    assert optimizer.get_config() == before  # which has nothing of it
    compat.alias_variables(optimizer, [(alias, original)])
    assert compat.variable_key(optimizer, alias) in given and compat.variable_key(optimizer, other) not in given


def test_alias_is_excluded_from_weight_decay():
    def decayed(prepare):
        original, alias = (keras.Variable(np.ones([1], np.float32)) for _ in range(2))
        optimizer = keras.optimizers.SGD(0.5, weight_decay=0.5)
        optimizer.exclude_from_weight_decay([original])
        prepare(optimizer, alias, original)
        optimizer.build([alias])
        optimizer.apply([tf.zeros([1])], [alias])
        return alias.numpy()[0] < 1

    assert decayed(lambda *_: None)  # Keras does not know the replacement
    assert not decayed(lambda optimizer, *pair: compat.alias_variables(optimizer, [pair]))


def test_learning_rate():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    optimizer = keras.optimizers.SGD(schedule)
    assert compat.learning_rate(optimizer) is schedule
    assert optimizer.learning_rate is not schedule  # the public one is its value


def test_strategy_of(mirrored):
    strategy = mirrored(2)
    with strategy.scope():
        optimizer = keras.optimizers.SGD(0.1)
    assert compat.strategy_of(optimizer) is strategy
    assert not [name for name in dir(optimizer) if "strategy" in name and not name.startswith("_")]


def test_name_counts():
    keras.layers.Dense(1)
    counts = compat.name_counts()
    try:
        compat.set_name_counts({**counts, "dense": 7})
        assert keras.layers.Dense(1).name == "dense_7"
    finally:
        compat.set_name_counts(counts)


# ----------------------------------------------------------------------------------------------------------- KerasHub


def test_cache_of_keras_hub():
    hub = pytest.importorskip("keras_hub")
    assert hub.__version__.startswith("0.32.")
    backbone = hub.models.GPT2Backbone(
        vocabulary_size=5, num_layers=1, num_heads=1, hidden_dim=4, intermediate_dim=4, max_sequence_length=6
    )
    task = hub.models.GPT2CausalLM(backbone=backbone, preprocessor=None)
    assert compat.has_cache(task) and not compat.has_cache(object())
    make, use = compat.cache_methods(task)
    assert list(inspect.signature(make).parameters) == ["token_ids"] and use == task.call_with_cache
    cache = compat.build_cache(task, keras.ops.zeros((1, 6), "int32"))
    assert cache.shape == (1, 1, 2, 6, 1, 4)
    assert not [name for name in dir(task) if "cache" in name and "build" in name and not name.startswith("_")]


# --------------------------------------------------------------------------------------------------------- TensorFlow


def test_skip_collective_keys():
    code = """
import tensorflow as tf
from dist_partial import compat
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 3)
for replicas in (2, 3):
    {skip}
    strategy = tf.distribute.MirroredStrategy([f"CPU:{{i}}" for i in range(replicas)])
    total = lambda: tf.distribute.get_replica_context().all_reduce("SUM", tf.ones([replicas]))
    tf.function(lambda: strategy.run(total))()
"""
    for skip, fine in (("compat.skip_collective_keys(1000)", True), ("pass", False)):
        done = subprocess.run([sys.executable, "-c", code.format(skip=skip)], capture_output=True, text=True)
        assert (done.returncode == 0) == fine, done.stderr[-2000:]


def test_gather(mirrored):
    strategy = mirrored(2)
    options = tf.distribute.experimental.CommunicationOptions()

    def ours(strategy, value):
        return compat.gather(strategy, value, options)

    def traced(gather):
        shapes = []

        @tf.function
        def call():
            def replica():
                context = tf.distribute.get_replica_context()
                rank = tf.cast(context.replica_id_in_sync_group, tf.float32)
                gathered = gather(context, tf.fill([3], rank))
                shapes.append(gathered.shape)
                return gathered

            return strategy.run(replica)

        values = [copy.numpy().tolist() for copy in strategy.experimental_local_results(call())]
        return (
            values,
            len([op for op in traffic.operations(call.get_concrete_function().graph) if "Collective" in op.type]),
            shapes[0],
        )

    values, ops, shape = traced(lambda context, value: context.merge_call(ours, args=(value,)))
    assert values == [[[0] * 3, [1] * 3]] * 2 and shape == (2, 3) and ops == 2
    _, public_ops, public_shape = traced(lambda context, value: context.all_gather(value[tf.newaxis], 0))
    assert public_ops > ops and public_shape[0] is None, (public_ops, public_shape)


def test_abort_collectives():
    from tensorflow.python.eager import context

    assert callable(context.Context.abort_collective_ops)
    assert not [name for name in dir(tf.distribute) + dir(tf.distribute.Strategy) if "abort" in name]


def test_called_graphs():
    @tf.function
    def inner(x):
        return x + 1.0

    @tf.function
    def outer(x):
        return inner(x)

    graph = outer.get_concrete_function(tf.TensorSpec([2])).graph
    (call,) = [op for op in graph.get_operations() if "PartitionedCall" in op.type]
    (found,) = compat.called_graphs(call, [call.node_def.attr["f"].func.name])
    assert "AddV2" in [op.type for op in found.get_operations()]
    assert not [name for name in dir(graph) if "get_function" in name and not name.startswith("_")]


@pytest.mark.parametrize(
    "name", [n for n, _ in inspect.getmembers(compat, inspect.isfunction) if not n.startswith("_")]
)
def test_every_function_is_used(name):
    texts = [path.read_text() for path in modules()]
    assert any(f"compat.{name}" in text or f"import {name}" in text for text in texts), "no longer needed"
