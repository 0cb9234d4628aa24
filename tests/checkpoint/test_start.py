"""Whose configuration holds, and which parameters a checkpoint must have."""
from __future__ import annotations

import copy

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.checkpoint.start import Recipe, adopt_configuration, describe_start, match_tensors, pet_parts
from mindformers_ixc.config import ModelConfig, read_config
from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.parameters import parameter_table, part_of


@pytest.fixture
def t1(goldens):
    """Configuration and weights of the small reference model."""
    return read_config(goldens / "t1"), load_file(goldens / "t1" / "model.safetensors")


def opened(folder, tensors):
    """A checkpoint of those tensors."""
    save_file(tensors, folder / "model.safetensors")
    return open_source(folder)


def shapes_of(config):
    return {name: entry.shape for name, entry in parameter_table(config).items()}


def test_what_the_yaml_does_not_say_comes_from_the_directory(t1):
    section = {"type": "IXC25Config", "seq_length": 80, "plora_dropout": 0.0}
    recipe = adopt_configuration(section, t1[0], "t1")
    assert recipe == Recipe()
    assert (section["seq_length"], section["plora_dropout"]) == (80, 0.0)
    model = ModelConfig(**{key: value for key, value in section.items() if key != "type"})
    assert shapes_of(model) == shapes_of(t1[0])
    assert (model.plora_alpha, model.rope_theta, model.rope_scaling, model.rms_norm_eps, model.pad_token_id) == \
        (t1[0].plora_alpha, t1[0].rope_theta, t1[0].rope_scaling, t1[0].rms_norm_eps, t1[0].pad_token_id)


@pytest.mark.parametrize(("given", "named"), [
    ({"plora_alpha": 64}, "plora_alpha is 64 in the YAML and 8 there"),
    ({"rope_theta": 100.0}, "rope_theta is 100.0 in the YAML and 1000000.0 there"),
    ({"rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 500000.0 in the YAML"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling is .*4.0.* in the YAML and .*2.0.* there"),
    ({"num_layers": 3}, "num_hidden_layers is 3 in the YAML and 2 there"),
    ({"vision_config": {"hidden_size": 48}}, "vision_config.hidden_size is 48 in the YAML and 32 there"),
    ({"vocab_size": 2048}, "vocab_size is 2048 in the YAML and 512 there"),
    ({"task_lora_ranks": {"web": 16}}, "task_lora_ranks.web is 16 in the YAML and 8 there")])
def test_what_contradicts_the_directory_is_named_with_both_values(t1, given, named):
    with pytest.raises(ConfigError, match=f"config.json of t1: {named}.*--override_model_config"):
        adopt_configuration(copy.deepcopy(given), t1[0], "t1")


@pytest.mark.parametrize("given", [
    {"plora_alpha": 8, "rope_theta": 1e6, "num_layers": 2, "num_heads": 8},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2}},
    {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}}, {"rope_scaling": None},
    {"vision_config": {"type": "IXC25VisionConfig", "image_size": 56}}])
def test_what_says_the_same_is_no_contradiction(t1, given):
    assert adopt_configuration(given, t1[0], "t1") == Recipe()
    assert (given["rope_theta"], given["rope_scaling"]) == (1e6, {"type": "dynamic", "factor": 2.0})


def test_named_fields_hold_against_the_directory(t1):
    section = {"plora_alpha": 64, "rope_theta": 100.0, "vision_config": {"layer_norm_eps": 1e-6}}
    adopt_configuration(section, t1[0], "t1", ["plora_alpha", "rope_theta", "vision_config.layer_norm_eps"])
    assert (section["plora_alpha"], section["rope_theta"]) == (64, 100.0)
    assert section["vision_config"]["layer_norm_eps"] == 1e-6
    with pytest.raises(ConfigError, match="override_model_config names seq_length"):
        adopt_configuration({"seq_length": 80}, t1[0], "t1", ["seq_length"])


