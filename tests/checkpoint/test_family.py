"""Which member of the family a checkpoint is: known by its files, and refused where it is another one."""
from __future__ import annotations

import json
import re

import numpy as np
import pytest
from random_model import SIZES, make, random_arrays, save

from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.inspection import inspect
from mindformers_ixc.checkpoint.merge import merge
from mindformers_ixc.checkpoint.quantise import quantize
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.checkpoint.start import begin, describe_start, match_tensors
from mindformers_ixc.config import ModelConfig, read_config
from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.parameters import SCORE_HEAD, UNUSED, parameter_table

REWARD = {**SIZES, "task_lora_ranks": {}, "reward_pooling": "mean"}


def make_reward(folder, **fields):
    """A reward model whose config.json has these fields in place of its own."""
    config = ModelConfig(**REWARD)
    folder.mkdir(parents=True)
    own = config.to_public_dict()
    del own["reward_pooling"], own["architectures"]
    (folder / "config.json").write_text(json.dumps({**own, **fields}), encoding="utf-8")
    save(folder / "model.safetensors", random_arrays(config))
    return folder


def test_a_reward_model_has_its_head_in_place_of_the_other():
    names = set(parameter_table(ModelConfig(**REWARD)))
    assert SCORE_HEAD in names and "output.weight" not in names
    assert parameter_table(ModelConfig(**REWARD))[SCORE_HEAD].shape == (1, SIZES["hidden_size"])
    assert SCORE_HEAD not in parameter_table(ModelConfig(**SIZES))


@pytest.mark.parametrize(("fields", "pooling"), [
    ({"reward_pooling": "mean"}, "mean"), ({"architectures": ["InternLMXComposer2ForRewardModel"]}, "last"),
    ({"architectures": ["Other"]}, "last"), ({}, "last")])
def test_it_comes_through_conversion_whatever_says_what_it_is(tmp_path, fields, pooling):
    source = make_reward(tmp_path / "model", **fields)
    report = inspect(source)
    assert not (report.missing or report.surplus) and report.parts["reward_head"].parameters == SIZES["hidden_size"]
    convert(source, tmp_path / "tp2", tensor_parallel=2, pipeline_stages=2)
    convert(tmp_path / "tp2", tmp_path / "back", to="hf")
    found, wanted = open_source(tmp_path / "back").tensors, open_source(source).tensors
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name].whole(), tensor.whole())
    assert read_config(tmp_path / "back").reward_pooling == pooling
    assert "Reward" in json.loads((tmp_path / "back" / "config.json").read_text())["architectures"][0]


def test_its_head_is_a_part_that_can_be_taken_out_and_put_back(tmp_path):
    source = make_reward(tmp_path / "model", reward_pooling="last")
    merge(source, tmp_path / "part", extract=["reward_head"])
    assert list(open_source(tmp_path / "part").tensors) == [SCORE_HEAD]
    merge(source, tmp_path / "again", attach=tmp_path / "part")
    assert len(open_source(tmp_path / "again").tensors) == len(open_source(source).tensors)


def test_a_head_in_a_file_that_says_nothing_keeps_the_pooling_of_the_model_it_goes_to(tmp_path):
    source = make_reward(tmp_path / "model", reward_pooling="mean")
    (tmp_path / "alone").mkdir()
    merge(source, tmp_path / "alone" / "head.safetensors", extract=["reward_head"])
    assert open_source(tmp_path / "alone" / "head.safetensors").config_file is None
    merge(source, tmp_path / "again", attach=tmp_path / "alone" / "head.safetensors")
    assert read_config(tmp_path / "again").reward_pooling == "mean"


def test_with_a_score_head_a_model_that_writes_becomes_a_reward_model(tmp_path):
    base, source = make(tmp_path / "base"), make_reward(tmp_path / "reward", reward_pooling="mean")
    merge(source, tmp_path / "parts", extract=["language", "partial_lora", "reward_head"])
    merge(base, tmp_path / "whole", attach=tmp_path / "parts", to="hf")
    found, wanted = open_source(tmp_path / "whole").tensors, open_source(source).tensors
    assert read_config(tmp_path / "whole").reward_pooling == "mean" and "output.weight" not in found
    np.testing.assert_array_equal(found[SCORE_HEAD].whole(), wanted[SCORE_HEAD].whole())
    assert not inspect(tmp_path / "whole").missing


def test_pooling_is_one_of_two():
    with pytest.raises(ConfigError, match="reward_pooling is 'first'; the choices are"):
        ModelConfig(**{**REWARD, "reward_pooling": "first"})


