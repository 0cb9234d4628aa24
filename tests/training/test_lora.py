"""DoRA and rsLoRA: forward pass and gradients against PyTorch in float64, and what a run leaves, in PEFT's form."""
from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pytest
import torch
from mindformers.models.build_model import build_network
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor, nn
from mindspore.ops import functional as F
from random_model import make

from mindformers_ixc.checkpoint.adapters import read_adapter
from mindformers_ixc.checkpoint.merge import fold_lora
from mindformers_ixc.checkpoint.model_directory import weights_of
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.layers import PartialLoRALinear
from mindformers_ixc.parallel.cuts import ROWS
from mindformers_ixc.training import pet as pet_module
from mindformers_ixc.training.lora import begin_magnitudes, folded_weights, lora_linears, write_adapter
from mindformers_ixc.training.starting import load_start

INPUTS, OUTPUTS, RANK, ALPHA, POSITIONS = 12, 20, 3, 6.0, 7
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "plora_rank": 2, "plora_alpha": 2, "plora_dropout": 0.0, "seq_length": 8,
         "max_tiles": 1, "task_lora_ranks": {"web": 2},
         "vision_config": {"image_size": 28, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "intermediate_size": 16}}


class Sum(nn.Cell):
    """Sum of a linear's outputs, each times a number of its own."""

    def __init__(self, linear, mask):
        super().__init__()
        self.linear, self.mask = linear, Tensor(mask)

    def construct(self, x, factors):
        return (self.linear(x, self.mask, ("web",)) * factors).sum()


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"weight": (OUTPUTS, INPUTS), "Plora_A.weight": (2, INPUTS), "Plora_B.weight": (OUTPUTS, 2),
              "lora_web_A.weight": (2, INPUTS), "lora_web_B.weight": (OUTPUTS, 2),
              "mindpet_delta_lora_a.weight": (RANK, INPUTS), "mindpet_delta_lora_b.weight": (OUTPUTS, RANK),
              "mindpet_delta_lora_magnitude": (OUTPUTS,)}
    found = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {**found, "x": rng.normal(size=(POSITIONS, INPUTS)).astype(np.float32),
            "factors": rng.normal(size=(POSITIONS, OUTPUTS)).astype(np.float32),
            "mask": (np.arange(POSITIONS) < 3).astype(np.float32)[:, None]}


def by_torch(arrays, scale, has_dora) -> tuple[float, dict[str, np.ndarray]]:
    """PEFT's formula (`lora.dora.DoraLinearLayer`): the norm is a constant of the gradient."""
    own = {name: torch.tensor(array.astype(np.float64), requires_grad=True) for name, array in arrays.items()}
    linear = torch.nn.functional.linear
    x, weight, first, second = (own[name] for name in ("x", "weight", "mindpet_delta_lora_a.weight",
                                                       "mindpet_delta_lora_b.weight"))
    base = linear(x, weight)
    y = base + own["mask"].detach() * linear(linear(x, own["Plora_A.weight"]), own["Plora_B.weight"])
    y = y + linear(linear(x, own["lora_web_A.weight"]), own["lora_web_B.weight"])
    change = linear(linear(x, first), second) * scale
    if has_dora:
        norm = torch.linalg.norm(weight + scale * (second @ first), dim=1).detach()
        factor = (own["mindpet_delta_lora_magnitude"] / norm).view(1, -1)
        change = (factor - 1) * base + factor * change
    total = ((y + change) * own["factors"].detach()).sum()
    total.backward()
    return total.item(), {name: tensor.grad.numpy() for name, tensor in own.items() if tensor.grad is not None}


@pytest.mark.parametrize(("has_dora", "scale"), [(False, ALPHA / RANK ** 0.5), (True, ALPHA / RANK),
                                                 (True, ALPHA / RANK ** 0.5)])
