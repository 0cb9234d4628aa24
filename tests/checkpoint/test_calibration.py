"""Calibration: the network on the host, weights chosen by what their outputs lose, and the command that does it."""
from __future__ import annotations

import json

import numpy as np
import pytest
from random_model import save
from reference import GOLDENS, ReferenceModel

from mindformers_ixc.checkpoint import layer_rounding, streaming
from mindformers_ixc.checkpoint.calibration import calibration_samples
from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.dtypes import to_float32
from mindformers_ixc.checkpoint.host_model import HostModel
from mindformers_ixc.checkpoint.layer_rounding import AWQ_WAY, WAYS, LayerRounding, inverse_factor, round_by_outputs
from mindformers_ixc.checkpoint.packing import round_4, widen_4
from mindformers_ixc.checkpoint.quantise import quantize
from mindformers_ixc.checkpoint.quantised import widened
from mindformers_ixc.checkpoint.scaling import FOLDS, energy
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
    factor = inverse_factor(moments)
    nearest, chosen = (widen_4(*rounded) for rounded in (round_4(weight), round_by_outputs(weight, factor)))
    measured = [np.sum((inputs @ (weight - rounded).T) ** 2) / np.sum((inputs @ weight.T) ** 2)
                for rounded in (nearest, chosen)]
    assert measured[1] < 0.2 * measured[0]
    found = [energy(weight - rounded, moments) / energy(weight, moments) for rounded in (nearest, chosen)]
    np.testing.assert_allclose(found, measured, rtol=1e-2)


def layer_and_moments() -> tuple:
    """The starter's second layer, and the moments of its inputs over samples."""
    model = HostModel(open_source(STARTER).tensors, read_config(STARTER))
    layer, seen = model.layer(1), {}

    def look(path, inputs):
        seen[path] = seen.get(path, 0) + inputs.T @ inputs

    for sample in calibration_samples(demo_path("train.json"), Processor.from_directory(STARTER), 6):
        x, image = model.embeddings(sample), sample.image_mask == 1
        layer(model.layer(0)(x, image), image, look)
    return model, layer.weights, seen


def test_of_all_ways_a_group_gets_the_one_that_loses_least():
    model, weights, seen = layer_and_moments()
    dtypes = {"attention_norm": "F16", "ffn_norm": "F16"}
    found = {}
    for ways in [*[(way,) for way in WAYS], WAYS]:
        rounding = LayerRounding(model.layer(1), ways, dtypes)
        for fold in FOLDS:
            rounding.round(fold, seen[fold.linears[0]])
        found[ways] = rounding
        for path, choice in rounding.choices.items():
            assert choice.way in ways
            # the error that is said is that of the weight the numbers stand for
            moments = seen["feed_forward.w1" if path == "feed_forward.w3" else path]
            lost = energy(weights[path] - rounding.layer.weights[path], moments) / energy(weights[path], moments)
            assert choice.chosen == pytest.approx(lost, rel=1e-3)
    best = found.pop(WAYS)
    for fold in FOLDS:
        least = min(sum(one.choices[path].chosen for path in fold.linears) for one in found.values())
        assert sum(best.choices[path].chosen for path in fold.linears) <= least * 1.05     # rows before are divided
    totals = [sum(one.chosen for one in found[(way,)].choices.values()) for way in WAYS]
    assert totals[1] < totals[0] and totals[2] < 0.5 * totals[0]
    # what was decided once gives the same again, without a search
    again = LayerRounding(model.layer(1), WAYS, dtypes, best.decisions)
    for fold in FOLDS:
        again.round(fold, seen[fold.linears[0]])
    assert {path: choice.way for path, choice in again.choices.items()} == best.decisions.ways
    for path, arrays in best.rounded.items():
        for one, other in zip(arrays, again.rounded[path]):
            np.testing.assert_array_equal(one, other)


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
    with pytest.raises(CheckpointError, match=r"ways is .*; the choices are nearest, AWQ, GPTQ, AWQ and GPTQ"):
        quantize("starter", tmp_path / "target", calibrate=demo_path("train.json"), ways=("LLM",))
    quantize("starter", tmp_path / "small")
    with pytest.raises(CheckpointError, match="there is nothing to choose"):
        quantize(tmp_path / "small", tmp_path / "target", calibrate=demo_path("train.json"))
    assert {entry.name for entry in tmp_path.iterdir()} == {"text.json", "small"}


def test_a_file_of_weights_is_calibrated_with_the_tokenizer_of_its_configuration(tmp_path):
    source = save(tmp_path / "alone.safetensors", arrays_of(STARTER))
    quantize(source, tmp_path / "target", calibrate=demo_path("train.json"), samples=1, config=STARTER / "config.json")
    assert (tmp_path / "target" / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("value", [np.nan, 1e18])
def test_samples_that_the_model_makes_no_numbers_of(tmp_path, value):
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("config.json", "tokenizer.model"):
        (folder / name).write_bytes((STARTER / name).read_bytes())
    arrays = arrays_of(STARTER)
    arrays["model.layers.1.attention_norm.weight"][...] = value
    save(folder / "model.safetensors", arrays)
    words = "bring to model.layers.1.attention.wqkv holds NaN"
    with np.errstate(all="ignore"), pytest.raises(CheckpointError, match=words):
        quantize(folder, tmp_path / "target", calibrate=demo_path("train.json"), samples=1)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"broken", ".target.partial"}


