"""Adapters: each field of adapter_config.json that changes a merge gives the right value, or is refused by name."""
from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from random_model import make, save

from mindformers_ixc.checkpoint.adapters import INERT, READ, REFUSED, open_adapter, read_adapter
from mindformers_ixc.checkpoint.merge import fold_lora, merge
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.errors import CheckpointError

WO, W1, WQKV = "model.layers.1.attention.wo", "model.layers.0.feed_forward.w1", "model.layers.2.attention.wqkv"
RANK = 3
NAME = "base_model.model.{0}.lora_{1}.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("adapters") / "model")


def arrays_of(path) -> dict[str, np.ndarray]:
    return {name: tensor.whole() for name, tensor in open_source(path).tensors.items()}


def pairs(model, ranks: dict[str, int], scheme: str = NAME, sides: str = "AB", seed: int = 5) -> dict[str, np.ndarray]:
    rng, weights, found = np.random.default_rng(seed), open_source(model).tensors, {}
    for linear, rank in ranks.items():
        rows, columns = weights[f"{linear}.weight"].shape
        found[scheme.format(linear, sides[0])] = rng.standard_normal((rank, columns)).astype(np.float32)
        found[scheme.format(linear, sides[1])] = rng.standard_normal((rows, rank)).astype(np.float32)
    return found


def write(folder, arrays, settings):
    folder.mkdir()
    save(folder / "adapter_model.safetensors", arrays)
    if settings is not None:
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def expected(model, arrays, scales, scheme: str = NAME, sides: str = "AB"):
    """W + scale B A in float64, of the linears named; everything else as it was."""
    result = arrays_of(model)
    for linear, scale in scales.items():
        first, second = (arrays[scheme.format(linear, side)].astype(np.float64) for side in sides)
        result[f"{linear}.weight"] = result[f"{linear}.weight"].astype(np.float64) + scale * (second @ first)
    return result


def folded(model, lora, alpha=None, name=None) -> dict[str, np.ndarray]:
    """What `merge --lora` computes, without writing it."""
    base = open_source(model).tensors
    adapter = read_adapter(open_adapter(lora), base, alpha, name)
    return {name: tensor.whole() for name, tensor in fold_lora(base, adapter).items()}


def check(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


ALL = {WO: RANK, W1: RANK, WQKV: RANK}
SAME = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6}


@pytest.mark.parametrize(("settings", "scales", "ranks"), [
    ({}, {WO: 2, W1: 2, WQKV: 2}, ALL),
    ({"use_rslora": True}, dict.fromkeys(ALL, 6 / 3 ** 0.5), ALL),
    ({"alpha_pattern": {"attention.wo": 30}}, {WO: 10, W1: 2, WQKV: 2}, ALL),
    ({"alpha_pattern": {"wo": 30, r"model\.layers\.\d+\.feed_forward\.w1": 1.5}}, {WO: 10, W1: 0.5, WQKV: 2}, ALL),
    # a name is matched to its end and from a dot on: `o` is not `wo`, and layer 1 is not layer 11
    ({"alpha_pattern": {"o": 30, "layers.1": 99, "model.layers.1.attention.wo": 3}}, {WO: 1, W1: 2, WQKV: 2}, ALL),
    ({"alpha_pattern": {"wo": 30, "attention.wo": 60}}, {WO: 10, W1: 2, WQKV: 2}, ALL),      # the first that matches
    ({"rank_pattern": {"wqkv": 2}}, {WO: 2, W1: 2, WQKV: 3}, {**ALL, WQKV: 2}),
    ({"rank_pattern": {"wqkv": 2}, "alpha_pattern": {"attention.wqkv": 8}}, {WO: 2, W1: 2, WQKV: 4}, {**ALL, WQKV: 2}),
    ({"rank_pattern": {"wqkv": 4}, "use_rslora": True}, {WO: 6 / 3 ** 0.5, W1: 6 / 3 ** 0.5, WQKV: 3},
     {**ALL, WQKV: 4}),
    ({"target_modules": ["wo", "w1", "wqkv"]}, dict.fromkeys(ALL, 2), ALL),
    ({"target_modules": r".*\.(wo|w1|wqkv)"}, dict.fromkeys(ALL, 2), ALL),
    ({"target_modules": ["wo", "w1", "wqkv"], "layers_to_transform": [0, 1, 2]}, dict.fromkeys(ALL, 2), ALL),
    ({"target_modules": ["wo", "w1", "wqkv"], "layers_to_transform": [0, 1, 2], "layers_pattern": "layers"},
     dict.fromkeys(ALL, 2), ALL),
    ({"init_lora_weights": "gaussian", "fan_in_fan_out": True, "lora_dropout": 0.1, "bias": "none", "use_dora": False,
      "layer_replication": None, "loftq_config": {}, "revision": "x", "something_new": None},
     dict.fromkeys(ALL, 2), ALL)])
