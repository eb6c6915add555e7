"""What an optimizer from `partial` is made of, as JSON values: its plan, with an optimizer a group, and its options."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import keras

from dist_partial.errors import UserError
from dist_partial.reductions import AllReduce, PowerSGD, Quantized, TopK
from dist_partial.selection.plan import Plan, VariablePlan
from dist_partial.selection.rules import Rule

REDUCTIONS = {each.__name__: each for each in (AllReduce, Quantized, TopK, PowerSGD)}


@dataclasses.dataclass(frozen=True)
class Options:
    """Describes how an optimizer from `partial` trains its plan, as JSON values.

    Attributes:
        inference: paths of the variables of BatchNorm layers in inference mode.
        accumulate: steps of `fit` in one update.
        norms: whether the squared gradient norms of the units are added up for a schedule.
        alike: numbers of the optimizers whose learning rate is set with the first one's.
        base: digests, by path, of what training may change, as it was before.

    Examples:
        >>> Options(accumulate=2).inference
        ()
    """

    inference: Sequence[str] = ()
    accumulate: int = 1
    norms: bool = False
    alike: Sequence[int] = (0,)
    base: dict[str, str] = dataclasses.field(default_factory=dict)


def with_optimizers(plan: Plan, made: Sequence[keras.optimizers.Optimizer]) -> Plan:
    """Makes the same plan with a rule of its own for each group, which hands out the optimizer made for it.

    Examples:
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="head")])
        >>> sgd = keras.optimizers.SGD()
        >>> plan = with_optimizers(resolve([("train", ".*")], model, AllReduce()), [sgd])
        >>> plan.rules[0].optimizer() is sgd
        True
    """
    owned = [
        (group, dataclasses.replace(group.rule, optimizer=lambda o=optimizer: o, learning_rate=None))
        for group, optimizer in zip(plan.groups, made, strict=True)
    ]
    of_path = {entry.path: rule for group, rule in owned for entry in group.entries}
    rules = [own for rule in plan.rules for own in ([own for g, own in owned if g.rule is rule] or [rule])]
    entries = [dataclasses.replace(entry, rule=of_path.get(entry.path, entry.rule)) for entry in plan.entries]
    return dataclasses.replace(plan, rules=tuple(rules), entries=tuple(entries))


def to_json(plan: Plan, optimizers: Sequence[keras.optimizers.Optimizer]) -> dict[str, Any]:
    """Writes a plan from `with_optimizers` without its variables, as JSON values.

    Examples:
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="head")])
        >>> plan = resolve([("train", ".*/bias"), ("freeze", ".*")], model, AllReduce("bfloat16"))
        >>> optimizers = [keras.optimizers.SGD()]
        >>> content = to_json(with_optimizers(plan, optimizers), optimizers)
        >>> content["entries"]
        [['head/kernel', [2, 1], 'float32', 1, ''], ['head/bias', [1], 'float32', 0, '']]
        >>> [(entry.path, str(entry.reduction)) for entry in from_json(content, optimizers).trained]
        [('head/bias', 'all-reduce in bfloat16')]
    """
    numbers = {id(rule): number for number, rule in enumerate(plan.rules)}
    rules: list[dict[str, Any]] = [{"match": rule.match, "train": rule.train} for rule in plan.rules]
    for group in plan.groups:
        owner = group.rule.optimizer()  # type: ignore[misc]
        rules[numbers[id(group.rule)]] |= {
            "rows": group.rule.rows and list(group.rule.rows),
            "optimizer": next(i for i, each in enumerate(optimizers) if each is owner),
            "reduction": _reduction_to_json(group.reduction),
            "inside": group.inside and _reduction_to_json(group.inside),
        }
    entries = [[e.path, list(e.shape), e.dtype, numbers[id(e.rule)], e.unit] for e in plan.entries]
    return {"rules": rules, "entries": entries, "workers": plan.workers, "local": plan.local}


def from_json(content: dict[str, Any], optimizers: Sequence[keras.optimizers.Optimizer]) -> Plan:
    """Reads a plan, whose variables `bound` finds."""
    rules: list[Rule] = []
    reductions: list[tuple[Any, Any]] = []
    for each in content["rules"]:
        if not each["train"]:
            rules.append(Rule(each["match"], train=False))
            reductions.append((None, None))
            continue
        optimizer = optimizers[each["optimizer"]]
        rows = tuple(each["rows"]) if each["rows"] else None
        rules.append(Rule(each["match"], optimizer=lambda o=optimizer: o, rows=rows))
        reductions.append((_reduction_from_json(each["reduction"]), _reduction_from_json(each.get("inside"))))
    entries = [
        VariablePlan(path, tuple(shape), dtype, None, rules[number], between, inside, unit=unit)
        for path, shape, dtype, number, unit in content["entries"]
        for between, inside in [reductions[number]]
    ]
    return Plan(tuple(rules), tuple(entries), workers=content["workers"], local=content.get("local", 1))


def _reduction_to_json(reduction: Any) -> dict[str, Any]:
    return {"class": type(reduction).__name__, **dataclasses.asdict(reduction)}


def _reduction_from_json(content: dict[str, Any] | None) -> Any:
    if content is None:
        return None
    fields = dict(content)
    return REDUCTIONS[fields.pop("class")](**fields)


def bound(plan: Plan, variables: Sequence[Any]) -> Plan:
    """Makes the same plan with the variables that it names, which without the model are known by Keras's paths alone.

    Args:
        plan: from `from_json`.
        variables: the model's that may be trained; what the plan freezes may be missing.

    Raises:
        UserError: what the plan trains is missing.

    Examples:
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1, name="head")])
        >>> optimizers = [keras.optimizers.SGD()]
        >>> plan = with_optimizers(resolve([("train", ".*")], model, AllReduce()), optimizers)
        >>> plan = bound(from_json(to_json(plan, optimizers), optimizers), model.trainable_variables)
        >>> plan.entries[0].variable is model.layers[0].kernel
        True
    """
    wanted = [entry.path for entry in plan.trained]
    # With the model's name in front or not, as Keras does it for the kind of model.
    by_path = {variable.path: variable for variable in variables}
    if not by_path.keys() >= set(wanted):
        by_path = {path.split("/", 1)[-1]: variable for path, variable in by_path.items()}
    for path in wanted:
        if path not in by_path:
            raise UserError(
                f"the optimizer trains {path!r}, which the model does not have or has frozen, or in which Keras calls "
                "several variables the same: load it with compile=False, then call partial and model.compile again"
            )
    entries = [dataclasses.replace(entry, variable=by_path.get(entry.path)) for entry in plan.entries]
    return dataclasses.replace(plan, entries=tuple(entries))
