"""docs/yaml.md lists every key: those of the recipes, those that the package checks, and none that there is not."""
from __future__ import annotations

import ast
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from mindformers_ixc.cli.run_config import OWN_SECTIONS, top_keys
from mindformers_ixc.cli.templates import section_templates
from mindformers_ixc.cli.yaml_docs import section_text
from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.cli.yaml_keys import SECTIONS, rows_of, shown_value
from mindformers_ixc.fields import FIELDS, TASK_LORAS, VISION_FIELDS
from mindformers_ixc.parallel.checks import ABSENT_DEGREES
from mindformers_ixc.parameters import PARTS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "yaml_configs").glob("*.yaml"))

# Keys inside values whose row says what they hold: names of parts, of task LoRAs, a processor's or MindSpore's own.
INSIDE = {"train_dataset.tokenizer", "train_dataset_task.dataset_config", "model.model_config.rope_scaling",
          "rollout.rewards"}


def _known() -> set[str]:
    """Dotted names of all keys on the page, and of the sections that hold them."""
    names = {f"{section}.{key}".lstrip(".") for section, table in SECTIONS.items() for key in table.keys}
    names |= {f"model.model_config.{name}" for name in FIELDS}
    names |= {f"model.model_config.vision_config.{name}" for name in VISION_FIELDS}
    names |= {f"model.model_config.task_lora_ranks.{task}" for task in TASK_LORAS}
    names |= {f"part_learning_rates.{part}.{key}" for part in PARTS for key in SECTIONS["part_learning_rates"].keys}
    return names | {"model.model_config.type", "model.model_config.vision_config.type"}


def _keys(value: object, name: str = "") -> set[str]:
    """Dotted names of all values of a YAML that are no section; entries of callbacks by their type."""
    if name == "callbacks":
        return {key for entry in value for key in _keys({k: v for k, v in entry.items() if k != "type"},
                                                        f"callbacks.{entry['type']}")}
    if isinstance(value, dict) and value and name not in INSIDE:
        return {key for inner, item in value.items() for key in _keys(item, f"{name}.{inner}".lstrip("."))}
    return {name}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_recipe_is_on_the_page(path):
    assert _keys(read_yaml(path)) - _known() == set()


@pytest.mark.parametrize("name", [name for name, section in SECTIONS.items() if section.rules])
def test_a_section_has_the_keys_that_are_checked(name):
    section = SECTIONS[name]
    assert set(section.rules) - {"type"} <= set(section.keys)
    if name and not section.template:       # what the rules leave out there, MindFormers' template says
        assert set(section.keys) <= set(section.rules)


def test_every_own_section_of_the_top_level_is_on_the_page():
    assert set(OWN_SECTIONS) <= set(SECTIONS[""].keys)
    assert set(SECTIONS[""].keys) <= {*top_keys(), "base_config"}
    assert {f"{where}{name}" for name, where in ABSENT_DEGREES.items()} <= _known()


@pytest.mark.parametrize("name", [name for name, section in SECTIONS.items() if section.template and name])
def test_keys_without_words_of_their_own_are_mindformers(name):
    template = section_templates()[SECTIONS[name].template]
    for key, words in SECTIONS[name].keys.items():
        assert hasattr(template, key) or words.kind or key in SECTIONS[name].rules, key


def test_every_row_says_something():
    for name, section in SECTIONS.items():
        rows = rows_of(section)
        assert [row.key for row in rows] == list(section.keys)
        assert all(row.meaning and row.default for row in rows), name
        assert section_text(name).count("\n") == len(rows) + 1


@pytest.mark.parametrize("module, owner, name, keys", [
    ("core/callback/callback.py", "CheckpointMonitor", "callbacks.CheckpointMonitor",
     "save_checkpoint_steps keep_checkpoint_max prefix checkpoint_format integrated_save async_save"),
    ("core/callback/callback.py", "MFLossMonitor", "callbacks.MFLossMonitor", "per_print_times"),
    ("core/optim/adamw.py", "AdamW", "optimizer", "betas eps weight_decay learning_rate"),
    ("core/lr/lr_schedule.py", "CosineWithWarmUpLR", "lr_schedule", "lr_end warmup_ratio"),
    ("wrapper/wrapper.py", "MFTrainOneStepCell", "runner_wrapper", "scale_sense use_clip_grad max_grad_norm")])
def test_defaults_of_mindformers_classes_are_theirs(module, owner, name, keys):
    """Where a section stands in a file, it is its class that fills in what the file does not say."""
    folder = Path(PathFinder.find_spec("mindformers").origin).parent      # the import itself would register
    tree = ast.parse(folder.joinpath(module).read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == owner)
    arguments = next(node for node in found.body if getattr(node, "name", "") == "__init__").args
    defaults = dict(zip([one.arg for one in arguments.args][-len(arguments.defaults):], arguments.defaults))
    shown = {row.key: row.default for row in rows_of(SECTIONS[name])}
    assert {key: shown[key] for key in keys.split()} == \
        {key: shown_value(ast.literal_eval(defaults[key])) for key in keys.split()}


def test_no_framework_is_imported():
    done = subprocess.run([sys.executable, "-c", "import sys; from mindformers_ixc.cli.yaml_docs import section_text; "
                           "section_text('parallel'); print({'mindspore', 'mindformers'} & set(sys.modules))"],
                          capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
