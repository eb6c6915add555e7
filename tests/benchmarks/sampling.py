"""Speed of generation: with the key-value cache against recomputing the prefix for each byte.

python -m tests.benchmarks.sampling
"""

import json
import statistics
import time
from pathlib import Path

import tensorflow as tf

from dist_partial.models import byte_transformer
from dist_partial.models.sampling import generate

COMMAND = "python -m tests.benchmarks.sampling"
RESULTS = Path(__file__).parent / "results" / "sampling.json"
REPEATS = 5
PROMPT = list(b"\n")
COUNT = 4
LENGTHS = (64, 128, 256)


def main() -> None:
    model = byte_transformer()
    rows = []
    print(f"byte_transformer(), {COUNT} texts at once, TensorFlow {tf.__version__}")
    print(f"tokens/s, medians of {REPEATS}\n")
    print("| bytes a text | prefix recomputed | key-value cache | ratio |\n|--:|--:|--:|--:|")
    for length in LENGTHS:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for repeat in range(REPEATS + 1):
            for use_cache, times in seconds.items():
                start = time.perf_counter()
                generate(
                    model,
                    PROMPT,
                    count=COUNT,
                    length=length,
                    temperature=1.0,
                    seed=repeat,
                    use_cache=use_cache,
                )
                if repeat:  # The first one compiles.
                    times.append(time.perf_counter() - start)
        recomputed, cached = (COUNT * length / statistics.median(seconds[cache]) for cache in (False, True))
        rows.append(
            {
                "length": length,
                "count": COUNT,
                "recomputed_tokens_per_second": round(recomputed, 1),
                "cached_tokens_per_second": round(cached, 1),
            }
        )
        print(f"| {length} | {recomputed:.0f} | {cached:.0f} | {cached / recomputed:.1f} |", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"command": COMMAND, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
