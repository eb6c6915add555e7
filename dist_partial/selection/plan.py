"""The rules resolved against one model: what is trained, in which groups, and what it sends."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from fractions import Fraction
from typing import Any

from dist_partial.errors import UserError
from dist_partial.selection.payload import Peers, average_bytes, exact_number, itemsize, nic_bytes
from dist_partial.selection.rules import Rule


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """Holds a kernel that is frozen, and the LoRA factors that are trained in its place.

    Examples:
        >>> import keras
        >>> from dist_partial.adapters import lora
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4, name="head")])
        >>> adapter = lora.enable([Rule("head/kernel", lora=2)], model)["head/kernel"]
        >>> [tuple(factor.shape) for factor in adapter.factors], adapter.kernel.trainable
        ([(8, 2), (2, 4)], False)
    """

    kernel: Any
    factors: tuple[Any, ...]

    def __repr__(self) -> str:  # not the values of variables, here and below
        return f"<Adapter of {self.kernel.path}>"


@dataclasses.dataclass(frozen=True, eq=False)
class VariablePlan:
    """Plans one variable of the model under the rule that covers it.

    Examples:
        >>> from dist_partial.reductions import AllReduce
        >>> kernel = VariablePlan("head/kernel", (8, 2), "float32", None, Rule("head/.*"), AllReduce("bfloat16"))
        >>> kernel.trained_parameters, kernel.payloads(Peers())[0].bytes, kernel.full_bytes
        (16, 32, 64)
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    variable: Any
    rule: Rule
    reduction: Any = None  # over all replicas, or between the workers
    inside: Any = None  # the reduction over a worker's own replicas, where another one follows between the workers
    sent: bool = True  # False once tracing has shown that the loss does not depend on the variable
    unit: str = ""  # what a schedule switches as one
    active: bool = True  # False while the schedule leaves its unit out
    ids: int | None = None  # rows of an embedding that a replica looks up in a step, as tracing has shown

    def __repr__(self) -> str:
        return f"<VariablePlan {self.path} {list(self.shape)}: {self.rule}>"

    @property
    def trained(self) -> bool:
        return self.rule.train and self.active

    @property
    def dealt(self) -> bool:
        """Whether one replica, or worker, trains it for all: see `Plan.owners`."""
        return getattr(self.reduction, "divided", False)

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """Shape of what is trained: the selected rows, or the whole variable."""
        if self.rule.rows is None:
            return self.shape
        start, stop = self.rule.rows
        return (stop - start, *self.shape[1:])

    @property
    def trained_parameters(self) -> int:
        return math.prod(self.trained_shape) if self.trained else 0

    def travels(self, peers: Peers) -> str:
        """How the gradient travels, in words."""
        if self.inside:
            return f"{self.inside}; between hosts {self.reduction}"
        return f"{self.reduction} of {self.ids} rows" if self._lookups(peers) else str(self.reduction)

    def payloads(self, peers: Peers) -> tuple[Any, ...]:
        """What one replica hands over to its peers for this variable: (kind, bytes, every so many steps)."""
        if not (self.trained and self.sent):
            return ()
        return self._lookups(peers) or self.reduction.payloads(self.trained_shape, self.dtype, peers)

    def _lookups(self, peers: Peers) -> tuple[Any, ...] | None:
        return self.reduction.lookup_payloads(self.ids, self.shape, self.dtype, peers) if self.ids else None

    @property
    def full_bytes(self) -> int:
        """Bytes of the whole gradient in the variable's own dtype."""
        return self.parameters * itemsize(self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Groups the variables of one unit that one trained rule covers: they share an optimizer and a reduction.

    Examples:
        >>> import keras
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(2, name="head")])
        >>> plan = resolve([Rule(".*/bias", reduction=AllReduce("bfloat16")), Rule(".*")], model, AllReduce())
        >>> [([entry.path for entry in group.entries], str(group.reduction)) for group in plan.groups]
        [(['head/bias'], 'all-reduce in bfloat16'), (['head/kernel'], 'all-reduce')]
    """

    rule: Rule
    entries: tuple[VariablePlan, ...]

    def __repr__(self) -> str:
        return f"<Group of {len(self.entries)} variables: {self.rule}>"

    @property
    def reduction(self) -> Any:
        return self.entries[0].reduction

    @property
    def inside(self) -> Any:
        return self.entries[0].inside


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Holds the rules resolved against one model; entries are in the model's order.

    Examples:
        >>> import keras
        >>> from dist_partial.reductions import AllReduce
        >>> from dist_partial.selection import resolve
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(2, name="head")])
        >>> plan = resolve([("train", ".*/kernel"), ("freeze", ".*")], model, AllReduce())
        >>> [entry.path for entry in plan.trained], plan.wire_bytes, plan.full_wire_bytes
        (['head/kernel'], 64, 72)
        >>> plan
        <Plan: trains 16 of 18 parameters>
        >>> print(plan)
        path         shape  trained  rule             reduction   bytes a step
        -----------  -----  -------  ---------------  ----------  ------------
        head/kernel  8x2    yes      train .*/kernel  all-reduce            64
        head/bias    2      no       freeze .*        -                      0
        trained: 16 of 18 parameters (88.89%)
        ...
    """

    rules: tuple[Rule, ...]
    entries: tuple[VariablePlan, ...]
    statistics: tuple[Any, ...] = ()  # what BatchNorm layers in training mode send; all of it once the step is traced
    workers: int = 2  # among which bytes at the network interface are counted
    local: int = 1  # replicas of each worker
    all_to_all: bool = True  # whether they can send each other one something of its own
    hosts: int | None = None  # how many workers there are, and devices of each; None where that is not known
    devices: int = 1

    def __repr__(self) -> str:
        trained = sum(entry.trained_parameters for entry in self.entries)
        return f"<Plan: trains {trained:,} of {sum(entry.parameters for entry in self.entries):,} parameters>"

    def __str__(self) -> str:
        from dist_partial.selection.table import plan_summary  # which imports this module

        return plan_summary(self, hosts=1)

    def _repr_html_(self) -> str:
        from dist_partial.selection.notebook import as_html

        return as_html(str(self))

    @property
    def groups(self) -> tuple[Group, ...]:
        """The trained rules, in the table's order, each by the units of the schedule, in the model's."""
        order = {id(rule): number for number, rule in enumerate(self.rules)}
        members: dict[tuple[int, str], list[VariablePlan]] = {}
        for entry in self.entries:
            if entry.trained:
                members.setdefault((order[id(entry.rule)], entry.unit), []).append(entry)
        by_rule = sorted(members.items(), key=lambda item: item[0][0])
        return tuple(Group(self.rules[number], tuple(entries)) for (number, _), entries in by_rule)

    @property
    def trained(self) -> tuple[VariablePlan, ...]:
        """The trained entries, group by group: the order in which gradients travel through a step."""
        return tuple(entry for group in self.groups for entry in group.entries)

    @property
    def units(self) -> tuple[str, ...]:
        """Names of the units of which something is trained, in the model's order."""
        return tuple(dict.fromkeys(entry.unit for entry in self.entries if entry.trained))

    @property
    def frozen(self) -> tuple[VariablePlan, ...]:
        return tuple(entry for entry in self.entries if not entry.trained)

    @property
    def payloads(self) -> tuple[Any, ...]:
        """All that one worker hands over."""
        return tuple(payload for entry in self.entries for payload in self.handed_over(entry)) + self.statistics

    def peers(self, entry: VariablePlan) -> Peers:
        """Who exchange the gradient of a variable: all replicas, or the workers, where those of each are summed."""
        # One process counts as so many workers as it has devices.
        local = 1 if entry.inside or self.hosts == 1 else self.devices if self.hosts else self.local
        return Peers(self.workers * local, local, self.all_to_all)

    def members(self, entry: VariablePlan, inside: bool = False) -> Peers:
        """Who there are at a level, for whom a reduction makes its state: see `Collectives.peers`."""
        if inside:
            return Peers(self.devices, all_to_all=False)
        return Peers(1, all_to_all=self.all_to_all) if entry.inside and self.hosts == 1 else self.peers(entry)

    def owners(self, replicas: int) -> dict[str, int]:
        """Says which of so many replicas, or workers, trains each variable that is dealt out, by its path.

        Consecutive ones, in the model's order, make a share; the largest share is as small as it can be.

        Raises:
            UserError: there are more of them than variables.

        Examples:
            >>> from dist_partial.reductions import BlockParallel
            >>> entries = [VariablePlan(f"{i}/kernel", (n,), "float32", None, Rule(".*"), BlockParallel(10))
            ...            for i, n in enumerate([4, 1, 1, 3])]
            >>> Plan((Rule(".*"),), tuple(entries)).owners(2)
            {'0/kernel': 0, '1/kernel': 0, '2/kernel': 1, '3/kernel': 1}
        """
        dealt = [entry for entry in self.entries if entry.trained and entry.dealt]
        if dealt and len(dealt) < replicas:
            raise UserError(
                f"{type(dealt[0].reduction).__name__} deals {len(dealt)} variables out to {replicas} replicas, of "
                "which some would train nothing: train more variables, or use fewer replicas"
            )
        shares = even_shares([math.prod(entry.trained_shape) for entry in dealt], replicas)
        return {entry.path: share for entry, share in zip(dealt, shares, strict=True)}

    def elsewhere(self, replicas: int, rank: int, inside: bool) -> set[str]:
        """Paths of what is dealt out, after a reduction inside each worker or not, and another one than `rank` owns."""
        owners = self.owners(replicas)
        return {
            entry.path
            for entry in self.trained
            if entry.dealt and (entry.inside is not None) == inside and owners[entry.path] != rank
        }

    def handed_over(self, entry: VariablePlan) -> tuple[Any, ...]:
        """What one worker hands over for a variable: of a sum its own total, else what each of its replicas gives."""
        several = 1 if entry.inside else self.local
        found = tuple(payload.of_worker(several) for payload in entry.payloads(self.peers(entry)))
        if not entry.dealt:
            return found
        return tuple(payload._replace(bytes=payload.bytes * self._padding[entry.path]) for payload in found)

    @functools.cached_property
    def _padding(self) -> dict[str, Fraction]:
        """By path of what is dealt out: how much more travels than its bytes, since all send as many as the largest."""
        found: dict[str, Fraction] = {}
        for group in self.groups:
            if not group.entries[0].dealt:
                continue
            peers = self.peers(group.entries[0])
            owners, shares = self.owners(peers.replicas), [Fraction(0)] * peers.replicas
            for entry in group.entries:
                shares[owners[entry.path]] += sum(payload.bytes for payload in entry.payloads(peers))
            more = max(shares) * peers.replicas / sum(shares) if sum(shares) else Fraction(1)
            found |= {entry.path: more for entry in group.entries}
        return found

    def bytes_of(self, entry: VariablePlan, at_interface: bool = False) -> int | float:
        """Counts the bytes that one worker hands over, or sends, for a variable in a step, on average."""
        return average_bytes(self.handed_over(entry), self.workers if at_interface else None)

    @property
    def wire_bytes(self) -> int | float:
        """Bytes that one worker hands over in a step, on average."""
        return average_bytes(self.payloads)

    @property
    def full_wire_bytes(self) -> int | float:
        """Bytes a step if everything were trained and sent in its own dtype, with the statistics."""
        return exact_number(sum(entry.full_bytes for entry in self.entries) + Fraction(average_bytes(self.statistics)))

    @property
    def nic_bytes(self) -> int | float:
        """Bytes that leave the network interface of each of the workers in a step, on average."""
        return average_bytes(self.payloads, self.workers)

    @property
    def full_nic_bytes(self) -> int | float:
        """The same if everything were trained and summed in its own dtype."""
        return exact_number(nic_bytes("sum", Fraction(self.full_wire_bytes), self.workers))

    def among(self, collectives: Any) -> "Plan":
        """The same plan for the replicas that there are, or, of one process, for replicas on hosts of their own.

        Called in the scope of their strategy.

        Args:
            collectives: how they reach each other, from `distributed.collectives`.
        """
        topology, backend = collectives.topology, collectives.backend
        return self.on(topology.workers, topology.local, backend.two_levels, backend.has_all_to_all)

    def on(self, hosts: int, devices: int = 1, two_levels: bool = True, all_to_all: bool = True) -> "Plan":
        """The same plan for so many workers with so many replicas each; of one worker, its replicas count as workers.

        Args:
            hosts: how many workers.
            devices: replicas of each.
            two_levels: whether a worker's own replicas are summed before anything is sent.
            all_to_all: whether each can send every other something of its own.
        """
        return dataclasses.replace(
            self,
            workers=max(2, hosts if hosts > 1 else devices),
            local=devices if two_levels and hosts > 1 else 1,
            all_to_all=all_to_all,
            hosts=hosts,
            devices=devices,
        )

    def divided(self, units: Sequence[tuple[str, Sequence[str]]]) -> "Plan":
        """The same plan in units, each a name and paths, that `only` can switch."""
        names = {path: name for name, paths in units for path in paths}
        return self._replaced(lambda entry: {"unit": names.get(entry.path, "")})

    def only(self, units: Collection[str]) -> "Plan":
        """The same plan with nothing trained but these units."""
        return self._replaced(lambda entry: {"active": entry.unit in units})

    def _replaced(self, change: Callable[[VariablePlan], dict[str, Any]]) -> "Plan":
        entries = tuple(dataclasses.replace(entry, **change(entry)) for entry in self.entries)
        return dataclasses.replace(self, entries=entries)

    def traced(
        self, without_gradient: Sequence[str], statistics: Sequence[Any], looked_up: Mapping[str, int] | None = None
    ) -> "Plan":
        """The same plan, with what tracing the step has shown.

        Args:
            without_gradient: paths of selected variables on which the loss does not depend: nothing is sent.
            statistics: messages beyond those of the gradients.
            looked_up: by path of an embedding, rows that a replica looks up in a step.
        """
        plan = self._replaced(
            lambda entry: {
                "sent": entry.path not in without_gradient,
                "ids": (looked_up or {}).get(entry.path, entry.ids),
            }
        )
        return dataclasses.replace(plan, statistics=tuple(statistics))

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json.

        Of a variable, `dtype` is the one in which its gradient would be exchanged whole, `stored_dtype` the one in
        which it is stored (see `adapters.quantization`), and `unit` what a schedule switches it with; None where none
        does. Of bytes, `wire` is the payload that one worker hands over, and `nic` what leaves each of the `workers`.
        """
        return {
            "variables": [
                {
                    "path": e.path,
                    "shape": list(e.shape),
                    "dtype": e.dtype,
                    "stored_dtype": getattr(e.variable, "dtype", e.dtype),
                    "trained": e.trained,
                    "rule": str(e.rule),
                    "unit": e.unit or None,
                    "rows": list(e.rule.rows) if e.trained and e.rule.rows else None,
                    "reduction": e.travels(self.peers(e)) if e.trained and e.sent else None,
                    "wire_bytes_per_step": self.bytes_of(e),
                    "nic_bytes_per_step": self.bytes_of(e, at_interface=True),
                }
                for e in self.entries
            ],
            "trained_parameters": sum(e.trained_parameters for e in self.entries),
            "total_parameters": sum(e.parameters for e in self.entries),
            "wire_bytes_per_step": self.wire_bytes,
            "statistics_wire_bytes_per_step": average_bytes(self.statistics),
            "full_wire_bytes_per_step": self.full_wire_bytes,
            "workers": self.workers,
            "nic_bytes_per_step": self.nic_bytes,
            "full_nic_bytes_per_step": self.full_nic_bytes,
        }


def even_shares(sizes: Sequence[int], count: int) -> list[int]:
    """Cuts a sequence into `count` shares, of which the largest is as small as it can be; returns each one's share.

    Examples:
        >>> even_shares([2, 2, 2, 6, 1], 3)
        [0, 0, 0, 1, 2]
    """

    def cut(largest: int) -> list[int] | None:
        shares, share, filled = [], 0, 0
        for i, size in enumerate(sizes):
            # Those that come must have one each as well.
            if i and (filled + size > largest or len(sizes) - i < count - share):
                share, filled = share + 1, 0
            shares.append(share)
            filled += size
            if filled > largest or share >= count:
                return None
        return shares

    low, high = 0, sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cut(middle) is not None else (middle + 1, high)
    return cut(high) or []
