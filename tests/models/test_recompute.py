"""Recomputed activations: how many layers a value means, and that the results stay what they are."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindformers.modules.transformer import TransformerRecomputeConfig
from mindspore import Tensor

from mindformers_ixc.config import recomputed_layers
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.recompute import apply_recompute

LENGTH, LAYERS = 12, 2


def model_of(**recompute) -> IXC25ForCausalLM:
    """A model of two layers, always with the same weights; its side paths are not zero."""
    fields = {"parallel_config": {"recompute": TransformerRecomputeConfig(**recompute)}} if recompute else {}
    model = IXC25ForCausalLM(IXC25Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, plora_rank=2, plora_alpha=2, plora_dropout=0.25, task_lora_ranks={}, seq_length=LENGTH,
        max_tiles=1, **fields, vision_config={"image_size": 28, "hidden_size": 8, "num_hidden_layers": 2,
                                              "num_attention_heads": 1, "intermediate_size": 8}))
    rng = np.random.default_rng(0)
    for parameter in sorted(model.get_parameters(), key=lambda p: p.name):
        parameter.set_data(Tensor(rng.normal(0, 0.2, parameter.shape).astype(np.float32)))
    model.set_train(True)
    return model


def loss_and_gradients(model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    ids = rng.integers(3, 32, (2, LENGTH)).astype(np.int32)
    mask = np.zeros((2, LENGTH), np.int32)
    mask[:, 1] = 1                     # one tile is one token
    columns = [ids, np.roll(ids, -1, 1), rng.normal(size=(2, 1, 3, 28, 28)).astype(np.float32), np.zeros_like(ids),
               mask]
    seeds = Tensor(np.array([3, 5], np.int32))      # of the dropout, which a second pass has to draw again
    ids, labels, pixels, index, mask = map(Tensor, columns)
    inputs = (ids, labels, pixels, None, None, index, mask, None, None, seeds)
    weights = ms.ParameterTuple(model.trainable_params())
    loss, gradients = ms.value_and_grad(model, None, weights)(*inputs)
    found = {weight.name: gradient.asnumpy() for weight, gradient in zip(weights, gradients)}
    return {**found, "loss": loss.asnumpy()}


@pytest.fixture(scope="module")
def without():
    model = model_of()
    return [parameter.name for parameter in model.get_parameters()], loss_and_gradients(model)


@pytest.mark.parametrize("section", [{"recompute": True}, {"select_recompute": True},
                                     {"recompute": 1, "select_recompute": 2}])
def test_recomputing_changes_neither_results_nor_names(without, section):
    names, expected = without
    model = model_of(**section)
    assert [parameter.name for parameter in model.get_parameters()] == names
    found = loss_and_gradients(model)
    assert found.keys() == expected.keys()
    assert np.isfinite(expected["loss"])
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, name)


@pytest.mark.parametrize(("choice", "layers"), [
    (True, 5), (False, 0), (0, 0), (3, 3), (5, 5), ([2, 3], 5), ((1, 0), 1), ([], 0)])
def test_values_stand_for_numbers_of_layers(choice, layers):
    assert recomputed_layers(choice, 5, "recompute") == layers


@pytest.mark.parametrize("choice", [6, -1, [3, 3], [1, -1], 1.5, "all", [True], None])
def test_other_values_are_refused_with_the_number_of_layers(choice):
    with pytest.raises(ConfigError) as error:
        recomputed_layers(choice, 5, "select_recompute")
    assert f"recompute_config.select_recompute is {choice!r}; it takes true, false" in str(error.value)
    assert "of the 5 decoder layers" in str(error.value)


def test_a_model_refuses_more_layers_than_it_has():
    with pytest.raises(ConfigError, match=r"recompute_config\.recompute is 3; .* 2 decoder layers"):
        model_of(recompute=3)


class Marked:
    """Stands for a cell or primitive; remembers that it was marked."""

    def __init__(self, **parts):
        self.marked = False
        self.__dict__.update(parts)

    def recompute(self):
        self.marked = True


@pytest.mark.parametrize(("whole", "selected", "layers", "inner", "tower"), [
    (False, False, "...", "...", False), (True, True, "WWW", "...", True), (1, 2, "W..", ".S.", False),
    (2, 1, "WW.", "...", False), (0, True, "...", "SSS", False), ([1, 2], 0, "WWW", "...", True)])
def test_whole_layers_come_first_and_the_tower_with_all_of_them(whole, selected, layers, inner, tower):
    decoder = [Marked(attention=Marked(core=Marked()),
                      feed_forward=Marked(first=(first := Marked()), second=(second := Marked()),
                                          gates=lambda first=first, second=second: (first, second)))
               for _ in range(3)]
    encoder = Marked(layers=[Marked(), Marked()])
    model = Marked(model=Marked(layers=decoder), vit=Marked(
        vision_tower=Marked(vision_model=Marked(encoder=encoder))))
    apply_recompute(model, TransformerRecomputeConfig(recompute=whole, select_recompute=selected))
    assert "".join("W" if layer.marked else "." for layer in decoder) == layers
    for layer, mark in zip(decoder, inner):
        parts = (layer.attention.core, *layer.feed_forward.__dict__.values())
        assert [part.marked for part in parts if isinstance(part, Marked)] == [mark == "S"] * 3
    assert [layer.marked for layer in encoder.layers] == [tower] * 2
