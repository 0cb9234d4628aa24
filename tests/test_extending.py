"""The steps of docs/extending.md: the size that it adds is a recipe that can be planned, its converter converts."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.data import converters
from mindformers_ixc.data.conversations import load_conversations
from mindformers_ixc.fields import FIELDS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_plan_of_the_pages_size_is_the_one_it_shows(tmp_path):
    (tmp_path / "ixc25_2b_sft.yaml").write_text(_blocks("yaml")[0], encoding="utf-8")
    command = ["plan", "--config", "ixc25_2b_sft.yaml", "--devices", "8", "--no_compile"]
    assert " ".join(command) in PAGE
    done = subprocess.run([sys.executable, "-c", "import sys, mindformers_ixc_cli as c; sys.exit(c.main())", *command],
                          cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(_blocks("text")[0])


def test_the_keys_that_the_page_changes_on_the_command_line_are_fields():
    changed = re.findall(r"--model\.model_config\.(\w+)", PAGE)
    assert changed and set(changed) <= set(FIELDS)
    tiny = read_yaml(ROOT / "yaml_configs" / "ixc25_sft_tiny.yaml")["model"]["model_config"]
    assert tiny["num_attention_heads"] % 2 == 0 and tiny["num_hidden_layers"] > 2


def test_the_pages_converter_converts(tmp_path, monkeypatch):
    monkeypatch.setattr(converters, "CONVERTERS", dict(converters.CONVERTERS))
    exec(_blocks("python")[0], {})
    rows = [{"imgname": "41699051005347.png", "query": "How many food items are shown?", "label": "14"},
            {"imgname": "2.png", "query": "", "label": "3"}, {"query": "How many?", "label": "3"}]
    (tmp_path / "train_human.json").write_text(json.dumps(rows), encoding="utf-8")
    dropped: Counter[str] = Counter()
    target = tmp_path / "charts.json"
    assert converters.convert_dataset("chart_qa", [tmp_path / "train_human.json"], target, dropped=dropped) == 1
    assert dropped == {"questions or answers that are empty or no text": 1, "questions without a picture": 1}
    (tmp_path / "41699051005347.png").write_bytes(b"read later")
    sample, = load_conversations(target)
    assert [text for _, text in sample.turns] == ["How many food items are shown?", "14"]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:mindformers_ixc|tests|scripts)/[\w/]+\.py)", PAGE))
                                        - {"tests/test_extending.py"}))
def test_files_that_the_page_names_are_there(path):
    assert (ROOT / path).is_file()
