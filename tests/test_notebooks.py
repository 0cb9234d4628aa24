"""The notebooks: what is kept of their runs, and that they run and come to the same results."""
from __future__ import annotations

import ast
import re

import pytest

nbformat = pytest.importorskip("nbformat", reason="notebooks are run by nbclient")
pytest.importorskip("nbclient", reason="notebooks are run by nbclient")
pytest.importorskip("ipykernel", reason="notebooks are run by nbclient")

from run_notebooks import NOTEBOOKS, execute, tidy  # noqa: E402 - only where its libraries are

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))

# The largest that is kept, bytes.
LARGEST = 300_000

# Names of places on the machine of whoever ran a notebook.
MACHINE = re.compile(r"(?<![\w.])/(?:tmp|root|home|usr|opt|var|work)/|site-packages")


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def streams(notebook, name):
    return [output.text for cell in code(notebook) for output in cell.outputs
            if output.output_type == "stream" and output.name == name]


def result(notebook):
    """The value of the last cell."""
    return ast.literal_eval(code(notebook)[-1].outputs[-1].data["text/plain"])


def pictures(notebook):
    return [output for cell in code(notebook) for output in cell.outputs if "image/png" in output.get("data", ())]


def kept(name):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_there_are_two():
    assert [path.stem for path in PATHS] == ["plan_a_cluster", "train_and_ask"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_what_is_kept_is_a_whole_run_and_names_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert not [output for cell in code(notebook) for output in cell.outputs if output.output_type == "error"]
    assert streams(notebook, "stderr") == []
    assert len(pictures(notebook)) >= 3
    assert path.stat().st_size < LARGEST
    said = "".join(streams(notebook, "stdout"))
    assert not MACHINE.search(said) and "\x1b" not in said and "\r" not in said
    assert max(len(text.splitlines()) for text in streams(notebook, "stdout")) < 40      # no walls of logs


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\((?!https?://)([^)#\s]+)", text)
    assert len(targets) >= 3
    assert all((path.parent / target).exists() for target in targets), targets


def test_a_run_is_kept_without_paths_and_signs_of_a_terminal(tmp_path):
    output = nbformat.v4.new_output("stream", text=f"\x1b[1mmodel\x1b[0m in {tmp_path}/own\r\n\x1b[Kdone\n")
    figure = nbformat.v4.new_output("display_data", {"image/png": "x", "image/jpeg": "y", "text/plain": "<Figure>"})
    cell = nbformat.v4.new_code_cell("run()", outputs=[output, figure], metadata={"execution": {"at": "noon"}})
    kernel = {"name": "python3", "display_name": "Python 3"}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel, "other": 1})
    cell, = tidy(notebook, tmp_path).cells
    assert cell.outputs[0].text == "model in own\ndone\n"
    assert (cell.outputs[1].data, cell.metadata) == ({"image/png": "x"}, {})
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


@pytest.mark.slow
def test_train_and_ask_ends_in_right_answers(tmp_path):
    notebook = execute(NOTEBOOKS / "train_and_ask.ipynb", tmp_path)
    scores = result(notebook)
    assert scores["exact match, %"] == 100.0
    assert scores["asked about another picture, %"] <= 20.0
    assert streams(notebook, "stderr") == []
    assert len(pictures(notebook)) == len(pictures(kept("train_and_ask")))
    assert (tmp_path / "own" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_plan_a_cluster_says_what_is_kept(tmp_path):
    notebook, before = execute(NOTEBOOKS / "plan_a_cluster.ipynb", tmp_path), kept("plan_a_cluster")
    found = result(notebook)
    assert found == result(before), "the formulae have changed; run: python scripts/run_notebooks.py"
    assert streams(notebook, "stdout") == streams(before, "stdout")
    days = found["days"]
    # more devices hold less each, so that tensor parallel 2 fits, which is quicker than 4
    assert 2 <= days[8] / days[16] < 2.4 and 8 <= days[8] / days[64] < 9.6
    assert streams(notebook, "stderr") == [] and list(tmp_path.iterdir()) == []
