"""Draws the tuned tables: held-out loss against bytes, a point for each policy.

python -m tests.benchmarks.pictures [long] [fine_tuning]
"""

import json
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from tests.benchmarks.tables import RESULTS, reported

UNITS = {"long": "nats a byte", "fine_tuning": "nats a token"}


def draw(name: str, found: Mapping[str, Any] | None = None) -> Any:
    """Draws a file of results, all of whose seeds are reported: the mean, and the deviation as a bar.

    Args:
        name: of the file, without `.json`.
        found: its content; None reads the file.

    Returns:
        matplotlib's figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = found or json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    points = {key: rows for key, rows in reported(found).items() if len(rows) == len(found["seeds"])}
    means = {key: statistics.mean(row["loss"] for row in rows) for key, rows in points.items()}
    policies = list(dict.fromkeys(policy for policy, _ in points))
    most = max(replicas for _, replicas in points)
    full = [
        key for key in points if key[1] == most and (key[0].endswith("float32 every step") or key[0] == "everything")
    ]
    best = min(means[key] for key in full)
    colours = pyplot.get_cmap("tab20").colors
    figure, axes = pyplot.subplots(figsize=(10, 4.6), layout="constrained")
    for (policy, replicas), rows in points.items():
        colour = colours[policies.index(policy) % len(colours)]
        filled = replicas == most
        axes.errorbar(
            rows[0]["nic_bytes"],
            means[policy, replicas],
            statistics.stdev(row["loss"] for row in rows),
            linestyle="",
            marker="o" if filled else "s",
            color=colour,
            markerfacecolor=colour if filled else "white",
            label=policy if filled else None,
        )
    axes.axhline(best, color="grey", linewidth=0.8)
    axes.axhline(best * 1.005, linestyle=":", color="grey", label="0.5 % worse than the best in float32")
    axes.set(xscale="log", xlabel="bytes that a replica sends in the whole run")
    axes.set(ylabel=f"held-out loss, {UNITS[name]}")
    fewer = {replicas for _, replicas in points} - {most}
    title = f"{most} replicas" + "".join(f"; open: {count}" for count in sorted(fewer))
    figure.legend(loc="outside right upper", fontsize=8, title=title, title_fontsize=8)
    return figure


if __name__ == "__main__":
    for each in sys.argv[1:] or UNITS:
        draw(each).savefig(RESULTS / f"{each}.png", dpi=110)
