"""Factors of inputs: nothing changes in full precision, and rounding loses less where inputs differ in size."""
from __future__ import annotations

import json

import numpy as np
from random_model import make
from reference import ReferenceModel
from safetensors.numpy import load_file, save_file

from mindformers_ixc.checkpoint.packing import round_4, widen_4
from mindformers_ixc.checkpoint.scaling import (
    FOLDS,
    LARGEST,
    Fold,
    divided_norm,
    energy,
    fitted,
    row_divisors,
    search,
    shared,
)
from mindformers_ixc.config import ModelConfig, read_config


def folded(arrays: dict[str, np.ndarray], config: ModelConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """All parameters with random factors in every layer."""
    found = dict(arrays)
    for number in range(config.num_hidden_layers):
        layer, factors = f"model.layers.{number}", {}
        for fold in FOLDS:
            width = arrays[f"{layer}.{fold.linears[0]}.weight"].shape[1]
            drawn = np.exp(shared(rng.uniform(-2, 2, width), fold.linears[0], config)).astype(np.float32)
            if fold.before.endswith("norm"):
                name = f"{layer}.{fold.before}.weight"
                found[name], drawn = divided_norm(arrays[name], drawn, "F32")
            factors.update(dict.fromkeys(fold.linears, drawn))
        for path in ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"):
            divisors = row_divisors(path, factors, config)
            name = f"{layer}.{path}.weight"
            found[name] = arrays[name] * factors[path] / (1 if divisors is None else divisors[:, None])
        for name, value in arrays.items():
            follow = fitted(name, config)
            if follow is not None and name.startswith(f"{layer}."):
                half = len(value) // 2
                found[name] = np.concatenate([follow(value[:half], 0, half, factors),
                                              follow(value[half:], half, len(value), factors)])
    return found


def test_in_full_precision_nothing_changes(tmp_path):
    folder = make(tmp_path / "model", num_hidden_layers=2)
    config, arrays = read_config(folder), load_file(folder / "model.safetensors")
    arrays = {name: value * np.float32(0.2) if value.ndim > 1 else value for name, value in arrays.items()}
    rng = np.random.default_rng(0)
    changed = folded(arrays, config, rng)
    for name in ("attention_norm", "feed_forward.w2", "attention.wqkv.lora_web_A", "attention.wqkv.Plora_B",
                 "feed_forward.w3.lora_sft_B", "attention.wo.Plora_A", "feed_forward.w1.lora_dpo_A"):
        name = f"model.layers.1.{name}.weight"
        assert not np.allclose(changed[name], arrays[name])
    embeds, image = rng.standard_normal((2, 9, 32)), rng.random((2, 9)) < 0.4
    logits = {}
    for place, content in (("one", arrays), ("other", changed)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text(json.dumps({
            **json.loads((folder / "config.json").read_text()), "rms_norm_eps": 1e-5}))
        save_file(content, tmp_path / place / "model.safetensors")
        model = ReferenceModel(tmp_path / place)
        logits[place] = [model.logits(embeds, image, mode) for mode in ("base", "write", "web")]
    for one, other in zip(*logits.values()):
        np.testing.assert_allclose(other, one, atol=1e-5 * np.abs(one).max())
    assert np.abs(logits["one"][0] - logits["one"][2]).max() > 1e-3


def test_the_rounding_of_a_norm_goes_into_its_factors():
    rng = np.random.default_rng(1)
    norm, factors = (rng.uniform(0.2, 3, 64).astype(np.float32) for _ in range(2))
    norm[3] = 0
    for dtype in ("BF16", "F16", "F32"):
        made, found = divided_norm(norm, factors, dtype)
        np.testing.assert_allclose(made * found, norm, rtol=1e-6)
        np.testing.assert_allclose(np.delete(found, 3), np.delete(factors, 3), rtol=5e-3)
        assert found[3] == 1
        np.testing.assert_array_equal(divided_norm(norm, found, dtype)[0], made)       # as it is written later
        if dtype == "BF16":
            assert not (made.view(np.uint32) & 0xFFFF).any()


def test_large_inputs_get_the_finer_numbers():
    rng, config = np.random.default_rng(2), ModelConfig(num_attention_heads=4, num_key_value_heads=2, hidden_size=256)
    inputs = rng.standard_normal((500, 256)).astype(np.float32)
    inputs[:, [5, 100, 101, 230]] *= 30
    weight = rng.standard_normal((40, 256)).astype(np.float32)
    moments = inputs.T @ inputs

    def lost(factors):
        return energy(weight - widen_4(*round_4(weight * factors)) / factors, moments)

    found = search(Fold(("feed_forward.w2",), "feed_forward.w3"), [weight], moments, config)
    assert lost(found) < 0.4 * lost(np.ones(256, np.float32))
    assert found[[5, 100, 101, 230]].min() > 2 * np.median(found)
    # inputs of heads that share a value have one factor
    heads = search(Fold(("attention.wo",), "attention.wqkv"), [weight], moments, config).reshape(2, 2, 64)
    np.testing.assert_array_equal(heads[:, 0], heads[:, 1])
    assert 1 / LARGEST <= heads.min() < heads.max() <= LARGEST
    np.testing.assert_array_equal(search(Fold(("feed_forward.w2",), ""), [weight], np.zeros_like(moments), config), 1)