def test_a_linear_and_every_gradient_are_those_of_pefts_formula(arrays, has_dora, scale):
    linear = PartialLoRALinear(INPUTS, OUTPUTS, IXC25Config(**SIZES), ROWS)
    linear.add_lora(RANK, scale, 0.0, has_dora)
    for name, parameter in linear.parameters_and_names():
        parameter.set_data(Tensor(arrays[name]))
    cell = Sum(linear, arrays["mask"])
    cell.set_train(True)
    inputs = Tensor(arrays["x"]), Tensor(arrays["factors"])
    total, expected = by_torch(arrays, scale, has_dora)
    assert float(cell(*inputs).asnumpy()) == pytest.approx(total, rel=1e-4)
    weights = ms.ParameterTuple(list(cell.get_parameters()))
    dx, found = F.grad(cell, grad_position=0, weights=weights)(*inputs)
    found = {parameter.name.removeprefix("linear."): gradient.asnumpy()
             for parameter, gradient in zip(weights, found)} | {"x": dx.asnumpy()}
    assert found.keys() == {name for name in expected if has_dora or "magnitude" not in name}
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[name], atol=1e-4 * abs(expected[name]).max(), err_msg=name)


def build(tmp_path, monkeypatch, **pet):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mindformers.pet.pet_model.get_output_root_path", lambda: str(tmp_path))
    section = {"type": "IXC25Config", **SIZES, "pet_config": {
        "pet_type": "lora", "lora_rank": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0,
        "target_modules": ".*wqkv|.*w1", **pet}}
    section["vision_config"] = {"type": "IXC25VisionConfig", **SIZES["vision_config"]}
    return build_network(MindFormerConfig(model_config=section, arch={"type": "IXC25ForCausalLM"}))


