"""Tables whose policies are tuned on one seed and reported on others, in pieces that go on where they were stopped.

A piece is one run of one policy, in a process of its own; its row is written when it ends. A policy's settings are
tuned on `TUNING_SEED`: from where it starts, the values next to those of the best setting so far are tried, one at a
time, until none of them is better by held-out loss. So the best lies at an edge only where there is nothing beyond. It
is then run on `SEEDS`, which decide on nothing.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tests.benchmarks.runs import give, results_of

TUNING_SEED, SEEDS = 0, (1, 2, 3)

Setting = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is tuned.

    Attributes:
        name: in the table.
        start: the setting that is tried first, JSON values by name.
        grid: what may be tried, by name: values in an order in which neighbours are alike.
        how: what the table's `run` makes of it.
        replicas: with how many it is reported; it is tuned with the first of them.
    """

    name: str
    start: Setting
    grid: Mapping[str, Sequence[Any]]
    how: Any
    replicas: Sequence[int] = (8,)

    def around(self, setting: Setting) -> list[Setting]:
        """The settings in which one value is next to that of this setting."""
        found = []
        for name, values in self.grid.items():
            place = list(values).index(setting[name])
            found += [{**setting, name: values[i]} for i in (place - 1, place + 1) if 0 <= i < len(values)]
        return found


@dataclasses.dataclass(frozen=True)
class Piece:
    """One run."""

    policy: str
    replicas: int
    seed: int
    setting: Setting

    def is_of(self, row: Row) -> bool:
        return all(row[name] == value for name, value in dataclasses.asdict(self).items())


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of tuned policies.

    Attributes:
        results: the file.
        command: that makes it.
        setting: what all runs have in common, in words.
        policies: in the order of the table.
        run: makes a piece, in a process that has not imported TensorFlow; returns what was found, at least `loss`.
        processes: how many at a time; each has a core of its own, or one has all.
    """

    results: Path
    command: str
    setting: str
    policies: Sequence[Policy]
    run: Callable[[Policy, Piece], dict[str, Any]]
    processes: int = 1

    def main(self, given: Sequence[str] | None = None) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--policies", default="", help="some of them, separated by ;")
        parser.add_argument("--hours", type=float, default=6.0, help="after which no run begins")
        parser.add_argument("--piece", help="one run, as JSON: prints its row")
        arguments = parser.parse_args(given)
        if arguments.piece:
            self._child(Piece(**json.loads(arguments.piece)))
            return
        names = arguments.policies.split(";") if arguments.policies else [policy.name for policy in self.policies]
        if failures := self._go_on([policy for policy in self.policies if policy.name in names], arguments.hours):
            sys.exit("\n".join(failures))

    def best(self, rows: Sequence[Row], policy: Policy) -> Setting | None:
        """The setting with the least loss, once all around it have been tried; None before."""
        best, untried = self._tuning(rows, policy)
        return None if untried else best

    def missing(self, rows: Sequence[Row], policies: Sequence[Policy]) -> Iterator[Piece]:
        """The pieces that can be run now and have no row: those of the tuning first."""
        for policy in policies:
            yield from self._tuning(rows, policy)[1]
        for policy in policies:
            best, untried = self._tuning(rows, policy)
            pieces = [Piece(policy.name, count, seed, best) for count in policy.replicas for seed in SEEDS]
            yield from (piece for piece in pieces if not untried and not any(piece.is_of(row) for row in rows))

    def write(self, rows: Sequence[Row]) -> None:
        order = [policy.name for policy in self.policies]
        rows = sorted((row for row in rows if row["policy"] in order), key=lambda row: order.index(row["policy"]))
        found = {"command": self.command, "setting": self.setting, "tuning_seed": TUNING_SEED, "seeds": SEEDS}
        head = json.dumps(found, indent=1).removesuffix("\n}")
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)  # a line each
        partial = self.results.with_suffix(".partial")
        partial.write_text(f'{head},\n "pieces": [\n{lines}\n ]\n}}\n')
        partial.replace(self.results)

    def _tuning(self, rows: Sequence[Row], policy: Policy) -> tuple[Setting, list[Piece]]:
        """The best setting so far, and the pieces around it that have not been run."""
        first = Piece(policy.name, policy.replicas[0], TUNING_SEED, policy.start)
        tried = [row for row in rows if dataclasses.replace(first, setting=row["setting"]).is_of(row)]
        tried = [row for row in tried if all(row["setting"][name] in values for name, values in policy.grid.items())]
        if not tried:
            return policy.start, [first]
        best = min(tried, key=lambda row: row["loss"])["setting"]
        around = [dataclasses.replace(first, setting=setting) for setting in policy.around(best)]
        return best, [piece for piece in around if not any(piece.is_of(row) for row in tried)]

    def _go_on(self, policies: Sequence[Policy], hours: float) -> list[str]:
        """Runs what is missing, for so long; returns what failed."""
        end = time.monotonic() + 3600 * hours
        rows = json.loads(self.results.read_text())["pieces"] if self.results.exists() else []
        failures: list[str] = []
        begun: list[Piece] = []
        running: dict[Future[dict[str, Any]], int] = {}
        with ThreadPoolExecutor(self.processes) as pool:
            while True:
                for piece in self.missing(rows, policies):
                    if len(running) == self.processes or time.monotonic() > end:
                        break
                    if piece not in begun:
                        begun.append(piece)
                        core = min(set(range(self.processes)) - set(running.values()))
                        running[pool.submit(self._apart, piece, core)] = core
                if not running:
                    return failures
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    running.pop(future)
                    if error := future.exception():
                        failures.append(str(error))
                    else:
                        rows.append(future.result())
                        self.write(rows)

    def _apart(self, piece: Piece, core: int) -> dict[str, Any]:
        """Makes a piece in a process of its own."""
        asked = json.dumps(dataclasses.asdict(piece))
        module, *options = self.command.removeprefix("python -m ").split()
        # Two at a time take turns less on cores of their own.
        begin = (lambda: os.sched_setaffinity(0, {core})) if self.processes > 1 else None
        [found] = results_of(module, *options, f"--piece={asked}", timeout=2 * 3600, begin=begin)
        print(f"{asked}: {found['loss']:.4f} in {found['seconds']} s", flush=True)
        return found

    def _child(self, piece: Piece) -> None:
        [policy] = [policy for policy in self.policies if policy.name == piece.policy]
        began = time.perf_counter()
        found = self.run(policy, piece)
        row = dataclasses.asdict(piece) | found | {"seconds": round(time.perf_counter() - began)}
        give(row)
