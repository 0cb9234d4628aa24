"""What trains and at which rate: from part names, against closed formulae and MindFormers' own optimizer."""
from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor

from mindformers_ixc import ConfigError, IXC25Config, IXC25ForCausalLM, IXC25Trainer, terminal
from mindformers_ixc.cli.run_config import check_fields
from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.parameters import part_of
from mindformers_ixc.training.parts import parts_table, rate_factors, rates_table, train_only

VISION = "vit.vision_tower.vision_model"
# the recipe of stage 2: layer-wise decay of the vision tower, the LLM at a fifth
RATES = {"vision": {"layer_decay": 0.9}, "language": {"factor": 0.2}}


def small(mode: str = "base") -> IXC25ForCausalLM:
    vision = {"image_size": 28, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 1,
              "intermediate_size": 8}
    return IXC25ForCausalLM(IXC25Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, plora_rank=2, task_lora_ranks={"web": 2}, vision_config=vision, adapter_mode=mode))


def trained(model) -> set[str]:
    return {part_of(parameter.name) for parameter in model.trainable_params()}


@pytest.mark.parametrize("parts", [["partial_lora"], ["vision", "projector", "separators", "partial_lora"],
                                   ["language", "vision"]])
def test_only_the_named_parts_train(parts):
    model = small()
    train_only(model, parts)
    assert trained(model) == set(parts)
    # what no graph computes stays frozen
    assert not any("post_layernorm" in parameter.name for parameter in model.trainable_params())


def test_a_task_lora_trains_in_its_mode_only():
    model = small("web")
    train_only(model, ["task_lora.web"])
    assert trained(model) == {"task_lora.web"}
    with pytest.raises(ConfigError, match=r"'task_lora.web', of which nothing is in this model's graph .*'base'"):
        train_only(small(), ["task_lora.web"])


@pytest.mark.parametrize(("parts", "words"), [(["head"], "'head'; the choices are vision, projector"),
                                              ([], "nothing would train"), (["task_lora.sft"], "of which nothing is")])
def test_parts_that_name_nothing(parts, words):
    with pytest.raises(ConfigError, match=words):
        train_only(small(), parts)


def test_the_table_counts_what_trains():
    model = small()
    train_only(model, ["separators"])
    rows = {line.split()[0]: line.split()[1:] for line in parts_table(model).splitlines()[1:]}
    assert rows["separators"] == ["64", "64"]
    assert rows["partial_lora"][1] == "0"
    assert rows["all"][1] == "64"


def test_rates_of_the_recipe():
    factors = {name: factor for factor, names in rate_factors(small(), RATES).items() for name in names}
    # three layers: the last is one step below the top, the embeddings four
    for name, expected in ((f"{VISION}.encoder.layers.2.mlp.fc1.weight", 0.9),
                           (f"{VISION}.encoder.layers.0.mlp.fc1.bias", 0.9 ** 3),
                           (f"{VISION}.embeddings.position_embedding.weight", 0.9 ** 4),
                           (f"{VISION}.pre_layrnorm.weight", 0.9 ** 4), ("output.weight", 0.2),
                           ("model.layers.1.attention.wo.weight", 0.2)):
        assert factors[name] == pytest.approx(expected, rel=1e-12)
    assert not any(part_of(name) in ("partial_lora", "projector", "separators") for name in factors)


def optimizer_of(model, **schedule):
    """The optimizer that MindFormers builds from the YAML's sections."""
    trainer = IXC25Trainer()
    trainer.config = MindFormerConfig(
        lr_schedule={"type": "CosineWithWarmUpLR", "learning_rate": 1e-3, "lr_end": 0.0, "warmup_steps": 10,
                     "total_steps": 110, **schedule},
        optimizer={"type": "AdamW", "weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-8},
        part_learning_rates=RATES, grouped_lr_schedule=None, lr_scale=False, lr_scale_factor=None, layer_scale=False,
        layer_decay=None, runner_config={"sink_mode": False, "epochs": 1})
    trainer.real_model = model
    trainer.train_dataset = SimpleNamespace(get_dataset_size=lambda: 110)
    return trainer.create_optimizer_scheduler(model, set())


def test_mindformers_optimizer_has_the_rate_and_the_decay_of_every_group(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(terminal, "current", terminal.Terminal(log=log))
    model = small()
    optimizer = optimizer_of(model)
    factors = {name: factor for factor, names in rate_factors(model, RATES).items() for name in names}
    seen = 0
    rates = optimizer.learning_rate if optimizer.is_group_lr else [optimizer.learning_rate]
    groups = zip(optimizer.group_params, rates, optimizer.weight_decay)
    for parameter, rate, decay in groups:
        for step, shape in ((5, 0.5), (10, 1.0), (60, 0.5), (110, 0.0)):
            # linear warm-up over 10 steps, then half a cosine over 100
            found = float(rate(Tensor(np.array(step, np.int32))).asnumpy())
            assert found == pytest.approx(1e-3 * factors.get(parameter.name, 1.0) * shape, abs=1e-9)
        plain = len(parameter.shape) == 1 or parameter.name.endswith(".bias") or part_of(parameter.name) == "separators"
        assert float(np.asarray(decay)) == pytest.approx(0.0 if plain else 0.1)
        seen += 1
    assert seen == len(model.trainable_params())
    assert "0.0002" in log.getvalue()       # the LLM's rate is told


def test_the_table_of_rates():
    lines = rates_table(small(), {"learning_rate": 1e-3}, RATES).splitlines()
    assert lines[1].split()[0] == "0.001" and "partial_lora" in lines[1]
    assert lines[-1].split()[0] == "0.0002" and lines[-1].endswith("language")
    assert len(lines) == 1 + 1 + 4 + 1


@pytest.mark.parametrize(("changes", "words"), [
    ({"train_parts": ["vision", "brain"]}, "'brain'; the choices are"), ({"train_parts": "vision"}, "a list of parts"),
    ({"part_learning_rates": {"brain": {"factor": 1}}}, "Unknown key part_learning_rates.brain"),
    ({"part_learning_rates": {"language": 0.2}}, "a section with factor and layer_decay"),
    ({"part_learning_rates": {"language": {"factor": 0}}}, "a number above 0"),
    ({"part_learning_rates": {"language": {"layer_decay": 0.9}}}, "only the vision tower"),
    ({"part_learning_rates": {"vision": {"decay": 0.9}}},
     "Unknown key part_learning_rates.vision.decay .* the choices are factor, layer_decay"),
    ({"part_learning_rates": {"vision": {"factor": None}}}, "vision.factor is None; it must be a number above 0"),
    ({"part_learning_rates": {"vision": None}}, "vision is None; it must be a section"),
    ({"part_learning_rates": RATES, "lr_schedule": None}, "needs an lr_schedule")])
def test_wrong_sections_are_refused_before_anything_starts(changes, words):
    from pathlib import Path

    fields = read_yaml(Path(__file__).parents[2] / "yaml_configs" / "ixc25_sft_tiny.yaml")
    with pytest.raises(ConfigError, match=words):
        check_fields({**fields, **changes}, "x.yaml")
