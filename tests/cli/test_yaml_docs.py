"""The tables of docs/yaml.md are those of the configuration's fields."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mindformers_ixc.cli.yaml_docs import BEGIN, END, fields_text, main, with_fields
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.fields import FIELDS, VISION_FIELDS

DOCUMENT = Path(__file__).parents[2] / "docs" / "yaml.md"


def test_the_document_has_the_tables_of_today():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == with_fields(text, DOCUMENT.name), "run: python -m mindformers_ixc.cli.yaml_docs docs/yaml.md"


def test_every_field_has_one_row():
    rows = [line.split("`")[1] for line in fields_text().splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted([*FIELDS, *VISION_FIELDS])


def test_stale_tables_are_replaced_and_nothing_else(tmp_path):
    file = tmp_path / "yaml.md"
    file.write_text(f"before\n\n{BEGIN}\nstale\n{END}\n\nafter\n", encoding="utf-8")
    assert main([str(file)]) == 0
    assert file.read_text(encoding="utf-8") == f"before\n\n{BEGIN}\n{fields_text()}\n{END}\n\nafter\n"


@pytest.mark.parametrize("text", ["no markers", f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}", BEGIN])
def test_a_document_without_its_markers_is_refused(text, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"yaml\.md must have the line"):
        with_fields(text, "yaml.md")
    file = tmp_path / "yaml.md"
    file.write_text(text, encoding="utf-8")
    assert main([str(file)]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert file.read_text(encoding="utf-8") == text


def test_no_framework_is_imported():
    done = subprocess.run([sys.executable, "-c", "import sys, mindformers_ixc.cli.yaml_docs; "
                           "print({'mindspore', 'mindformers'} & set(sys.modules))"], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
