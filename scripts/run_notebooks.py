"""Runs the notebooks anew, each in an empty folder, and writes them back with what came out.

    python scripts/run_notebooks.py [NOTEBOOK.ipynb ...]

Needs `pip install ".[tests]"`. `tests/test_notebooks.py` runs them by the same function and looks at their last cells.
"""
from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"

# Of a cell; the longest one trains.
TIMEOUT_S = 1800

# What a terminal is told and a page has no use for: colours, and that the rest of a line is to be taken away.
_CONTROL = re.compile(r"\x1b\[[\d;]*[A-Za-z]")


def execute(path: Path, folder: Path) -> NotebookNode:
    """A notebook as it comes out of a run from its first cell to its last.

    Args:
        path: of the notebook; stays as it is.
        folder: where it runs, and leaves its files.

    Raises:
        nbclient.exceptions.CellExecutionError: when a cell fails, with its text.
    """
    notebook = nbformat.read(path, as_version=4)
    # by the interpreter of this process and the command beside it, whether or not its environment is activated
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    client = NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3", coalesce_streams=True,
                            record_timing=False, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "PATH": beside, "NO_COLOR": "1"})
    return tidy(notebook, folder)


def tidy(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The notebook without what only says who ran it and where.

    Args:
        notebook: as it was run; is changed.
        folder: where it ran; files in it are named as from there.
    """
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if "text" in output:
                output.text = _CONTROL.sub("", output.text).replace(f"{folder.resolve()}/", "").replace("\r\n", "\n")
            if "image/png" in output.get("data", ()):      # once is enough: no words about it, no second picture
                output.data = {"image/png": output.data["image/png"]}
    return notebook


def main() -> None:
    """Runs the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb")))
    for path in parser.parse_args().notebooks:
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(path, Path(folder)), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
