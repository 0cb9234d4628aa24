"""Quantised directories on Ascend: what the loader puts where, what it refuses, and the graphs, without a device."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import mindspore.common.dtype as mstype
import numpy as np
import pytest
from random_model import make

from mindformers_ixc.checkpoint.ascend_packing import repacked
from mindformers_ixc.checkpoint.quantise import quantize
from mindformers_ixc.checkpoint.quantised import quantization_of, stored_weights, widened
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.device import assume_device
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.generation import stored_weights as loader
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.generation.loading import load_model
from mindformers_ixc.models import stored_ascend

ROOT = Path(__file__).resolve().parents[2]

# two groups for w2, one elsewhere
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
HALF = {"compute_dtype": "bfloat16", "param_init_type": "bfloat16"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("ascend")
    model = make(place / "model", "BF16", **SIZES)
    return {name: quantize(model, place / name, **options)
            for name, options in (("4", {}), ("awq", {"layout": "awq"}), ("8", {"bits": 8}))}


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


@pytest.mark.parametrize("name", ["4", "awq", "8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parameters_are_what_the_operator_takes(folders, name, dtype):
    with assume_device("Ascend"):
        model = load_model(folders[name], compute_dtype=dtype, param_init_type=dtype)
    found, source = {parameter.name: parameter for parameter in model.get_parameters()}, open_source(folders[name])
    weights = stored_weights(source, quantization_of(source))
    held = {parameter.rpartition(".")[0] for parameter in found if parameter.endswith(".qweight")}
    assert held == weights.keys() - {"model.tok_embeddings"}
    for stem in held:
        for part, array in repacked(weights[stem], {"bfloat16": "BF16", "float16": "F16"}[dtype]).items():
            parameter = found.pop(f"{stem}.{part}")
            np.testing.assert_array_equal(bits(parameter.asnumpy()), bits(array))
            assert not parameter.requires_grad
            assert parameter.dtype == {"qweight": mstype.int8 if weights[stem].kind == "int8" else mstype.qint4x2}.get(
                part, getattr(mstype, dtype))
    full = widened(source).tensors
    assert found.keys() < full.keys()
    for parameter in found.values():
        value = full[parameter.name].whole()
        if full[parameter.name].dtype == "BF16":
            value = (value.astype(np.uint32) << 16).view(np.float32)
        np.testing.assert_allclose(parameter.asnumpy().astype(np.float32), value, rtol=2 ** -8, atol=1e-6)
    linear = model.model.layers[0].feed_forward.w2.held
    assert linear.matmul.antiquant_group_size == (0 if name == "8" else 128)
    assert model.model.layers[0].attention.wo.held.matmul.antiquant_group_size == 0       # a single group


def test_what_the_operator_does_not_take_is_widened(folders, monkeypatch):
    monkeypatch.setattr(stored_ascend, "MOST_SIDE", 200)       # of the vocabulary's 64, w1's 256
    with assume_device("Ascend"):
        model = load_model(folders["4"], IXC25ForCausalLM, **HALF)
    layer = model.model.layers[0]
    assert hasattr(layer.attention.wo, "held") and not hasattr(layer.feed_forward.w1, "held")
    expected = widened(open_source(folders["4"])).tensors["model.layers.0.feed_forward.w1.weight"].whole()
    np.testing.assert_allclose(layer.feed_forward.w1.weight.asnumpy().astype(np.float32), expected, rtol=2 ** -8)


def test_every_door_takes_quantised_weights_there(folders):
    with assume_device("Ascend"):
        model = IXC25ForCausalLM.from_pretrained(str(folders["awq"]), **HALF)
    assert model.model.layers[0].attention.wqkv.held.qweight.dtype == mstype.qint4x2


def test_one_process_with_halves(folders, monkeypatch):
    words = "on Ascend it is computed with by one process, with compute_dtype float16 or bfloat16.* mindformers convert"
    with assume_device("Ascend"), pytest.raises(CheckpointError, match=words):
        load_model(folders["4"])
    monkeypatch.setattr("mindformers_ixc.generation.ascend_weights.is_parallel", lambda: True)
    with assume_device("Ascend"), pytest.raises(CheckpointError, match=words):
        load_model(folders["4"], **HALF)
    assert loader.on_ascend() is False and ms.get_context("device_target") == "CPU"


@pytest.mark.parametrize("width", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_the_graphs_hold_the_operator_and_keep_its_rules(width):
    script = ROOT / "scripts" / "compile_ascend.py"
    done = subprocess.run([sys.executable, script, "--bits", str(width)], capture_output=True, text=True, check=False,
                          env=os.environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # per layer five linears with two pairs, the head; of the tower six, of the projector two
    assert f"{2 * 5 * 5 + 1 + 6 + 2} weights of 4 and 8 bits; full instead: model.tok_embeddings\n" in done.stdout
    assert "all fused operations are there and keep the rules" in done.stdout
    largest = {4: "(4096, 3072)", 8: "(6144, 4096)"}[width]
    assert "decode: compiled in" in done.stdout and f"largest tensor: {largest}" in done.stdout
