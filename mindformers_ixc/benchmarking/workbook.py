"""VLMEvalKit's result files: the table without its pictures, and what was answered."""
from __future__ import annotations

import importlib
import io
import os
from collections.abc import Sequence
from typing import Any

from mindformers_ixc.benchmarking.table_file import HEAVY, Row
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import write_whole

# Letters that a cell of a workbook can have.
LONGEST_CELL = 32767


def check_library() -> None:
    """Raises `ConfigError` when workbooks cannot be written here."""
    _library()


def write_results(target: str | os.PathLike, columns: Sequence[str], rows: Sequence[Row],
                  predictions: Sequence[str]) -> int:
    """Writes a result file, whole or not at all.

    Args:
        target: the file.
        columns: of the table.
        rows: that were asked about.
        predictions: the final answer of each.

    Returns:
        Cells that were too long for a workbook and have been cut.
    """
    openpyxl = _library()
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    names = [name for name in columns if name not in HEAVY and name != "prediction"]
    sheet.append([_cell(sheet, name) for name in (*names, "prediction")])
    long = 0
    for row, prediction in zip(rows, predictions):
        values = [*(row.cells[name] for name in names), prediction]
        long += sum(isinstance(value, str) and len(value) > LONGEST_CELL for value in values)
        sheet.append([_cell(sheet, value) for value in values])
    content = io.BytesIO()
    book.save(content)
    write_whole(target, content.getvalue())
    return long


def _cell(sheet: Any, value: object) -> Any:
    """A value as a cell; a text stays a text, also one that begins like a formula."""
    if not isinstance(value, str):
        return value
    openpyxl = importlib.import_module("openpyxl")
    text = openpyxl.cell.cell.ILLEGAL_CHARACTERS_RE.sub("", value)
    cell = openpyxl.cell.WriteOnlyCell(sheet, value=text)
    cell.data_type = "s"
    return cell


def _library() -> Any:
    try:
        return importlib.import_module("openpyxl")
    except ImportError as error:
        raise ConfigError("Result files of benchmarks need openpyxl; install it with `pip install "
                          "\"mindformers_ixc[eval]\"`.") from error
