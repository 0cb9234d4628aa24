"""`mindformers recipes`: what is listed, what a copy says, and which file a name means."""
from __future__ import annotations

import re
import subprocess
import sys
from argparse import Namespace
from io import StringIO
from pathlib import Path

import pytest
import yaml

from mindformers_ixc.cli import recipe_files
from mindformers_ixc.cli.inputs import check_inputs
from mindformers_ixc.cli.older_files import check_version
from mindformers_ixc.cli.recipe_files import find_config, recipes, summary
from mindformers_ixc.cli.recipe_text import merged_text
from mindformers_ixc.cli.recipes import copy, listing, show_recipes
from mindformers_ixc.cli.yaml_file import apply_overrides, parse_overrides, read_yaml
from mindformers_ixc.errors import ConfigError

FOLDER = Path(__file__).parents[2] / "yaml_configs"


def test_the_list_has_every_recipe_in_one_line_and_no_base():
    lines = [line for line in listing().splitlines() if line.startswith("  ")]
    assert sorted(line.split()[0] for line in lines) == sorted(
        path.stem for path in FOLDER.glob("*.yaml") if not path.name.startswith("base_"))
    assert all(len(line) <= 110 for line in lines)
    assert "  ixc25_pretrain_tiny  Stage 1, pre-training, small: captions of drawn charts" in lines


@pytest.mark.parametrize("width", [30, 40, 60, 80])
def test_the_list_fits_a_narrow_terminal(width):
    assert all(len(line) <= max(width, 34) for line in listing(width).splitlines())
    assert " ".join(listing(width).split()) == " ".join(listing().split())


def test_the_list_comes_without_mindspore():
    program = ("import sys, mindformers_ixc_cli as c; code = c.main(['recipes']); "
               "print(code, 'mindspore' in sys.modules, 'numpy' in sys.modules, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300,
                          env={"PATH": "", "PYTHONPATH": str(FOLDER.parent), "HOME": "/nonexistent"})
    assert done.stdout == listing() + "\n"
    assert done.stderr.splitlines()[-1] == "0 False False"
    assert "recipes copy NAME" in done.stderr


