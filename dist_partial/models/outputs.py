"""Compares the outputs of a model with what is given for each of them, by name and number."""

from collections.abc import Mapping, Sequence
from typing import Any

from dist_partial.errors import UserError
from dist_partial.models.inputs import listed
from dist_partial.validation import nearest


def check_outputs(model: Any, outputs: Any, settings: Mapping[str, Any], examples: Mapping[str, Any]) -> None:
    """Raises UserError if what is given by output does not name, or count, the outputs of a model.

    Keras 3.15 ends with a word on structures then, or a KeyError. It takes much that is no dict of just these names, so
    this is asked after it has failed.

    Args:
        model: which knows the names of its outputs if it is no subclass.
        outputs: the model's, a nest; with dicts and lists in others nothing is compared.
        settings: such as loss and metrics, which may leave outputs out; by their bindings.
        examples: such as targets, which have all outputs with a loss; by what a message calls them.

    Examples:
        >>> check_outputs(None, {"buy": 1, "kind": 2}, {"run.loss": "mse"}, {"d's targets": {"buy": 0, "knd": 0}})
        Traceback (most recent call last):
        dist_partial.errors.UserError: run.model has the outputs 'buy', 'kind', and d's targets have no 'kind'; \
nearest: 'knd'; give each under the name of its output
    """
    if not isinstance(outputs, (dict, list, tuple)):
        for what, value in examples.items():
            if isinstance(value, dict):
                raise UserError(f"run.model has one output, and {what} have {listed(list(value))}: give one array")
    names = _names(model, outputs)
    if names is None:
        return
    has = f"run.model has the {'outputs' if len(names) > 1 else 'output'} {listed(names)}, and"
    form = "{" + ", ".join(f"{each!r}: ..." for each in names) + "}"
    for what, value in settings.items():
        if isinstance(value, dict):
            _check_keys(f"{has} {what} has", value, names, [])
        elif "metrics" in what and value and len(names) > 1 and len(value) != len(names):
            raise UserError(f"{has} {what} is one list: say which are of which output, by {form}")
    loss = settings.get("run.loss")
    if isinstance(loss, dict) and not isinstance(outputs, dict) and len(loss) < len(names):
        missing = [each for each in names if each not in loss]
        raise UserError(f"{has} run.loss has no {listed(missing)}: give each output one, or None")
    weights = settings.get("run.loss_weights")
    if isinstance(weights, dict) and (missing := [each for each in loss or names if each not in weights]):
        raise UserError(f"{has} run.loss_weights has no {listed(missing)}: give each loss a weight, such as 1.0")
    lossless = [key for key, each in loss.items() if each is None] if isinstance(loss, dict) else []
    needed = [each for each in (loss if isinstance(loss, dict) else names) if each not in lossless]
    for what, value in examples.items():
        if isinstance(value, dict):
            _check_keys(f"{has} {what} have", value, names, needed)
        elif len(names) > 1:
            count = len(value) if isinstance(value, (list, tuple)) else 1
            if count != len(names) and not (count == 1 and "weights" in what):  # which weigh all outputs
                raise UserError(f"{has} {what} have {count} without a name: give them as {form}")


def _check_keys(has: str, given: Mapping[str, Any], names: Sequence[str], needed: Sequence[str]) -> None:
    others = [each for each in given if each not in names]
    if missing := [each for each in needed if each not in given]:
        near = nearest(missing[0], others)
        also = f", but {listed(others)}" if others and not near else ""
        raise UserError(f"{has} no {listed(missing)}{near or also}; give each under the name of its output")
    if others:
        raise UserError(f"{has} {listed(others)}, which is none{nearest(others[0], names)}; leave it out, or rename it")


def _names(model: Any, outputs: Any) -> list[str] | None:
    """The names of a flat nest of outputs; None where they are not known."""
    flat = list(outputs.values()) if isinstance(outputs, dict) else outputs
    flat = list(flat) if isinstance(flat, (list, tuple)) else [flat]
    if any(isinstance(each, (dict, list, tuple)) for each in flat):
        return None
    names = list(outputs) if isinstance(outputs, dict) else list(getattr(model, "output_names", None) or ())
    return names if len(names) == len(flat) else None
