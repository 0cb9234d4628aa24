"""PET types: what trains, what is refused, and a training step through MindFormers' own network builder."""
from __future__ import annotations

import numpy as np
import pytest
from mindformers.models.build_model import build_network
from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.models.modeling_utils import PreTrainedModel
from mindformers.pet import get_pet_model
from mindformers.pet.models.lora import LoraModel
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor, nn

import mindformers_ixc  # noqa: F401
from mindformers_ixc.checkpoint.model_directory import weights_of
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.reward import IXC25RewardModel
from mindformers_ixc.parameters import parameter_table
from mindformers_ixc.training.lora import folded_weights
from mindformers_ixc.training.pet import IXC25LoraModel
from mindformers_ixc.training.trainer import IXC25Trainer

MODEL = {"type": "IXC25Config", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "plora_rank": 4, "plora_alpha": 8, "seq_length": 8,
         "max_tiles": 1, "task_lora_ranks": {"sft": 2, "web": 3},
         "vision_config": {"type": "IXC25VisionConfig", "image_size": 28, "hidden_size": 16, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "intermediate_size": 16}}


def build(tmp_path, monkeypatch, model=None, arch="IXC25ForCausalLM", **pet):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mindformers.pet.pet_model.get_output_root_path", lambda: str(tmp_path))
    return build_network(MindFormerConfig(model_config={**MODEL, **(model or {}), "pet_config": pet},
                                          arch={"type": arch}))


def trainable(network) -> set[str]:
    return {parameter.name for parameter in network.trainable_params()}


def pairs(kind: str, linears=("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
                              "feed_forward.w3")) -> set[str]:
    return {f"model.layers.{i}.{linear}.{kind}_{side}.weight" for i in range(2) for linear in linears for side in "AB"}


def test_partial_lora_trains_its_pairs_only(tmp_path, monkeypatch):
    network = build(tmp_path, monkeypatch, pet_type="partial_lora", rank=4, alpha=8)
    assert trainable(network) == pairs("Plora")
    assert (tmp_path / "adapter_config.json").is_file()


