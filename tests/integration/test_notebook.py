"""A notebook in a real Jupyter kernel: run from the first cell to the last, edited, and run again."""

import ast

import nbclient
import nbformat
import numpy as np
import pytest

from dist_partial.training import metric_writer
from tests import ROOT
from tests.helpers import snippets

CELLS = {
    "imports": """
        import keras
        import numpy as np
        from dist_partial import train
        x = np.random.default_rng(0).normal(size=(200, 3)).astype("float32")
        y = (x.sum(1) > 0).astype("int32")
    """,
    "model": """
        model = keras.Sequential([keras.Input([3]), keras.layers.Dense(8, "relu"), keras.layers.Dense(2)])
    """,
    "train": """
        result = train(model, (x, y), rules=[("train", "dense_1/.*"), ("freeze", ".*")],
                       optimizer=keras.optimizers.Adam(0.02), steps=30, eval_every=10)
        result
    """,
    "sweep": """
        losses = {}
        for name in ("dense", "dense_1"):
            for replicas in (1, 2):
                rules = [("train", f"{name}/.*"), ("freeze", ".*")]
                found = train(model, (x, y), rules=rules, steps=3, replicas=replicas)
                losses[name, replicas] = found.metrics["loss"]
        print(len(losses), result.metrics["step"], float(np.mean(model.predict(x, verbose=0).argmax(1) == y)) > 0.5)
    """,
    "mistake": """
        try:
            train(model, (x, y), rules=[("train", ".*")], batch_size=5)
        except Exception as error:
            print(type(error).__name__, error)
    """,
}


def cell_of(code: str) -> nbformat.NotebookNode:
    lines = code.strip("\n").splitlines()
    indentation = len(lines[0]) - len(lines[0].lstrip())
    return nbformat.v4.new_code_cell("\n".join(line[indentation:] for line in lines))


def printed(cell) -> str:
    return "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout")


@pytest.mark.slow
def test_from_the_first_cell_to_the_last_twice(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[cell_of(code) for code in CELLS.values()])
    cells = dict(zip(CELLS, notebook.cells, strict=True))
    client = nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel():
        for steps in (30, 40):
            cells["train"].source = cells["train"].source.replace("steps=30", f"steps={steps}")
            for number, cell in enumerate(notebook.cells):
                client.execute_cell(cell, number)
            [shown] = [output["data"] for output in cells["train"].outputs if output.output_type == "execute_result"]
            assert f"{steps} of {steps} steps" in shown["text/plain"]
            assert "<svg" in shown["text/html"] and "<td>dense_1</td>" in shown["text/html"]
            assert f"step {steps}: held-out loss" in printed(cells["train"])
            assert printed(cells["sweep"]).splitlines()[-1] == f"4 {steps} True"
            assert printed(cells["mistake"]).startswith("UserError train has no argument 'batch_size'")
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(names) == 10 and all(name.startswith("sequential-") for name in names)


# Of the recipe's cells, before the second time: the width of the code, which rules, and how many replicas.
EDITS = (
    ("keras.layers.Dense(2, name=name)", "keras.layers.Dense(3, name=name)"),
    (r'r"decoder/.*"', r'r"(mean|decoder)/.*"'),
    ("eval_every=100)", "eval_every=100, replicas=2)"),
)


def recipe() -> dict[str, nbformat.NotebookNode]:
    """The notebook of the documentation: its cells, by the last line of each."""
    blocks = snippets.blocks(ROOT / "docs" / "how_to" / "recipes.md")
    blocks = [block for block in blocks if "A notebook" in snippets.headings(block)[1]]
    return {block.code.splitlines()[-1]: nbformat.v4.new_code_cell(block.code) for block in blocks}


@pytest.mark.slow
def test_the_recipe_of_the_documentation_twice_edited_in_between(tmp_path):
    cells = recipe()
    notebook = nbformat.v4.new_notebook(cells=list(cells.values()))
    client = nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}})
    with client.setup_kernel():
        for width, replicas, frozen in ((2, 1, 2 * 26), (3, 2, 39)):
            for number, cell in enumerate(notebook.cells):
                client.execute_cell(cell, number)  # raises what the cell raises
            total = 3 * 12 * width + 2 * width + 12  # two dense layers of `width` units, and one of 12
            trained = [total - frozen, total]
            lines = "".join(printed(cell) for cell in notebook.cells).splitlines()
            assert [line for line in lines if line.startswith("trained: ")] == [
                f"trained: {part} of {total} parameters ({part / total:.2%})" for part in trained
            ]
            assert sum(line.startswith(f"replicas: {replicas}, ") for line in lines) == 2
            evaluations = [float(line.split()[4]) for line in lines if ": held-out loss " in line]
            tracked = ast.literal_eval(printed(cells["result"]))
            [part, everything] = tracked.values()
            np.testing.assert_allclose(part + everything, evaluations, atol=6e-4)
            assert everything[0] > everything[1] < part[1]
            [shown] = [each["data"] for each in cells["result"].outputs if each.output_type == "execute_result"]
            assert "200 of 200 steps" in shown["text/plain"] and f"{total} of {total} parameters" in shown["text/plain"]
            assert "<svg" in shown["text/html"] and "<td>log_variance</td>" in shown["text/html"]
            for old, new in EDITS if width == 2 else ():
                [cell] = [cell for cell in notebook.cells if old in cell.source]
                cell.source = cell.source.replace(old, new)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [f"vae-{n}" for n in (1, 2, 3, 4)]


def test_the_progress_bar_is_drawn_a_few_times_a_second(tmp_path, capsys):
    """A kernel sends each drawing to the notebook, which keeps it."""
    with metric_writer.MetricWriter(tmp_path, 0, 1000, active=True) as writer:
        for step in range(1, 1001):
            writer.train(step, np.ones(1), np.ones(1), np.array([[1, 1, 2]]) * [[step - 1], [step]])
    drawn = capsys.readouterr().err
    assert "1000/1000" in drawn and "loss 1.000" in drawn.split("\r")[-1] and drawn.count("\r") < 200
