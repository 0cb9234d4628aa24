"""What a step is made of, from the configuration alone, and what MindFormers is told of it before it starts."""
from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from mindformers.tools.register import MindFormerConfig, MindFormerModuleType, MindFormerRegister
from mindformers.trainer.causal_language_modeling import CausalLanguageModelingTrainer
from mindspore import Parameter, Tensor, nn

from mindformers_ixc.cli.yaml_file import apply_overrides, read_yaml
from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.models.preference import REPORT
from mindformers_ixc.models.reward import REPORT as REWARD_REPORT
from mindformers_ixc.training import step as steps
from mindformers_ixc.training.checkpoints import MONITOR, SafeCheckpointMonitor, safe_checkpoints
from mindformers_ixc.training.step import StepPlan, plan_step
from mindformers_ixc.training.trainer import IXC25Trainer

YAMLS = Path(__file__).parents[2] / "yaml_configs"
COLUMNS = list(BATCH_COLUMNS)
ACCUMULATED = {"runner_config.gradient_accumulation_steps": 3}
PLAIN, SOURCES = ({"train_dataset.input_columns": columns} for columns in (COLUMNS, [*COLUMNS, "source"]))
AVERAGED = {"runner_wrapper.ema_decay": 0.9}
STAGES = {"parallel_config.pipeline_stage": 2}


def config_of(*changes: dict, name: str = "sft") -> MindFormerConfig:
    fields = read_yaml(YAMLS / f"ixc25_{name}_tiny.yaml")
    for change in changes:
        apply_overrides(fields, change)
    return MindFormerConfig(**fields)


@pytest.fixture
def parallel(monkeypatch):
    monkeypatch.setattr(steps, "is_parallel", lambda: True)


@pytest.mark.parametrize(("changes", "expected"), [
    ((PLAIN,), StepPlan()),
    ((PLAIN, ACCUMULATED), StepPlan(micro_batches=3, own_cell=True, labels_column=1)),
    ((PLAIN, AVERAGED), StepPlan(ema_decay=0.9)),
    ((SOURCES,), StepPlan("sources", "sources", own_cell=True, labels_column=1)),
    ((SOURCES, ACCUMULATED, AVERAGED), StepPlan("sources", "sources", 3, True, 1, ema_decay=0.9)),
    (({"train_dataset.input_columns": ["labels", "input_ids", "source"]},),
     StepPlan("sources", "sources", own_cell=True, labels_column=0)),
    (({"train_dataset.input_columns": [*COLUMNS, "loss_weights"]}, ACCUMULATED),
     StepPlan(micro_batches=3, own_cell=True, labels_column=7)),
    ((PLAIN, {"skip_spikes.loss": 9.0}), StepPlan(own_cell=True, labels_column=1, skips_spikes=True)),
    (({"train_dataset.input_columns": None},), StepPlan())])
def test_a_stand_alone_step(changes, expected):
    assert plan_step(config_of(*changes)) == expected


def test_a_stand_alone_step_on_preferences_weighs_its_parts_the_same():
    plan = plan_step(config_of(ACCUMULATED, name="dpo"))
    assert plan == StepPlan(report="preference", micro_batches=3, own_cell=True)
    assert plan.report_shape == (len(REPORT),)
    scores = plan_step(config_of(ACCUMULATED, name="reward"))
    assert scores == StepPlan(report="reward", micro_batches=3, own_cell=True)
    assert scores.report_shape == (len(REWARD_REPORT),)


@pytest.mark.parametrize(("changes", "per_token"), [((), False), ((ACCUMULATED,), True), ((STAGES,), True)])
def test_micro_batches_of_a_parallel_step_are_mindformers(parallel, changes, per_token):
    form = "sums" if per_token else "mean"
    assert plan_step(config_of(PLAIN, *changes)) == StepPlan(form, per_token=per_token)
    assert plan_step(config_of(PLAIN, AVERAGED, *changes)) == StepPlan(form, per_token=per_token, ema_decay=0.9)


@pytest.mark.parametrize(("changes", "per_token"), [((), False), ((ACCUMULATED,), True), ((STAGES,), True)])
@pytest.mark.parametrize(("name", "columns", "report"), [("dpo", {}, "preference"), ("sft", SOURCES, "sources")])
def test_a_parallel_step_keeps_its_report_in_the_model(parallel, name, columns, report, changes, per_token):
    plan = plan_step(config_of(columns, *changes, name=name))
    form = "sources" if report == "sources" else "sums" if per_token else "mean"
    assert plan == StepPlan(form, report, in_model=True, per_token=per_token)
    assert plan.report_shape is None
    assert plan.cell("MFTrainOneStepCell") == {"type": "IXC25TrainOneStepCell"}