def test_freeze_exclude_adds_parts(tmp_path, monkeypatch):
    network = build(tmp_path, monkeypatch, pet_type="partial_lora", freeze_exclude=["*vision_proj*"])
    extra = {f"vision_proj.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert trainable(network) == pairs("Plora") | extra


def test_target_modules_narrow_it_down(tmp_path, monkeypatch):
    network = build(tmp_path, monkeypatch, pet_type="task_lora", task="web", target_modules=r".*\.(w1|w3)")
    assert trainable(network) == pairs("lora_web", ("feed_forward.w1", "feed_forward.w3"))


def test_a_step_changes_the_trained_pair_and_nothing_else(tmp_path, monkeypatch):
    network = build(tmp_path, monkeypatch, pet_type="task_lora", task="web")
    network.set_train(True)
    before = {p.name: p.asnumpy().copy() for p in network.get_parameters()}
    step = nn.TrainOneStepCell(network, nn.Adam(network.trainable_params(), learning_rate=0.1))
    ids = Tensor(np.arange(8, dtype=np.int32)[None] + 3)
    step(ids, ids, Tensor(np.zeros((1, 1, 3, 28, 28), np.float32)), None, None, Tensor(np.zeros((1, 8), np.int32)),
         Tensor(np.zeros((1, 8), np.int32)))
    changed = {p.name for p in network.get_parameters() if p.name in before and (p.asnumpy() != before[p.name]).any()}
    # B starts at zero, so in the first step only B has a gradient
    assert changed == {name for name in pairs("lora_web") if name.endswith("B.weight")}


@pytest.mark.parametrize(("pet", "words"), [
    ({"pet_type": "partial_lora", "rank": 8}, ["rank 8", "4"]),
    ({"pet_type": "task_lora", "task": "dpo"}, ["'dpo'", "sft, web"]),
    ({"pet_type": "task_lora", "task": "web", "alpha": 9}, ["alpha 9", "3"]),
    ({"pet_type": "partial_lora", "target_modules": "nothing"}, ["'nothing'", "no linear"]),
])
def test_contradictions_are_refused(tmp_path, monkeypatch, pet, words):
    with pytest.raises(ConfigError) as error:
        build(tmp_path, monkeypatch, **pet)
    assert all(word in str(error.value) for word in words)


PLAIN = {"plora_rank": 0, "task_lora_ranks": {}}


@pytest.mark.parametrize(("pet", "kind"), [
    ({"pet_type": "partial_lora", "rank": 4, "alpha": 8}, "Plora"),
    ({"pet_type": "task_lora", "task": "web", "rank": 3}, "lora_web"),
])
def test_a_plain_internlm2_gets_the_pairs(tmp_path, monkeypatch, pet, kind):
    network = build(tmp_path, monkeypatch, PLAIN, **pet)
    assert trainable(network) == pairs(kind)
    model = network.network
    assert {p.name: tuple(p.shape) for p in model.get_parameters()} == \
        {name: entry.shape for name, entry in parameter_table(model.config).items()}


def test_mindformers_own_lora_trains_and_starts_without_effect(tmp_path, monkeypatch):
    network = build(tmp_path, monkeypatch, pet_type="lora", lora_rank=2, lora_alpha=4, lora_dropout=0.0,
                    target_modules=".*wqkv|.*wo")
    names = {f"model.layers.{i}.attention.{linear}.mindpet_delta_lora_{side}.weight" for i in range(2)
             for linear in ("wqkv", "wo") for side in "ab"}
    assert trainable(network) == names
    ids = Tensor(np.arange(3, 11, dtype=np.int32)[None])
    adapted = network.network(ids).asnumpy()
    for parameter in network.get_parameters():
        if "mindpet_delta_lora_b" in parameter.name:
            parameter.set_data(Tensor(np.ones(parameter.shape, np.float32)))
    assert np.abs(network.network(ids).asnumpy() - adapted).max() > 1e-3


def test_a_reward_model_trains_lora_on_all_linears_and_is_left_without_pairs(tmp_path, monkeypatch):
    """As the published recipe has it: rank 512 on wqkv, wo, w1, w2 and w3, and the head."""
    model = {"task_lora_ranks": {}, "reward_pooling": "last", "reward": {"loss": "ranking"}}
    network = build(tmp_path, monkeypatch, model, "IXC25ForReward", pet_type="lora", lora_rank=512, lora_alpha=512,
                    lora_dropout=0.0, target_modules=".*(wqkv|wo|w1|w2|w3)", freeze_exclude=["*v_head*"])
    trained = {name.replace("lora_A", "mindpet_delta_lora_a").replace("lora_B", "mindpet_delta_lora_b")
               for name in pairs("lora")}
    assert trainable(network) == {*trained, "v_head.weight"}
    rng, tuned = np.random.default_rng(0), network
    while not isinstance(tuned, IXC25Model):      # the cells of MindFormers around it
        tuned = tuned.network
    for parameter in network.trainable_params():
        parameter.set_data(Tensor(rng.normal(0, 0.02, parameter.shape).astype(np.float32)))
    weights = folded_weights(tuned, weights_of(tuned))
    plain = IXC25RewardModel(IXC25Config(**{key: value for key, value in {**MODEL, **model}.items() if key != "type"}))
    assert weights.keys() == {parameter.name for parameter in plain.get_parameters()}
    for parameter in plain.get_parameters():
        parameter.set_data(Tensor(weights[parameter.name].whole()))
    ids = Tensor(rng.integers(3, 64, (1, 2, 8)).astype(np.int32))
    positions = Tensor(np.array([[[1] * 7 + [2]] * 2], np.int32))
    found, wanted = (one(ids, None, None, None, None, Tensor(np.zeros((1, 2, 8), np.int32)),
                         Tensor(np.zeros((1, 2, 8), np.int32)), positions)[1].asnumpy() for one in (plain, tuned))
    assert abs(wanted[2]) > 1e-3
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_lora_on_nothing_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="matches no linear; they are named wqkv"):
        build(tmp_path, monkeypatch, pet_type="lora", target_modules="q_proj")


class Attention(nn.Cell):
    """A linear that MindFormers' LoRA knows."""

    def __init__(self):
        super().__init__()
        self.wq = nn.Dense(8, 8)

    def construct(self, x):
        return self.wq(x)


class OtherModel(PreTrainedModel):
    """A model of somebody else."""

    config_class = PretrainedConfig
    base_model_prefix = "other"

    def __init__(self, config):
        super().__init__(config, auto_prefix=True)
        self.model = Attention()

    def construct(self, x):
        return self.model(x)


def test_another_model_gets_exactly_mindformers_lora(tmp_path, monkeypatch):
    monkeypatch.setattr("mindformers.pet.pet_model.get_output_root_path", lambda: str(tmp_path))
    section = MindFormerConfig(pet_type="lora", lora_rank=2, lora_alpha=4, lora_dropout=0.0, target_modules=".*wq")
    network = get_pet_model(OtherModel(PretrainedConfig()), section)
    assert type(network.network) is LoraModel
    assert {name.rpartition(".")[0] for name in trainable(network)} == {"model.wq"}
    assert all("mindpet_delta_lora" in name for name in trainable(network))
    ours = build(tmp_path, monkeypatch, pet_type="lora", lora_rank=2, lora_alpha=4, target_modules=".*wqkv")
    assert type(ours.network) is IXC25LoraModel


@pytest.mark.parametrize("pet", [{"pet_type": "partial_lora"}, {"pet_type": "lora", "target_modules": ".*wqkv"}])
def test_the_trainer_knows_the_model_inside(tmp_path, monkeypatch, pet):
    trainer = IXC25Trainer("common")
    trainer.real_model = build(tmp_path, monkeypatch, **pet)
    assert isinstance(trainer.trained_model, IXC25Model)
