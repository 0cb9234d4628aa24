"""Which checkpoint a run goes on from, and what it must share with the run that wrote it."""
from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindformers_ixc.cli.yaml_file import apply_overrides, read_yaml
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.training import resume
from mindformers_ixc.training.resume import (
    check_same_run,
    checkpoints_in,
    last_checkpoint,
    prepare_resume,
    record_run,
)
from mindformers_ixc.training.run_folder import RECORD

TINY = Path(__file__).parents[2] / "yaml_configs" / "ixc25_sft_tiny.yaml"
COUNTERS = {"epoch_num": 2, "step_num": 31, "loss_scale": 1.0, "global_batch_size": 4}


def fields_of(folder) -> dict:
    return {**read_yaml(TINY), "output_dir": str(folder)}


def checkpoint(output_dir, epoch: int, step: int, **counters) -> Path:
    folder = Path(output_dir) / "checkpoint" / "rank_0"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ixc25_rank_0-{epoch}_{step}.safetensors"
    tensors = {name: np.array(value) for name, value in counters.items()}
    save_file({"output.weight": np.arange(4, dtype=np.float32), **tensors}, path)
    return path


@pytest.fixture
def finished(tmp_path):
    """Folder and fields of a run that wrote two checkpoints and its configuration."""
    fields = fields_of(tmp_path / "run")
    checkpoint(tmp_path / "run", 1, 30)
    checkpoint(tmp_path / "run", 2, 1, **COUNTERS)
    record_run(fields)
    return tmp_path / "run", fields


def test_checkpoints_are_in_the_order_of_training_whatever_their_age(tmp_path):
    for number, (epoch, step) in enumerate(((10, 2), (2, 9), (2, 10), (1, 100))):
        path = checkpoint(tmp_path, epoch, step)
        os.utime(path, (1000 - number, 1000 - number))
    folder = tmp_path / "checkpoint" / "rank_0"
    (folder / "ixc25_rank_0_1-3_4.ckpt").touch()      # MindFormers numbers a name that is taken
    for other in ("unfinished_ixc25_rank_0-11_1.safetensors", "ixc25_rank_0-11_1.safetensors.tmp", "meta.json",
                  "ixc25-12_1.safetensors", "ixc25_rank_0-12_x.safetensors"):
        (folder / other).touch()
    assert [path.name for path in checkpoints_in(folder)] == [
        "ixc25_rank_0-1_100.safetensors", "ixc25_rank_0-2_9.safetensors", "ixc25_rank_0-2_10.safetensors",
        "ixc25_rank_0_1-3_4.ckpt", "ixc25_rank_0-10_2.safetensors"]
    assert last_checkpoint(tmp_path) == folder / "ixc25_rank_0-10_2.safetensors"


def test_a_folder_without_a_whole_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path} holds no checkpoint")):
        last_checkpoint(tmp_path)
    path = checkpoint(tmp_path, 1, 1)
    path.rename(path.with_name(f"unfinished_{path.name}"))
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path} holds no checkpoint")):
        last_checkpoint(tmp_path)


def test_the_same_configuration_goes_on(finished):
    folder, fields = finished
    check_same_run(copy.deepcopy(fields), folder / RECORD)
    assert not list(folder.glob("run_config.[0-9]*"))


@pytest.mark.parametrize(("key", "value"), [
    ("train_dataset.num_parallel_workers", 7), ("train_dataset.prefetch_size", 9), ("train_dataset.max_bad_share", 0.5),
    ("train_dataset.python_multiprocessing", "changed"), ("callbacks", []), ("output_dir", "elsewhere"),
    ("load_checkpoint", "x"), ("resume_training", True), ("runner_config.sink_mode", "changed")])
def test_what_does_not_change_the_training_may_differ(finished, key, value):
    folder, fields = finished
    apply_overrides(fields, {key: value})
    check_same_run(fields, folder / RECORD)


@pytest.mark.parametrize(("key", "value"), [
    ("lr_schedule.learning_rate", 0.125), ("seed", 4321), ("train_dataset.data_loader.dataset_dir", "other.json"),
    ("train_dataset.seq_length", 999), ("runner_config.epochs", 501),
    ("model.model_config.plora_dropout", 0.4), ("optimizer.weight_decay", 0.7), ("runner_wrapper.max_grad_norm", 5.5)])
