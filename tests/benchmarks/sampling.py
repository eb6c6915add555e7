"""Speed of generation: with the key-value cache against recomputing the prefix for each byte.

python -m tests.benchmarks.sampling
"""

import json
import statistics
import time
from pathlib import Path

from dist_partial.models import byte_transformer
from dist_partial.models.sampling import Generation, generate
from tests.benchmarks import tables

COMMAND = "python -m tests.benchmarks.sampling"
RESULTS = Path(__file__).parent / "results" / "sampling.json"
REPEATS = 5
PROMPT = list(b"\n")
COUNT = 4
LENGTHS = (64, 128, 256)


def main() -> None:
    model = byte_transformer()
    rows = []
    for length in LENGTHS:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for repeat in range(REPEATS + 1):
            for use_cache, times in seconds.items():
                start = time.perf_counter()
                generate(model, PROMPT, Generation(COUNT, length, seed=repeat), use_cache=use_cache)
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
    RESULTS.parent.mkdir(exist_ok=True)
    setting = f"byte_transformer(), {COUNT} texts at once, medians of {REPEATS}"
    RESULTS.write_text(json.dumps({"command": COMMAND, "setting": setting, "rows": rows}, indent=1) + "\n")
    print(tables.text("sampling"))


if __name__ == "__main__":
    main()
