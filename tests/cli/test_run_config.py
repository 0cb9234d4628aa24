"""Reading, overriding and checking a run's YAML file."""
from __future__ import annotations

from pathlib import Path

import mindformers  # noqa: F401 - so that the names of registered classes are known
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ixc.cli.run_config import check_fields
from mindformers_ixc.cli.yaml_file import apply_overrides, parse_overrides, read_value, read_yaml
from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.errors import ConfigError, DataError

CONFIGS = sorted((Path(__file__).parents[2] / "yaml_configs").glob("*ixc25*.yaml"))   # not the bases, which lack data
TINY = Path(__file__).parents[2] / "yaml_configs" / "ixc25_sft_tiny.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_yaml_passes_the_check(path):
    check_fields(read_yaml(path), path.name)


def test_overrides_are_dotted_and_typed():
    words = ["--runner_config.epochs", "3", "--lr_schedule.learning_rate=1e-4", "--use_parallel", "False", "--a", "x"]
    assert parse_overrides(words) == {"runner_config.epochs": 3, "lr_schedule.learning_rate": 1e-4,
                                      "use_parallel": False, "a": "x"}


def test_short_forms_of_mindformers_launcher():
    assert parse_overrides(["--epochs", "2"]) == {"runner_config.epochs": 2}


@pytest.mark.parametrize(("words", "message"), [(["--epochs"], "no value"), (["epochs", "3"], "neither an option"),
                                                (["--epochs", "--batch_size", "3"], "no value")])
def test_malformed_overrides(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_overrides(words)


@given(st.recursive(st.integers() | st.booleans() | st.text("abc", min_size=1), lambda x: st.lists(x, max_size=3)))
def test_values_are_read_as_yaml(value):
    assert read_value(yaml.safe_dump(value, default_flow_style=True)) == value


def test_override_through_a_value_is_refused():
    with pytest.raises(ConfigError, match="'seed' is not a section"):
        apply_overrides({"seed": 1}, {"seed.x": 2})


@pytest.mark.parametrize(("key", "value", "words"), [
    ("sead", 1, ["unknown key sead", "seed"]),
    ("run_mode", "trian", ["trian", "finetune"]),
    *[("device_tflops", value, ["device_tflops is", "it must be the peak of a device in 10^12 operations a second"])
      for value in (-1, "fast", float("nan"), float("inf"), 3.2e14, True, [320])],
    ("tensorboard", "out", ["tensorboard is 'out'", "true or false or a section"]),
    ("tensorboard", 1, ["tensorboard is 1"]),
    ("tensorboard", {"tensorboard_dirs": "./out"}, ["tensorboard.tensorboard_dirs", "tensorboard_dir"]),
    ("tensorboard", {"log_timers_to_tensorboard": True}, ["tensorboard lacks tensorboard_dir"]),
    ("tensorboard", {"tensorboard_dir": "./out", "tensorboard_queue_size": 0}, ["tensorboard_queue_size is 0"]),
    ("runner_config.epoch", 3, ["runner_config.epoch", "epochs"]),
    ("runner_config.epochs", "three", ["runner_config.epochs", "'three'", "whole number"]),
    ("runner_config.sink_mode", 1, ["sink_mode", "true or false"]),
    ("model.model_config.hidden_sizes", 3, ["model.model_config.hidden_sizes", "hidden_size"]),
    ("model.model_config.num_hidden_layers", 2.5, ["num_hidden_layers", "2.5"]),
    ("model.model_config.vision_config.patchsize", 14, ["vision_config.patchsize", "patch_size"]),
    ("optimizer.type", "AdamWW", ["optimizer.type", "AdamW"]),
    ("trainer.type", "IXC25Traner", ["trainer.type", "IXC25Trainer"]),
    ("callbacks", [{"type": "LossMonitor_"}], ["callbacks[0].type", "LossMonitor_"]),
    ("train_dataset.seq_len", 3, ["train_dataset.seq_len", "seq_length"]),
    ("train_dataset.max_tiles", "5", ["train_dataset.max_tiles", "'5'"]),
    ("train_dataset.data_loader.folder", "x", ["data_loader.folder", "image_folder"]),
    ("train_dataset.seq_length", None, ["lacks seq_length"]),
])
def test_wrong_keys_and_values_are_named(key, value, words):
    fields = read_yaml(TINY)
    apply_overrides(fields, {key: value})
    with pytest.raises((ConfigError, DataError)) as error:
        check_fields(fields, "my.yaml")
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("text", "message"), [("- 1", "mapping"), ("a: [", "not valid YAML")])
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")


