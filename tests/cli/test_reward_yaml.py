"""What a YAML says of a reward model, checked before anything starts."""
from __future__ import annotations

import pytest

from mindformers_ixc.cli.run_config import check_fields
from mindformers_ixc.cli.yaml_file import apply_overrides, parse_overrides, read_yaml, tie_data_section
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.planning.workload import read_workload


def fields_of(recipe: str, *words: str) -> dict:
    fields = read_yaml(recipe)
    apply_overrides(fields, parse_overrides(list(words)))
    tie_data_section(fields)
    return fields


@pytest.mark.parametrize("recipe", ["ixc25_reward", "ixc25_reward_tiny"])
def test_the_recipes_pass(recipe):
    fields = fields_of(recipe)
    check_fields(fields, recipe)
    workload = read_workload(fields)
    assert workload.preference and not workload.reference and workload.sequences == 2 * workload.samples
    assert "v_head.weight" in [entry.name for entry, _ in workload.table.entries]


@pytest.mark.parametrize(("recipe", "words", "message"), [
    ("ixc25_reward_tiny", ["--model.model_config.reward_pooling", "first"], "reward_pooling is 'first'"),
    ("ixc25_reward_tiny", ["--model.model_config.reward_pooling", "null"], "reward_pooling is None"),
    ("ixc25_reward_tiny", ["--model.model_config.reward.loss", "hinge"], "model_config.reward.loss is 'hinge'"),
    ("ixc25_reward_tiny", ["--model.model_config.reward.beta", "1"], "unknown key|beta"),
    ("ixc25_reward_tiny", ["--train_dataset_task.type", "IXC25SFTDataset"], "IXC25PreferenceDataset belongs to"),
    ("ixc25_reward_tiny", ["--train_dataset.input_columns", "[input_ids, labels, pixel_values, global_views, "
                           "view_index, vision_index, image_mask]"], "lacks score_positions"),
    ("ixc25_reward_tiny", ["--evaluation.mode", "write"], "evaluation.mode is of answers, and a reward model writes"),
    ("ixc25_sft_tiny", ["--model.model_config.reward_pooling", "last"], "reward_pooling is for reward models"),
    ("ixc25_dpo_tiny", ["--model.model_config.reward.loss", "focal"], "model_config.reward is for reward models"),
    ("ixc25_sft_tiny", ["--model.arch.type", "IXC25ForReward"], "reward_pooling is None|lacks score_positions"),
])
def test_what_does_not_go_together_is_refused(recipe, words, message):
    with pytest.raises(ConfigError, match=message):
        check_fields(fields_of(recipe, *words), recipe)
