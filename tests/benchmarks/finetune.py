"""Fine-tuning a part of SmolLM2-135M against all of it: loss, bytes, time and memory.

python -m tests.benchmarks.finetune

Each row is a process of its own, one after the other. Writes results/finetune.json.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from tests.benchmarks import tables
from tests.benchmarks.runs import give, results_of

COMMAND = "python -m tests.benchmarks.finetune"
RESULTS = Path(__file__).parent / "results" / "finetune.json"
CONFIGS = Path(__file__).parents[2] / "gin_configs"
STEPS, BATCH = 60, 4
LAST_TWELVE = "adapters/Rule.match = r'transformer_layer_(1[89]|2[0-9])/.*/kernel'"
# Name: gin file, bindings over it, and the best of the learning rates that were tried.
ROWS: dict[str, tuple[str, list[str], float]] = {
    "everything": ("smollm2.gin", ["run.rules = [('train', '.*')]"], 1e-4),
    "the last 4 of 30 blocks": ("smollm2.gin", [], 5e-4),
    "LoRA 16, kernels of the last 12": ("smollm2_lora.gin", [LAST_TWELVE, "adapters/Rule.lora = 16"], 4e-3),
    "LoRA 8, all kernels": ("smollm2_lora.gin", [], 4e-3),
    "LoRA 8, base in bfloat16": ("smollm2_lora.gin", ["run.frozen_dtype = 'bfloat16'"], 4e-3),
}


def child(name: str) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    file, bindings, rate = ROWS[name]
    from dist_partial.config import gin_files
    from dist_partial.training import loop

    params = [
        f"run.steps = {STEPS}",
        f"run.global_batch = {BATCH}",
        f"CosineDecay.decay_steps = {STEPS - 10}",
        f"CosineDecay.warmup_target = {rate}",
        f"CosineDecay.initial_learning_rate = {rate / 20}",
        "run.eval_every = None",
        "run.save_every = None",
        *bindings,
    ]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        loop.run(gin_files.load([CONFIGS / file], params).settings, Path(folder))
        took = time.perf_counter() - begun
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        traffic = json.loads((Path(folder) / "traffic.json").read_text())
        plan = json.loads((Path(folder) / "plan.json").read_text())
        samples = [json.loads(line)["text"] for line in (Path(folder) / "samples.jsonl").read_text().splitlines()]
        checkpoint = sum(path.stat().st_size for path in (Path(folder) / "checkpoints").iterdir())
    before, after = [row["loss"] for row in rows if row["split"] == "eval"]
    found = {
        "what": name,
        "parameters": plan["trained_parameters"],
        "share": plan["trained_parameters"] / plan["total_parameters"],
        "wire_bytes_per_step": plan["wire_bytes_per_step"],
        "loss_before": before,
        "loss_after": after,
        "step_ms": traffic["step_ms"],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "checkpoint_bytes": checkpoint,
        "seconds": took,
        "samples": samples,
    }
    give(found)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    rows = []
    for name in ROWS:
        rows += results_of("tests.benchmarks.finetune", f"--child={name}", timeout=1800)
        setting = f"{STEPS} steps of {BATCH} examples of 128 tokens, Adam, cosine, 2 simulated replicas on 2 cores"
        RESULTS.write_text(json.dumps({"command": COMMAND, "setting": setting, "rows": rows}, indent=1) + "\n")
        print({key: value for key, value in rows[-1].items() if key != "samples"}, flush=True)
    print(tables.text("finetune"))


if __name__ == "__main__":
    main()
