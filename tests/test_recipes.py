"""What the recipes say: the files name bases, so the merged result of each is kept in tests/data/recipes.json.

After a change that is meant, write that file anew and read its diff:

    python tests/test_recipes.py
"""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mindformers_ixc.cli.yaml_file import read_yaml

ROOT = Path(__file__).parents[1]
SNAPSHOT = ROOT / "tests" / "data" / "recipes.json"
YAMLS = sorted((ROOT / "yaml_configs").glob("*.yaml"))
RECIPES = [path for path in YAMLS if not path.name.startswith("base_")]   # a base is no recipe, it lacks data


def text_of(value, depth: int = 1) -> str:
    """JSON with sorted keys; a mapping that is no short line has a line for each key."""
    line = json.dumps(value, sort_keys=True)
    if not isinstance(value, dict) or len(line) < 160:
        return line
    lines = [f"{' ' * depth}{json.dumps(key)}: {text_of(value[key], depth + 1)}" for key in sorted(value)]
    return "{\n" + ",\n".join(lines) + f"\n{' ' * (depth - 1)}}}"


def snapshot() -> dict:
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))


def test_every_recipe_is_in_the_snapshot_and_nothing_else():
    assert sorted(snapshot()) == [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_says_what_it_said(path):
    # as text: 1 and 1.0, or 1 and True, are equal to Python
    assert text_of(read_yaml(path)) == text_of(snapshot()[path.name])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_mindformers_reads_the_same(path, tmp_path):
    from mindformers.tools.register import MindFormerConfig

    whole = tmp_path / path.name                     # MindFormers' defaults come on top when it reads a file
    whole.write_text(yaml.safe_dump(snapshot()[path.name]), encoding="utf-8")
    assert MindFormerConfig(str(path)) == MindFormerConfig(str(whole))


if __name__ == "__main__":
    SNAPSHOT.write_text(text_of({path.name: read_yaml(path) for path in RECIPES}) + "\n", encoding="utf-8")