def shapes_of(section) -> dict:
    return {name: entry.shape for name, entry in parameter_table(ModelConfig(**section)).items()}


def test_training_one_begins_with_a_model_that_writes(tmp_path):
    """The head is new, the other head and the task LoRAs that the YAML does not name are left out, and it is said."""
    source = open_source(make(tmp_path / "model"))
    section = {"reward_pooling": "last", "task_lora_ranks": {}}
    recipe = begin(section, source)
    tensors, new = match_tensors(source, shapes_of(section), recipe)
    assert new == [SCORE_HEAD] and "output.weight" not in tensors
    lines = describe_start("model", recipe, new)
    assert lines[0] == "model writes answers: output.weight is left out, and the score head starts at zero."
    assert len(lines) == 2 and "task_lora" in lines[1]


def test_training_goes_on_with_one(tmp_path):
    source = open_source(make_reward(tmp_path / "model", reward_pooling="mean"))
    section = {"reward_pooling": "mean", "task_lora_ranks": {}}
    recipe = begin(section, source)
    tensors, new = match_tensors(source, shapes_of(section), recipe)
    assert not new and SCORE_HEAD in tensors
    with pytest.raises(ConfigError, match="reward_pooling is 'last' in the YAML and 'mean' there"):
        begin({"reward_pooling": "last", "task_lora_ranks": {}}, source)


@pytest.mark.parametrize("fields", [{"reward_pooling": "last"}, {}])
def test_another_training_does_not_begin_with_one(tmp_path, fields):
    with pytest.raises(CheckpointError, match=r"is a reward model: .* writes none"):
        begin({"task_lora_ranks": {}}, open_source(make_reward(tmp_path / "model", **fields)))


def add_memory(folder, dtype="F32"):
    """Gives a model directory what OmniLive's base has beside it."""
    arrays = {name: tensor.whole() for name, tensor in open_source(folder).tensors.items()}
    width = SIZES["hidden_size"]
    memory = {"video_mem_proj.0.weight": (width, 24), "video_mem_proj.0.bias": (width,),
              "video_mem_proj.2.weight": (width, width), "video_mem_proj.2.bias": (width,)}
    rng = np.random.default_rng(9)
    arrays.update({name: rng.standard_normal(shape).astype(np.float32) for name, shape in memory.items()})
    save(folder / "model.safetensors", arrays, dtype)
    return folder


def test_omnilives_base_comes_through_and_nothing_uses_its_memory(tmp_path, caplog):
    source = add_memory(make(tmp_path / "base", task_lora_ranks={}))
    with caplog.at_level("INFO"):
        convert(source, tmp_path / "tp2", tensor_parallel=2, pipeline_stages=2)
        convert(source, tmp_path / "again", to="hf")
    assert sum("nothing here computes with them" in record.message for record in caplog.records) == 1
    convert(tmp_path / "tp2", tmp_path / "back", to="hf")
    merge(source, tmp_path / "mean", average=[tmp_path / "again"])
    merge(source, tmp_path / "part", extract=["vision"])
    merge(source, tmp_path / "attached", attach=tmp_path / "part")
    wanted = open_source(source).tensors
    for folder in ("again", "back", "mean", "attached"):
        found = open_source(tmp_path / folder).tensors
        assert found.keys() == wanted.keys(), folder
        for name, tensor in wanted.items():
            np.testing.assert_array_equal(found[name].whole(), tensor.whole())
    section = {"task_lora_ranks": {}}
    opened = open_source(source)
    recipe = begin(section, opened)
    tensors, new = match_tensors(opened, shapes_of(section), recipe)
    assert not new and not any(name.startswith("video_mem_proj") for name in tensors)
    report = inspect(source)
    assert not report.surplus and report.parts["not used here"].tensors == 4
    assert "OmniLive's base: it answers and trains" in report.to_text()


def test_omnilives_base_stays_one_when_it_is_quantised_and_widened(tmp_path):
    source = add_memory(make(tmp_path / "base", task_lora_ranks={}))
    quantize(source, tmp_path / "q8", bits=8)
    convert(tmp_path / "q8", tmp_path / "full", to="hf")
    wanted = open_source(source).tensors
    for folder in ("q8", "full"):
        found = open_source(tmp_path / folder).tensors
        for name in UNUSED:
            np.testing.assert_array_equal(found[name].whole(), wanted[name].whole())
    assert "OmniLive's base: it answers as" in inspect(tmp_path / "q8").to_text()


