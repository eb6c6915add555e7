"""What `dist_partial.plan` predicts against what a run on real hosts takes.

python -m tests.benchmarks.plan

Hosts are network namespaces on this machine, which share its cores; this needs root and iproute2.
"""

import json
import tempfile
from pathlib import Path

from tests.benchmarks import tables
from tests.benchmarks.simulation import predicted
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


def main() -> None:
    rows = []
    for name, text in CONFIGS.items():
        for count in HOSTS:
            with tempfile.TemporaryDirectory() as folder:
                config = Path(folder, "config.gin")
                config.write_text(f"{text}{LOOP}run.global_batch = {8 * count}\n")
                for rate in RATES:
                    expected = predicted(config, workers=count, workers_per_host=count, rate=rate)["step_ms"]
                    found = hosts.trained(config, count, rate)
                    error = expected / found["step_ms"] - 1
                    row = {"config": name, "hosts": count, "rate": rate, "predicted_ms": round(expected, 1)}
                    row |= {"measured_ms": round(found["step_ms"], 1), "error": round(error, 4)}
                    row |= {"expected_nic_bytes": found["expected_nic_bytes"], "nic_bytes": found["nic_bytes"]}
                    rows.append(row)
                    print(row, flush=True)
    RESULTS.write_text(json.dumps({"command": COMMAND, "rows": rows}, indent=1) + "\n")
    print(tables.text("plan"))


if __name__ == "__main__":
    main()
