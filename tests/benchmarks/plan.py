"""What `dist_partial.plan` predicts against what a run on real hosts takes.

python -m tests.benchmarks.plan

Hosts are network namespaces on this machine, which share its cores; this needs root and iproute2.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks import tables
from tests.helpers import hosts

COMMAND = "python -m tests.benchmarks.plan"
RESULTS = Path(__file__).parent / "results" / "plan.json"
HOSTS = (2, 3, 4)
RATES = ("200mbit", "1gbit")
CONFIGS = {
    "two_dense, 33.6 MB": """
run.model = @two_dense
two_dense.hidden = 49152
run.data = @stdlib_shapes
run.rules = [('train', '.*')]
run.optimizer = @keras.optimizers.SGD
""",
    "transformer, 3.4 MB": """
run.model = @byte_transformer
run.data = @stdlib_corpus
run.rules = [('train', '.*')]
""",
}
LOOP = "run.steps = 24\nrun.steps_per_loop = 3\nrun.eval_examples = 32\nsample.length = 1\n"


def predicted(config: Path, count: int) -> list[float]:
    """Milliseconds a step at each rate, from a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.plan", "--child", str(config), str(count)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def child(config: str, count: str) -> None:
    from dist_partial import plan
    from dist_partial.config import gin_files as configuration
    from dist_partial.training import cost_model

    settings = configuration.load([config]).settings
    machines = [
        cost_model.Machine(int(count), plan.bytes_per_second(rate), workers_per_host=int(count)) for rate in RATES
    ]
    print([cost_model.estimate(settings, machine).step * 1e3 for machine in machines])


def measured(config: Path, count: int, rate: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, hosts.hosts(count, rate):
        command = [sys.executable, "-m", "dist_partial.train", f"--gin_file={config}", f"--run_dir={folder}/run"]
        for code, output in hosts.run(command, count, timeout=300):
            if code:
                raise RuntimeError(output[-2000:])
        return json.loads(Path(folder, "run", "traffic.json").read_text())


def main() -> None:
    rows = []
    for name, text in CONFIGS.items():
        for count in HOSTS:
            with tempfile.TemporaryDirectory() as folder:
                config = Path(folder, "config.gin")
                config.write_text(f"{text}{LOOP}run.global_batch = {8 * count}\n")
                for rate, expected in zip(RATES, predicted(config, count), strict=True):
                    found = measured(config, count, rate)
                    error = expected / found["step_ms"] - 1
                    row = {"config": name, "hosts": count, "rate": rate, "predicted_ms": round(expected, 1)}
                    row |= {"measured_ms": round(found["step_ms"], 1), "error": round(error, 4)}
                    row |= {"expected_nic_bytes": found["expected_nic_bytes"], "nic_bytes": found["nic_bytes"]}
                    rows.append(row)
                    print(row, flush=True)
    RESULTS.write_text(json.dumps({"command": COMMAND, "rows": rows}, indent=1) + "\n")
    print(tables.text("plan"))


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