@pytest.mark.parametrize(("build", "words"), [
    (lambda folder: make(folder), "It is InternLM-XComposer-2.5 with the task LoRAs sft, dpo, web: `mindformers chat`"),
    (lambda folder: make(folder, task_lora_ranks={}), "It is InternLM-XComposer-2.5 without task LoRAs"),
    (lambda folder: make_reward(folder), "It is a reward model (IXC-2.5-Reward): `mindformers score`"),
])
def test_inspect_says_which_member_it_is(tmp_path, build, words):
    text = inspect(build(tmp_path / "model")).to_text()
    assert words in text and "It holds exactly what its configuration asks for." in text


def test_what_lacks_a_part_of_omnilives_memory_says_so(tmp_path, caplog):
    source = add_memory(make(tmp_path / "base", task_lora_ranks={}))
    arrays = {name: tensor.whole() for name, tensor in open_source(source).tensors.items()}
    del arrays["video_mem_proj.2.bias"]
    save(source / "model.safetensors", arrays)
    assert inspect(source).missing == ["video_mem_proj.2.bias"]
    convert(source, tmp_path / "again", to="hf")
    assert "base lacks video_mem_proj.2.bias, which belong to these" in caplog.text


@pytest.mark.parametrize("says", [{}, {"reward_pooling": "last"}])
def test_two_heads_are_named(tmp_path, says):
    source = make(tmp_path / "model", task_lora_ranks={})
    arrays = {name: tensor.whole() for name, tensor in open_source(source).tensors.items()}
    save(source / "model.safetensors", {**arrays, SCORE_HEAD: np.ones((1, SIZES["hidden_size"]), np.float32)})
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**fields, **says}), encoding="utf-8")
    text = inspect(source).to_text()
    assert "It has two heads, v_head.weight of a reward model and output.weight" in text and "surplus" in text


@pytest.mark.parametrize(("fields", "words"), [
    ({"model_type": "foo", "architectures": ["FooForBar"]}, "It is another model (FooForBar), which does nothing here"),
    ({"model_type": "clip_vision_model"}, "It is a CLIP vision tower, which `mindformers assemble` joins"),
    ({"model_type": "internlm2"}, "It is an InternLM2 language model"),
    ({"model_type": "qwen2", "architectures": ["GroundQwenForCausalLM"]}, "It is OmniLive's memory model, which is"),
    ({"model_type": "qwen2_audio"}, "It is OmniLive's audio model"),
])
def test_inspect_names_other_models(tmp_path, fields, words):
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    save(tmp_path / "model.safetensors", {"layer.weight": np.ones((2, 2), np.float32)})
    report = inspect(tmp_path)
    text = report.to_text()
    assert words in text and "missing" not in text and not report.of_family
    assert json.loads(report.to_json())["member"] in text
    for use in (read_config, lambda folder: convert(folder, tmp_path / "target")):     # and so do those that take none
        with pytest.raises(CheckpointError, match=f"expected 'internlmxcomposer2': it is {re.escape(words[6:])}"):
            use(tmp_path)


def test_fields_that_are_none_are_said(tmp_path):
    (tmp_path / "config.json").write_text("[1]", encoding="utf-8")
    save(tmp_path / "model.safetensors", {"layer.weight": np.ones((2, 2), np.float32)})
    with pytest.raises(CheckpointError, match=r"config\.json holds a list and no object of fields"):
        inspect(tmp_path)


def test_the_folder_of_omnilive_leads_to_its_base(tmp_path):
    make(tmp_path / "ol" / "base")
    for use in (read_config, inspect):
        with pytest.raises(CheckpointError, match=r"ol/base has one: is that meant\?"):
            use(tmp_path / "ol")


@pytest.mark.parametrize(("ranks", "build"), [
    ({"sft": 2, "dpo": 2, "web": 4}, make), ({}, make), ({"web": 3}, make),
    ({}, lambda folder, **_: make_reward(folder))])
def test_the_weights_say_which_task_loras_there_are(tmp_path, ranks, build):
    """Public configurations do not, and the reward model and OmniLive's base have none."""
    folder = build(tmp_path / "model", task_lora_ranks=ranks)
    fields = json.loads((folder / "config.json").read_text())
    del fields["task_lora_ranks"]
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    report = inspect(folder)
    assert not report.missing and not report.surplus
    convert(folder, tmp_path / "again", to="hf")
    assert read_config(tmp_path / "again").task_lora_ranks == ranks


def test_what_a_parallel_network_keeps_of_its_steps_is_asked_of_no_checkpoint(tmp_path):
    source = open_source(make(tmp_path / "model"))
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    tensors, new = match_tensors(source, {**shapes, "train_report": (5,)})
    assert not new and tensors.keys() == shapes.keys()