def test_fields_that_are_read(model, tmp_path, settings, scales, ranks):
    arrays = pairs(model, ranks)
    check(folded(model, write(tmp_path / "lora", arrays, {**SAME, **settings})), expected(model, arrays, scales))


@pytest.mark.parametrize(("settings", "words"), [
    *(({"init_lora_weights": start}, f"init_lora_weights '{start.lower()}'.*path_initial_model_for_weight_conversion")
      for start in ("pissa", "PiSSA_niter_16", "olora", "corda", "loftq", "lora_ga")),
    *(({name: value}, f"{name} .*merge_and_unload") for name, value in (
        ("lora_bias", True), ("layer_replication", [[0, 2]]), ("trainable_token_indices", [3]),
        ("alora_invocation_tokens", [1]), ("megatron_config", {"a": 1}), ("use_qalora", True),
        ("target_parameters", ["w"]), ("arrow_config", {"a": 1}), ("something_new", 0.5))),
    ({"peft_type": "IA3"}, "peft_type 'IA3'; only LORA"),
    ({"r": 4}, rf"rank 3 for {WO}, .* says 4"),
    ({"rank_pattern": {"wo": 2}}, rf"rank 3 for {WO}, .* says 2"),
    ({"target_modules": ["w1", "wqkv"]}, f"a LoRA for {WO}, which is none of the modules"),
    ({"target_modules": ["wo", "w1", "wqkv"], "layers_to_transform": 0}, f"a LoRA for {WO}, which is none"),
    ({"exclude_modules": ["wo"]}, f"a LoRA for {WO}, which is none of the modules"),
    ({"modules_to_save": ["output"]}, "names output in modules_to_save, but .* does not hold its weights"),
    ({"lora_alpha": "6"}, "lora_alpha '6'; it is a number"), ({"lora_alpha": float("nan")}, "lora_alpha nan"),
    ({"r": 0}, "r 0; it is a whole number"), ({"r": True}, "r True"), ({"alpha_pattern": ["wo"]}, "alpha_pattern"),
    ({"alpha_pattern": {"wo": None}}, "alpha_pattern"), ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    ({"target_modules": 5}, "target_modules 5"), ({"use_rslora": "yes"}, "use_rslora 'yes'"),
    ({"use_dora": "yes"}, "use_dora 'yes'; it is true or false"),
    ({"use_dora": True}, rf"holds no magnitudes of {WO}, but .* has use_dora True; they do not belong together"),
    ({"bias": "some"}, "bias 'some'"), ({"layers_to_transform": ["0"]}, "layers_to_transform")])
def test_fields_that_are_refused(model, tmp_path, settings, words):
    lora = write(tmp_path / "lora", pairs(model, ALL), {**SAME, **settings})
    with pytest.raises(CheckpointError, match=words):
        folded(model, lora)


def magnitudes(model, scheme: str) -> dict[str, np.ndarray]:
    rng, weights = np.random.default_rng(9), open_source(model).tensors
    return {scheme.format(linear): rng.uniform(0.5, 2, weights[f"{linear}.weight"].shape[0]).astype(np.float32)
            for linear in ALL}


# by PEFT before 0.12 and since, of one of several adapters, and by this package's runs
@pytest.mark.parametrize("scheme", ["base_model.model.{0}.lora_magnitude_vector",
                                    "base_model.model.{0}.lora_magnitude_vector.weight",
                                    "{0}.lora_magnitude_vector.default.weight", "{0}.mindpet_delta_lora_magnitude"])
def test_dora_scales_every_row_to_its_magnitude(model, tmp_path, scheme):
    own = "{0}.mindpet_delta_lora_{1}.weight" if "mindpet" in scheme else NAME
    sides = "ab" if "mindpet" in scheme else "AB"
    arrays, rows = pairs(model, ALL, own, sides), magnitudes(model, scheme)
    lora = write(tmp_path / "lora", {**arrays, **rows}, {**SAME, "use_dora": True})
    wanted = expected(model, arrays, dict.fromkeys(ALL, 2), own, sides)
    for linear in ALL:
        weight = wanted[f"{linear}.weight"]
        wanted[f"{linear}.weight"] = weight * (rows[scheme.format(linear)] / np.linalg.norm(weight, axis=1))[:, None]
    check(folded(model, lora), wanted)


def test_magnitudes_that_do_not_belong_are_refused(model, tmp_path):
    rows = magnitudes(model, "{0}.lora_magnitude_vector")
    plain = write(tmp_path / "plain", {**pairs(model, ALL), **rows}, SAME)
    with pytest.raises(CheckpointError, match=r"holds magnitudes of .*, but .* has use_dora False; they do not belong"):
        folded(model, plain)
    rows[f"{WO}.lora_magnitude_vector"] = np.ones(3, np.float32)
    short = write(tmp_path / "short", {**pairs(model, ALL), **rows}, {**SAME, "use_dora": True})
    with pytest.raises(CheckpointError, match=rf"the magnitudes of {WO} have the shape \(3,\), the weight"):
        folded(model, short)


