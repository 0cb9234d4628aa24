"""Faults of a run's start: missing weights, a YAML that contradicts them, odd configurations and surroundings."""
from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import random_model
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor
from safetensors.numpy import load_file, save_file

import mindformers_ixc_cli
from mindformers_ixc import IXC25Config, IXC25ForCausalLM
from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.digests import write_digests
from mindformers_ixc.checkpoint.model_directory import load_weights, save_model_directory
from mindformers_ixc.checkpoint.start import Recipe
from mindformers_ixc.cli.yaml_file import load_yaml, parse_overrides, read_yaml
from mindformers_ixc.config import ModelConfig, read_config
from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.fields import FIELDS, VISION_FIELDS
from mindformers_ixc.files import read_metrics
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.training import datasets
from mindformers_ixc.training.starting import adopt_start

TINY = Path(__file__).parents[2] / "yaml_configs" / "ixc25_sft_tiny.yaml"
ODD = st.sampled_from([None, True, False, 0, -1, -2.5, 2 ** 63, 2 ** 4000, 1e308, float("nan"), float("inf"), "", "x",
                       "4", [], [1], {}, {"a": 1}, [[]]])


@pytest.fixture
def start(goldens, tmp_path) -> Path:
    """A copy of the small reference model, which may be changed."""
    return Path(shutil.copytree(goldens / "t1", tmp_path / "start", ignore=shutil.ignore_patterns("*.npz", "bin")))


def fields_from(folder: Path | str, **section) -> dict:
    """Fields of a run that starts there."""
    return {"run_mode": "finetune", "load_checkpoint": str(folder),
            "model": {"model_config": {"type": "IXC25Config", "seq_length": 80, **section}}}


def change_config(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_run_gets_the_configuration_of_the_directory_it_starts_with(start, capsys):
    change_config(start, plora_alpha=64, rope_theta=100.0)
    adopt_start(fields := fields_from(start))
    section = fields["model"]["model_config"]
    assert (section["plora_alpha"], section["rope_theta"], section["seq_length"]) == (64, 100.0, 80)
    with pytest.raises(ConfigError, match=r"plora_alpha is 8 in the YAML and 64 there.*override_model_config"):
        adopt_start(fields_from(start, plora_alpha=8))
    fields = {**fields_from(start, plora_alpha=8), "override_model_config": ["plora_alpha"]}
    adopt_start(fields)
    assert fields["model"]["model_config"]["plora_alpha"] == 8
    assert f"the model of {start} is changed: plora_alpha 8 instead of 64." in capsys.readouterr().err


def test_a_run_without_a_checkpoint_has_nothing_to_override():
    fields = {**fields_from(Path()), "load_checkpoint": "", "override_model_config": ["plora_alpha"]}
    with pytest.raises(ConfigError, match="override_model_config is for runs that start with a checkpoint"):
        adopt_start(fields)
    with pytest.raises(FileNotFoundError, match="load_checkpoint: gone does not exist"):
        adopt_start({**fields, "load_checkpoint": "gone"})


@pytest.mark.parametrize("parallel", [False, True])
def test_a_run_is_refused_where_a_parameter_is_missing(start, parallel):
    weights = load_file(start / "model.safetensors")
    del weights["output.weight"]
    save_file(weights, start / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 parameters are missing \(first: output.weight\)"):
        adopt_start({**fields_from(start), "use_parallel": parallel})


def test_a_parallel_run_starts_with_what_mindformers_can_cut(start):
    weights = {f"module.{name}": value for name, value in load_file(start / "model.safetensors").items()}
    save_file(weights, start / "model.safetensors")
    adopt_start(fields_from(start))
    with pytest.raises(CheckpointError, match="mindformers convert"):
        adopt_start({**fields_from(start), "use_parallel": True})


def test_a_run_that_leaves_a_whole_model_does_not_start_with_a_part_of_one(start, tmp_path):
    """What ranks of a run in mode base saved lacks the pairs that mode has no use for."""
    convert(start, tmp_path / "run", tensor_parallel=2, drop=["sft", "dpo", "web"])
    shutil.copy(start / "config.json", tmp_path / "run")
    adopt_start({**fields_from(tmp_path / "run"), "use_parallel": True})
    with pytest.raises(CheckpointError, match=r"60 parameters are missing.*--attach"):
        adopt_start(fields_from(tmp_path / "run"))


def test_weights_of_a_parallel_run_are_compared_with_their_digests(start, tmp_path):
    weights = start / "model.safetensors"
    write_digests(start)
    adopt_start({**fields_from(start), "use_parallel": True})
    content = bytearray(weights.read_bytes())
    content[-1] ^= 64
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="differs from its digest"):
        adopt_start({**fields_from(start), "use_parallel": True})


@pytest.mark.parametrize("begun", ["from a directory", "from nothing"])
@pytest.mark.parametrize("section", [
    {}, {"num_layers": 2}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}},
    {"rope_parameters": {"rope_theta": 1e6}}])
