"""Merging: against closed formulae, and the reference outputs of the modes."""
from __future__ import annotations

import json

import numpy as np
import pytest
from mindspore import Tensor
from random_model import make, random_arrays, save

from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.dtypes import from_float32, to_float32
from mindformers_ixc.checkpoint.merge import merge
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.models.ixc25 import LogitsGraph

WO = "model.layers.1.attention.wo"


def arrays_of(path) -> dict[str, np.ndarray]:
    return {name: tensor.whole() for name, tensor in open_source(path).tensors.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("merge") / "model")


@pytest.mark.parametrize("tasks", [["web"], ["sft", "dpo"]])
def test_folding_adds_the_products(model, tmp_path, tasks):
    merge(model, tmp_path / "x", fold=tasks)
    before, after = arrays_of(model), arrays_of(tmp_path / "x")
    for linear in (WO, "model.layers.3.feed_forward.w2", "model.layers.0.attention.wqkv"):
        expected = before[f"{linear}.weight"].astype(np.float64) + sum(
            before[f"{linear}.lora_{task}_B.weight"].astype(np.float64) @ before[f"{linear}.lora_{task}_A.weight"]
            for task in tasks)
        np.testing.assert_allclose(after[f"{linear}.weight"], expected, rtol=1e-6, atol=1e-6)
    assert not any(f"lora_{task}" in name for task in tasks for name in after)
    assert set(read_config(tmp_path / "x").task_lora_ranks) == {"sft", "dpo", "web"} - set(tasks)
    np.testing.assert_array_equal(after[f"{WO}.Plora_A.weight"], before[f"{WO}.Plora_A.weight"])


def test_bfloat16_is_rounded_once(tmp_path):
    source = make(tmp_path / "model", "BF16")
    merge(source, tmp_path / "x", fold=["web"])
    before, after = arrays_of(source), arrays_of(tmp_path / "x")
    weight, first, second = (to_float32(before[f"{WO}.{name}weight"], "BF16")
                             for name in ("", "lora_web_A.", "lora_web_B."))
    np.testing.assert_array_equal(after[f"{WO}.weight"], from_float32(weight + second @ first, "BF16"))


@pytest.mark.parametrize(("mode", "tasks"), [("web", ["web"]), ("write", ["sft", "dpo"])])
def test_a_folded_model_answers_as_its_mode(goldens, tmp_path, mode, tasks):
    merge(goldens / "t1", tmp_path / "x", fold=tasks)
    reference = np.load(goldens / "t1" / "llm.npz")
    ids = reference[f"{mode}_ids"]
    text = ids[ids >= 0][None].astype(np.int32)
    folded, paired, base = (
        LogitsGraph(load_model(folder, seq_length=text.shape[1], adapter_mode=own))(Tensor(text)).asnumpy()
        for folder, own in ((tmp_path / "x", "base"), (goldens / "t1", mode), (goldens / "t1", "base")))
    np.testing.assert_allclose(folded, paired, atol=2e-5 * np.abs(paired).max(), rtol=0)
    assert np.abs(base - paired).max() > 1e-2 * np.abs(paired).max()


@pytest.mark.parametrize("part", ["partial_lora", "task_lora.web", "vision"])
def test_extracted_parts_are_attached_again(model, tmp_path, part):
    merge(model, tmp_path / "part", extract=[part])
    found = arrays_of(tmp_path / "part")
    assert found and all(np.array_equal(value, arrays_of(model)[name]) for name, value in found.items())
    other = make(tmp_path / "other", seed=1)
    merge(other, tmp_path / "x", attach=tmp_path / "part")
    expected = {**arrays_of(other), **found}
    assert all(np.array_equal(value, expected[name]) for name, value in arrays_of(tmp_path / "x").items())


def test_an_attached_pair_may_have_another_rank(model, tmp_path):
    merge(model, tmp_path / "part", extract=["task_lora.web"])
    other = make(tmp_path / "other", task_lora_ranks={})
    merge(other, tmp_path / "x", attach=tmp_path / "part")
    assert read_config(tmp_path / "x").task_lora_ranks == {"web": 4}


def test_what_a_parallel_run_saved_is_put_on_its_base(tmp_path):
    base, run = make(tmp_path / "base"), make(tmp_path / "run", seed=1)
    # a run in mode base saves neither the task LoRAs nor post_layernorm, but its optimizer's states and counters
    trained = {name: value for name, value in arrays_of(run).items()
               if ".lora_" not in name and "post_layernorm" not in name}
    states = {f"adam_v.{name}": value for name, value in trained.items()}
    save(run / "model.safetensors", {**trained, **states, "scale_sense": np.ones(1, np.float32)})
    with pytest.raises(CheckpointError, match=r"saves only what its graph uses; .* merge BASE DST --attach"):
        convert(run, tmp_path / "x")
    merge(base, tmp_path / "x", attach=run)
    expected = {**arrays_of(base), **trained}
    found = arrays_of(tmp_path / "x")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(value, expected[name]) for name, value in found.items())


