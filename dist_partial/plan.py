"""python -m dist_partial.plan --gin_file=F --workers=64 --bandwidth=10gbit [--latency_ms=0.1] [--price_per_hour=2]

Prints, without training, what each variable sends, which rules cost most, what optimizers hold, and how long steps and
the run will take, for this plan and for training everything in float32 every step. The computation is measured here;
the workers, those that are slow or fail among them, are simulated.

A gin file is a program: this imports the modules that it names, as training does. Read one that is not yours first.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from absl import flags

from dist_partial import cli
from dist_partial.selection.payload import average_bytes

if TYPE_CHECKING:
    from dist_partial.training.cost_model import Cost, Machine


def bytes_per_second(rate: str, flag: str = "bandwidth") -> float:
    """Reads a rate as network tools write it, such as '200mbit' or '10gbit'.

    Raises:
        UserError: it is none.

    Examples:
        >>> bytes_per_second("200mbit"), bytes_per_second("10 Gbit/s")
        (25000000.0, 1250000000.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(bit|bps)(?:/s)?", rate.strip().lower())
    if match is None or float(match[1]) == 0:
        raise cli.UserError(f"--{flag} is {rate!r}: write e.g. 200mbit or 10gbit, of each worker's link")
    return float(match[1]) * {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]] / 8


def stragglers(text: Sequence[str], workers: int) -> list[tuple[int, float]]:
    """Reads how many workers take how many times as long as the others, such as '3x1.5'.

    Raises:
        UserError: it cannot be read, or is more than there are.

    Examples:
        >>> stragglers(["3x1.5", "1x4"], workers=8)
        [(3, 1.5), (1, 4.0)]
    """
    found = []
    for each in text:
        match = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)", each.strip().lower())
        if match is None or float(match[2]) < 1:
            raise cli.UserError(
                f"--stragglers has {each!r}: write how many workers, x, and how many times as long they take: 3x1.5"
            )
        found.append((int(match[1]), float(match[2])))
    if sum(count for count, _ in found) > workers:
        raise cli.UserError(f"--stragglers names more workers than the {workers} that there are")
    return found


@dataclasses.dataclass(frozen=True)
class Prices:
    """Holds what a worker costs an hour, and a gigabyte that leaves one; in any currency, 0 where it is not known."""

    per_hour: float = 0.0
    per_gb: float = 0.0

    def of(self, cost: "Cost", workers: int) -> float:
        """What a whole run costs, with all that faults make it do again."""
        if cost.run.seconds == math.inf:
            return math.inf
        gigabytes = cost.nic_bytes * cost.run.made / 1e9
        return workers * (cost.run.seconds / 3600 * self.per_hour + gigabytes * self.per_gb)


def report(costs: Mapping[str, "Cost"], machine: "Machine", prices: Prices, steps: int) -> str:
    """Compares plans, of which the first is the user's, and lists its rules by what they cost."""
    cost = next(iter(costs.values()))
    several, fails = machine.devices > 1, math.isfinite(machine.faults.mean_seconds)
    rows: list[tuple[bool, str, Callable[[Cost], str]]] = [
        (True, "trained parameters", lambda c: f"{sum(e.trained_parameters for e in c.plan.entries):,}"),
        (True, f"payload a step and {'worker' if several else 'replica'}", lambda c: _size(c.payload)),
        (True, f"interface of each of {machine.workers}", lambda c: _size(c.nic_bytes)),
        (several, "each device, to its own host", lambda c: _size(c.inside_bytes)),
        (True, "slots, residuals, anchors", lambda c: _size(c.memory)),
        (True, "computation, " + ("as given" if machine.step_seconds else "measured here"), lambda c: _ms(c.compute)),
        (True, "wire, lower bound", lambda c: _ms(c.wire)),
        (True, "expected step", lambda c: _ms(c.step)),
        (True, f"{steps:,} steps take", lambda c: _time(c.run.seconds)),
        (fails, "faults in that time", _of_an_end(lambda c: f"{c.run.faults:,.1f}")),
        (True, "goodput", lambda c: f"{c.run.goodput:.1%}"),
        (True, "a worker sends a day", _of_an_end(lambda c: _size(_a_day(c, c.nic_bytes)))),
        (True, "all workers send a day", _of_an_end(lambda c: _size(_a_day(c, c.nic_bytes) * machine.workers))),
        (several, "a device sends a day, inside", _of_an_end(lambda c: _size(_a_day(c, c.inside_bytes)))),
        (prices != Prices(), "the run costs", _of_an_end(lambda c: f"{prices.of(c, machine.workers):,.2f}")),
    ]
    lines = ["".join([" " * 28, *(f"{name:>18}" for name in costs)])]
    for shown, name, write in rows:
        lines += ["".join([f"{name:28}", *(f"{write(each):>18}" for each in costs.values())])] if shown else []
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


def _a_day(cost: "Cost", size: float) -> float:
    return size * cost.run.made / cost.run.seconds * 86400


def _of_an_end(write: Callable[["Cost"], str]) -> Callable[["Cost"], str]:
    """The same of a run that ends: of one that does not there is no sum."""
    return lambda cost: write(cost) if math.isfinite(cost.run.seconds) else "-"


