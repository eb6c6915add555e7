"""Selects variables by a table of rules: pure, without TensorFlow."""

from dist_partial.selection.paths import own_names, paths_of, variable_paths
from dist_partial.selection.payload import Payload, Peers, average_bytes, itemsize, nic_bytes
from dist_partial.selection.plan import Adapter, Group, Plan, VariablePlan
from dist_partial.selection.resolve import resolve
from dist_partial.selection.rules import Rule, first_match, matches, parse_rules

__all__ = [
    "Adapter",
    "Group",
    "Payload",
    "Peers",
    "Plan",
    "Rule",
    "VariablePlan",
    "average_bytes",
    "first_match",
    "itemsize",
    "matches",
    "nic_bytes",
    "own_names",
    "parse_rules",
    "paths_of",
    "resolve",
    "variable_paths",
]