def adapter(folder, scheme: str, rank: int = 3, **settings):
    """A trained LoRA on two linears."""
    rng = np.random.default_rng(5)
    config, arrays = read_config(folder.parent / "model"), {}
    weights = random_arrays(config)
    for linear in (WO, "model.layers.0.feed_forward.w1"):
        rows, columns = weights[f"{linear}.weight"].shape
        pair = (rng.standard_normal((rank, columns)).astype(np.float32),
                rng.standard_normal((rows, rank)).astype(np.float32))
        arrays |= {scheme.format(linear, *side): value for side, value in zip(("Aa", "Bb"), pair)}
    folder.mkdir()
    save(folder / "adapter_model.safetensors", arrays)
    if settings:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, arrays


PEFT, MINDPET = "base_model.model.{0}.lora_{1}.weight", "{0}.mindpet_delta_lora_{2}"


@pytest.mark.parametrize(("scheme", "settings", "alpha", "scale"), [
    (PEFT, {"r": 3, "lora_alpha": 6}, None, 2.0), (PEFT, {"lora_alpha": 6, "use_rslora": True}, None, 6 / 3 ** 0.5),
    ("{0}.lora_{1}.default.weight", {"lora_alpha": 3}, None, 1.0), (MINDPET, {}, 12.0, 4.0),
    (f"{MINDPET}.weight", {}, 12.0, 4.0)])
def test_a_trained_lora_is_folded(tmp_path, scheme, settings, alpha, scale):
    source = make(tmp_path / "model")
    folder, pairs = adapter(tmp_path / "lora", scheme, **settings)
    merge(source, tmp_path / "x", lora=folder, alpha=alpha)
    before, after = arrays_of(source), arrays_of(tmp_path / "x")
    first, second = (pairs[scheme.format(WO, *side)] for side in ("Aa", "Bb"))
    np.testing.assert_allclose(after[f"{WO}.weight"], before[f"{WO}.weight"] + scale * (second @ first), rtol=1e-5,
                               atol=1e-5)
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert changed == ["model.layers.0.feed_forward.w1.weight", f"{WO}.weight"]


def test_mean_and_exponential_average(tmp_path):
    paths = [make(tmp_path / f"step_{i}", seed=i) for i in range(3)]
    merge(paths[0], tmp_path / "mean", average=paths[1:])
    merge(paths[0], tmp_path / "ema", average=paths[1:], ema=0.9)
    steps = [arrays_of(path)["output.weight"].astype(np.float64) for path in paths]
    np.testing.assert_allclose(arrays_of(tmp_path / "mean")["output.weight"], sum(steps) / 3, rtol=1e-6, atol=1e-7)
    running = steps[0]
    for step in steps[1:]:
        running = 0.9 * running + 0.1 * step
    np.testing.assert_allclose(arrays_of(tmp_path / "ema")["output.weight"], running, rtol=1e-6, atol=1e-7)


def test_the_mean_of_equal_checkpoints_is_the_checkpoint(model, tmp_path):
    copy = make(tmp_path / "copy")
    merge(model, tmp_path / "mean", average=[copy, make(tmp_path / "another")])
    assert all(np.array_equal(value, arrays_of(model)[name]) for name, value in arrays_of(tmp_path / "mean").items())


@pytest.mark.parametrize(("changes", "words"), [
    ({}, "Nothing to merge"), ({"fold": ["partial_lora"]}, "acts on image positions only"),
    ({"fold": ["Plora"]}, "acts on image positions only"), ({"fold": ["video"]}, "choices are sft, dpo and web"),
    ({"extract": ["head"]}, "choices are vision, projector"), ({"average": ["."], "ema": 2.0}, "no checkpoint")])
def test_what_cannot_be_merged(model, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        merge(model, tmp_path / "x", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_pair_is_folded_once(model, tmp_path):
    merge(model, tmp_path / "x", fold=["web"])
    with pytest.raises(CheckpointError, match=r"\['web'\] are not in this checkpoint; it has \['dpo', 'sft'\]"):
        merge(tmp_path / "x", tmp_path / "y", fold=["web"])


def test_a_lora_of_another_model(tmp_path):
    source = make(tmp_path / "model")
    folder, _ = adapter(tmp_path / "lora", PEFT)
    with pytest.raises(CheckpointError, match="give it with --alpha"):
        merge(source, tmp_path / "x", lora=folder)
    small = make(tmp_path / "small", hidden_size=16)
    with pytest.raises(CheckpointError, match=r"has shapes \(3, 32\) and \(32, 3\), the weight \(16, 16\)"):
        merge(small, tmp_path / "x", lora=folder, alpha=1.0)
    short = make(tmp_path / "short", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"a LoRA for model\.layers\.1.*which this model does not have"):
        merge(short, tmp_path / "x", lora=folder, alpha=1.0)
    with pytest.raises(CheckpointError, match="no matrix of a LoRA"):
        merge(source, tmp_path / "x", lora=short, alpha=1.0)


def test_averages_need_equal_shapes(model, tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        merge(model, tmp_path / "x", average=[make(tmp_path / "short", num_hidden_layers=1)])
    with pytest.raises(CheckpointError, match="lies between 0 and 1"):
        merge(model, tmp_path / "x", average=[make(tmp_path / "other", seed=1)], ema=1.5)
