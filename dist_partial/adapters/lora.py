"""LoRA (Hu et al. 2021) where a rule asks for it: kernels are frozen, and two small factors of a sum are trained."""

from collections.abc import Sequence
from typing import Any

import keras

from dist_partial import selection
from dist_partial.adapters import layers, quantization
from dist_partial.errors import UserError


def enable(table: Sequence[Any], model: keras.Model, seed: int = 0) -> dict[str, selection.Adapter]:
    """Gives every kernel that a rule with `lora` covers its factors, in the strategy's scope.

    `keras.Layer.enable_lora` is called for the layers of these kernels alone: a backbone's own `enable_lora` leaves
    biases trainable beside the factors, and here the rules decide on them.

    A layer that the model's own code has given factors of the same rank keeps them. Factors are float32, as Keras makes
    them, or as wide as the kernel if that is float64.

    Args:
        table: the rules, short or full form.
        model: built.
        seed: of the run, from which the factors' first values follow, whatever was drawn before; sets Keras's seed.

    Returns:
        What was adapted, by the kernel's path, for `selection.resolve`.

    Raises:
        UserError: a rule with `lora` covers a variable that is no kernel of a Dense, EinsumDense or Embedding layer,
            one that cannot have it, or one that has factors of another rank.

    Examples:
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4, name="head")])
        >>> list(enable([selection.Rule(".*/kernel", lora=2), ("freeze", ".*")], model))
        ['head/kernel']
        >>> selection.variable_paths(model)
        ['head/bias', 'head/lora_kernel_a', 'head/lora_kernel_b']
    """
    rules = selection.parse_rules(table)
    if all(rule.lora is None for rule in rules):
        return {}
    keras.utils.set_random_seed((seed + 1) % 2**32)
    adapters = {}
    for path, (number, layer) in _covered(rules, model).items():
        rule = rules[number]
        try:
            if not layer.lora_enabled:
                layer.enable_lora(rule.lora)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"rule {number + 1} ({rule.match!r}): no LoRA for {path!r}: {error}") from error
        kernel, factors = layers.raw(layer), layers.factors(layer)
        for factor in factors if kernel.dtype == "float64" else ():
            quantization.store(factor, kernel.dtype)  # Keras 3.15 makes them float32 beside any kernel
        adapters[path] = selection.Adapter(kernel, factors)
    return adapters


def _covered(rules: Sequence[selection.Rule], model: keras.Model) -> dict[str, tuple[int, Any]]:
    """By the kernel's path, the number of the rule with `lora` that covers it, and its layer; changes nothing yet."""
    owners = {id(layers.raw(layer)): layer for layer in layers.layers(model)}
    given = {id(v): layer for layer in owners.values() if layer.lora_enabled for v in layers.factors(layer)}
    trainable, kernels = model.trainable_variables, [layers.raw(layer) for layer in owners.values()]
    paths = selection.paths_of(model, [*trainable, *kernels])[len(trainable) :] if given else []
    kernel_paths = {id(kernel): path for kernel, path in zip(kernels, paths, strict=False)}
    covered = {}
    for own_path, variable in zip(selection.variable_paths(model), trainable, strict=True):
        path, layer = own_path, owners.get(id(variable))
        if id(variable) in given:  # the kernel's path, unless a rule of their own trains the factors
            number = selection.first_match(rules, own_path)
            if number is None or not rules[number].train or rules[number].lora:
                layer = given[id(variable)]
                path = kernel_paths[id(layers.raw(layer))]
        number = selection.first_match(rules, path)
        if number is None or not (rank := rules[number].lora):
            continue
        where = f"rule {number + 1} ({rules[number].match!r}) asks for LoRA of"
        if layer is None:
            raise UserError(
                f"{where} {path!r}, which is no kernel of a Dense, EinsumDense or Embedding layer: match kernels only, "
                "as in r'.*/(query|value)/kernel'"
            )
        if layer.lora_enabled and layer.lora_rank != rank:
            raise UserError(
                f"{where} rank {rank} of {path!r}, and the model's own code has given it rank {layer.lora_rank} by "
                f"enable_lora: write lora = {layer.lora_rank}, or take that out of the code"
            )
        covered[path] = number, layer
    return covered


def merge(model: keras.Model) -> None:
    """Adds the factors of all layers to their kernels and turns LoRA off, so that what is saved is as before `enable`.

    A layer that is stored in fewer bits stays as it is.

    Examples:
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="head")])
        >>> adapter = enable([selection.Rule(".*/kernel", lora=1), ("freeze", ".*")], model)["head/kernel"]
        >>> for variable in (adapter.kernel, *adapter.factors):
        ...     _ = variable.assign(keras.ops.ones(variable.shape))
        >>> merge(model)
        >>> adapter.kernel.numpy().tolist(), model.layers[0].lora_enabled
        ([[2.0], [2.0]], False)
    """
    for layer in layers.layers(model):
        if layer.lora_enabled and not layer.quantization_mode:
            kernel = layers.raw(layer)
            kernel.assign(layers.merged(layer))
            layer.lora_enabled, layer.lora_rank, kernel.trainable = False, None, True
