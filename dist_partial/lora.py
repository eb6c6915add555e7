"""LoRA (Hu et al. 2021) where a rule asks for it: kernels stay frozen, and two small factors of a sum are trained."""

from collections.abc import Sequence
from typing import Any

import keras

from dist_partial import kernels, selection
from dist_partial.errors import UserError


def enable(table: Sequence[Any], model: keras.Model) -> dict[str, selection.Adapter]:
    """Gives every kernel that a rule with `lora` covers its factors, in the strategy's scope.

    `keras.Layer.enable_lora` is called for the layers of these kernels alone: a backbone's own `enable_lora` leaves
    biases trainable beside the factors, and here the rules decide on them.

    Args:
        table: the rules, short or full form.
        model: built.

    Returns:
        What was adapted, by the kernel's path, for `selection.resolve`.

    Raises:
        UserError: a rule with `lora` covers a variable that is no kernel of a Dense, EinsumDense or Embedding layer,
            or one that cannot have it.
    """
    rules = selection.parse_rules(table)
    if all(rule.lora is None for rule in rules):
        return {}
    owners = {id(kernels.raw(layer)): layer for layer in kernels.layers(model)}
    wanted = []
    # All are looked at before the first is changed.
    for path, variable in zip(selection.variable_paths(model), list(model.trainable_variables), strict=True):
        number = selection.first_match(rules, path)
        if number is None or rules[number].lora is None:
            continue
        if id(variable) not in owners:
            raise UserError(
                f"rule {number + 1} ({rules[number].match!r}) asks for LoRA of {path!r}, which is no kernel of a "
                "Dense, EinsumDense or Embedding layer: match kernels only, as in r'.*/(query|value)/kernel'"
            )
        wanted.append((number, path, variable, owners[id(variable)]))
    adapters = {}
    for number, path, variable, layer in wanted:
        before = {id(v) for v in layer.variables}
        try:
            layer.enable_lora(rules[number].lora)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"rule {number + 1} ({rules[number].match!r}): no LoRA for {path!r}: {error}") from error
        adapters[path] = selection.Adapter(variable, tuple(v for v in layer.variables if id(v) not in before))
    return adapters


def merge(model: keras.Model) -> None:
    """Adds the factors of all layers to their kernels, and turns LoRA off: what is saved then is as before `enable`.

    A layer that is stored in fewer bits stays as it is.
    """
    for layer in kernels.layers(model):
        if layer.lora_enabled and not layer.quantization_mode:
            kernel = kernels.raw(layer)
            kernel.assign(kernels.merged(layer))
            layer.lora_enabled, layer.lora_rank, kernel.trainable = False, None, True
