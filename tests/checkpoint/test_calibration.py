"""Calibration: the network on the host, weights chosen by what their outputs lose, and the command that does it."""
from __future__ import annotations

import json

import numpy as np
import pytest
from reference import GOLDENS, ReferenceModel

from mindformers_ixc.checkpoint.calibration import calibration_samples, output_error, round_by_outputs
from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.host_model import HostModel
from mindformers_ixc.checkpoint.packing import round_4, widen_4
from mindformers_ixc.checkpoint.quantise import quantize
from mindformers_ixc.checkpoint.quantised import widened
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.config import read_config
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import CheckpointError, DataError
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.resources import resolve_model

STARTER = resolve_model("starter")


def host_states(folder, samples) -> list[np.ndarray]:
    """States behind the last layer, of every sample."""
    model = HostModel(widened(open_source(folder)).tensors, read_config(folder))
    layers, found = [model.layer(number) for number in range(model.config.num_hidden_layers)], []
    for sample in samples:
        x = model.embeddings(sample)
        for layer in layers:
            x = layer(x, sample.image_mask == 1)
        found.append(x)
    return found


@pytest.fixture(scope="module")
def samples():
    processor = Processor.from_directory(STARTER)
    return calibration_samples(demo_path("train.json"), processor, 12)


def test_the_network_on_the_host_is_the_reference_model():
    golden, reference = np.load(GOLDENS / "t1" / "llm.npz"), ReferenceModel(GOLDENS / "t1")
    model = HostModel(open_source(GOLDENS / "t1").tensors, read_config(GOLDENS / "t1"))
    x, image = golden["base_embeds"].astype(np.float32), golden["base_ids"] < 0
    for number in range(model.config.num_hidden_layers):
        x = model.layer(number)(x, image)
    x = reference._rms_norm(x, "model.norm") @ reference.weights["output.weight"].T
    np.testing.assert_allclose(x, golden["base_logits"], atol=2e-4)


def test_pictures_on_the_host_are_the_reference_models(samples):
    golden = np.load(GOLDENS / "t1" / "vision.npz")
    model = HostModel(open_source(GOLDENS / "t1").tensors, read_config(GOLDENS / "t1"))
    np.testing.assert_allclose(model._tower(golden["vit_tiles"].astype(np.float32)), golden["vit_features"], atol=1e-4)
    picture = next(sample for sample in samples if sample.image_mask.any())
    starter = HostModel(open_source(STARTER).tensors, read_config(STARTER))
    x, table = starter.embeddings(picture), starter.vision_table(picture.pixel_values)
    image = picture.image_mask == 1
    np.testing.assert_array_equal(x[image], table[picture.vision_index(picture.tiles)[image]])
    np.testing.assert_array_equal(x[~image], starter.weight("model.tok_embeddings.weight")[picture.input_ids[~image]])


def test_inputs_that_go_together_make_up_for_each_other():
    rng = np.random.default_rng(0)
    few = rng.standard_normal((400, 24)).astype(np.float32)
    inputs = few @ rng.standard_normal((24, 256)).astype(np.float32) + 0.1 * rng.standard_normal((400, 256))
    inputs, weight = inputs.astype(np.float32), rng.standard_normal((40, 256)).astype(np.float32)
    inputs[:, 7] = 0                                                # an input that never is
    moments = inputs.T @ inputs
    nearest, chosen = (widen_4(*rounded) for rounded in (round_4(weight), round_by_outputs(weight, moments)))
    measured = [np.sum((inputs @ (weight - rounded).T) ** 2) / np.sum((inputs @ weight.T) ** 2)
                for rounded in (nearest, chosen)]
    assert measured[1] < 0.2 * measured[0]
    np.testing.assert_allclose([output_error(weight, rounded, moments) for rounded in (nearest, chosen)], measured,
                               rtol=1e-2)


def test_a_calibrated_model_is_nearer_on_samples_it_has_not_seen(tmp_path, capsys):
    rows = [{**row, "image": str(demo_path(row["image"]))} for row in json.loads(demo_path("train.json").read_text())
            if isinstance(row["image"], str)]
    half, rest = tmp_path / "half.json", tmp_path / "rest.json"
    half.write_text(json.dumps(rows[::2]))
    rest.write_text(json.dumps(rows[1::2]))
    quantize("starter", tmp_path / "nearest")
    quantize("starter", tmp_path / "chosen", calibrate=half, samples=12)
    assert "Calibrated with 12 samples" in capsys.readouterr().err
    others = calibration_samples(rest, Processor.from_directory(STARTER), 8)
    expected, nearest, chosen = (host_states(folder, others) for folder in
                                 (STARTER, tmp_path / "nearest", tmp_path / "chosen"))
    errors = [sum(float(np.sum((a - b) ** 2)) for a, b in zip(expected, found)) for found in (nearest, chosen)]
    assert errors[1] < 0.5 * errors[0]
    quantize("starter", tmp_path / "awq", layout="awq", calibrate=half, samples=12)
    convert(tmp_path / "awq", tmp_path / "awq_full", to="hf", dtype="float32")
    convert(tmp_path / "chosen", tmp_path / "full", to="hf", dtype="float32")
    name = "model.layers.3.feed_forward.w2.weight"
    np.testing.assert_array_equal(*[open_source(tmp_path / folder).tensors[name].whole()
                                    for folder in ("full", "awq_full")])


def test_what_calibration_refuses(tmp_path):
    text = tmp_path / "text.json"
    text.write_text(json.dumps([{"id": 1, "conversations": [{"from": "human", "value": "Hello"},
                                                            {"from": "gpt", "value": "Hi"}]}]))
    with pytest.raises(DataError, match="has no sample with a picture"):
        quantize("starter", tmp_path / "target", calibrate=text)
    with pytest.raises(CheckpointError, match="Calibration is for 4 bits"):
        quantize("starter", tmp_path / "target", 8, calibrate=text)
    quantize("starter", tmp_path / "small")
    with pytest.raises(CheckpointError, match="there is nothing to choose"):
        quantize(tmp_path / "small", tmp_path / "target", calibrate=demo_path("train.json"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"text.json", "small"}