def test_a_file_changes_the_ones_it_names_as_base(tmp_path):
    (tmp_path / "first.yaml").write_text("a: 1\nsection: {x: 1, y: [1, 2], inner: {z: 1}}\n")
    (tmp_path / "second.yaml").write_text("base_config: first.yaml\nb: 2\nsection: {y: [3]}\n")
    (tmp_path / "third.yaml").write_text("base_config: [second.yaml]\nsection: {inner: {w: 2}}\n")
    assert read_yaml(tmp_path / "third.yaml") == {
        "a": 1, "b": 2, "section": {"x": 1, "y": [3], "inner": {"z": 1, "w": 2}}}


def test_bases_are_read_as_mindformers_reads_them(tmp_path):
    from mindformers.tools.register import MindFormerConfig

    (tmp_path / "base.yaml").write_text("seed: 1\nrunner_config: {epochs: 3, batch_size: 2}\n")
    (tmp_path / "own.yaml").write_text("base_config: base.yaml\nrunner_config: {epochs: 5}\n")
    theirs = MindFormerConfig._file2dict(str(tmp_path / "own.yaml"))
    assert read_yaml(tmp_path / "own.yaml") == dict(theirs)


def test_bases_that_are_missing_or_run_in_circles(tmp_path):
    (tmp_path / "one.yaml").write_text("base_config: two.yaml\n")
    (tmp_path / "two.yaml").write_text("base_config: one.yaml\n")
    (tmp_path / "lost.yaml").write_text("base_config: gone.yaml\n")
    with pytest.raises(ConfigError, match="is its own base_config"):
        read_yaml(tmp_path / "one.yaml")
    with pytest.raises(ConfigError, match=r"gone.yaml that .*lost.yaml names as base_config does not exist"):
        read_yaml(tmp_path / "lost.yaml")


@pytest.mark.parametrize("stage", ["sft", "pretrain", "dpo", "web"])
@pytest.mark.parametrize("devices", [8, 16, 64])
def test_the_recipes_of_every_stage_fill_their_devices(stage, devices):
    from mindformers_ixc.parallel.checks import check_run

    name = f"ixc25_{stage}.yaml" if devices == 8 else f"ixc25_{stage}_{devices}.yaml"
    fields = read_yaml(TINY.with_name(name))
    check_fields(fields, name)
    check_run(fields, devices)


LORA = {"pet_type": "lora", "target_modules": ".*wo"}
NOISE = [*BATCH_COLUMNS, "noise_seed", "lengths"]