def arrays_of(folder) -> dict[str, np.ndarray]:
    return {name: to_float32(tensor.whole(), tensor.dtype)
            for name, tensor in widened(open_source(folder)).tensors.items()}


@pytest.mark.parametrize("layout", ["mindformers_ixc", "awq"])
def test_norms_and_pairs_follow_the_factors_of_their_layer(tmp_path, layout):
    quantize("starter", tmp_path / "scaled", layout=layout, calibrate=demo_path("train.json"), samples=6,
             ways=(AWQ_WAY,))
    full, scaled = arrays_of(STARTER), arrays_of(tmp_path / "scaled")
    for number in range(4):
        layer = f"model.layers.{number}"
        for norm, linears in (("attention_norm", ("attention.wqkv",)), ("ffn_norm", ("feed_forward.w1",
                                                                                   "feed_forward.w3"))):
            before, after = (one[f"{layer}.{norm}.weight"] for one in (full, scaled))
            assert np.abs(after / before - 1).max() > 0.05
            for linear in linears:
                for side in ("", ".Plora_A", ".lora_web_A", ".lora_dpo_A"):
                    one, other = (arrays[f"{layer}.{linear}{side}.weight"] * weight
                                  for arrays, weight in ((full, before), (scaled, after)))
                    if linear == "feed_forward.w3" and not side:       # its rows are divided
                        continue
                    close = 0.25 if not side else 0.02
                    assert np.abs(one - other)[:16].max() < close * np.abs(one).max(), (linear, side)
        # what w3 gives is divided by what w2 takes: row by row the product of both is the same
        for pair in ("Plora", "lora_web"):
            inner, outer = f"{layer}.feed_forward.w2.{pair}_A.weight", f"{layer}.feed_forward.w3.{pair}_B.weight"
            one, other = (arrays[inner] @ arrays[outer] for arrays in (full, scaled))
            assert np.abs(one - other).max() <= 0.03 * np.abs(one).max()
    assert {tensor.dtype for name, tensor in open_source(tmp_path / "scaled").tensors.items()
            if name.endswith("norm.weight")} == {"F16"}


def test_a_run_that_goes_on_decides_as_before(tmp_path, monkeypatch, capsys):
    def run(name):
        return quantize("starter", tmp_path / name, calibrate=demo_path("train.json"), samples=3)

    def content(folder):
        return {name: tensor.whole().tobytes() for name, tensor in open_source(folder).tensors.items()}

    run("whole")
    said = capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(streaming, "SYNC_BYTES", 1)
    send, search = streaming.Lanes.send, layer_rounding.search

    def stop(lanes, item):
        if item.name == "model.layers.2.feed_forward.w1.qzeros":
            for one in lanes.settled:          # all before it is on the disk
                one.result()
            raise KeyboardInterrupt
        send(lanes, item)

    with monkeypatch.context() as patch:
        patch.setattr(streaming.Lanes, "send", stop)
        with pytest.raises(KeyboardInterrupt):
            run("target")
    searched, sent = [], []
    monkeypatch.setattr(streaming.Lanes, "send", lambda lanes, item: sent.append(item.name) or send(lanes, item))
    monkeypatch.setattr(layer_rounding, "search", lambda *given: searched.append(given) or search(*given))
    run("target")
    assert len(searched) == len(FOLDS)            # of the last layer alone
    # numbers, scales and zeros are of one run: what was written without its zeros is written again, and nothing else
    assert sent[:4] == [f"model.layers.2.feed_forward.{name}" for name in
                        ("w1.qweight", "w1.scales", "w1.qzeros", "w1.Plora_A.qweight")]
    assert content(tmp_path / "target") == content(tmp_path / "whole")
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert {entry.name for entry in tmp_path.iterdir()} == {"whole", "target"}


def test_samples_come_from_whatever_training_reads(tmp_path):
    processor = Processor.from_directory(STARTER)
    (tmp_path / "data.txt").write_text(f"{demo_path('train.json')} 0.001  # thousands\n", encoding="utf-8")
    expected, listed = (calibration_samples(path, processor, 3) for path in (demo_path("train.json"),
                                                                             tmp_path / "data.txt"))
    assert [one.input_ids.tolist() for one in listed] == [one.input_ids.tolist() for one in expected]
    folder = tmp_path / "own"
    folder.mkdir()
    picture = demo_path("images/cat.jpg")
    (folder / "questions.csv").write_text(f"image,question,answer\n{picture},What?,A cat\n", encoding="utf-8")
    assert len(calibration_samples(folder, processor, 3)) == 1