@pytest.mark.parametrize("pet", [{"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}])
def test_what_a_run_leaves_is_the_model_it_trained(tmp_path, monkeypatch, pet):
    """Folded into the model, and as PEFT's files folded into the base: the same logits as with the pairs beside."""
    network = build(tmp_path, monkeypatch, **pet)
    model = network.network.network
    begin_magnitudes(model)
    linears = list(lora_linears(model))
    assert linears == ["model.layers.0.attention.wqkv", "model.layers.0.feed_forward.w1"]
    names = {parameter.name for parameter in network.trainable_params()}
    kinds = ["a.weight", "b.weight"] + ["magnitude"] * pet.get("use_dora", False)
    assert names == {f"{linear}.mindpet_delta_lora_{kind}" for linear in linears for kind in kinds}
    ids = Tensor(np.arange(3, 11, dtype=np.int32)[None])
    model.set_train(False)
    base = {name: tensor.whole().copy() for name, tensor in weights_of(model).items()}
    rng = np.random.default_rng(1)
    before = model(ids).asnumpy()
    for parameter in network.trainable_params():
        near = parameter.asnumpy() if "magnitude" in parameter.name else 0
        parameter.set_data(Tensor((near + rng.normal(size=parameter.shape, scale=0.3)).astype(np.float32)))
    trained = model(ids).asnumpy()
    assert abs(trained - before).max() > 0.01 * abs(before).max()
    folded = {name: tensor.whole().copy() for name, tensor in folded_weights(model, weights_of(model)).items()}
    assert not any("mindpet" in name for name in folded)
    scale = ALPHA / (RANK ** 0.5 if pet.get("use_rslora") else RANK)
    for linear in linears:
        first, second = (model.parameters_dict()[f"{linear}.mindpet_delta_lora_{side}.weight"].asnumpy()
                         for side in "ab")
        expected = base[f"{linear}.weight"].astype(np.float64) + scale * (second.astype(np.float64) @ first)
        if pet.get("use_dora"):
            rows = model.parameters_dict()[f"{linear}.mindpet_delta_lora_magnitude"].asnumpy()
            expected *= (rows / np.linalg.norm(expected, axis=1))[:, None]
        np.testing.assert_allclose(folded[f"{linear}.weight"], expected, rtol=1e-5, atol=1e-6)
    write_adapter(tmp_path / "adapter", model.config.pet_config, model, weights_of(model, names))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings == json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["use_dora"], settings["use_rslora"]) == (pet.get("use_dora", False), pet.get("use_rslora", False))
    plain = {name: tensor for name, tensor in weights_of(model).items() if "mindpet" not in name}
    adapter = read_adapter(open_source(tmp_path / "adapter" / "adapter_model.safetensors"), plain)
    again = {name: tensor.whole() for name, tensor in fold_lora(plain, adapter).items()}
    assert again.keys() == folded.keys()
    for name, value in again.items():
        np.testing.assert_array_equal(value, folded[name], err_msg=name)
    for parameter in model.get_parameters():          # the pairs without effect, the weights the folded ones
        if parameter.name in folded:
            parameter.set_data(Tensor(folded[parameter.name]))
        elif parameter.name.endswith("_b.weight"):
            parameter.set_data(Tensor(np.zeros(parameter.shape, np.float32)))
    begin_magnitudes(model)
    np.testing.assert_allclose(model(ids).asnumpy(), trained, atol=2e-5 * abs(trained).max())


def test_what_was_trained_beside_the_pairs_is_kept_with_them(tmp_path, monkeypatch):
    network = build(tmp_path, monkeypatch, freeze_exclude=["*vision_proj*", "*plora_glb_GN*"])
    model, names = network.network.network, {parameter.name for parameter in network.trainable_params()}
    others = {"plora_glb_GN", *(f"vision_proj.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias"))}
    assert others < names
    write_adapter(tmp_path / "adapter", model.config.pet_config, model, weights_of(model, names))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == [
        "plora_glb_GN", "vision_proj.0", "vision_proj.2"]
    base = {name: tensor for name, tensor in weights_of(model).items() if "mindpet" not in name}
    adapter = read_adapter(open_source(tmp_path / "adapter" / "adapter_model.safetensors"), base)
    assert set(adapter.replaced) == others and set(adapter.pairs) == set(lora_linears(model))
    for name, tensor in adapter.replaced.items():
        np.testing.assert_array_equal(tensor.whole(), base[name].whole())


def test_dora_begins_with_the_weights_as_they_are_even_rows_of_zeros(arrays):
    linear = PartialLoRALinear(INPUTS, OUTPUTS, IXC25Config(**{**SIZES, "task_lora_ranks": {}}), ROWS)
    linear.add_lora(RANK, 2.0, 0.0, True)
    weight = arrays["weight"].copy()
    weight[3] = 0
    linear.weight.set_data(Tensor(weight))
    linear.begin_magnitudes()
    found = linear(Tensor(arrays["x"]), None, ()).asnumpy()
    np.testing.assert_allclose(found, arrays["x"] @ weight.T, rtol=1e-4, atol=1e-5)


def test_dora_where_a_graph_is_cut_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pet_module, "is_parallel", lambda: True)
    with pytest.raises(ConfigError, match=r"pet_config\.use_dora is for runs of one process"):
        build(tmp_path, monkeypatch, use_dora=True)


def test_a_run_starts_with_the_pairs_that_its_checkpoint_lacks(tmp_path):
    folder = make(tmp_path / "base")
    config = read_config(folder, IXC25Config, seq_length=8, max_tiles=1)
    model = IXC25Model(config)
    pet_module.inject(model, lambda cell: cell.add_lora(RANK, 2.0, 0.0, True))
    section = {"type": "IXC25Config", "task_lora_ranks": dict(config.task_lora_ranks)}
    with pytest.raises(CheckpointError, match=r"parameters are missing .*mindpet_delta_lora_a"):
        load_start(model, str(folder), section)
    load_start(model, str(folder), section, (), {"lora"})
    begin_magnitudes(model)
    weights = open_source(folder).tensors
    for linear, cell in lora_linears(model).items():
        weight = weights[f"{linear}.weight"].whole()
        np.testing.assert_array_equal(cell.weight.asnumpy(), weight)
        rows = cell.mindpet_delta_lora_magnitude.asnumpy()
        np.testing.assert_allclose(rows, np.linalg.norm(weight, axis=1), rtol=1e-6)
