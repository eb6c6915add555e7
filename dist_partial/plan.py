"""python -m dist_partial.plan --gin_file=F --workers=64 --bandwidth=10gbit [--latency_ms=0.1]

Prints, without training, what each variable sends, which rules cost most, what optimizers hold, and how long a step
will take, for this plan and for training everything in float32 every step. The computation is measured here.

A gin file is a program: this imports the modules that it names, as training does. Read one that is not yours first.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from dist_partial import cli
from dist_partial.selection.payload import average_bytes

if TYPE_CHECKING:
    from dist_partial.training.cost_model import Cost, Machine


def bytes_per_second(rate: str) -> float:
    """Reads a rate as network tools write it, such as '200mbit' or '10gbit'.

    Raises:
        UserError: it is none.

    Examples:
        >>> bytes_per_second("200mbit"), bytes_per_second("10 Gbit/s")
        (25000000.0, 1250000000.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(bit|bps)(?:/s)?", rate.strip().lower())
    if match is None or float(match[1]) == 0:
        raise cli.UserError(f"--bandwidth is {rate!r}: write e.g. 200mbit or 10gbit, of each worker's link")
    return float(match[1]) * {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]] / 8


def report(cost: "Cost", full: "Cost", machine: "Machine") -> str:
    """Compares the plan with training everything, and lists the rules by what they cost."""
    rows = [
        ("trained parameters", *(f"{sum(e.trained_parameters for e in c.plan.entries):,}" for c in (cost, full))),
        ("payload a step and replica", *(_size(c.payload) for c in (cost, full))),
        (f"interface of each of {machine.workers}", *(_size(c.nic_bytes) for c in (cost, full))),
        ("slots, residuals, anchors", *(_size(c.memory) for c in (cost, full))),
        ("computation, measured here", *(_ms(c.compute) for c in (cost, full))),
        ("wire, lower bound", *(_ms(c.wire) for c in (cost, full))),
        ("expected step", *(_ms(c.step) for c in (cost, full))),
    ]
    lines = [f"{'':28}{'this plan':>16}{'all, float32':>16}"]
    lines += [f"{name:28}{one:>16}{other:>16}" for name, one, other in rows]
    lines += ["", "rules by what they make each worker send:"]
    sent = [
        (f"{g.rule}: {g.reduction}", [m for e in g.entries for m in cost.plan.handed_over(e)]) for g in cost.plan.groups
    ]
    sent += [("statistics of layers", list(cost.plan.statistics))] if cost.plan.statistics else []
    sizes = [(average_bytes(payloads, machine.workers), name) for name, payloads in sent]
    for size, name in sorted(sizes, key=lambda item: -item[0]):
        share = size / cost.nic_bytes if cost.nic_bytes else 0.0
        lines.append(f"  {share:7.2%}  {_size(size):>10}  {_ms(size / machine.bandwidth):>10}  {name}")
    return "\n".join(lines)


def _size(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for a mistake of the user's."""
    values = flags.FlagValues()
    cli.define_gin_flags(values)
    flags.DEFINE_integer("workers", 2, "workers, with one replica each", flag_values=values)
    flags.DEFINE_string("bandwidth", "1gbit", "of each worker's link, each way", flag_values=values)
    flags.DEFINE_float("latency_ms", 0.1, "of a message between two workers", flag_values=values)
    flags.DEFINE_integer("workers_per_host", 1, "workers that share the cores of one host", flag_values=values)

    def command() -> int:
        cli.check_gin_file(values)
        for name, least in (("workers", 1), ("workers_per_host", 1), ("latency_ms", 0)):
            if not float(values[name].value or 0) >= least:
                raise cli.UserError(f"--{name} is {values[name].value}: it must be at least {least}")
        bandwidth = bytes_per_second(values.bandwidth)
        cli.import_tensorflow_quietly()
        from dist_partial.config import gin_files
        from dist_partial.reductions.all_reduce import AllReduce
        from dist_partial.selection.table import plan_table
        from dist_partial.training.cost_model import Machine, estimate

        machine = Machine(values.workers, bandwidth, values.latency_ms / 1e3, values.workers_per_host)
        settings = gin_files.load(values.gin_file, values.gin_param).settings
        everything = dataclasses.replace(settings, rules=[("train", ".*")], reduction=AllReduce("float32"))
        cost = estimate(settings, machine)
        print(plan_table(cost.plan, machine.workers))
        if settings.global_batch % machine.workers:
            print(f"run.global_batch = {settings.global_batch} does not divide among {machine.workers} workers")
        print(f"\n{machine.workers} workers at {values.bandwidth}\n")
        print(report(cost, estimate(everything, machine), machine))
        return 0

    return cli.call(__doc__, values, argv, command)


if __name__ == "__main__":
    sys.exit(main())