def test_a_resumed_run_has_the_configuration_that_it_wrote_down(start, tmp_path, section, begun):
    fields = fields_from(start if begun == "from a directory" else "", **copy.deepcopy(section))
    adopt_start(fields)
    recorded = copy.deepcopy(fields["model"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run_config.json").write_text(json.dumps({"model": recorded, "layout": [1, 1, 1]}))
    again = {**fields_from(start, **section), "resume_training": True, "load_checkpoint": "",
             "output_dir": str(tmp_path / "out")}
    adopt_start(again)
    assert again["model"] == recorded


@settings(max_examples=150, deadline=None, derandomize=True)
@given(name=st.sampled_from([*FIELDS, *(f"vision_config.{name}" for name in VISION_FIELDS), "task_lora_ranks.sft",
                             "rope_scaling.factor"]), value=ODD)
def test_any_value_of_a_field_is_taken_or_refused_by_name(name, value):
    section = {"vision_config": {}, "task_lora_ranks": {"sft": 4}, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    inner, _, key = name.rpartition(".")
    (section[inner] if inner else section)[key or name] = value
    try:
        ModelConfig(**section)
    except ConfigError as error:
        assert len(str(error)) < 400


@pytest.mark.parametrize(("change", "words"), [
    ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number from 1"),
    ({"num_hidden_layers": 10 ** 9}, "num_hidden_layers is 1000000000; it must be .* to 4096"),
    ({"hidden_size": "64"}, "hidden_size is '64'"), ({"vision_config": [1]}, r"vision_config is \[1\]; .*a section"),
    ({"task_lora_ranks": {"sft": 0}}, "task_lora_ranks.sft is 0"), ({"bias": 1}, "bias is 1; .*true or false"),
    ({"plora_dropout": 1.0}, "plora_dropout is 1.0"), ({"hd_num": -1}, "hd_num is -1"),
    ({"head_size": 3}, "head_size is no field"), ({"to_public_dict": 3}, "to_public_dict is no field")])
def test_a_value_of_a_config_file_is_named_with_the_file(start, change, words):
    change_config(start, **change)
    with pytest.raises(ConfigError, match=f"start: {words}"):
        read_config(start)


def test_a_config_file_may_have_any_key_that_is_no_name_of_the_class(start):
    change_config(start, self=3, given=4)
    assert (read_config(start).given, read_config(start, IXC25Config).hidden_size) == (4, 64)


@pytest.mark.parametrize(("content", "words"), [
    (b"a: " + b"[" * 100_000, "nested too deeply"), (b"{a: " * 101, "nested too deeply"),
    (b"a: &x\n  b: *x\n", "an alias"), (b"a: 2024-99-99\n", "month must be"),
    ("a: 图片是什么".encode("gbk"), "is not UTF-8 text"), (b"base_config: [3]\n", "base_config is"),
    (b"a: !!python/object:os.system {}\n", "not valid YAML"), (b"? [a]\n: 1\n", "not valid YAML"),
    ("a: x".encode("utf-16"), "UTF-16 text")])
def test_a_yaml_that_cannot_be_read_is_one_sentence(tmp_path, content, words):
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"run\.yaml.*{words}"):
        read_yaml(tmp_path / "run.yaml")


def test_many_aliases_are_looked_at_once():
    text = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    assert len(load_yaml(text, "x")) == 30


def test_a_value_of_the_command_line_that_is_no_yaml_is_named():
    with pytest.raises(ConfigError, match=r"The value '\[1' is not valid YAML"):
        parse_overrides(["--seed", "[1"])


def test_a_byte_that_is_no_text_on_the_command_line(capsys):
    assert mindformers_ixc_cli.main(["inspect", "caf\udce9"]) == 1
    assert r"the argument 'caf\udce9' has a byte that is not UTF-8" in capsys.readouterr().err


def test_logs_go_elsewhere_where_the_home_cannot_be_written(start):
    environment = {key: value for key, value in os.environ.items() if key not in ("LOG_MF_PATH", "XDG_CACHE_HOME")}
    command = [sys.executable, "-m", "mindformers_ixc_cli", "inspect", str(start)]
    result = subprocess.run(command, env={**environment, "HOME": os.devnull}, capture_output=True, text=True,
                            check=False)
    assert result.returncode == 0 and "language" in result.stdout
    assert "LOG_MF_PATH chooses another" in result.stderr


def test_a_new_pair_stays_as_it_is_and_must_have_no_effect(goldens, tmp_path):
    weights = load_file(goldens / "t1" / "model.safetensors")
    fewer = {name: value for name, value in weights.items() if "lora_sft" not in name}
    save_file(fewer, tmp_path / "model.safetensors")
    model = IXC25ForCausalLM(read_config(goldens / "t1", IXC25Config))
    recipe = Recipe(new={"task_lora.sft"})
    assert len(load_weights(model, tmp_path, recipe)) == 20
    loaded = {parameter.name: parameter for parameter in model.get_parameters()}
    name = "model.layers.1.feed_forward.w2.weight"
    np.testing.assert_array_equal(loaded[name].asnumpy(), weights[name])
    second = loaded["model.layers.1.feed_forward.w2.lora_sft_B.weight"]
    assert not second.asnumpy().any()
    second.set_data(Tensor(np.ones(second.shape, np.float32)))
    with pytest.raises(CheckpointError, match="does not start at zero"):
        load_weights(model, tmp_path, recipe)


@pytest.mark.slow
def test_the_first_loss_of_a_run_is_that_of_the_directorys_model(tmp_path):
    """The YAML says nothing of the model; scale and rotary base are the directory's, and unusual."""
    sizes = {**random_model.SIZES, "vocab_size": 1024, "plora_alpha": 8, "rope_theta": 100.0,
             "vision_config": {"image_size": 112, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                               "intermediate_size": 32}}
    model, rng = IXC25ForCausalLM(IXC25Config(**sizes)), np.random.default_rng(0)
    for parameter in model.get_parameters():
        if parameter.name.endswith("_B.weight"):
            parameter.set_data(Tensor(rng.normal(0, 0.3, parameter.shape).astype(np.float32)))
    save_model_directory(model, tmp_path / "m", demo_path("tokenizer.model"))
    silent = {key: None for key in read_yaml(TINY)["model"]["model_config"]
              if key not in ("type", "seq_length", "max_tiles")}
    section = {**silent, "plora_dropout": 0.0}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"base_config": str(TINY), "model": {"model_config": section}}))
    command = [str(Path(sys.executable).parent / "mindformers"), "run", "--config", "own.yaml", "--load_checkpoint",
               "m", "--output_dir", "out", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    row = read_metrics(tmp_path / "out" / "metrics.jsonl")[0]
    data = read_yaml(TINY)["train_dataset"]
    table, _ = datasets._table(MindFormerConfig(**data), "sample")
    columns = list(zip(*(table[index] for index in row["samples"])))
    batch = {name: Tensor(np.stack(column)) for name, column in zip(table.columns, columns)}
    trained = load_model(tmp_path / "m", IXC25ForCausalLM, seq_length=data["seq_length"], max_tiles=data["max_tiles"])
    columns = [None if name == "labels" else batch[name] for name in BATCH_COLUMNS]
    logits = trained(*columns).asnumpy().astype(np.float64)
    labels = batch["labels"].asnumpy()
    logps = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) \
        - logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logps, np.maximum(labels, 0)[..., None], -1)[..., 0][labels >= 0]
    assert row["loss"] == pytest.approx(-chosen.mean(), rel=1e-5)
    written = read_config(tmp_path / "out" / "model")
    assert (written.plora_alpha, written.rope_theta, written.vision_config.hidden_size) == (8, 100.0, 32)