def test_the_average_is_the_optimizers(parallel):
    config = config_of(PLAIN, AVERAGED)
    plan = plan_step(config)
    plan.put_into(config)
    assert "ema_decay" not in config.runner_wrapper
    weight = Parameter(Tensor(np.ones(2, np.float32)), name="weight")
    ours = plan.optimizer(nn.SGD([weight], learning_rate=0.1))
    assert [parameter.name for parameter in ours.average] == ["ema.weight"]
    plain = nn.SGD([weight], learning_rate=0.1)
    assert StepPlan().optimizer(plain) is plain


def test_a_plan_does_not_change_and_is_completed_by_the_data():
    plan = plan_step(config_of(SOURCES))
    with pytest.raises(FrozenInstanceError):
        plan.micro_batches = 2
    assert plan.sources == ()
    complete = plan.with_sources(["text.json", "charts.json"])
    assert complete.sources == ("text.json", "charts.json")
    assert complete.report_shape == (2, 2)
    assert complete.cell("MFTrainOneStepCell") == {"type": "IXC25TrainOneStepCell", "micro_batches": 1,
                                                   "labels_column": 1, "report_shape": (2, 2), "skips_spikes": False}


def test_mindformers_cells_are_kept_where_they_do():
    assert StepPlan().cell("MFTrainOneStepCell") == {"type": "IXC25TrainOneStepCell"}      # the CPU's
    assert StepPlan("sums").cell("MFPipelineWithLossScaleCell") == {"type": "IXC25PipelineWithLossScaleCell"}
    assert StepPlan().cell("SomethingElse") == {"type": "SomethingElse"}


def test_a_stand_alone_batch_is_as_large_as_its_parts_together():
    config = config_of(SOURCES, ACCUMULATED)
    size = config.runner_config.batch_size
    plan_step(config).put_into(config)
    assert (config.runner_config.batch_size, config.runner_config.gradient_accumulation_steps) == (3 * size, 1)
    assert config.model.model_config.loss_form == "sources"
    assert not config.calculate_per_token_loss


@pytest.mark.parametrize(("columns", "form"), [(PLAIN, "sums"), (SOURCES, "sources")])
def test_a_parallel_batch_is_left_to_mindformers(parallel, columns, form):
    config = config_of(columns, ACCUMULATED)
    size = config.runner_config.batch_size
    plan_step(config).put_into(config)
    assert (config.runner_config.batch_size, config.runner_config.gradient_accumulation_steps) == (size, 3)
    assert config.model.model_config.loss_form == form
    assert config.calculate_per_token_loss is True


def monitor() -> type:
    return MindFormerRegister.get_cls(MindFormerModuleType.CALLBACK, MONITOR)


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_during_a_run_all_is_decided_and_afterwards_mindformers_has_its_monitor_again(monkeypatch, tmp_path, error):
    before, seen = monitor(), {}

    def train(self, config, **_):
        seen.update(monitor=monitor(), plan=self.plan, size=config.runner_config.batch_size)
        if error is not None:
            raise error

    monkeypatch.setattr(CausalLanguageModelingTrainer, "train", train)
    monkeypatch.setattr("mindformers_ixc.training.trainer.get_output_root_path", lambda: str(tmp_path))
    monkeypatch.setattr(IXC25Trainer, "_save_model", lambda *_: None)
    trainer = IXC25Trainer("common")
    if error is None:
        trainer.train(config_of(SOURCES, ACCUMULATED))
    else:
        with pytest.raises(error):
            trainer.train(config_of(SOURCES, ACCUMULATED))
    assert seen == {"monitor": SafeCheckpointMonitor, "plan": StepPlan("sources", "sources", 3, True, 1), "size": 12}
    assert monitor() is before
    assert before.__module__.startswith("mindformers.")


def test_another_trainers_yaml_gets_mindformers_monitor(tmp_path):
    section = MindFormerConfig(type=MONITOR, prefix="t", directory=str(tmp_path))
    with safe_checkpoints():
        ours = MindFormerRegister.get_instance_from_cfg(section, MindFormerModuleType.CALLBACK)
    theirs = MindFormerRegister.get_instance_from_cfg(MindFormerConfig(type=MONITOR, prefix="t",
                                                                       directory=str(tmp_path)),
                                                      MindFormerModuleType.CALLBACK)
    assert type(ours) is SafeCheckpointMonitor
    assert type(theirs).__name__ == MONITOR and type(theirs).__module__.startswith("mindformers.")
