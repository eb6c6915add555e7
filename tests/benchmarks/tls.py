"""Step time over a limited link with plain connections, with tags and with TLS, side by side.

python -m tests.benchmarks.tls

Two hosts and the model of `wire`, whose worker runs here as well; needs root and iproute2. In each round every way is
started once, in the next in reverse order.
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks import tables
from tests.benchmarks.wire import MODEL, RATES, SELECTIONS, Setting, launch
from tests.benchmarks.wire_worker import GUARDS
from tests.helpers import hosts

COMMAND = "python -m tests.benchmarks.tls"
RESULTS = Path(__file__).parent / "results" / "tls.json"


def measure(setting: Setting, rounds: int, blocks: int) -> list[dict[str, Any]]:
    """Medians over the blocks of all rounds, for each type and way."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number in range(rounds):
        for guard in list(GUARDS)[:: -1 if number % 2 else 1]:
            lines, failure = launch(setting, "dist_partial", sys.executable, blocks, None, guard)
            if failure:
                sys.exit(f"error: {guard}: {failure}")
            for dtype, line in lines.items():
                found.setdefault((dtype, guard), []).append(line)
            said = ", ".join(f"{dtype} {line['step_ms']} ms" for dtype, line in lines.items())
            print(f"[{setting}] {guard}: {said}", file=sys.stderr, flush=True)
    return [
        {
            **dataclasses.asdict(setting),
            "dtype": dtype,
            "guard": guard,
            "step_ms": round(statistics.median(block for line in lines for block in line["blocks_ms"]), 2),
            "cpu_ms": round(statistics.median(line["cpu_ms"] for line in lines), 2),
            "nic_bytes": round(statistics.mean(line["nic_bytes"] for line in lines)),
            "blocks_ms": [block for line in lines for block in line["blocks_ms"]],
        }
        for (dtype, guard), lines in sorted(found.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND)
    parser.add_argument("--rates", type=lambda text: text.split(","), default=["1gbit"], help=f"of {[*RATES]}")
    parser.add_argument("--rounds", type=int, default=6, help="times that each way is started")
    parser.add_argument("--repeats", type=int, default=3, help="timed blocks in each round")
    parser.add_argument("--no_write", action="store_true", help="print only")
    options = parser.parse_args()
    if reason := hosts.available():
        sys.exit(f"error: no hosts can be made here: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that hosts are removed then, too
    rows: list[dict[str, Any]] = []
    for rate in options.rates:
        with hosts.hosts(2, None if rate == "unshaped" else rate):
            for selected in SELECTIONS:
                rows += measure(Setting(2, rate, selected), options.rounds, options.repeats)
    content = {"command": COMMAND, "model": MODEL, "cores": os.cpu_count(), "rounds": options.rounds}
    if not options.no_write:
        RESULTS.write_text(json.dumps(content | {"blocks_a_round": options.repeats, "rows": rows}, indent=1) + "\n")
    print(tables.text("tls", {"rows": rows}))


if __name__ == "__main__":
    main()