@pytest.mark.parametrize(("changes", "name", "words"), [
    ({"model.model_config.neftune_alpha": 5.0}, "sft", r"neftune_alpha is 5\.0, but .*input_columns lacks lengths, wh"),
    ({"model.model_config.neftune_alpha": 5.0, "train_dataset.input_columns": list(BATCH_COLUMNS)}, "sft",
     r"input_columns lacks noise_seed and lengths, which the noise is made of"),
    ({"model.model_config.neftune_alpha": 5.0}, "dpo", r"but IXC25ForPreference compares answers, each of"),
    ({"model.model_config.neftune_alpha": 5.0}, "grpo", r"but IXC25ForGRPO compares answers, each of which"),
    ({"skip_spikes": {"loss": 5.0}, "rollout.updates": 2}, "grpo", r"rollout\.updates 2 makes that many of each round"),
    ({"train_dataset.input_columns": [*BATCH_COLUMNS, "score_positions", *NOISE[-2:]]}, "reward",
     r"input_columns has noise_seed, lengths, which preference pairs do not have; they have .*, score_positions\."),
    ({"skip_spikes": {"window": 5}}, "sft", r"skip_spikes has no limit .*; give one of loss, grad_norm, loss_times"),
    ({"skip_spikes": {"los": 5}}, "sft", r"Unknown key skip_spikes\.los"),
    ({"skip_spikes": {"loss_times": 1}}, "sft", r"skip_spikes\.loss_times is 1; it must be a number above 1"),
    ({"skip_spikes": {"loss": 5.0, "most_in_a_row": 0}}, "sft", r"most_in_a_row is 0; it must be a whole number of at"),
    ({"model.model_config.pet_config": {"pet_type": "partial_lora", "use_dora": True}}, "sft",
     r"pet_config\.use_dora is for pet_type lora, and this is 'partial_lora'"),
    ({"model.model_config.pet_config": {"pet_type": "lora", "use_rslora": 1}}, "sft", r"use_rslora is 1; it must b"),
    ({"model.model_config.pet_config": {"pet_type": "lora", "use_dora": True}, "use_parallel": True}, "sft",
     r"pet_config\.use_dora is for runs of one process"),
    ({"model.model_config.pet_config": {"pet_type": "lorra"}}, "sft", r"pet_type is 'lorra'; the choices are lora, "),
    ({"model.model_config.pet_config": {"lora_rank": 4}}, "sft", r"pet_type is None; .*, without which everyth"),
    ({"model.model_config.pet_config": {**LORA, "r": 4}}, "sft", r"Unknown key model\.model_config\.pet_config\.r"),
    ({"model.model_config.pet_config": {**LORA, "exclude_layers": ["wo"]}}, "sft", r"Unknown key .*exclude_layers"),
    ({"model.model_config.pet_config": {**LORA, "lora_rank": 0}}, "sft", r"lora_rank is 0; it m"),
    ({"model.model_config.pet_config": {**LORA, "lora_alpha": float("nan")}}, "sft", r"lora_alpha is nan; it m"),
    ({"model.model_config.pet_config": {**LORA, "lora_dropout": 1.0}}, "sft", r"lora_dropout is 1\.0; it mu"),
    ({"model.model_config.pet_config": {**LORA, "target_modules": "(("}}, "sft", r"target_modules is '\(\('; it mu"),
    ({"model.model_config.pet_config": {"pet_type": "lora"}}, "sft", r"target_modules is missing; for pet_type lora"),
    ({"model.model_config.pet_config": {"pet_type": "task_lora", "task": "sfx"}}, "sft", r"task is 'sfx'; the choices"),
    ({"skip_spikes": 5}, "sft", r"skip_spikes is 5; it must be a section"),
    ({"skip_spikes": {"loss": 5.0}, "use_parallel": True}, "sft", r"skip_spikes is for runs of one process"),
    ({"skip_spikes": {"grad_norm_times": 5}, "runner_wrapper.use_clip_grad": False}, "dpo",
     r"skip_spikes\.grad_norm_times needs runner_wrapper\.use_clip_grad True"),
    ({"skip_spikes": {"loss": 5}, "runner_config.sink_mode": True, "runner_config.sink_size": 2}, "sft",
     r"skip_spikes needs to know every step, .*\(sink_size 2\)")])
def test_extras_of_training_that_cannot_be_are_refused(changes, name, words):
    fields = read_yaml(TINY.with_name(f"ixc25_{name}_tiny.yaml"))
    apply_overrides(fields, changes)
    with pytest.raises(ConfigError, match=words):
        check_fields(fields, "my.yaml")


@pytest.mark.parametrize(("changes", "name"), [
    ({"model.model_config.neftune_alpha": 5.0, "train_dataset.input_columns": NOISE}, "sft"),
    ({"model.model_config.neftune_alpha": 0.0}, "dpo"),
    ({"skip_spikes": {"loss": 5, "grad_norm_times": 10}}, "reward"),
    ({"skip_spikes": {"loss": 5, "grad_norm_times": 10}}, "grpo"),
    ({"skip_spikes": {"loss": 5}, "runner_config.sink_mode": True, "runner_config.sink_size": 1}, "sft")])
def test_extras_of_training_that_can_be_are_not(changes, name):
    fields = read_yaml(TINY.with_name(f"ixc25_{name}_tiny.yaml"))
    apply_overrides(fields, changes)
    check_fields(fields, "my.yaml")


@pytest.mark.parametrize("value", ["auto", 0, [1, -1]])
def test_offsets_are_a_number_a_list_or_auto(value):
    fields = read_yaml(TINY)
    fields["model"]["model_config"]["offset"] = value
    check_fields(fields, "my.yaml")


@pytest.mark.parametrize(("key", "value"), [
    ("device_tflops", 0), ("device_tflops", 353.5), ("device_tflops", None), ("tensorboard", True),
    ("tensorboard", False), ("tensorboard", {"tensorboard_dir": "./out"}),
    ("tensorboard", {"tensorboard_dir": "./out", "tensorboard_queue_size": 10, "log_timers_to_tensorboard": True,
                     "log_loss_scale_to_tensorboard": True, "log_expert_load_to_tensorboard": False})])
def test_keys_of_the_log(key, value):
    check_fields({**read_yaml(TINY), key: value}, "my.yaml")
