"""A further task LoRA is one line, of `fields.TASK_LORAS`: everything else is derived from that table."""
from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import pytest

import mindformers_ixc_cli
from mindformers_ixc import fields
from mindformers_ixc.checkpoint.merge import check_merge_names
from mindformers_ixc.config import ModelConfig
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.parameters import PARTS, part_of

PACKAGE = Path(fields.__file__).parent
TASKS = tuple(fields.TASK_LORAS)


def literals(path: Path):
    """Strings of a module beside its docstrings, and those of each literal tuple, list, set and dict together."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Constant) and isinstance(child.value, str) and not isinstance(node, ast.Expr):
                yield child.lineno, child.value
        if isinstance(node, (ast.Tuple, ast.List, ast.Set, ast.Dict)):
            items = node.keys if isinstance(node, ast.Dict) else node.elts
            yield node.lineno, " ".join(str(item.value) for item in items if isinstance(item, ast.Constant))


def test_no_other_module_lists_the_tasks():
    found = [f"{path}:{line}" for path in (*PACKAGE.rglob("*.py"), Path(mindformers_ixc_cli.__file__))
             if path != PACKAGE / "fields.py" for line, text in literals(path)
             if all(re.search(rf"(?<![A-Za-z0-9]){task}(?![A-Za-z0-9])", text) for task in TASKS)]
    assert found == []


def test_parts_and_modes_are_those_of_the_table():
    assert [part for part in PARTS if part.startswith("task_lora.")] == [f"task_lora.{task}" for task in TASKS]
    assert all(part_of(f"model.layers.0.attention.wo.lora_{task}_{side}.weight") == f"task_lora.{task}"
               for task in TASKS for side in "AB")
    assert fields.ALL_MODES["all"] == TASKS and fields.ALL_MODES["base"] == ()
    for task, pair in fields.TASK_LORAS.items():
        assert task in fields.MODE_ADAPTERS[pair.mode]
    assert sum(map(len, fields.MODE_ADAPTERS.values())) == len(TASKS)
    assert ModelConfig().task_lora_ranks == {task: pair.rank for task, pair in fields.TASK_LORAS.items()}


def test_the_command_offers_the_modes_of_the_table():
    commands = next(action for action in mindformers_ixc_cli.build_parser()._actions
                    if isinstance(action, argparse._SubParsersAction)).choices
    modes = {name: action.choices for name, command in commands.items() for action in command._actions
             if "--mode" in action.option_strings}
    assert modes.pop("convert") == list(fields.ALL_MODES)
    assert modes and all(choices == list(fields.MODE_ADAPTERS) for choices in modes.values())


def test_merge_folds_the_tasks_of_the_table():
    check_merge_names(TASKS, ())
    *others, last = TASKS
    with pytest.raises(CheckpointError, match=f"the choices are {', '.join(others)} and {last}"):
        check_merge_names(("none",), ())
