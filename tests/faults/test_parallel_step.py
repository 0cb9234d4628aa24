"""What a training step cannot do is said by the first check, before anything is read; what it can is let through."""
from __future__ import annotations

from pathlib import Path

import pytest

from mindformers_ixc.cli.run_config import check_fields
from mindformers_ixc.cli.yaml_file import apply_overrides, read_yaml
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.parallel.checks import check_run

YAMLS = Path(__file__).parents[2] / "yaml_configs"
PARALLEL = {"use_parallel": True, "parallel.parallel_mode": 1, "parallel.full_batch": True,
            "parallel.gradients_mean": False}
COLUMNS = ["input_ids", "labels", "pixel_values", "global_views", "view_index", "vision_index", "image_mask"]
PREFERENCE = "model.model_config.preference"


def check(name: str, options: dict, devices: int = 2) -> None:
    """What `mindformers launch` checks before it starts anything."""
    fields = read_yaml(YAMLS / f"ixc25_{name}_tiny.yaml")
    apply_overrides(fields, {**PARALLEL, **options})
    check_fields(fields, "my.yaml")
    check_run(fields, devices)


@pytest.mark.parametrize("options", [
    {"parallel_config.model_parallel": 2}, {"parallel_config.data_parallel": 2},
    {"parallel_config.model_parallel": 2, "runner_config.gradient_accumulation_steps": 2},
    {"parallel_config.data_parallel": 2, "parallel.full_batch": False},
    {"parallel_config.pipeline_stage": 2, "parallel_config.micro_batch_num": 2}])
def test_sources_and_averages_are_let_through_in_every_layout(options):
    check("sft", {"runner_wrapper.ema_decay": 0.99, **options})


@pytest.mark.parametrize("options", [
    {}, {"runner_config.gradient_accumulation_steps": 4}, {"parallel.full_batch": False},
    {f"{PREFERENCE}.rpo_alpha": 1.0}, {f"{PREFERENCE}.loss": "simpo", f"{PREFERENCE}.gamma": 0.5}])
def test_pairs_are_let_through(options):
    check("dpo", {"parallel_config.data_parallel": 2, **options})


@pytest.mark.parametrize(("name", "options", "words"), [
    ("dpo", {f"{PREFERENCE}.loss": "simpo", f"{PREFERENCE}.rpo_alpha": 1.0}, "rpo_alpha is 1.0, but the loss simpo"),
    ("dpo", {f"{PREFERENCE}.loss": "hinge"}, r"preference\.loss is 'hinge'; the choices are"),
    ("dpo", {f"{PREFERENCE}.task": "web"}, "task is 'web', which adapter_mode 'write' does not use"),
    ("dpo", {f"{PREFERENCE}.loss": "orpo", "train_dataset.input_columns": [*COLUMNS, "reference_logps"]},
     "reference_logps, but the loss orpo compares with no reference"),
    ("dpo", {"train_dataset.input_columns": [*COLUMNS, "source"]}, "has source, which preference pairs do not have"),
    ("sft", {"train_dataset.input_columns": [*COLUMNS, "reference_logps"]}, "which only preference pairs have"),
    ("sft", {"model.arch.type": "IXC25ForPreference"}, "IXC25PreferenceDataset belongs to IXC25ForPreference"),
    ("dpo", {"model.arch.type": "IXC25ForCausalLM"}, "IXC25PreferenceDataset belongs to IXC25ForPreference"),
    ("sft", {"runner_wrapper.ema_decay": 1}, r"ema_decay.* is 1; it must be a number of at least 0 and below 1"),
    ("sft", {"runner_wrapper.ema_decay": "0.9x"}, r"ema_decay.* is '0.9x'; it must be a number")])
def test_what_cannot_be_meant_is_refused(name, options, words):
    with pytest.raises(ConfigError, match=words):
        check(name, {"parallel_config.data_parallel": 2, **options})