def test_what_changes_the_training_is_refused_with_both_values(finished, key, value):
    folder, fields = finished
    section = fields
    for name in key.split("."):
        section = section[name]
    apply_overrides(fields, {key: value})
    with pytest.raises(ConfigError) as error:
        check_same_run(fields, folder / RECORD)
    assert f"{key} was {section!r}, is {value!r}" in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(("changes", "size"), [
    ({"runner_config.batch_size": 9}, 9), ({"runner_config.gradient_accumulation_steps": 3}, 3),
    ({"use_parallel": True, "parallel_config": {"data_parallel": 2, "pipeline_stage": 2, "micro_batch_num": 3}}, 6)])
def test_what_a_step_takes_in_is_compared_whatever_the_layout(finished, changes, size):
    folder, fields = finished
    runner = fields["runner_config"]
    before = runner["batch_size"] * (runner.get("gradient_accumulation_steps") or 1)
    key = next(iter(changes))
    apply_overrides(fields, changes)
    now = size * (1 if "runner_config.batch_size" in key else before)
    with pytest.raises(ConfigError, match=rf"runner_config.global_batch was {before}, is {now}"):
        check_same_run(fields, folder / RECORD)


@pytest.mark.parametrize("section", ["train_parts", "part_learning_rates", "preference"])
def test_a_section_that_came_or_went_is_refused(finished, section):
    folder, fields = finished
    more = {**fields, section: ["vision"]}
    with pytest.raises(ConfigError, match=rf"{section} was None, is \['vision'\]"):
        check_same_run(more, folder / RECORD)
    record_run(more)
    with pytest.raises(ConfigError, match=rf"{section} was \['vision'\], is None"):
        check_same_run(fields, folder / RECORD)


def test_of_many_differences_five_are_named(finished):
    folder, fields = finished
    record = json.loads((folder / RECORD).read_text())
    record["model"]["model_config"].update({f"x{i}": i for i in range(9)})
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(ConfigError) as error:
        check_same_run(fields, folder / RECORD)
    assert str(error.value).count(" was ") == 5


def test_a_checkpoint_without_a_record_is_refused(finished):
    folder, fields = finished
    (folder / RECORD).unlink()
    with pytest.raises(ConfigError, match=re.escape(f"{folder / RECORD} is missing")):
        prepare_resume(fields)
    assert not (folder / "resume").exists()


@pytest.mark.parametrize("given", [None, "run", "file"])
def test_resuming_finds_the_last_checkpoint_and_its_counters(finished, tmp_path, given):
    folder, fields = finished
    path = folder / "checkpoint" / "rank_0" / "ixc25_rank_0-2_1.safetensors"
    fields["load_checkpoint"] = {None: "", "run": str(folder), "file": str(path)}[given]
    target = folder / "resume"
    if given is not None:     # into a folder of its own, which an earlier attempt has used
        fields["output_dir"], target = str(tmp_path / "new"), tmp_path / "new" / "resume"
        target.mkdir(parents=True)
        (target / "ixc25_rank_0-1_30.safetensors").touch()
    fields.update(run_mode="train", load_ckpt_format="ckpt")
    prepare_resume(fields)
    assert fields["load_checkpoint"] == str(target)
    assert [fields[key] for key in ("resume_training", "run_mode", "load_ckpt_format")] == [
        True, "finetune", "safetensors"]
    assert sorted(entry.name for entry in target.iterdir()) == ["hyper_param.safetensors", path.name]
    assert (target / path.name).is_symlink()
    assert (target / path.name).resolve() == path.resolve()
    counters = load_file(target / "hyper_param.safetensors")
    assert {name: value.item() for name, value in counters.items()} == COUNTERS


def test_resuming_another_configuration_leaves_nothing_behind(finished):
    folder, fields = finished
    fields["seed"] = 1
    with pytest.raises(ConfigError, match=r"seed was \d+, is 1"):
        prepare_resume(fields)
    assert not (folder / "resume").exists()
    assert not fields.get("resume_training")


def test_a_run_whose_ranks_were_not_joined_is_complete_only_for_who_does_not_want_that(tmp_path):
    fields = {"output_dir": str(tmp_path), "resume_training": True}
    resume.record_run({"output_dir": str(tmp_path)})
    assert resume.closing_of(tmp_path) is None and not resume.is_complete(fields)
    resume.mark_finished(tmp_path, [], "Join them.", joined=False)
    assert resume.closing_of(tmp_path) == "Join them."
    assert not resume.is_complete(fields)
    assert resume.is_complete({**fields, "no_join": True})
    (tmp_path / "model").mkdir()                    # joined by hand
    assert resume.is_complete(fields)
    resume.mark_finished(tmp_path, ["model", "best"])
    assert not resume.is_complete(fields)