@pytest.mark.parametrize("name", recipes())
def test_a_copy_says_what_the_recipe_says(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = copy(name)
    text = path.read_text(encoding="utf-8")
    assert path == Path(f"{name}.yaml")
    assert "base_config" not in yaml.safe_load(text)
    assert read_yaml(path) == read_yaml(FOLDER / f"{name}.yaml")
    assert f"--config {name}.yaml" in text
    assert not any(len(line) > 120 for line in text.splitlines())
    own = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\n\n")[2]
    for comment in re.findall(r"\s(# .*)", own):
        assert comment in text


def test_a_copy_keeps_comments_of_the_base_where_it_changes_nothing(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "# What it is for.\n#\n# What [x] means.\n\nseed: 42   # the answer\n\n"
        "# about a\na: &a\n  size: &size 3   # three\n  kept: 1   # stays\n             # on two lines\n"
        "b: {x: *size, y: 2}   # of b\nc: [1, 2]   # goes\nboth: *a\n")
    (tmp_path / "own.yaml").write_text(
        "# Mine.\n\nbase_config: base.yaml\n\na: &a\n  size: &size 5   # five\nb:\n  y: 7   # seven\n"
        "new: true   # beside b\nc: [3,\n    4]   # comes\nboth: *a\n")
    lines = merged_text(tmp_path / "own.yaml", "x.yaml").splitlines()
    assert lines[0].startswith("# The recipe own of mindformers_ixc ")
    assert lines[1:] == [
        "#", "# Mine.", "#", "# From base.yaml:", "# What it is for.", "#", "# What [x] means.", "",
        "seed: 42   # the answer", "", "# about a", "a: &a", "  size: &size 5   # five", "  kept: 1   # stays",
        "             # on two lines", f"{'b:':<40} # of b", "  x: 3", "  y: 7   # seven",
        "new: true   # beside b", "c: [3,", "    4]   # comes", "both: *a"]
    assert read_yaml(tmp_path / "own.yaml")["b"] == {"x": 3, "y": 7}      # the base's alias is the base's value


def test_an_alias_that_means_something_else_in_the_copy_becomes_its_value(tmp_path):
    (tmp_path / "base.yaml").write_text("a: &n 1\nlist: [*n, 2]\nsame: *n\nsection: {z: *n}\n")
    (tmp_path / "own.yaml").write_text("base_config: base.yaml\na: &n x y\nlast: *n\n")
    text = merged_text(tmp_path / "own.yaml", "x.yaml")
    assert yaml.safe_load(text) == {"a": "x y", "list": [1, 2], "same": 1, "section": {"z": 1}, "last": "x y"}
    assert "list: [1, 2]\nsame: 1\n" in text
    assert "last: *n\n" in text


def test_a_copy_never_overwrites(tmp_path):
    (tmp_path / "mine.yaml").write_text("x: 1\n")
    (tmp_path / "link.yaml").symlink_to(tmp_path / "gone.yaml")
    for name in ("mine.yaml", "link.yaml"):
        with pytest.raises(ConfigError, match=f"{name} is there already; give another name"):
            copy("ixc25_sft_tiny", str(tmp_path / name))
    assert (tmp_path / "mine.yaml").read_text() == "x: 1\n"
    assert copy("ixc25_sft_tiny.yaml", str(tmp_path)) == tmp_path / "ixc25_sft_tiny.yaml"
    with pytest.raises(OSError, match="is no folder; make it first"):
        copy("ixc25_sft_tiny", str(tmp_path / "none" / "x.yaml"))
    with pytest.raises(ConfigError, match="sft_tiny is no recipe; did you mean ixc25_sft_tiny"):
        copy("sft_tiny")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ixc25_sft_tiny.yaml", "link.yaml", "mine.yaml"]


def test_the_words_of_the_command(tmp_path, capsys):
    answers = StringIO()
    with pytest.raises(ConfigError, match="needs the name of a recipe"):
        show_recipes(Namespace(action="copy", name=None, target=None, answers=answers))
    target = tmp_path / "mine.yaml"
    show_recipes(Namespace(action="copy", name="ixc25_web_tiny", target=str(target), answers=answers))
    assert answers.getvalue() == ""
    assert f"take it with --config {target}." in capsys.readouterr().err


@pytest.mark.parametrize("written", ["ixc25_sft_tiny", "ixc25_sft_tiny.yaml", "yaml_configs/ixc25_sft_tiny.yaml",
                                     "yaml_configs/ixc25_sft_tiny"])
def test_a_name_is_a_recipe_where_no_file_has_it(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_config(written)      # in the checkout, or in the installed package
    assert found.is_absolute() and found.name == "ixc25_sft_tiny.yaml"
    assert found.read_text() == (FOLDER / "ixc25_sft_tiny.yaml").read_text()
    Path(written).parent.mkdir(exist_ok=True)
    Path(written).write_text("seed: 1\n")
    assert find_config(written) == Path(written)
    assert read_yaml(written) == {"seed": 1}


@pytest.mark.parametrize(("written", "message"), [
    ("ixc25_sft_tinny", "does not exist, and no recipe has that name; did you mean ixc25_sft_tiny"),
    ("pretrain", "did you mean ixc25_pretrain or"),
    ("other/ixc25_web_tiny.yaml", "other/ixc25_web_tiny.yaml does not exist.*did you mean ixc25_web_tiny"),
    ("base_7b", "does not exist.* `mindformers recipes` lists"),
    ("qqq.yaml", "no recipe has that name; `mindformers recipes` lists the recipes"),
    ("..", "is a folder; give the path of a YAML file")])
def test_a_name_that_is_none(written, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        find_config(written)


def test_a_base_is_a_file_beside_or_a_shipped_one(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("base_config: base_tiny.yaml\nseed: 7\n")
    assert read_yaml(own)["trainer"]["model_name"] == "ixc25_tiny"
    (tmp_path / "base_tiny.yaml").write_text("other: 1\n")
    assert read_yaml(own) == {"other": 1, "seed": 7}
    own.write_text("base_config: ixc25_sft_tny\n")
    with pytest.raises(ConfigError, match=r"own.yaml names as base_config does not exist.*did you mean ixc25_sft_tiny"):
        read_yaml(own)


def test_an_installed_package_has_the_files_inside(tmp_path, monkeypatch):
    module = tmp_path / "mindformers_ixc" / "cli" / "recipe_files.py"
    (tmp_path / "mindformers_ixc" / "recipes").mkdir(parents=True)
    (tmp_path / "mindformers_ixc" / "recipes" / "one.yaml").write_text("# What it is\n# for. More.\nseed: 1\n")
    monkeypatch.setattr(recipe_files, "__file__", str(module))
    assert list(recipes()) == ["one"]
    assert summary(recipes()["one"]) == "What it is for"


def test_entries_of_lists_can_be_overridden():
    fields = {"callbacks": [{"type": "A", "n": 1}, {"type": "B"}], "betas": [0.9, 0.95], "none": None}
    apply_overrides(fields, parse_overrides(["--callbacks.0.n", "5", "--callbacks.1", "{type: C}", "--betas.1", "0.99",
                                             "--callbacks.2.type", "D", "--callbacks.2.n", "2"]))
    assert fields == {"callbacks": [{"type": "A", "n": 5}, {"type": "C"}, {"type": "D", "n": 2}],
                      "betas": [0.9, 0.99], "none": None}


def test_an_overridden_list_is_that_of_one_key():
    fields = yaml.safe_load("x: &x [1, 2]\ny: *x\n")
    apply_overrides(fields, {"x.0": 3})
    assert fields == {"x": [3, 2], "y": [1, 2]}


@pytest.mark.parametrize(("key", "message"), [
    ("callbacks.2", "'2' is no entry of the list 'callbacks'; its entries are numbered 0 to 1"),
    ("callbacks.3.type", "'3' is no entry"), ("callbacks.-1.type", "'-1' is no entry"),
    ("callbacks.x.type", "'x' is no entry"), ("betas.2", "'2' is no entry of the list 'betas'"),
    ("betas.2.x", "'2' is no entry"), ("betas.0.x", "'betas.0' is not a section"),
    ("callbacks.0.type.x", "'callbacks.0.type' is not a section")])
def test_entries_that_a_list_has_not(key, message):
    fields = {"callbacks": [{"type": "A"}, {"type": "B"}], "betas": [0.9, 0.95]}
    with pytest.raises(ConfigError, match=message):
        apply_overrides(fields, {key: 1})
    assert fields == {"callbacks": [{"type": "A"}, {"type": "B"}], "betas": [0.9, 0.95]}


OLD = ["input_ids", "labels", "pixel_values", "vision_index", "image_mask"]


@pytest.mark.parametrize(("columns", "words"), [
    (OLD, ["add global_views and view_index to train_dataset.input_columns"]),
    ([*OLD, "global_views", "view_index", "segment_ids"], ["segment_ids", "write segment_ends in its place"]),
    ([*OLD, "position_ids", "segment_ids"], ["write segment_ends", "add global_views and view_index"])])
def test_a_file_of_an_earlier_version_is_told_what_changed(columns, words):
    fields = read_yaml("ixc25_sft_tiny")
    fields["train_dataset"]["input_columns"] = columns
    fields["parallel"]["dataset_strategy"] = [[1, 1]] * len(columns)
    with pytest.raises(ConfigError) as error:
        check_version(fields, "mine.yaml")
    assert str(error.value).startswith("mine.yaml was written for an earlier version of mindformers_ixc. ")
    assert all(word in str(error.value) for word in [*words, "Take parallel.dataset_strategy out"])


@pytest.mark.parametrize("name", recipes())
def test_no_recipe_is_of_an_earlier_version(name):
    check_version(read_yaml(name), name)


@pytest.mark.parametrize("fields", [{}, {"train_dataset": None}, {"train_dataset": {"input_columns": "x"}},
                                    {"train_dataset_task": {"type": "CausalLanguageModelDataset"},
                                     "train_dataset": {"input_columns": ["input_ids", "segment_ids"]}}])
def test_other_data_sets_and_sections_are_not_looked_at(fields):
    check_version(fields, "mine.yaml")


@pytest.mark.parametrize(("rest", "message"), [
    (["--callbacks.9.type", "x"], "'9' is no entry"), (["--epochs"], "no value"),
    (["--train_dataset.input_columns", "[pixel_values]"], "earlier version")])
def test_overrides_are_looked_at_before_anything_is_imported(rest, message):
    with pytest.raises(ConfigError, match=message):
        check_inputs(Namespace(command="run", config="ixc25_sft_tiny", rest=rest))
