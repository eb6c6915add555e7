"""The report: numbers of run folders against NumPy, mistakes, hostile text, and the page in a real browser."""

import html.parser
import itertools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_partial.report import page, plots, runs
from dist_partial.report.__main__ import main
from tests.helpers.browser import Browser
from tests.helpers.letters import start


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    try:
        yield started
    finally:
        started.close()


VARIABLES = [("embedding/embeddings", [16, 4], True), ("block_0/kernel", [4, 30], True), ("block_0/bias", [30], False)]
VARIABLES += [("block_1/kernel", [4, 30], True), ("head/kernel", [4, 16], True)]
HOSTILE = (
    '</pre><script>window.hacked=1</script><img src=x onerror="window.hacked=1">\'"><b>&amp;$\\x$\u202e\x00\x1b[31m'
)


def bytes_of(payload: int) -> dict[str, Any]:
    """Of sums among four workers."""
    return {"wire_bytes": payload, "nic_bytes": 1.5 * payload}


def write_run(folder: Path, steps: int = 60, every: int = 20, **change: Any) -> Path:
    """A folder as training writes it; `change` replaces a file's content by its name without the ending."""
    rng = np.random.default_rng(len(folder.name))
    folder.mkdir(parents=True)
    units = change.pop("units", lambda path: path.split("/")[0])
    entries = [
        {
            "path": path,
            "shape": shape,
            "dtype": "float32",
            "trained": trained,
            "unit": units(path) if trained else None,
            "rule": "train .*" if trained else "freeze .*/bias",
            "rows": None,
            "reduction": "all-reduce" if trained else None,
            "wire_bytes_per_step": 4 * math.prod(shape) * trained,
        }
        for path, shape, trained in change.pop("variables", VARIABLES)
    ]
    sent = sum(entry["wire_bytes_per_step"] for entry in entries)
    full = 4 * sum(math.prod(entry["shape"]) for entry in entries)
    plan = {"variables": entries, "wire_bytes_per_step": sent, "full_wire_bytes_per_step": full, "workers": 4}
    plan |= {"nic_bytes_per_step": 1.5 * sent, "full_nic_bytes_per_step": 1.5 * full}
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 1 + 4 * math.exp(-step / 20) + 0.1 * rng.random()
        rows.append({"step": step, "split": "train", "loss": loss, "gradient_norm": 1.0} | bytes_of(sent * step))
        rows[-1]["wire_share"] = sent / full
        if step % every == 0:
            more = {"examples": 11, "accuracy": 0.5, "bits_per_byte": loss / math.log(2), "auc": 0.75} | bytes_of(
                sent * step
            )
            rows.append({"step": step, "split": "eval", "loss": loss} | more)
    texts = [{"step": step, "temperature": 0.6, "prompt": "\ndef ", "text": f"a{step}"} for step in (every, steps)]
    traffic = {"workers": 4, "first_step": 1, "last_step": steps, "planned_bytes": sent * steps, "step_ms": 12.5}
    files = {
        "plan.json": json.dumps(plan),
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in change.pop("before", []) + rows),
        "samples.jsonl": "".join(json.dumps(row) + "\n" for row in texts),
        "traffic.json": json.dumps(traffic),
        "run_fingerprint.json": json.dumps({"data": {"name": "letters"}, "seed": 1}),
        "operative_config.gin": f"# Parameters for run:\nrun.model = @small\nrun.steps = {steps}\n",
    }
    for name, content in files.items():
        content = change.get(name.split(".")[0], content)
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def report(tmp_path: Path, *folders: Path) -> str:
    output = tmp_path / "report.html"
    assert main([*[f"--run_dir={folder}" for folder in folders], f"--output={output}"]) == 0
    return output.read_text()


