"""Result files: what is in them, and that a text stays a text."""
from __future__ import annotations

import openpyxl
import pytest

from mindformers_ixc.benchmarking import workbook
from mindformers_ixc.benchmarking.table_file import Row
from mindformers_ixc.benchmarking.workbook import check_library, write_results
from mindformers_ixc.errors import ConfigError


def read(path):
    return [list(row) for row in openpyxl.load_workbook(path).active.iter_rows(values_only=True)]


def test_the_table_without_its_pictures_and_with_what_was_answered(tmp_path):
    rows = [Row({"index": 1, "question": "=1+1", "hint": None, "share": 0.5}, (0, 0), 1),
            Row({"index": 2, "question": "a\nb\x07", "hint": "x", "share": 2.0}, (0, 0), 1)]
    columns = ["index", "image", "question", "hint", "share"]
    assert write_results(tmp_path / "m.xlsx", columns, rows, ["=A1", "007"]) == 0
    assert read(tmp_path / "m.xlsx") == [["index", "question", "hint", "share", "prediction"],
                                         [1, "=1+1", None, 0.5, "=A1"], [2, "a\nb", "x", 2, "007"]]
    kinds = [cell.data_type for cell in openpyxl.load_workbook(tmp_path / "m.xlsx").active[2]]
    assert kinds == ["n", "s", "n", "n", "s"]            # no formula that a spreadsheet would compute


def test_long_cells_are_counted_and_an_older_column_of_answers_is_replaced(tmp_path):
    rows = [Row({"index": 1, "question": "x" * 40000, "prediction": "old"}, (0, 0), 1)]
    assert write_results(tmp_path / "m.xlsx", ["index", "question", "prediction"], rows, ["new"]) == 1
    assert read(tmp_path / "m.xlsx")[1] == [1, "x" * 32767, "new"]


def test_without_the_library_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(workbook.importlib, "import_module", lambda name: __import__("no_such_module"))
    with pytest.raises(ConfigError, match=r"need openpyxl; install it with .*mindformers_ixc\[eval\]"):
        check_library()
