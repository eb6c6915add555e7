"""The Markdown tables of the results: what the benchmarks print and the documentation shows.

python -m tests.benchmarks.tables [NAME ...]

A function for each file of results/, by its name: it takes the file's content and returns the tables by their titles.
"""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# Columns of the table of the wire: a system and the type in which its gradients travel.
_WIRE = {
    "limit, float32": ("limit", "float32"),
    "DDP, float32": ("ddp", "float32"),
    "TensorFlow, float32": ("tensorflow", "float32"),
    "dist_partial, float32": ("dist_partial", "float32"),
    "limit, bfloat16": ("limit", "bfloat16"),
    "dist_partial, bfloat16": ("dist_partial", "bfloat16"),
}
_TRAINED = {"all": "everything", "part": "the last block of each half, the last norm, the head"}  # of 8 blocks
_TRAINED_OF_FOUR = {"all": "everything", "part": "the last block, the last norm, the head"}

Rows = Sequence[Mapping[str, Any]]
Tables = dict[str, str]


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]], words: int = 1) -> str:
    """A Markdown table whose columns after the first `words` hold numbers, to the right."""
    lines = [header, [*["---"] * words, *["--:"] * (len(header) - words)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def columns(rows: Rows, words: int = 1) -> str:
    """A table that shows the rows as they are."""
    return markdown(list(rows[0]), [list(row.values()) for row in rows], words)


def cache(found: Mapping[str, Any]) -> Tables:
    return {"": columns(found["rows"], words=2)}


def collectives(found: Mapping[str, Any]) -> Tables:
    """Milliseconds a sum; the ratio to gloo's in brackets."""
    places: dict[tuple[int, int], dict[str, Mapping[str, Any]]] = {}
    for row in found["rows"]:
        places.setdefault((row["bytes"], row["workers"]), {})[row["system"]] = row
    lines = []
    for (size, workers), place in places.items():
        cells = [f"{size // 1024} KiB", workers]
        for number in ("cpu_ms", "ms"):
            own, other = place["dist_partial"][number], place.get("gloo", {}).get(number)
            cells += [f"{other:.2f}" if other else "", f"{own:.2f}" + (f" ({own / other:.2f})" if other else "")]
        lines.append(cells)
    header = ["summed", "workers", "gloo, CPU", "dist_partial, CPU", "gloo, time", "dist_partial, time"]
    return {"A sum over workers on loopback": markdown(header, lines)}


def faults(found: Mapping[str, Any]) -> Tables:
    names = {
        "words": "fault",
        "way": "in place of a lost worker",
        "times": "times",
        "seconds_median": "seconds to the next step, median",
        "seconds_max": "maximum",
        "delay_seconds_median": "of these the launcher's delay",
        "recomputed_steps_max": "steps computed again, maximum",
    }
    ways = {"spare": "a spare", "process": "a new process", "restart": "all start again", "none": "nobody is lost"}
    lines = [[ways[row["way"]] if name == "way" else row[name] for name in names] for row in found["rows"]]
    texts = {"": markdown(list(names.values()), lines)}
    if rates := found.get("every_15_seconds"):
        lines = [[row["workers"], ways[row["way"]], row["kills"], row["steps"], f"{row['share']:.1%}"] for row in rates]
        header = ["workers", "in place of a lost worker", "kills", "steps", "of the rate without faults"]
        texts["A kill every 15 seconds"] = markdown(header, lines)
    if cost := found.get("cost"):
        lines = [
            [row["configuration"], row["workers"], row["not_ms"], row["kept_ms"], f"{row['ratio']:.3f}"] for row in cost
        ]
        header = ["configuration", "workers", "nothing is kept, ms a step", "what to go back to is kept", "ratio"]
        texts["While nobody is lost"] = markdown(header, lines)
    return texts


def few_bits(found: Mapping[str, Any]) -> Tables:
    """Bytes a step in kB, and step times."""
    titles = {"payload": "payload, kB", "expected": "plan, kB", "read": "interface, kB"}
    header = ["workers", "reduction", *titles.values(), "interface / plan", "fewer than float32"]
    lines = [
        [
            row["workers"],
            row["reduction"],
            *(f"{row[name] / 1e3:,.1f}" for name in titles),
            f"{row['read'] / row['expected']:.3f}",
            f"{row['fewer']:.1f}x",
        ]
        for row in found.get("bytes", [])
    ]
    tables = {"Bytes that a worker sends in a step": markdown(header, lines, words=2)}
    if times := [[row["way"], f"{row['step_ms']:.1f}", f"{row['of_alone']:.3f}"] for row in found.get("delay", [])]:
        tables[f"{found['hosts']} hosts at {found['rate']}"] = markdown(["what travels", "a step, ms", "ratio"], times)
    if times := [
        [row["delay"], f"{row['step_ms']:.1f}", f"{row['alone_ms']:.1f}", f"{row['of_alone']:.3f}"]
        for row in found.get("within", [])
    ]:
        header = ["delay, steps", "a step, ms", "a step while nothing travels, ms", "ratio"]
        tables["One exchange in 24 steps, within one run"] = markdown(header, times)
    return tables


def finetune(found: Mapping[str, Any]) -> Tables:
    whole = found["rows"][0]
    header = ("what is trained", "parameters", "MB a step", "held-out loss", "ms a step", "relative time")
    lines = [
        [
            row["what"],
            f"{row['parameters']:,} ({row['share']:.1%})",
            f"{row['wire_bytes_per_step'] / 1e6:.1f}",
            f"{row['loss_before']:.3f} → {row['loss_after']:.3f}",
            f"{row['step_ms']:,.0f}",
            f"{row['step_ms'] / whole['step_ms']:.2f}",
            f"{row['peak_gb']:.1f}",
            f"{row['checkpoint_bytes'] / 1e6:.0f}",
        ]
        for row in found["rows"]
    ]
    return {"": markdown([*header, "peak GB", "checkpoint, MB"], lines)}


def fit(found: Mapping[str, Any]) -> Tables:
    header = ["trained", "the loop, ms a step", "fit, ms a step", "ratio", "a call of fit besides, ms"]
    names = ("loop ms", "fit ms", "ratio", "call ms")
    lines = [[_TRAINED_OF_FOUR[row["selected"]], *(row[name] for name in names)] for row in found["rows"]]
    return {"`model.fit` on two workers": markdown(header, lines)}


def plan(found: Mapping[str, Any]) -> Tables:
    header = ["what is trained", "rate", "hosts", "predicted, ms", "measured, ms", "error"]
    names = ("config", "rate", "hosts", "predicted_ms", "measured_ms")
    lines = [[*(row[name] for name in names), f"{row['error']:+.1%}"] for row in found["rows"]]
    return {"": markdown(header, lines, words=2)}


def quality(found: Mapping[str, Any]) -> Tables:
    return {"": _losses(found["rows"])}


def long(found: Mapping[str, Any]) -> Tables:
    """What was reported, against the best run that exchanges float32 in every step, and what the sweeps have found."""
    pieces = reported(found)
    means = {key: statistics.mean(row["loss"] for row in rows) for key, rows in pieces.items()}
    lines = []
    for (policy, replicas), rows in pieces.items():
        full = [key for key in means if key[0].endswith("float32 every step") and key[1] == replicas]
        best = min(full, key=means.__getitem__, default=(policy, replicas))
        lines.append(
            [
                policy,
                replicas,
                _words(rows[0]["setting"]),
                len(rows),
                _spread(rows),
                f"{means[policy, replicas] / means[best] - 1:+.2%}",
                f"{rows[0]['nic_bytes']:,}",
                f"{pieces[best][0]['nic_bytes'] / rows[0]['nic_bytes']:,.0f}",
            ]
        )
    header = ["policy", "replicas", "tuned to", "seeds", "held-out loss", "to the best in float32", "bytes", "fewer"]
    return ({"Reported": markdown(header, lines)} if lines else {}) | {"Sweeps": _swept(found)}


def fine_tuning(found: Mapping[str, Any]) -> Tables:
    """What was reported, against training everything, and what the sweeps have found."""
    pieces = reported(found)
    means = {
        key: {name: statistics.mean(row[name] for row in rows) for name in ("loss", "nic_bytes", "step_ms", "peak_gb")}
        for key, rows in pieces.items()
    }
    whole = means.get(("everything", 2))
    lines = []
    for key, rows in pieces.items():
        mean = means[key]
        whole = whole or mean
        lines.append(
            [
                key[0],
                _words(rows[0]["setting"]),
                len(rows),
                _spread(rows),
                f"{mean['loss'] / whole['loss'] - 1:+.2%}",
                f"{mean['nic_bytes'] / 1e6:,.1f}",
                f"{mean['nic_bytes'] / whole['nic_bytes']:.2%}",
                f"{mean['step_ms']:,.0f}",
                f"{mean['step_ms'] / whole['step_ms']:.2f}",
                f"{mean['peak_gb']:.1f}",
            ]
        )
    header = ["what is trained", "tuned to", "seeds", "held-out loss", "to everything", "MB", "of everything's"]
    header += ["ms a step", "of everything's", "peak GB"]
    return ({"Reported": markdown(header, lines)} if lines else {}) | {"Sweeps": _swept(found)}


def reported(found: Mapping[str, Any]) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    """By policy and number of replicas: the pieces whose seeds have chosen nothing (see `tuned`)."""
    pieces: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for piece in found["pieces"]:
        if piece["seed"] != found["tuning_seed"]:
            pieces.setdefault((piece["policy"], piece["replicas"]), []).append(piece)
    return pieces


def _swept(found: Mapping[str, Any]) -> str:
    lines = [
        [piece["policy"], _words(piece["setting"]), f"{piece['loss']:.4f}"]
        for piece in found["pieces"]
        if piece["seed"] == found["tuning_seed"]
    ]
    return markdown(["policy", "setting", "held-out loss"], lines, words=2)


def _words(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def _spread(rows: Rows) -> str:
    losses = [row["loss"] for row in rows]
    return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses) if len(losses) > 1 else 0:.4f}"


def modem(found: Mapping[str, Any]) -> Tables:
    """Losses and steps a second against those without a limit."""
    free, *_ = found["rows"]
    lines = [
        [
            row["line"],
            f"{row['loss']:.4f}",
            f"{row['loss'] / free['loss'] - 1:+.2%}",
            f"{1e3 / row['mean_step_ms']:.3f}",
            f"{free['mean_step_ms'] / row['mean_step_ms']:.1%}",
            f"{row['nic_bytes']:,}",
        ]
        for row in found["rows"]
    ]
    header = ["line", "held-out loss", "difference", "steps a second", "of those without a limit", "bytes of each host"]
    return {"": markdown(header, lines)}


def records(found: Mapping[str, Any]) -> Tables:
    header = ["pipeline", "examples a second", "least", "most", "CPU time an example, µs"]
    numbers = ("median", "least", "most", "cpu_us")
    rates = [[row["pipeline"], *(f"{row[name]:,.0f}" for name in numbers)] for row in found["rates"]]
    start = found["start"]
    seconds = [f"{start[name]:.2f}" for name in ("median_s", "most_s", "cpu_s", "without_index_s")]
    line = [f"{start['records']:,}", f"{start['step']:,}", *seconds]
    titles = ["records", "step", "seconds, median", "most", "of these CPU time", "making the index, too"]
    return {
        "JPEG images with augmentation": markdown(header, rates),
        "From the names of the files to the first batch": markdown(titles, [line], words=0),
    }


def simulation(found: Mapping[str, Any]) -> Tables:
    """Predicted and measured step times; runs that were killed; and, of each number of workers, the output."""

    def lines(name: str, words: Sequence[str], numbers: Sequence[str]) -> list[list[str]]:
        return [
            [*(row[each] for each in words), *(f"{row[each]:,.1f}" for each in numbers), f"{row['error']:+.1%}"]
            for row in found.get(name, [])
        ]

    header = ["run", "rate", "workers", "predicted, ms", "measured, ms", "error"]
    made = {}
    for name, title in {"runs": "Links", "many": "Messages", "straggler": "A straggler"}.items():
        steps = lines(name, ("run", "rate", "workers"), ("predicted_ms", "measured_ms"))
        made |= {title: markdown(header, steps, words=2)} if steps else {}
    killed = lines("kills", ("round", "kills"), ("restart_seconds", "predicted_seconds", "measured_seconds"))
    names = ["run", "kills", "a restart, s", "predicted, s", "measured, s", "error"]
    made["Kills"] = markdown(names, killed, words=0)
    for row in found.get("large", []):
        made[f"{row['workers']:,} replicas, simulated"] = f"```text\n{row['output'].strip()}\n```"
    return made


def sampling(found: Mapping[str, Any]) -> Tables:
    header = ["bytes a text", "everything recomputed, tokens a second", "key-value cache, tokens a second", "ratio"]
    lines = []
    for row in found["rows"]:
        recomputed, cached = row["recomputed_tokens_per_second"], row["cached_tokens_per_second"]
        lines.append([row["length"], f"{recomputed:,.0f}", f"{cached:,.0f}", f"{cached / recomputed:.1f}"])
    return {"Sampling": markdown(header, lines, words=0)}


def schedules(found: Mapping[str, Any]) -> Tables:
    return {"": _losses(found["rows"], seconds=True)}


def step(found: Mapping[str, Any]) -> Tables:
    tables = {
        "A part against everything": (found["against_everything"], _TRAINED),
        "Against a hand-written loop": (found["against_hand_written"], _TRAINED_OF_FOUR),
    }
    return {
        title: columns([{"trained": names[row["selected"]], **_without(row, "selected")} for row in rows])
        for title, (rows, names) in tables.items()
    }


def before(found: Mapping[str, Any]) -> Tables:
    return {"Earlier commits, in turn": columns(found["rows"])}


def switch(found: Mapping[str, Any]) -> Tables:
    header = ["unit", "first steps after a switch, ms", "later steps, ms", "ratio"]
    steps = [[row["unit"], row["after_ms"], row["steady_ms"], row["ratio"]] for row in found["steps"]]
    held = ["run.leave", "after the first visit, MiB", "after the last visit, MiB", "slots at the end, MiB"]
    memory = [
        [row["leave"], row["MiB_above_start"][0], row["MiB_above_start"][-1], row["slots_MiB_at_the_end"]]
        for row in found["memory"]
    ]
    return {"Time of a switch": markdown(header, steps), "Memory of the slots": markdown(held, memory)}


def tls(found: Mapping[str, Any]) -> Tables:
    """A line a setting; the ratio to plain connections in brackets."""
    places: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in found["rows"]:
        places.setdefault((row["rate"], row["selected"], row["dtype"]), {})[row["guard"]] = row
    lines = []
    for key, place in places.items():
        cells: list[Any] = list(key)
        for number in ("step_ms", "cpu_ms"):
            plain = place["plain"][number]
            cells.append(f"{plain:.1f}")
            cells += [f"{place[guard][number]:.1f} ({place[guard][number] / plain:.2f})" for guard in ("tags", "tls")]
        lines.append(cells)
    header = ["link", "trained", "dtype", "plain, ms", "tags, ms", "TLS, ms", "plain, CPU ms", "tags, CPU ms"]
    return {"What tags and TLS cost, on two hosts": markdown([*header, "TLS, CPU ms"], lines, words=3)}


def saving(found: Mapping[str, Any]) -> Tables:
    lines = [
        [
            row["way"],
            f"{row['checkpoint_bytes'] / 1e9:.2f}",
            f"{row['step_seconds']:.2f}",
            f"{row['longest_seconds']:.2f}",
            f"{row['longer_seconds']:.2f}",
            f"{row['share']:.1%}",
        ]
        for row in found["rows"]
    ]
    header = ["a checkpoint is", "GB", "a step, s", "the longest with it, s", "it costs, s", "of all steps"]
    return {"What a checkpoint costs": markdown(header, lines)}


def trackers(found: Mapping[str, Any]) -> Tables:
    header = ["with", "a step without it, ms", "with it, ms", "ratio"]
    lines = [[row["with"], f"{row['ms']:.2f}", f"{row['with_ms']:.2f}", f"{row['ratio']:.3f}"] for row in found["rows"]]
    return {"What a tracker costs": markdown(header, lines)}


def waits(found: Mapping[str, Any]) -> Tables:
    header = ["a batch", "read by", "a batch, ms", "a step, ms", "the slower, ms", "measured, ms", "most"]
    numbers = ("data_ms", "step_ms", "least_ms", "median_ms", "most_ms")
    lines = [[row["what"], row["by"], *(f"{row[name]:.0f}" for name in numbers)] for row in found["rows"]]
    return {"": markdown(header, lines, words=2)}


def wire(found: Mapping[str, Any]) -> Tables:
    """Milliseconds a step, and of them CPU; a line a setting, with the ratio to DDP's in brackets."""
    settings: dict[tuple[Any, ...], dict[tuple[str, str], Mapping[str, Any]]] = {}
    for row in found["rows"]:
        place = settings.setdefault((row["hosts"], row["rate"], row["selected"]), {})
        place[row["system"], row["dtype"]] = row
    times = [[*key, *(_cell(place.get(column)) for column in _WIRE.values())] for key, place in settings.items()]
    systems = {name: column for name, column in _WIRE.items() if column[0] != "limit"}
    cpu = [[*key, *(_cpu(place, column) for column in systems.values())] for key, place in settings.items()]
    return {
        "Time of a step": markdown(["hosts", "link", "trained", *_WIRE], times, words=3),
        "CPU of a step": markdown(["hosts", "link", "trained", *systems], cpu, words=3),
    }


def _without(row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return {key: value for key, value in row.items() if key != name}


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["step_ms"] is None:
        return "failed"
    took = f"{row['step_ms']:.0f}" if row["step_ms"] >= 100 else f"{row['step_ms']:.1f}"
    compared = row["system"] in ("tensorflow", "dist_partial") and row["of_ddp"]
    return took + (f" ({row['of_ddp']:.2f})" if compared else "") + (" failed" if "failed" in row else "")


def _cpu(place: Mapping[tuple[str, str], Mapping[str, Any]], column: tuple[str, str]) -> str:
    own, other = (place.get(key, {}).get("cpu_ms") for key in (column, _WIRE["DDP, float32"]))
    if own is None:
        return ""
    took = f"{own:.0f}" if own >= 100 else f"{own:.1f}"
    return took + (f" ({own / other:.2f})" if other and column[0] != "ddp" else "")


def _losses(rows: Rows, seconds: bool = False) -> str:
    full = next((row for row in rows if row["policy"] == "full"), rows[0])
    lines = [
        [
            row["policy"],
            f"{row['eval_loss']:.4f}",
            f"{row['spread']:.4f}",
            f"{row['eval_loss'] / full['eval_loss'] - 1:+.2%}",
            f"{row['wire_bytes']:,.0f}",
            f"{full['wire_bytes'] / row['wire_bytes']:,.1f}x" if row["wire_bytes"] else "all",
            *([f"{row['seconds']:.0f} s"] if seconds else []),
        ]
        for row in rows
    ]
    header = ["policy", "held-out loss", "spread", "against full", "bytes, 2 replicas", "fewer bytes"]
    return markdown([*header, "run"] if seconds else header, lines)


TABLES: dict[str, Callable[[Mapping[str, Any]], Tables]] = {
    each.__name__: each
    for each in (
        before,
        cache,
        collectives,
        faults,
        few_bits,
        fine_tuning,
        finetune,
        fit,
        long,
        modem,
        plan,
        quality,
        records,
        sampling,
        saving,
        schedules,
        simulation,
        step,
        switch,
        tls,
        trackers,
        waits,
        wire,
    )
}


def text(name: str, found: Mapping[str, Any] | None = None, heading: str = "##") -> str:
    """The tables of one file of results, each under its title.

    Args:
        name: of the file, without `.json`.
        found: its content; None reads the file.
        heading: Markdown's marks before a title.
    """
    found = found or json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    tables = TABLES[name](found)
    return "\n\n".join(f"{heading} {title}\n\n{table}" if title else table for title, table in tables.items())


if __name__ == "__main__":
    print("\n\n".join(text(name) for name in sys.argv[1:] or sorted(path.stem for path in RESULTS.glob("*.json"))))
