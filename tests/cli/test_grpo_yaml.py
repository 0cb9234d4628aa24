"""What a YAML says of GRPO, checked before anything starts."""
from __future__ import annotations

import pytest
from test_reward_yaml import fields_of

from mindformers_ixc.cli.run_config import check_fields
from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.planning.workload import read_workload


@pytest.mark.parametrize("recipe", ["ixc25_grpo", "ixc25_grpo_tiny"])
def test_the_recipes_pass_and_have_no_plan(recipe):
    fields = fields_of(recipe)
    check_fields(fields, recipe)
    with pytest.raises(ConfigError, match="whose graph is not cut"):
        read_workload(fields)


@pytest.mark.parametrize(("recipe", "words", "message"), [
    ("ixc25_grpo_tiny", ["--train_dataset.group_size", "1"], "group_size is 1; it must be a whole number of at"),
    ("ixc25_grpo_tiny", ["--train_dataset.group_size", "null"], "group_size is missing"),
    ("ixc25_grpo_tiny", ["--train_dataset_task.type", "IXC25SFTDataset"], "IXC25GroupDataset belongs to IXC25ForGRPO"),
    ("ixc25_grpo_tiny", ["--model.arch.type", "IXC25ForCausalLM"], "IXC25GroupDataset belongs to IXC25ForGRPO"),
    ("ixc25_grpo_tiny", ["--train_parts", "[task_lora.dpo, task_lora.sft]"], r"with GRPO it is \[task_lora.dpo\]"),
    ("ixc25_grpo_tiny", ["--train_parts", "null"], "train_parts is None"),
    ("ixc25_grpo_tiny", ["--model.model_config.grpo.task", "web"], "grpo.task is 'web', which adapter_mode 'write'"),
    ("ixc25_grpo_tiny", ["--model.model_config.grpo.beta", "-1"], "beta is -1"),
    ("ixc25_grpo_tiny", ["--rollout.rewards", "{exact: 1}"], "rollout.rewards.exact"),
    ("ixc25_grpo_tiny", ["--runner_config.sink_mode", "True"], "sink_mode is True"),
    ("ixc25_grpo_tiny", ["--use_parallel", "True", "--parallel.parallel_mode", "1"], "parallel_mode is 1, but GRPO"),
    ("ixc25_grpo_tiny", ["--train_dataset.input_columns", "[input_ids, labels, pixel_values, global_views, "
                         "view_index, vision_index, image_mask, matches, rewards, sampled_logps]"], "in this order"),
    ("ixc25_grpo_tiny", ["--train_dataset.data_loader.loss_on", "last"], "in place of the last"),
    ("ixc25_dpo_tiny", ["--rollout.updates", "2"], "rollout is for GRPO"),
    ("ixc25_sft_tiny", ["--train_dataset.group_size", "4"], "train_dataset.group_size is for GRPO"),
])
def test_what_does_not_go_together_is_refused(recipe, words, message):
    with pytest.raises((ConfigError, DataError), match=message):
        check_fields(fields_of(recipe, *words), recipe)
