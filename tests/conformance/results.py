"""The results of all cases, which `table.py` computes and the documentation shows."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.conformance.known import EXACT, KNOWN, PARTS, Known, known

RESULTS = Path(__file__).parent / "results.json"
KINDS = {
    "vision": "Images and video: classifiers, segmentation, detection",
    "text": "Text: taggers, transformers, language models, translation",
    "sequence": "Sequences: recurrent, convolutional, attention, CTC",
    "tabular": "Tables: lookups, factorization, several inputs and outputs",
    "generative": "Generative: autoencoders, flows, diffusion",
    "metric_learning": "Metric learning: pairs, triplets, towers, distillation",
    "losses": "Losses: reductions, weights, functions of one's own",
    "layers": "Layers: regularizers, constraints, sharing, frozen parts, graphs",
    "optimizers": "Optimizers: clipping, averages, decay, learning rate schedules",
    "hub": "KerasHub: BERT, DistilBERT, GPT-2, Llama, Gemma, BART, ViT, LoRA",
}
COLUMNS = {"1": "one device", "2": "2 replicas", "3": "3 replicas", "2 workers": "2 workers"}

Results = dict[str, dict[str, Any]]


def load() -> Results:
    """Reads the results: by case its kind, and what came out by column: '1', '2', '3', '2 workers'."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def save(results: Results) -> None:
    """Writes the results in one piece, so that a killed table loses none."""
    draft = RESULTS.with_suffix(".draft")
    draft.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    draft.replace(RESULTS)


def replicas_of(column: str) -> int:
    """The number of replicas of a column, such as '2' or '2 workers'."""
    return int(column.split()[0])


def as_known(name: str, column: str, row: dict[str, Any]) -> bool:
    """Whether a result is equality, or what is known of the case."""
    different = known(name, replicas_of(column))
    if "error" in row or (different and different.refused):
        return bool(different and different.refused and different.refused in row.get("error", ""))
    if different is None:
        return max(row[part] for part in PARTS) <= EXACT
    # What is rounded to float32 may come out alike on other numbers of replicas.
    least = EXACT if different.within == float("inf") else -1.0
    return least < max(row[part] for part in different.differs) <= different.within and all(
        row[part] <= EXACT for part in PARTS if part not in different.differs
    )


def tables(results: Results) -> tuple[list[list[Any]], list[list[Any]]]:
    """Makes the rows of two tables: kinds of models with the largest difference, and cases that are known to differ."""
    kinds = []
    for kind, title in KINDS.items():
        cases = {name: case["results"] for name, case in results.items() if case["kind"] == kind}
        cells = [_largest(cases, column) for column in COLUMNS]
        kinds.append([title, len(cases), *cells])
    return kinds, [[f"`{name}`", each.reason, _how(each, results.get(name))] for name, each in KNOWN.items()]


def cases(results: Results) -> list[list[Any]]:
    """Makes the rows of a table of all cases, with the largest difference of each."""

    def cell(row: Mapping[str, Any] | None) -> str:
        if row is None or "error" in row:
            return "refused" if row else ""
        return f"{max(row[part] for part in PARTS):.0e}"

    kinds = list(KINDS)
    ordered = sorted(results.items(), key=lambda each: (kinds.index(each[1]["kind"]), each[0]))
    return [
        [f"`{name}`", case["kind"].replace("_", " "), *(cell(case["results"].get(column)) for column in COLUMNS)]
        for name, case in ordered
    ]


def _largest(cases: Mapping[str, Mapping[str, Any]], column: str) -> str:
    """The largest difference of the cases that are not known to differ, and how many these are."""
    equal = {
        name: rows[column] for name, rows in cases.items() if column in rows and not known(name, replicas_of(column))
    }
    if not equal:
        return ""
    return f"{max(row.get(part, float('inf')) for row in equal.values() for part in PARTS):.0e} ({len(equal)})"


def _how(each: Known, case: Mapping[str, Any] | None) -> str:
    if each.refused:
        return "refused" if each.least == 1 else "refused on several replicas"
    rows: Sequence[Any] = [row for row in (case or {"results": {}})["results"].values() if "error" not in row]
    worst = [f"{part} {max(row[part] for row in rows):.0e}" for part in each.differs if rows]
    return ", ".join(worst) or ", ".join(each.differs)
