"""Resolves a table of rules against a built model. It is pure: it reads names and shapes, and changes nothing."""

import collections
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

from dist_partial.errors import UserError
from dist_partial.selection.paths import frozen_by_code, variable_paths
from dist_partial.selection.plan import Adapter, Plan, VariablePlan
from dist_partial.selection.rules import REDUCTION, Rule, first_match, matches, parse_rules
from dist_partial.validation import check_value, counted, nearest


def resolve(
    table: Sequence[Any],
    model: Any,
    reduction: Any,
    adapters: Mapping[str, Adapter] = MappingProxyType({}),
    between_hosts: Any = None,
) -> Plan:
    """Resolves the rules against a built Keras model.

    Args:
        table: the rules, short or full form.
        model: a built model; its trainable variables are the candidates.
        reduction: the reduction of the rules that name none.
        between_hosts: likewise, between the workers; None: `reduction` crosses all replicas.
        adapters: from `lora.enable`; the factors go by the path of their kernel, which is frozen.

    Returns:
        The plan.

    Raises:
        UserError: a rule that matches nothing, a variable that no rule covers, an empty selection, two
            variables with one path, a pattern that is not a regular expression, rows beyond a variable.

    Examples:
        >>> import keras
        >>> from dist_partial.reductions import AllReduce
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(2, name="head")])
        >>> resolve([("train", "hed/.*l"), ("freeze", ".*")], model, AllReduce())
        Traceback (most recent call last):
        dist_partial.errors.UserError: rule 1 ('hed/.*l') matches no variable; nearest: 'head/kernel', 'head/bias'
    """
    rules = parse_rules(table)
    check_value("all rules that name none: reduction", reduction, Annotated[Any, REDUCTION])
    check_value("all rules that name none: between_hosts", between_hosts, Annotated[Any | None, REDUCTION])
    paths = _candidates(model)
    kernels = {id(factor): path for path, adapter in adapters.items() for factor in adapter.factors}
    entries, used, frozen = [], set(), set()
    for own_path, variable in zip(paths, model.trainable_variables, strict=True):
        path = kernels.get(id(variable), own_path)
        number = first_match(rules, path)
        if number is None:
            near = nearest(path, [rule.match for rule in rules], always=True)
            raise UserError(f"no rule covers {path!r}: end the table with ('freeze', r'.*') or name it{near}")
        used.add(number)
        rule, shape = rules[number], tuple(variable.shape)
        _check_applies(f"rule {number + 1} ({rule.match!r})", rule, path, shape, path in adapters)
        if path in adapters and path not in frozen:
            frozen.add(path)
            kernel = adapters[path].kernel
            entries.append(VariablePlan(path, tuple(kernel.shape), kernel.dtype, kernel, Rule(rule.match, train=False)))
        levels = _levels(f"rule {number + 1} ({rule.match!r})", rule, reduction, between_hosts)
        entries.append(VariablePlan(own_path, shape, variable.dtype, variable, rule, *levels))
    for number in range(len(rules)):
        if number not in used and not _closes(number, rules, paths):
            _check_unused(number, rules, paths, model)
    plan = Plan(rules, tuple(entries))
    if not plan.trained:
        raise UserError(f"the rules train nothing: {counted(len(paths), 'variable')} frozen; add ('train', pattern)")
    return plan


def _candidates(model: Any) -> list[str]:
    """The paths of the trainable variables, in their order."""
    paths = variable_paths(model)
    if not paths:
        why = "; its own code has set trainable = False, which is for the rules to do" if model.weights else ""
        raise UserError(f"model {model.name!r} has no trainable variables: nothing can be selected{why}")
    for path, count in collections.Counter(paths).items():
        if count > 1:
            raise UserError(f"{count} variables have the path {path!r}: name the layers apart")
    return paths


def _levels(where: str, rule: Rule, reduction: Any, between_hosts: Any) -> tuple[Any, Any]:
    """The reduction over all replicas or between the workers, and in the latter case that inside a worker."""
    if not rule.train:
        return None, None
    inside, between = rule.reduction or reduction, rule.between_hosts or between_hosts
    if between is None:
        return inside, None
    if not inside.shared:
        raise UserError(
            f"{where}: reduction is {type(inside).__name__} ({inside}), and where between_hosts is given it sums the "
            "replicas of a worker, in every step: give AllReduce() or the like, in a gin file @all_reduce()"
        )
    return between, inside


def _check_applies(where: str, rule: Rule, path: str, shape: tuple[int, ...], adapted: bool) -> None:
    """Raises UserError if a rule asks for rows or LoRA that the variable which it covers does not have."""
    if rule.rows is not None and (not shape or rule.rows[1] > shape[0]):
        raise UserError(f"{where}: rows {rule.rows} lie beyond {path!r} of shape {shape}")
    if rule.lora is not None and not adapted:
        raise UserError(
            f"{where} asks for LoRA of {path!r}, and nothing has enabled it: call enable_lora({rule.lora}) of the "
            "layer and match r'.*/lora_.*', or train with dist_partial.train"
        )


def _closes(number: int, rules: Sequence[Rule], paths: Sequence[str]) -> bool:
    """Whether a rule ends the table as ('freeze', r'.*') does: that nothing may be left for it is no mistake."""
    return number == len(rules) - 1 and not rules[number].train and all(matches(rules[number].match, p) for p in paths)


def _check_unused(number: int, rules: Sequence[Rule], paths: Sequence[str], model: Any) -> None:
    """Raises UserError of a rule that covers none of the paths, unless it freezes what is frozen already."""
    rule = rules[number]
    taken = [path for path in paths if matches(rule.match, path)]
    frozen = [path for path in frozen_by_code(model) if matches(rule.match, path)]
    if taken:
        first = next(n for n, r in enumerate(rules) if matches(r.match, taken[0]))
        raise UserError(
            f"rule {number + 1} ({rule.match!r}) never applies: rule {first + 1} ({rules[first].match!r}) is "
            f"before it and takes {taken[0]!r}; the first match wins, so move it up"
        )
    if not frozen:
        near = nearest(rule.match, paths, always=True)
        raise UserError(f"rule {number + 1} ({rule.match!r}) matches no variable{near}")
    if rule.train:
        layer = frozen[0].rpartition("/")[0]
        factors = [path for path in paths if path.startswith(f"{layer}/lora_")]
        what = "trainable = False: take that out of the code and let the rules decide, or take out the rule"
        if factors:
            what = f"enable_lora: match its factors, such as {factors[0]!r}, or take that out of the code"
        where = f"rule {number + 1} ({rule.match!r})"
        raise UserError(f"{where} would train {frozen[0]!r}, which the model's own code has frozen by {what}")