def test_task_loras_may_be_added_and_left_out(t1, tmp_path):
    config, tensors = t1
    recipe = adopt_configuration(section := {"task_lora_ranks": {"sft": 4, "web": 8}}, config, "t1")
    assert recipe.left_out == {"task_lora.dpo"} and not recipe.new
    kept, new = match_tensors(opened(tmp_path, tensors), shapes_of(ModelConfig(**section)), recipe)
    assert not new and "task_lora.dpo" not in {part_of(name) for name in kept}
    assert "task_lora.dpo" in describe_start("t1", recipe, new)[0]

    config.task_lora_ranks = {"sft": 4, "dpo": 4}
    recipe = adopt_configuration(section := {"task_lora_ranks": {"sft": 4, "dpo": 4, "web": 8}}, config, "t1")
    fewer = {name: value for name, value in tensors.items() if ".lora_web_" not in name}
    _, new = match_tensors(opened(tmp_path, fewer), shapes_of(ModelConfig(**section)), recipe)
    assert {part_of(name) for name in new} == {"task_lora.web"} and len(new) == 20
    assert describe_start("t1", recipe, new)[0].startswith("20 parameters (task_lora.web) are not in t1")
    # a pair of which something is there is no new pair
    fewer["model.layers.0.attention.wo.lora_web_A.weight"] = tensors["model.layers.0.attention.wo.lora_web_A.weight"]
    with pytest.raises(CheckpointError, match="19 parameters are missing"):
        match_tensors(opened(tmp_path, fewer), shapes_of(ModelConfig(**section)), recipe)


@pytest.mark.parametrize(("pet", "parts"), [
    (None, set()), ({"pet_type": "partial_lora"}, {"partial_lora"}), ({"pet_type": "lora"}, {"lora"}),
    ({"pet_type": "task_lora", "task": "sft"}, {"task_lora.sft"}), ({"pet_type": "adapter"}, set())])
def test_a_pet_type_adds_its_pairs(pet, parts):
    assert pet_parts(pet) == parts


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop("output.weight"), r"1 parameters are missing \(first: output.weight\), 0 are surplus"),
    (lambda t: t.update({"extra.weight": np.zeros(3, np.float32)}), r"1 are surplus \(first: extra.weight\)"),
    (lambda t: t.update({"model.norm.weight": np.zeros(3, np.float32)}), r"model.norm.weight with shape \(3,\)"),
    (lambda t: t.update({"model.norm.weight": np.zeros(64, np.int32)}), "in the format I32"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": t.pop("model.layers.0.attention.wo.weight")}),
     "names are those of a Llama-style decoder"),
    (lambda t: t.update({f"other.{name}": t.pop(name) for name in list(t) if name.startswith("vit.")}),
     r"surplus \(first: other\.vit\..*\)\. The directory is incomplete"),      # the tower has queries of its own
    (lambda t: [t.pop(name) for name in list(t) if "Plora" in name], "20 parameters are missing.*pet_config")])
def test_whatever_does_not_fit_is_refused_by_name(t1, tmp_path, change, words):
    config, tensors = t1
    change(tensors)
    with pytest.raises(CheckpointError, match=words):
        match_tensors(opened(tmp_path, tensors), shapes_of(config))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrapped_models_are_read_without_the_wrapper(t1, tmp_path, prefix, caplog):
    config, tensors = t1
    source = opened(tmp_path, {prefix + name: value for name, value in tensors.items()})
    kept, new = match_tensors(source, shapes_of(config))
    assert source.renamed and not new
    assert all(np.array_equal(kept[name].whole(), tensors[name]) for name in tensors)
    assert sum("wrappers put there" in record.message for record in caplog.records) == 1


def test_a_name_with_and_without_a_wrapper_is_refused(t1, tmp_path):
    tensors = {**t1[1], "module.output.weight": t1[1]["output.weight"]}
    with pytest.raises(CheckpointError, match=r"holds output\.weight twice"):
        opened(tmp_path, tensors)


def test_states_counters_and_buffers_are_passed_over(t1, tmp_path):
    config, tensors = t1
    extra = {"adam_m.output.weight": tensors["output.weight"], "train_report": np.zeros(3, np.float32),
             "vit.vision_tower.vision_model.embeddings.position_ids": np.zeros((1, 17), np.int64)}
    kept, _ = match_tensors(opened(tmp_path, {**tensors, **extra}), shapes_of(config))
    assert kept.keys() == tensors.keys()