class Elements(html.parser.HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def switch(step: int, *units: str) -> dict[str, Any]:
    return {"step": step, "split": "plan", "digest": "0", "units": list(units)}


def of_workers(split: str, step: int, seconds: Any, **more: Any) -> dict[str, Any]:
    return {"step": step, "split": split, "seconds": seconds, **more}


def test_workers_waits_and_losses(tmp_path):
    """Added up for as many workers as there were last; what is no number counts as nothing."""
    rows = [
        of_workers("workers", 20, 10.0, waited_seconds=[1.0, 2.0, 4.0]),
        of_workers("fault", 25, 1.5, workers=[1]),
        of_workers("fault", 30, 6.5, workers=[2], of=3, now=2),
        of_workers("workers", 40, 8.0, waited_seconds=[2.0, 0.5]),
        of_workers("fault", 45, 2.0, workers=[]),
        of_workers("fault", 50, HOSTILE, workers=HOSTILE, of=HOSTILE, now=True),
        of_workers("workers", 60, "?", waited_seconds=[HOSTILE, None]),
    ]
    folder = write_run(tmp_path / "one", before=rows)
    [run] = runs.read([folder])
    assert run.staff.waited == (3.0, 2.5) and run.staff.slowest == 1 and run.staff.seconds == 18.0
    assert run.staff.losses == (
        (25, "worker 1", 1.5),
        (30, "worker 2; 2 instead of 3 workers go on", 6.5),
        (45, "a connection", 2.0),
        (50, "a connection", 0.0),
    )
    assert run.staff.goodput == 18 / 28
    text = "".join(Elements(report(tmp_path, folder)).text.split())  # cells are next to each other
    assert "Goodput64.3%:stepstook18s,anduntiltheywentonafteraloss10swentby." in text
    assert "worker2;2insteadof3workersgoon306.5000s" in text
    assert "theotherswaitedforworker1.workerwaitedofthetimeworker03s16.7%worker12.5000s13.9%" in text
    assert "Goodput" not in report(tmp_path, write_run(tmp_path / "other"))


def test_numbers_of_a_run(tmp_path):
    [run] = runs.read([write_run(tmp_path / "one")])
    train = [json.loads(line) for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in train if row["split"] == "train"]
    np.testing.assert_array_equal(run.train, [[i + 1, loss, 6 * 368 * (i + 1)] for i, loss in enumerate(losses)])
    assert [row["step"] for row in run.evaluations] == [20, 40, 60]
    assert (run.trained_parameters, run.parameters, run.last_step) == (368, 398, 60)
    cells = page.summary(run)
    assert cells["selected parameters"] == "368 (92.5%)"
    assert cells["bytes sent"] == "132\u00a0kB"  # of sums among four, 1.5 * 4 * 368 * 60
    assert cells["of exchanging everything"] == "92.5%"
    assert cells["bits per byte"] == f"{losses[-1] / math.log(2):.4f}"
    assert (cells["accuracy"], cells["auc"]) == ("0.5000", "0.7500")  # whatever metrics the run has
    [strip] = [strip for strip in run.strips() if strip.name == "block_0"]
    assert strip.spans == ((0, 60, 120 / 150),)


def test_every_metric_and_the_learning_rate_are_drawn(tmp_path):
    """Of steps and of evaluations in one plot; of a run that lacks one, the others."""
    rows = [
        {"step": step, "split": "train", "loss": 1.0, "learning_rate": 0.1 / step, "auc": 0.5 if step % 2 else None}
        for step in range(61, 81)
    ]
    rows += [{"step": 80, "split": "eval", "loss": 1.0, "auc": 0.75, "f1_score_0": 0.25, "examples": 11}]
    runs_of = runs.read([write_run(tmp_path / "one", before=rows), write_run(tmp_path / "other")])
    assert set(runs_of[0].measures) == {"auc", "f1_score_0", "accuracy", "bits_per_byte", "learning_rate"}
    np.testing.assert_array_equal(runs_of[0].measured["learning_rate"][:, 0], range(61, 81))
    assert np.isfinite(runs_of[0].measured["auc"][:, 1]).sum() == 10
    titles = {figure.title: figure for figure in page.figures(runs_of)}
    assert {"Auc", "F1 score 0", "Accuracy", "Learning rate"} <= titles.keys()
    assert titles["Learning rate"].note == "Of each step."
    assert titles["Auc"].note.endswith("Marked: held-out.")
    text = report(tmp_path, tmp_path / "one", tmp_path / "other")
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "Gradient norm" not in titles


def test_curves_are_binned_as_by_hand():
    rng = np.random.default_rng(0)
    x, y = np.arange(1.0, 1002), rng.normal(size=1001)
    y[[3, 500]] = np.nan
    steps, mean, low, high = plots.binned(x, y, 10)
    kept = [(a, b) for a, b in zip(x, y, strict=True) if not math.isnan(b)]
    groups = [[(a, b) for a, b in kept if min(int((a - 1) / 100), 9) == bin] for bin in range(10)]
    np.testing.assert_allclose(steps, [np.mean([a for a, _ in group]) for group in groups])
    np.testing.assert_allclose(mean, [np.mean([b for _, b in group]) for group in groups])
    assert low.tolist() == [min(b for _, b in group) for group in groups]
    assert high.tolist() == [max(b for _, b in group) for group in groups]
    few = plots.binned(x[:5], y[:5], 10)
    assert few[0].tolist() == [1, 2, 3, 5]
    assert len(plots.binned(np.zeros(50), np.arange(50.0), 10)[0]) == 1


def test_what_was_trained_when_follows_the_switches(tmp_path):
    rows = [switch(1, "embedding", "block_0"), switch(11, "block_1"), switch(41, "block_0", "head"), switch(90, "head")]
    [run] = runs.read([write_run(tmp_path / "one", before=rows)])
    shares = {strip.name: strip.spans for strip in run.strips()}
    phases = [(0, 10), (10, 40), (40, 60)]
    for name, on in {"embedding": [1, 0, 0], "block_0": [0.8, 0, 0.8], "block_1": [0, 1, 0], "head": [0, 0, 1]}.items():
        assert shares[name] == tuple((*phase, share) for phase, share in zip(phases, on, strict=True)), name
    block = next(strip for strip in run.strips() if strip.name == "block_0")
    assert block.total == pytest.approx(0.8 * 30 / 60)
    assert plots.cells(block, 60, 100) == [(0, 10, 0.875), (40, 60, 0.875)]  # eighths, rounded up


@pytest.mark.parametrize("units", [(".*/kernel", ".*"), ("phases 1+2", "phase 2")])
def test_units_that_are_no_layers_are_those_of_the_plan(units, tmp_path):
    rows = [switch(1, units[0]), switch(31, *units)]
    folder = write_run(tmp_path / "one", before=rows, units=lambda path: units["embeddings" in path])
    [run] = runs.read([folder])
    shares = {strip.name: [share for _, _, share in strip.spans] for strip in run.strips()}
    assert shares == {"embedding": [0, 1], "block_0": [0.8, 0.8], "block_1": [1, 1], "head": [1, 1]}


def test_a_layer_of_two_units_is_trained_in_parts(tmp_path):
    variables = [("block_0/kernel", [4, 30], True), ("block_0/bias", [30], True), ("head/kernel", [4, 16], False)]
    rows = [switch(1, "kernel"), switch(31, "bias"), switch(46, "kernel", "bias")]
    folder = write_run(tmp_path / "one", before=rows, variables=variables, units=lambda path: path.split("/")[1])
    [run] = runs.read([folder])
    shares = {strip.name: [share for _, _, share in strip.spans] for strip in run.strips()}
    assert shares == {"block_0": [0.8, 0.2, 1], "head": [0, 0, 0]}


def test_units_that_nobody_knows_have_strips_of_their_own(tmp_path):
    [run] = runs.read([write_run(tmp_path / "one", before=[switch(1, "left"), switch(31, "right")])])
    assert {strip.name: [share for *_, share in strip.spans] for strip in run.strips()} == {
        "left": [1, 0],
        "right": [0, 1],
    }


def test_a_plan_without_units_has_a_strip_for_each_that_was_switched(tmp_path):
    folder = write_run(tmp_path / "one", before=[switch(1, "head"), switch(31, "head", "block_1")])
    plan = json.loads((folder / "plan.json").read_text())
    for variable in plan["variables"]:
        del variable["unit"]
    (folder / "plan.json").write_text(json.dumps(plan))
    [run] = runs.read([folder])
    strips = {strip.name: [share for *_, share in strip.spans] for strip in run.strips()}
    assert strips == {"head": [1, 1], "block_1": [0, 1]}


def test_many_layers_share_rows_and_many_switches_columns():
    same = [runs.Strip(f"layer_{i}", ((0, 100, float(i >= 400)),)) for i in range(500)]
    assert [strip.name for strip in plots.merged(same)] == ["layer_0 … layer_399 (400)", "layer_400 … layer_499 (100)"]
    busy = runs.Strip("busy", tuple((i, i + 1, float(i % 4 == 0)) for i in range(1000)))
    assert plots.cells(busy, 1000, 50) == [(0, 1000, 0.25)]


def test_names_tell_folders_apart(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a/run", "b/run", "other")]
    assert [run.name for run in runs.read([*folders, folders[0]])] == ["a/run", "b/run", "other"]


@pytest.mark.parametrize(
    "prepare,arguments,message",
    [
        ("", [], "no --run_dir: name the folder of a run"),
        ("", ["--run_dir={tmp}/quickstar"], "nearest: '{tmp}/quickstart'"),
        ("", ["--run_dir={tmp}/quickstart/a/b"], "name the folder of a run, such as runs/quickstart"),
        ("", ["--run_dir={tmp}"], "quickstart in it is; name a folder that training has written"),
        ("", ["--run_dir={tmp}/quickstart/plan.json"], "is a file: name the run folder"),
        ("plan.json", ["--run_dir={tmp}/quickstart"], "is no run folder: it has no plan.json"),
        ('{"variables": []}', ["--run_dir={tmp}/quickstart"], "plan.json is damaged: it lists no variables"),
        ('{"variables": [', ["--run_dir={tmp}/quickstart"], "plan.json is damaged"),
        ('{"variables": [{"path": 1}]}', ["--run_dir={tmp}/quickstart"], 'plan.json is damaged at {"path": 1}'),
        ("", ["--run_dir={tmp}/quickstart", "--output={tmp}/quickstart/plan.json"], "ends in .html"),
        ("", ["--run_dir={tmp}/quickstart", "--output={tmp}/absent/a.html"], "there is no folder {tmp}/absent"),
        ("", ["--run_dir={tmp}/quickstart", "--output={tmp}/folder.html"], "choose another --output"),
        ("", ["--run_dirs=a"], "Unknown command line flag 'run_dirs'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(prepare, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plan = write_run(tmp_path / "quickstart") / "plan.json"
    (tmp_path / "folder.html").mkdir()
    if prepare == "plan.json":
        plan.unlink()
    elif prepare:
        plan.write_text(prepare)
    before = sorted(tmp_path.rglob("*"))
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message.replace("{tmp}", str(tmp_path)) in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_running_run_and_damaged_lines(tmp_path):
    whole = write_run(tmp_path / "whole")
    metrics = (whole / "metrics.jsonl").read_bytes()
    text = report(tmp_path, whole)
    (whole / "metrics.jsonl").write_bytes(metrics + b'{"step": 61, "spl')
    assert report(tmp_path, whole) == text
    damaged = b'\xff\x00\n[1]\n{"step": "x", "split": "train"}\n{"step": 3}\n' + b"[" * 100_000 + b"\n"
    (whole / "metrics.jsonl").write_bytes(damaged + metrics)
    text = Elements(report(tmp_path, whole)).text
    assert "5 lines of metrics.jsonl cannot be read and are left out." in text


def test_numbers_that_are_none(tmp_path):
    rows = [{"step": 61 + i, "split": "train", "loss": value} for i, value in enumerate([None, "x", True, 10**400])]
    one = write_run(tmp_path / "one", before=[*rows, {"step": 65, "split": "eval", "loss": None}])
    with open(one / "metrics.jsonl", "a") as file:
        file.write('{"step": 66, "split": "train", "loss": NaN, "nic_bytes": Infinity}\n')
    assert "The loss of 5 steps is not finite and is left out of the plots." in Elements(report(tmp_path, one)).text


@pytest.mark.parametrize("metrics", [None, "", '{"step": 1, "spl'])
def test_a_run_without_metrics_has_its_plan(metrics, tmp_path):
    nothing = {"metrics": metrics, "samples": None, "traffic": None, "operative_config": None}
    text = report(tmp_path, write_run(tmp_path / "new", **nothing))
    assert "No step is recorded yet" in text
    assert "block_0/kernel" in text
    assert "nan" not in Elements(text).text
    assert Elements(text).tags.count("svg") == text.count('class="mark"')  # the legend, and no plots


def test_one_replica_sends_nothing(tmp_path):
    rows = [{"step": step, "split": "train", "loss": 1.0, "nic_bytes": 0} for step in (1, 2)]
    rows.append({"step": 2, "split": "eval", "loss": 1.0, "nic_bytes": 0})
    alone = write_run(tmp_path / "alone", metrics="".join(json.dumps(row) + "\n" for row in rows))
    text = report(tmp_path, alone)
    assert "Nothing is sent" in text
    assert "over bytes" not in text


def hostile_run(tmp_path: Path) -> Path:
    variables = [(HOSTILE, [4, 4], True), ("b/kernel", [4, 4], True)]
    rows = [{"step": 60, "temperature": 0.6, "prompt": HOSTILE, "text": HOSTILE + "\ud800"}]
    return write_run(
        tmp_path / HOSTILE.replace("/", "").replace("\x00", ""),
        variables=variables,
        before=[switch(1, HOSTILE), switch(5, "b")],
        samples="".join(json.dumps(row) + "\n" for row in rows),
        fingerprint=json.dumps({"data": {"name": HOSTILE}, "schedule": HOSTILE}),
        operative_config=f"run.model = @{HOSTILE}\n{HOSTILE}\n",
        traffic=json.dumps({"workers": 2, "first_step": HOSTILE, "step_ms": HOSTILE}),
    )


def test_hostile_text_stays_text(tmp_path):
    text = report(tmp_path, hostile_run(tmp_path), write_run(tmp_path / "other"))
    found = Elements(text)
    assert not {"script", "img", "iframe", "object", "link"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert not set(map(chr, [*range(9), *range(11, 32), 0x202E])) & set(text)
    shown = HOSTILE.replace("\u202e", "\ufffd").replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
    assert found.text.count(shown) >= 4  # prompt, sample, layer, configuration


def test_nothing_is_fetched(tmp_path):
    text = report(tmp_path, write_run(tmp_path / "one", before=[switch(1, "head")]), write_run(tmp_path / "two"))
    assert "http" not in text.replace("http-equiv", "")
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    links = [value for name, value in Elements(text).attributes if name in ("src", "href", "xlink:href")]
    assert links
    assert all(value.startswith("#") for value in links)
    ids = [value for name, value in Elements(text).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in links} <= set(ids)


@pytest.mark.slow
def test_a_large_run_is_thinned(tmp_path):
    steps = 100_000
    variables = [(f"layer_{i}/kernel", [8, 8], True) for i in range(500)]
    rows = [switch(i, f"layer_{i * 7 % 500}", f"layer_{i * 3 % 500}") for i in range(1, steps, 10)]
    samples = [
        {"step": 1 + i // 9, "temperature": i % 9 / 4, "prompt": f"p{i}", "text": "x" * 500} for i in range(20_000)
    ]
    large = write_run(
        tmp_path / "large",
        steps,
        100,
        before=rows,
        variables=variables,
        samples="".join(json.dumps(row) + "\n" for row in samples),
    )
    assert len(report(tmp_path, large)) < 6e6
    # A unit is on where a switch names it, and of the last ten steps of a hundred thousand nothing is lost.
    expected = dict.fromkeys((f"layer_{i}" for i in range(500)), 0)
    for row in rows:
        for unit in set(row["units"]):
            expected[unit] += 10
    [run] = runs.read([large])
    assert {strip.name: strip.total * steps for strip in run.strips()} == pytest.approx(expected)


def test_a_page_of_many_runs_tells_them_apart(tmp_path):
    text = report(tmp_path, *[write_run(tmp_path / f"run_{i}", 6, 2) for i in range(10)])
    legend = re.search(r'<nav class="legend".*?</nav>', text, re.DOTALL)[0]
    marks = re.findall(r"<svg.*?</svg>", legend, re.DOTALL)
    assert len(set(marks)) == len(marks) == 10


def test_where_runs_differ(tmp_path):
    one = write_run(tmp_path / "one", operative_config="run.steps = 60\nrun.rules = \\\n    [('train',\n      '.*')]\n")
    other = write_run(tmp_path / "other", operative_config="run.steps = 60\nrun.seed = 2\n")
    assert page.differences(runs.read([one, other])) == [
        ("run.rules", ["[('train', '.*')]", ""]),
        ("run.seed", ["", "2"]),
    ]


def test_samples_stand_side_by_side(tmp_path):
    def texts(temperature: float) -> str:
        rows = [
            {"step": step, "temperature": temperature, "prompt": "p", "text": f"{step}"} for step in range(10, 200, 10)
        ]
        return "".join(json.dumps(row) + "\n" for row in rows)

    folders = [write_run(tmp_path / f"at_{t}", samples=texts(t)) for t in (1.0, 0.2)]
    last, *earlier = page.samples(runs.read(folders))
    assert [(sample.run, sample.temperature, sample.step) for sample in last[1]] == [(1, 0.2, 190), (0, 1.0, 190)]
    assert len(earlier) == 8
    assert (earlier[0][0], earlier[-1][0]) == ("step 180", "step 10")


ROWS = st.fixed_dictionaries(
    {},
    optional={
        "step": st.one_of(st.integers(-2, 80), st.integers(), st.none(), st.text()),
        "split": st.sampled_from(["train", "eval", "plan", "x", 3]),
        "loss": st.one_of(st.floats(), st.integers(), st.none(), st.text()),
        "nic_bytes": st.one_of(st.floats(), st.integers(), st.booleans()),
        "units": st.lists(st.one_of(st.sampled_from(["embedding", "head", "block_0"]), st.integers(), st.text())),
        "temperature": st.one_of(st.floats(), st.integers(), st.text()),
        "prompt": st.one_of(st.text(), st.integers()),
        "text": st.text(),
    },
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(ROWS, max_size=12), noise=st.binary(max_size=40))
def test_whatever_is_in_the_lines_there_is_a_page(rows, noise, tmp_path_factory):
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows) + noise
    folder = write_run(tmp_path_factory.mktemp("fuzz") / "run", metrics=lines, samples=lines)
    text = page.page(runs.read([folder]))
    assert set(Elements(text).tags).isdisjoint(["script", "img"])
    text.encode()


def test_figures_in_words():
    assert [plots.bytes_text(value) for value in (0, 999, 1234, 49_497_600, 999_600, math.nan)] == [
        "0\u00a0B",
        "999\u00a0B",
        "1.23\u00a0kB",
        "49.5\u00a0MB",
        "1\u00a0MB",
        "-",
    ]
    shares = (0, 1, 0.456, 0.0001, 0.99999, 1e-9, 1 - 1e-9)
    assert [plots.percent(share) for share in shares] == [
        *("0%", "100%", "45.6%", "0.01%", "99.9990%"),
        *("<0.0001%", ">99.9999%"),
    ]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_in_a_browser(width, browser, tmp_path):
    rows = [switch(1, "embedding", "block_0"), switch(11, "block_1"), switch(41, "block_0", "head")]
    folders = [
        write_run(tmp_path / "schedule", before=rows),
        hostile_run(tmp_path),
        write_run(tmp_path / "x" / ("n" * 90)),
    ]
    report(tmp_path, *folders)
    backgrounds = []
    for dark in (False, True):
        browser.open(tmp_path / "report.html", width, dark=dark)
        browser.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert browser.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
        assert browser.evaluate("typeof window.hacked") == "undefined"
        drawn = browser.evaluate(_DRAWN)
        assert len(drawn) == 6 + len(folders)  # two metrics
        for shown, inside, curves, text in drawn:
            assert shown == 1, "one of the two widths"
            assert inside
            assert curves > 0
            assert text >= 9
        backgrounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        contrasts = browser.evaluate(_CONTRASTS)
        assert min(contrasts["text"]) >= 4.5, contrasts
        assert min(contrasts["series"]) >= 3, contrasts
        unnamed = "[...document.querySelectorAll('[role=img], [role=region]')].filter(e => !e.ariaLabel).length"
        assert browser.evaluate(unnamed) == 0
        levels = browser.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(e => +e.tagName[1])")
        assert levels[0] == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        assert browser.complaints() == []
    assert backgrounds[0] != backgrounds[1]


# Of each plot: how many of its drawings are shown, whether all of the shown one lies within the page, how many of its
# curves or areas in a run's colour have a size, and the size of its text in CSS pixels.
_DRAWN = """
[...document.querySelectorAll('.plot')].map(plot => {
  const shown = [...plot.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().height > 0);
  const svg = shown[0], box = svg.getBoundingClientRect();
  const sized = [...svg.querySelectorAll('path')].filter(path => {
    const at = path.getBoundingClientRect();
    return path.style.cssText.includes('--series') && at.width > 20 && at.bottom <= box.bottom + 1;
  });
  const texts = [...svg.querySelectorAll('text')].map(text => parseFloat(getComputedStyle(text).fontSize));
  const scale = box.width / svg.viewBox.baseVal.width;
  return [shown.length, box.left >= 0 && box.right <= innerWidth, sized.length, Math.min(...texts) * scale];
})
"""
# WCAG 2.2's contrast of the page's colours against its grounds.
_CONTRASTS = """
(() => {
  const probe = document.body.appendChild(document.createElement('i'));
  const light = name => {
    probe.style.color = `var(--${name})`;
    const [r, g, b] = getComputedStyle(probe).color.match(/[\\d.]+/g).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const grounds = ['paper', 'panel', 'track'].map(light);
  const text = ['ink', 'soft', 'link'].flatMap(name => grounds.map(ground => ratio(light(name), ground)));
  const series = [...Array(8).keys()].map(i => ratio(light(`series-${i}`), grounds[0]));
  probe.remove();
  return {text, series};
})()
"""


@pytest.mark.slow
def test_a_run_that_was_trained(letters, tmp_path):
    """From the folders of real runs, one of which goes on with a schedule."""
    params = ["run.rules = [('train', '.*')]", "run.schedule = @lisa()", "lisa.every = 3", "lisa.count = 1"]
    assert start(letters, tmp_path / "constant") == 0
    assert start(letters, tmp_path / "lisa", *params, "sample.temperature = 1.0") == 0
    constant, lisa = runs.read([tmp_path / "constant", tmp_path / "lisa"])
    plan = json.loads((tmp_path / "constant" / "plan.json").read_text())
    assert constant.trained_parameters == plan["trained_parameters"]
    assert constant.parameters == plan["total_parameters"]
    assert {strip.name: strip.total for strip in constant.strips()}["embedding"] == 0
    rows = [json.loads(line) for line in (tmp_path / "lisa" / "metrics.jsonl").read_text().splitlines()]
    # What the strips say was trained, against the journal's own count.
    counts = {row["step"]: row["trained_parameters"] for row in rows if row["split"] == "plan"}
    sizes: dict[str, int] = {}
    for variable in lisa.variables:
        sizes[variable.layer] = sizes.get(variable.layer, 0) + math.prod(variable.shape)
    trained: dict[int, float] = {}
    for strip in lisa.strips():
        for begin, _, share in strip.spans:
            trained[begin + 1] = trained.get(begin + 1, 0) + share * sizes[strip.name]
    assert trained == pytest.approx(counts)
    text = report(tmp_path, tmp_path / "constant", tmp_path / "lisa")
    assert re.findall(r"</b> · temperature (\S+) · step (\d+)", text)[:2] == [("0.6", "12"), ("1.0", "12")]