def _time(seconds: float) -> str:
    if seconds == math.inf:
        return "never"
    for unit, scale in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _size(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def _define_flags(values: flags.FlagValues) -> None:
    number, text, several = flags.DEFINE_float, flags.DEFINE_string, flags.DEFINE_list
    flags.DEFINE_integer("workers", 2, "workers, with one replica each", flag_values=values)
    flags.DEFINE_integer("hosts", None, "the same, with --devices replicas each", flag_values=values)
    flags.DEFINE_integer("devices", 1, "replicas of each of --hosts", flag_values=values)
    text("bandwidth", "1gbit", "of each worker's link, each way; of --devices, inside their host", flag_values=values)
    text("between", None, "of each host's link to the others, each way, where devices have others", flag_values=values)
    text("slowest_link", None, "of the worker whose link is the slowest", flag_values=values)
    number("latency_ms", 0.1, "of a message between two workers", flag_values=values)
    flags.DEFINE_integer("workers_per_host", 1, "workers that share the cores of one host", flag_values=values)
    several("step_ms", [], "times of steps that were measured elsewhere, without communication", flag_values=values)
    several("stragglers", [], "so many workers take so many times as long: 3x1.5", flag_values=values)
    number("hours_between_faults", math.inf, "of one worker, on average", flag_values=values)
    number("restart_seconds", 60.0, "from a fault until steps are made again", flag_values=values)
    flags.DEFINE_bool("rejoin", False, "after a fault the others keep their steps", flag_values=values)
    number("price_per_hour", 0.0, "of a worker", flag_values=values)
    number("price_per_gb", 0.0, "that leaves a worker", flag_values=values)
    number("max_loss", None, "of the cheapest reduction: held-out loss above float32's, percent", flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the simulation", flag_values=values)


_LEAST = {
    "workers": 1,
    "hosts": 1,
    "devices": 1,
    "workers_per_host": 1,
    "latency_ms": 0,
    "restart_seconds": 0,
    "price_per_hour": 0,
    "price_per_gb": 0,
    "max_loss": 0,
    "seed": 0,
}


def _machine(values: flags.FlagValues) -> "Machine":
    """What the flags describe; raises UserError for what cannot be."""
    from dist_partial.training.cost_model import Machine
    from dist_partial.training.simulation import Faults

    for name, least in _LEAST.items():
        value = values[name].value
        if value is not None and not least <= float(value) < math.inf:
            raise cli.UserError(f"--{name} is {value}: it must be at least {least}")
    if not values.hours_between_faults > 0:
        raise cli.UserError(f"--hours_between_faults is {values.hours_between_faults}: it must be more than 0")
    if values.hosts is None and (values.devices > 1 or values.between):
        raise cli.UserError("--devices and --between say something of hosts: give --hosts instead of --workers")
    if values.hosts is not None and values["workers"].present:
        raise cli.UserError("--hosts and --workers both say how many workers there are: give one of them")
    bandwidth = bytes_per_second(values.bandwidth)
    between = bytes_per_second(values.between, "between") if values.between else bandwidth
    if values.slowest_link:
        others, between = between, bytes_per_second(values.slowest_link, "slowest_link")
        if between > others:
            raise cli.UserError(f"--slowest_link is {values.slowest_link}: that is faster than the others")
    try:
        step_seconds = [float(each) / 1e3 for each in values.step_ms]
    except ValueError:
        step_seconds = [0.0]
    if not all(0 < each < math.inf for each in step_seconds):
        raise cli.UserError(
            f"--step_ms is {','.join(values.step_ms)!r}: write times in milliseconds, as in 118,120,131"
        )
    workers = values.hosts or values.workers
    return Machine(
        workers,
        between,
        values.latency_ms / 1e3,
        values.workers_per_host,
        values.devices,
        bandwidth if values.hosts else math.inf,
        step_seconds,
        stragglers(values.stragglers, workers),
        Faults(values.hours_between_faults * 3600, values.restart_seconds, rejoin=values.rejoin),
    )


def _words(machine: "Machine", values: flags.FlagValues) -> str:
    if values.hosts is None:
        return f"{machine.workers} workers at {values.slowest_link or values.bandwidth}"
    devices = f"with {machine.devices} devices each at {values.bandwidth}"
    return (
        f"{machine.workers} hosts {devices}, {values.slowest_link or values.between or values.bandwidth} between them"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 2 for a mistake of the user's."""
    values = flags.FlagValues()
    cli.define_gin_flags(values)
    _define_flags(values)

    def command() -> int:
        cli.check_gin_file(values)
        cli.import_tensorflow_quietly()
        machine, prices = _machine(values), Prices(values.price_per_hour, values.price_per_gb)
        from dist_partial.config import gin_files
        from dist_partial.reductions.all_reduce import AllReduce
        from dist_partial.schedules.fixed import Constant
        from dist_partial.selection.table import plan_table
        from dist_partial.training.candidates import cheapest
        from dist_partial.training.cost_model import estimate

        settings = gin_files.load(values.gin_file, values.gin_param).settings
        if not isinstance(settings.schedule, Constant):  # the costliest case
            print("run.schedule trains a part of this at a time; what follows is of all that the rules train together")
        everything = dataclasses.replace(
            settings, rules=[("train", ".*")], reduction=AllReduce("float32"), between_hosts=None
        )
        cost = estimate(settings, machine, values.seed)
        print(plan_table(cost.plan, machine.workers))
        replicas = machine.workers * machine.devices
        if settings.global_batch % replicas:
            print(f"run.global_batch = {settings.global_batch} does not divide among {replicas} replicas")
        costs = {"this plan": cost, "all, float32": estimate(everything, machine, values.seed)}
        if values.max_loss is not None:
            name, found = cheapest(
                settings, machine, values.max_loss / 100, lambda c: prices.of(c, machine.workers), values.seed
            )
            print(f"cheapest within {values.max_loss:g} %: {name}")
            costs["cheapest"] = found
        print(f"\n{_words(machine, values)}\n")
        print(report(costs, machine, prices, settings.steps))
        return 0

    return cli.call(__doc__, values, argv, command)


if __name__ == "__main__":
    sys.exit(main())
