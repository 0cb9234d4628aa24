"""Which member of the family a checkpoint is: known by its files, and refused where it is another one."""
from __future__ import annotations

import json

import numpy as np
import pytest
from random_model import SIZES, make, random_arrays, save

from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.inspection import inspect
from mindformers_ixc.checkpoint.merge import merge
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.checkpoint.start import begin, describe_start, match_tensors
from mindformers_ixc.config import ModelConfig, read_config
from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.parameters import SCORE_HEAD, parameter_table

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