def test_each_field_stands_in_one_table():
    names = [*READ, *INERT, *REFUSED]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100000, "nothing"])
def test_a_file_that_is_no_configuration(model, tmp_path, text):
    lora = write(tmp_path / "lora", pairs(model, ALL), {})
    (lora / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        folded(model, lora)


def test_alpha_is_said_once(model, tmp_path):
    lora = write(tmp_path / "lora", pairs(model, ALL), SAME)
    with pytest.raises(CheckpointError, match="lora_alpha 6; leave --alpha out"):
        folded(model, lora, 12.0)


@pytest.mark.parametrize("key", ["base_model.model.output.weight",
                                 "base_model.model.output.modules_to_save.default.weight"])
def test_saved_modules_replace_the_base(model, tmp_path, key):
    arrays = pairs(model, ALL)
    head = np.random.default_rng(1).standard_normal((64, 32)).astype(np.float32)
    with pytest.raises(CheckpointError, match=r"output.*does not name it in modules_to_save"):
        folded(model, write(tmp_path / "unsaid", {**arrays, key: head}, SAME))
    settings = {**SAME, "modules_to_save": ["output"]}
    check(folded(model, write(tmp_path / "lora", {**arrays, key: head}, settings)),
          {**expected(model, arrays, dict.fromkeys(ALL, 2)), "output.weight": head})
    with pytest.raises(CheckpointError, match=r"shape \(63, 32\), the base has output\.weight with shape \(64, 32\)"):
        folded(model, write(tmp_path / "short", {**arrays, key: head[1:]}, settings))


def test_trained_biases_replace_the_base(model, tmp_path):
    linear = "vit.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    arrays = pairs(model, {linear: RANK})
    bias = {f"base_model.model.{linear}.base_layer.bias": np.arange(16, dtype=np.float32)}
    lora = write(tmp_path / "lora", {**arrays, **bias}, {**SAME, "bias": "lora_only"})
    check(folded(model, lora), {**expected(model, arrays, {linear: 2}), f"{linear}.bias": np.arange(16.0)})


def test_of_several_adapters_one_is_chosen(model, tmp_path):
    scheme = "base_model.model.{{0}}.lora_{{1}}.{0}.weight"
    one, other = (pairs(model, ALL, scheme.format(name), seed=seed) for name, seed in (("default", 1), ("other", 2)))
    lora = write(tmp_path / "lora", {**one, **other}, SAME)
    with pytest.raises(CheckpointError, match="holds the adapters default, other; choose one with --adapter"):
        folded(model, lora)
    with pytest.raises(CheckpointError, match="no adapter 'third'; it has default, other"):
        folded(model, lora, name="third")
    merge(model, tmp_path / "x", lora=lora, adapter="other")
    check(arrays_of(tmp_path / "x"), expected(model, other, dict.fromkeys(ALL, 2), scheme.format("other")))


@pytest.mark.parametrize("key", [f"base_model.model.{WO}.lora_B.bias",
                                 "base_model.model.model.tok_embeddings.lora_embedding_A",
                                 "base_model.model.head.weight"])
def test_other_tensors_are_refused_by_name(model, tmp_path, key):
    lora = write(tmp_path / "lora", {**pairs(model, ALL), key: np.ones(32, np.float32)}, SAME)
    with pytest.raises(CheckpointError, match=key.rsplit(".", 1)[0]):
        folded(model, lora)


def test_targets_without_matrices_are_counted(model, tmp_path, caplog):
    lora = write(tmp_path / "lora", pairs(model, {WO: RANK}), {**SAME, "target_modules": ["wo"]})
    with caplog.at_level(logging.INFO):
        folded(model, lora)
    assert "no matrices for 3 of the modules" in caplog.text and "layers.0.attention.wo" in caplog.text


def test_a_whole_checkpoint_with_mindformers_lora(model, tmp_path):
    scheme = "{0}.mindpet_delta_lora_{1}"
    arrays = pairs(model, ALL, scheme, "ab")
    states = {"adam_m.output.weight": np.ones((64, 32), np.float32), "global_step": np.ones(1, np.float32)}
    folder = tmp_path / "run"
    folder.mkdir()
    save(folder / "model.safetensors", {**arrays_of(model), **arrays, **states})
    check(folded(model, folder, 12.0), expected(model, arrays, dict.fromkeys(ALL, 4), scheme, "ab"))
    other = make(tmp_path / "other", seed=3)
    with pytest.raises(CheckpointError, match="with other values than the base has"):
        folded(other, folder, 12.0)
