"""Calls the private names of Keras 3.15, KerasHub 0.32 and TensorFlow 2.21: each once, and no other module does.

Each function says why a public name does not serve and what would make the function unnecessary.
`tests/unit/test_compat.py` fails when a name is gone, when it is no longer needed, and when another module uses a
private name. TensorFlow and Keras are imported within the functions: what imports this module needs neither.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

# ------------------------------------------------------------------------------------------------- Keras: layers


def layers(layer: Any) -> list[Any]:
    """Lists a layer or model, then the layers in it, and in those.

    Keras 3.15: `Model.layers` has the first level only, and a layer that is no model has none.
    Unnecessary with a public list that goes down to the last level.

    Examples:
        >>> import keras
        >>> inner = keras.Sequential([keras.layers.Dense(1, name="c")], name="b")
        >>> [layer.name for layer in layers(keras.Sequential([inner], name="a"))]
        ['a', 'b', 'c']
    """
    return list(layer._flatten_layers())


def direct_layers(layer: Any) -> list[Any]:
    """Lists the layers that a layer or model holds itself.

    Keras 3.15: `Model.layers` exists, and a layer that is no model has no public list.
    Unnecessary with `Layer.layers`.

    Examples:
        >>> import keras
        >>> inner = keras.Sequential([keras.layers.Dense(1, name="c")], name="b")
        >>> [layer.name for layer in direct_layers(keras.Sequential([inner], name="a"))]
        ['b']
    """
    return list(layer._flatten_layers(include_self=False, recursive=False))


def own_weights(layer: Any) -> list[Any]:
    """Lists the weights that a layer itself holds, whether it is frozen or not; none of the layers in it.

    Keras 3.15: `trainable_weights` leaves out those of a frozen layer, and all public lists go down into the layers.
    Unnecessary with a public list of a layer's own weights.

    Examples:
        >>> import keras
        >>> layer = keras.layers.BatchNormalization(trainable=False)
        >>> layer.build([None, 2])
        >>> [variable.name for variable in own_weights(layer)]
        ['gamma', 'beta']
    """
    return list(layer._trainable_variables)


def own_variables(layer: Any) -> list[Any]:
    """Lists `own_weights`, then the layer's own statistics and counters.

    Keras 3.15: as for `own_weights`.

    Examples:
        >>> import keras
        >>> layer = keras.layers.BatchNormalization(scale=False)
        >>> layer.build([None, 2])
        >>> [variable.name for variable in own_variables(layer)]
        ['beta', 'moving_mean', 'moving_variance']
    """
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def stored_kernel(layer: Any) -> Any:
    """Returns the variable in which a Dense, EinsumDense or Embedding layer stores its kernel.

    Keras 3.15: the public `kernel` of a layer with LoRA, or of a quantized one, is a computed value.
    Unnecessary with a public name for the variable.

    Examples:
        >>> import keras
        >>> layer = keras.layers.Dense(2)
        >>> layer.build([None, 3])
        >>> layer.quantize("int8")
        >>> stored_kernel(layer).dtype
        'int8'
    """
    import keras

    return layer._embeddings if isinstance(layer, keras.layers.Embedding) else layer._kernel


def is_generator(variable: Any) -> bool:
    """Tells whether a variable is the state of a random generator.

    Keras 3.15: `SeedGenerator.state` is public, and lists of variables do not say which is one: its name does.
    Unnecessary with a mark on the variable.

    Examples:
        >>> import keras
        >>> is_generator(keras.random.SeedGenerator(0).state), is_generator(keras.Variable(0))
        (True, False)
    """
    return variable.name == "seed_generator_state"


# ---------------------------------------------------------------------------------------------- Keras: variables


def initialize(variable: Any, value: Any, dtype: str | None = None) -> None:
    """Gives a Keras variable a new value of another shape or dtype, in the strategy's scope.

    Keras 3.15: a variable's shape and dtype are fixed when it is made, and no layer takes another variable.
    Unnecessary with a public way to replace the variable of a built layer.

    Examples:
        >>> import keras
        >>> import numpy as np
        >>> variable = keras.Variable([1.0])
        >>> initialize(variable, np.zeros([2, 3]), "float64")
        >>> variable.numpy().shape, variable.dtype
        ((2, 3), 'float64')
    """
    variable._shape = tuple(value.shape)
    if dtype is not None:
        variable._dtype = dtype
    variable._initialize(value)


# ------------------------------------------------------------------------------------------------ Keras: tensors


def mask(tensor: Any) -> Any:
    """Returns the mask that Keras has put on a tensor, or None.

    Keras 3.15: `compute_mask` computes a layer's mask, and what was computed in a call is a private attribute.
    Unnecessary with a public function that reads it.

    Examples:
        >>> import keras
        >>> import numpy as np
        >>> mask(keras.layers.Embedding(5, 2, mask_zero=True)(np.array([[3, 0]]))).numpy().tolist()
        [[True, False]]
    """
    return getattr(tensor, "_keras_mask", None)


def producer(tensor: Any) -> Any:
    """Returns the operation (a layer, or one of `keras.ops`) that gives a symbolic tensor.

    Keras 3.15: the graph of a functional model is public as JSON only (`get_config`).
    Unnecessary with a public walk over the graph.

    Examples:
        >>> import keras
        >>> producer(keras.layers.Dense(1, name="head")(keras.Input([2]))).name
        'head'
    """
    return tensor._keras_history.operation


def producer_inputs(tensor: Any) -> list[Any]:
    """Lists the symbolic tensors of which `producer` computes a tensor.

    Keras 3.15: as for `producer`.

    Examples:
        >>> import keras
        >>> x = keras.Input([2])
        >>> producer_inputs(keras.layers.Dense(1)(x))[0] is x
        True
    """
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index].input_tensors


def inputs_structure(model: Any) -> Any:
    """Returns the inputs of a functional model as it was made: a tensor, a list, or a dictionary by name.

    Keras 3.15: `Model.inputs` is flat.
    Unnecessary with a public name for the structure.

    Examples:
        >>> import keras
        >>> x = keras.Input([2], name="x")
        >>> list(inputs_structure(keras.Model({"ids": x}, x)))
        ['ids']
    """
    return model._inputs_struct


def is_functional(operation: Any) -> bool:
    """Tells whether `run_graph` can run it: whether it is a functional model.

    Keras 3.15: as for `run_graph`.

    Examples:
        >>> import keras
        >>> x = keras.Input([2])
        >>> is_functional(keras.Model(x, x)), is_functional(keras.layers.Dense(1))
        (True, False)
    """
    return hasattr(operation, "_run_through_graph")


def run_graph(model: Any, inputs: Sequence[Any], operation: Callable[[Any], Any]) -> Any:
    """Runs a functional model's graph on other inputs, with each operation replaced by what `operation` makes of it.

    Keras 3.15: `keras.models.clone_model` makes new layers of a nested model's class, and here the layers stay.
    Unnecessary with a clone that can keep layers and take nested models apart.

    Examples:
        >>> import keras
        >>> import numpy as np
        >>> x = keras.Input([1])
        >>> model = keras.Model(x, keras.layers.Rescaling(3.0)(x))
        >>> float(run_graph(model, [np.array([[2.0]])], lambda operation: operation)[0, 0])
        6.0
        >>> run_graph(model, [np.array([[2.0]])], lambda operation: lambda x: x + 1)
        array([[3.]])
    """
    return model._run_through_graph(inputs, operation)


# -------------------------------------------------------------------------------------------- Keras: losses, metrics


@contextlib.contextmanager
def as_one_device() -> Iterator[None]:
    """Has Keras's losses compute within it as they do on one device.

    Keras 3.15: under a strategy every built-in loss divides by the number of replicas, and regularisers, `add_loss` and
    what a `compute_loss` adds by itself do not, so that N replicas train on something else than one device.
    Unnecessary with an option not to scale.
    """
    from keras.src.losses import loss as module

    # Threads may enter and leave in any order: one of each replica, and those of runs side by side.
    if not hasattr(module.scale_loss_for_distribution, "unless_alone"):
        for name in ("scale_loss_for_distribution", "unscale_loss_for_distribution"):
            setattr(module, name, _unless_alone(getattr(module, name)))
    before = getattr(_alone, "depth", 0)
    _alone.depth = before + 1
    try:
        yield
    finally:
        _alone.depth = before


_alone = threading.local()


def _unless_alone(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(function)
    def scaled(value: Any) -> Any:
        return value if getattr(_alone, "depth", 0) else function(value)

    scaled.unless_alone = True  # type: ignore[attr-defined]
    return scaled


@contextlib.contextmanager
def fixed_losses(model: Any) -> Iterator[None]:
    """Has `model.losses` give within it what it gives at its beginning.

    Keras 3.15: in a `StatelessScope` it gives what was added in the scope alone, and regularisers read their variables
    from the scope alone. (Keras's own trainer for JAX sets the same attribute.)
    Unnecessary if the scope knew what was added before it.
    """
    losses = list(model.losses)
    model._losses_override.extend(losses)
    try:
        yield
    finally:
        model._losses_override.clear()


def compute_loss(model: Any, x: Any, y: Any, outputs: Any, weight: Any, training: bool) -> Any:
    """Calls a compiled model's `compute_loss`, with or without `training`, as its signature has it.

    Keras 3.15: the public method of a user's class may lack the argument, and Keras keeps which it is to itself.
    Unnecessary once all take it.
    """
    return model._compute_loss(x, y, outputs, weight, training=training)


def overrides(model: Any, name: str) -> bool:
    """Tells whether a model has a method of that name of its own, in its class or on the object.

    Keras 3.15: nothing marks what a user's class overrides. No private name of Keras's is used.
    Unnecessary with such a mark.
    """
    import keras

    return getattr(getattr(model, name), "__func__", None) is not getattr(keras.Model, name)


def compiled_loss(model: Any) -> Any:
    """Returns what a model was compiled with as (loss, loss_weights), or None.

    Keras 3.15: `Model.loss` lacks the weights, and a model that was not compiled has it not.
    Unnecessary with a public name for both.
    """
    compiled = getattr(model, "_compile_loss", None)
    return compiled and (compiled._user_loss, compiled._user_loss_weights)


def user_metrics(model: Any) -> tuple[Any, Any]:
    """Returns the metrics and the weighted metrics that a model was compiled with, as `compile` was given them.

    Keras 3.15: `Model.metrics` has what is made of them, once the model has been called on targets.
    Unnecessary with a public name for both.

    Examples:
        >>> import keras
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
        >>> model.compile(loss="mse", metrics=["mae"])
        >>> user_metrics(model)
        (['mae'], None)
    """
    compiled = getattr(model, "_compile_metrics", None)
    return (compiled._user_metrics, compiled._user_weighted_metrics) if compiled else (None, None)


def loss_function(function: Callable[..., Any], name: str | None = None) -> Any:
    """Makes a Keras loss of a function of targets and outputs, as `Model.compile` does.

    Keras 3.15: brings both to one rank and casts them; the class is not exported.
    Unnecessary once it is.
    """
    from keras.src.losses.losses import LossFunctionWrapper

    name = name or str(getattr(function, "__name__", ""))
    return LossFunctionWrapper(function, name=name if name.isidentifier() else None)  # TensorFlow takes no '<lambda>'


# Where a loss that wraps a function keeps the arguments of it.
LOSS_ARGUMENTS = "_fn_kwargs"


def loss_arguments(loss: Any) -> dict[str, Any]:
    """Returns the arguments that a loss of Keras's hands to its function; {} of anything else.

    Keras 3.15: `get_config` of some of them, such as Huber, leaves theirs out.
    Unnecessary if all had them.

    Examples:
        >>> import keras
        >>> loss_arguments(keras.losses.Huber(delta=2.0)), loss_arguments(keras.losses.MeanSquaredError())
        ({'delta': 2.0}, {})
    """
    arguments = dict(getattr(loss, LOSS_ARGUMENTS, {}))
    return arguments if type(loss).__module__.startswith("keras.") else {}


def set_mask(tensor: Any, mask: Any) -> None:
    """Puts a mask on a tensor, as Keras's layers and losses do.

    Keras 3.15: as for `mask`.
    """
    tensor._keras_mask = mask


def grows(metric: Any) -> bool:
    """Tells whether more is better of a metric, as far as Keras knows.

    Keras 3.15: callbacks with `mode="auto"` read a private attribute.
    Unnecessary with a public name for it.
    """
    return getattr(metric, "_direction", None) == "up"


def forget_compilation(model: Any) -> None:
    """Has a compiled model saved as one that is not, for what it was compiled with is made for one run.

    Keras 3.15: `Model.save` writes the arguments of `compile`; to set `compiled` back would take the metrics away, too.
    Unnecessary with an option of `save`.
    """
    del model._compile_config


@contextlib.contextmanager
def noting_single_values() -> Iterator[set[int]]:
    """Gives the ids of the metrics that are updated within it by one number for a batch, which counts as one.

    Keras 3.15: a `Mean` over batches differs from one over examples in its calls alone.
    Unnecessary if a metric said which of them it is.
    """
    import keras

    found: set[int] = set()
    update = keras.metrics.Mean.update_state

    def noted(self: Any, values: Any, sample_weight: Any = None) -> None:
        if sample_weight is None and keras.ops.ndim(values) == 0:
            found.add(id(self))
        update(self, values, sample_weight)

    keras.metrics.Mean.update_state = noted
    try:
        yield found
    finally:
        keras.metrics.Mean.update_state = update


def compiled_metrics(model: Any) -> list[tuple[str, Any]]:
    """Lists the metrics of a compiled model that has been called on targets, by the names of their results.

    Keras 3.15: `Model.metrics` has those of `compile` in one object, which names them by their outputs.
    Unnecessary with a public list of it.
    """
    found: list[tuple[str, Any]] = []
    for metric in model.metrics:
        if metric is model._compile_metrics:
            found += zip(metric.result(), metric.metrics, strict=True)
        elif metric is not model._loss_tracker:
            found.append((metric.name, metric))
    return found


# --------------------------------------------------------------------------------------------- Keras: optimizers


def sum_no_gradients(optimizer: Any) -> None:
    """Has an optimizer apply gradients that are summed over the replicas already.

    Keras 3.15: `apply` sums what it gets over the replicas and has no option not to. After our own reduction that is
    a second sum: an update as many times too large, and twice the bytes.
    Unnecessary with such an option.

    Raises:
        RuntimeError: the method that sums is gone, so that something else would sum twice.

    Examples:
        >>> import keras
        >>> optimizer = keras.optimizers.SGD()
        >>> sum_no_gradients(optimizer)
        >>> "_all_reduce_sum_gradients" in vars(optimizer)
        True
    """
    if not hasattr(optimizer, "_all_reduce_sum_gradients"):
        import keras

        raise RuntimeError(
            f"Keras {keras.__version__} has no Optimizer._all_reduce_sum_gradients: gradients would be summed twice"
        )
    optimizer._all_reduce_sum_gradients = lambda grads_and_vars: grads_and_vars


def watch_gradient_sums(watch: Callable[[Any], None]) -> None:
    """Calls `watch(optimizer)` before an optimizer of Keras's sums gradients over the replicas of a strategy.

    Keras 3.15: the method that sums is private, and nothing else tells its sums from those of layers. What
    `sum_no_gradients` was called for is not watched. Unnecessary with a hook in `Optimizer.apply`.

    Args:
        watch: takes the place of an earlier one.

    Examples:
        >>> import keras
        >>> import tensorflow as tf
        >>> watch_gradient_sums(lambda optimizer: print(type(optimizer).__name__))
        >>> weight = keras.Variable([1.0])
        >>> keras.optimizers.SGD(1.0).apply([tf.constant([0.5])], [weight])
        SGD
        >>> watch_gradient_sums(lambda optimizer: None)
    """
    import keras

    kind = next(kind for kind in keras.optimizers.Optimizer.__mro__ if "_all_reduce_sum_gradients" in vars(kind))
    sums: Any = vars(kind)["_all_reduce_sum_gradients"]
    sums = getattr(sums, "watched", sums)

    def watched(optimizer: Any, grads_and_vars: Any) -> Any:
        watch(optimizer)
        return sums(optimizer, grads_and_vars)

    watched.watched = sums  # type: ignore[attr-defined]
    kind._all_reduce_sum_gradients = watched


# What `sum_no_gradients`, `alias_variables` and Keras's cache leave on an optimizer object, for those who list its
# attributes; and what `exclude_from_weight_decay` does.
OPTIMIZER_ATTRIBUTES = frozenset({"_all_reduce_sum_gradients", "_var_key", "_exclude_from_weight_decay_cache"})
EXCLUSIONS = frozenset({"_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"})


def variable_key(optimizer: Any, variable: Any) -> Any:
    """Returns the key by which an optimizer knows a variable; the same for the variable and each of its copies.

    Keras 3.15: under a strategy a replica sees a copy, and no public name leads from it to the variable.
    Unnecessary if copies and variable compared equal.

    Examples:
        >>> import keras
        >>> optimizer, one, other = keras.optimizers.SGD(), keras.Variable([1.0]), keras.Variable([1.0])
        >>> key = variable_key(optimizer, one)
        >>> key == variable_key(optimizer, one), key == variable_key(optimizer, other)
        (True, False)
    """
    return optimizer._var_key(variable)


def alias_variables(optimizer: Any, originals: Iterable[tuple[Any, Any]]) -> None:
    """Has an optimizer treat each first variable of a pair as the second where it looks one up.

    Keras 3.15: `exclude_from_weight_decay(var_list=...)` keeps variables by key, and a stand-in has another one.
    Unnecessary if exclusions went by path.

    Examples:
        >>> import keras
        >>> optimizer, rows, whole = keras.optimizers.AdamW(), keras.Variable([1.0]), keras.Variable([1.0, 2.0])
        >>> alias_variables(optimizer, [(rows, whole)])
        >>> variable_key(optimizer, rows) == variable_key(optimizer, whole)
        True
    """
    key = optimizer._var_key
    known = {key(variable): key(original) for variable, original in originals}
    optimizer._var_key = lambda variable: known.get(key(variable), key(variable))


def weight_decay_exclusions(optimizer: Any) -> tuple[Any, Any]:
    """Returns what `exclude_from_weight_decay` was given: variables by `variable_key`, and a compiled pattern or None.

    Keras 3.15: no config and no public name has it.
    Unnecessary if `get_config` had it.

    Examples:
        >>> import keras
        >>> optimizer = keras.optimizers.AdamW()
        >>> optimizer.exclude_from_weight_decay(var_names=["bias"])
        >>> weight_decay_exclusions(optimizer)[1].pattern
        'bias'
    """
    given = getattr(optimizer, "_exclude_from_weight_decay", ())
    return given, getattr(optimizer, "_exclude_from_weight_decay_pattern", None)


def learning_rate(optimizer: Any) -> Any:
    """Returns an optimizer's learning rate as it was given: a variable, a schedule or a function.

    Keras 3.15: the public `learning_rate` calls a schedule and gives its present value.
    Unnecessary with a public name for the schedule.

    Examples:
        >>> import keras
        >>> decay = keras.optimizers.schedules.CosineDecay(0.1, 100)
        >>> learning_rate(keras.optimizers.SGD(decay)) is decay
        True
    """
    return optimizer._learning_rate


def initial_epoch(model: Any) -> int:
    """Returns the epoch from which a model's `fit` goes on, as `BackupAndRestore` has found it; 0 without one.

    Keras 3.15: callbacks set it under a private name only.
    Unnecessary with a public one.

    Examples:
        >>> import keras
        >>> initial_epoch(keras.Sequential([keras.Input([1]), keras.layers.Dense(1)]))
        0
    """
    return model._initial_epoch or 0


def set_initial_epoch(model: Any, epoch: int) -> None:
    """Sets what `initial_epoch` returns, for a `fit` that has called `on_train_begin`.

    Keras 3.15: as there.
    Unnecessary with a public name.

    Examples:
        >>> import keras
        >>> model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
        >>> set_initial_epoch(model, 3)
        >>> initial_epoch(model)
        3
    """
    model._initial_epoch = epoch


def strategy_of(optimizer: Any) -> Any:
    """Returns the strategy in whose scope a Keras optimizer was made.

    Keras 3.15: it keeps the strategy under a private name only.
    Unnecessary with `Optimizer.distribute_strategy`, as `Model` has one.

    Examples:
        >>> import keras
        >>> import tensorflow as tf
        >>> strategy_of(keras.optimizers.SGD()) is tf.distribute.get_strategy()
        True
    """
    return optimizer._distribution_strategy


# ----------------------------------------------------------------------------------------------- Keras: the process


def name_counts() -> Any:
    """Returns the counts by which Keras numbers layers without a name (`dense`, `dense_1`), or None.

    Keras 3.15: `clear_session` resets them, with much else, for good.
    Unnecessary with a public scope in which names start again.

    Examples:
        >>> import collections
        >>> import keras
        >>> before = name_counts()
        >>> set_name_counts(collections.defaultdict(int))
        >>> names = [keras.layers.Dense(1).name for _ in range(2)]
        >>> name_counts()["dense"]
        2
        >>> set_name_counts(before)
    """
    return _global_state().get_global_attribute(_COUNTS)


def set_name_counts(counts: Mapping[str, int] | None) -> None:
    """Replaces the counts that `name_counts` returns.

    Keras 3.15: as for `name_counts`.

    Examples:
        >>> import keras
        >>> before = name_counts()
        >>> set_name_counts({"dense": 5})
        >>> keras.layers.Dense(1).name
        'dense_5'
        >>> set_name_counts(before)
    """
    _global_state().set_global_attribute(_COUNTS, counts)


_COUNTS = "object_name_uids"


def _global_state() -> Any:
    from keras.src.backend.common import global_state

    return global_state


# ------------------------------------------------------------------------------------------------------- KerasHub


def has_cache(task: Any) -> bool:
    """Tells whether a task of KerasHub generates with a key-value cache that `build_cache` can make.

    KerasHub 0.32: as for `build_cache`.
    """
    return hasattr(task, "_build_cache") and hasattr(task, "call_with_cache")


def cache_methods(task: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the methods of a task of KerasHub that make and use its cache, to look at their parameters.

    KerasHub 0.32: as for `build_cache`.
    """
    return task._build_cache, task.call_with_cache


def build_cache(task: Any, ids: Any) -> Any:
    """Returns the filled key-value cache of a causal model of KerasHub for ids [batch, time].

    KerasHub 0.32: `call_with_cache` is public, and what makes its argument is not.
    Unnecessary with a public method that makes an empty cache.
    """
    return task._build_cache(ids)[-1]


def hub_converter(backbone: Any) -> Any:
    """Returns KerasHub's module that reads a backbone's weights from a file of Hugging Face's; None: it has none.

    KerasHub 0.32: `from_preset` alone calls it, and says nothing of names. Unnecessary with a public table of names.

    Examples:
        >>> import keras_hub
        >>> sizes = {"vocabulary_size": 100, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
        >>> hub_converter(keras_hub.models.GPT2Backbone(**sizes)).__name__.rpartition(".")[2]
        'convert_gpt2'
    """
    from keras_hub.src.utils.transformers import preset_loader

    found = [one for one in vars(preset_loader).values() if getattr(one, "backbone_cls", None) is type(backbone)]
    return found[0] if found else None


def hugging_face_config(backbone: Any) -> dict[str, Any] | None:
    """Returns the `config.json` that KerasHub writes for a backbone; None: it writes none.

    KerasHub 0.32: `export_to_transformers` writes it with weights, of which it takes the wrong ones where layers have
    had LoRA. Unnecessary once that is fixed.

    Examples:
        >>> import keras_hub
        >>> sizes = {"vocabulary_size": 100, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
        >>> hugging_face_config(keras_hub.models.GPT2Backbone(**sizes))["n_embd"]
        8
    """
    from keras_hub.src.utils.transformers.export import hf_exporter

    make = hf_exporter.MODEL_CONFIGS.get(type(backbone).__name__)
    return make(backbone) if make else None


# ----------------------------------------------------------------------------------------------------- TensorFlow


def is_batched(dataset: Any) -> bool:
    """Tells whether the elements of a `tf.data.Dataset` are batches, by what made them.

    TensorFlow 2.21: an element's spec does not say whether its first axis counts examples, and `_inputs` alone lists
    what a data set reads from. Unnecessary with a public list of them.

    Examples:
        >>> import tensorflow as tf
        >>> batches = tf.data.Dataset.range(6).batch(2).prefetch(1)
        >>> is_batched(batches), is_batched(batches.unbatch())
        (True, False)
    """
    while True:
        name = type(dataset).__name__
        if any(word in name for word in ("Unbatch", "FlatMap", "Interleave", "Window")):
            return False
        if "Batch" in name:
            return True
        inputs = dataset._inputs()
        if not inputs:
            return False
        dataset = inputs[0]


def tensorflow_seed() -> tuple[int | None, Any]:
    """Gives TensorFlow's seed, and the generator that goes on from it, for `set_tensorflow_seed`.

    TensorFlow 2.21: `tf.random.set_seed` has no counterpart that reads it. Unnecessary with one.

    Examples:
        >>> import tensorflow as tf
        >>> before = tensorflow_seed()
        >>> tf.random.set_seed(7)
        >>> tensorflow_seed()[0]
        7
        >>> set_tensorflow_seed(before)
    """
    from tensorflow.python.eager import context

    return context.context()._seed, getattr(context.context(), "_rng", None)  # which a first seed makes


def set_tensorflow_seed(state: tuple[int | None, Any]) -> None:
    """Puts back what `tensorflow_seed` gave: random numbers go on as if nothing had been drawn since.

    TensorFlow 2.21: `tf.random.set_seed` begins again. Unnecessary with a public way to put it back.
    """
    from tensorflow.python.eager import context

    seed, generator = state
    context.context()._set_global_seed(seed)
    if generator is not None:
        context.context()._rng = generator


def skip_collective_keys(count: int) -> None:
    """Has the next `MirroredStrategy` number its collectives from `count` keys further on.

    TensorFlow 2.21: each new strategy begins at the same key. Its collectives meet those of an earlier strategy of
    another size ("Shape mismatch in the collective instance"), and then the process can make no collective any more.
    Unnecessary if strategies did not share keys.
    """
    import tensorflow as tf

    tf.distribute.MirroredStrategy._collective_key_base += count


def gather(strategy: Any, value: Any, options: Any) -> Any:
    """Gathers one tensor a replica, of the same static shape [n]: [replicas, n] on each; in a cross-replica context.

    TensorFlow 2.21: the public `all_gather` first sends each tensor's shape, in a collective of its own, and so loses
    the static shape.
    Unnecessary with an `all_gather` for equal shapes.
    """
    import tensorflow as tf
    from tensorflow.python.distribute import distribute_utils

    launchers = strategy.extended._cross_device_ops._launchers
    copies = strategy.experimental_local_results(value)
    size = strategy.num_replicas_in_sync
    found = [
        tf.ensure_shape(tf.reshape(launcher._all_gather(copy, options), [size, -1]), [size, *copy.shape])
        for launcher, copy in zip(launchers, copies, strict=True)
    ]
    return distribute_utils.regroup(tuple(found), always_wrap=True)


def all_to_all(strategy: Any, value: Any, options: Any) -> Any:
    """Sends row j of each replica's [replicas, n] to replica j, which gets [replicas, n]; in a cross-replica context.

    TensorFlow 2.21: its strategies have no such method, and the op wants the keys by which their launchers number
    collectives.
    Unnecessary with an all-to-all of a strategy.
    """
    import tensorflow as tf
    from tensorflow.python.distribute import distribute_utils
    from tensorflow.python.ops import collective_ops

    found = []
    copies = strategy.experimental_local_results(value)
    for launcher, copy in zip(strategy.extended._cross_device_ops._launchers, copies, strict=True):
        own = launcher._options.merge(options)
        with tf.device(launcher._device):
            swapped = collective_ops.all_to_all_v2(
                copy,
                launcher._group_size,
                launcher._group_key,
                launcher._next_instance_key(),
                communication_hint=own.implementation.value,
                timeout=own.timeout_seconds or 0,
                ordering_token=launcher._get_ordering_token(),
            )
        found.append(tf.ensure_shape(swapped, copy.shape))
    return distribute_utils.regroup(tuple(found), always_wrap=True)


def abort_collectives(reason: str) -> None:
    """Ends the collectives that wait, and all later ones, with an UnavailableError.

    TensorFlow 2.21: collectives wait for a lost worker for ever, or for half a minute, and nothing public ends them.
    Unnecessary with a public way to abort them.
    """
    import tensorflow as tf
    from tensorflow.python.eager import context

    context.context().abort_collective_ops(tf.errors.UNAVAILABLE, reason)


def called_graphs(op: Any, names: Sequence[str]) -> Iterator[Any]:
    """Yields the graphs of functions that an op calls by name; not those of the old kind, which hold no operations.

    TensorFlow 2.21: a graph's functions are public as a protocol buffer only, in which shapes are missing.
    Unnecessary with a public look-up of a function by its name.

    Examples:
        >>> import tensorflow as tf
        >>> inner = tf.function(lambda x: tf.sin(x))
        >>> graph = tf.function(lambda x: inner(x)).get_concrete_function(tf.constant(0.0)).graph
        >>> [call] = [op for op in graph.get_operations() if "Call" in op.type]
        >>> [found] = called_graphs(call, [call.node_def.attr["f"].func.name])
        >>> [op.type for op in found.get_operations()]
        ['Placeholder', 'Sin', 'Identity']
    """
    for name in names:
        function = op.graph._get_function(name)
        graph = getattr(function, "graph", function)
        if hasattr(graph, "get_operations"):
            yield graph
