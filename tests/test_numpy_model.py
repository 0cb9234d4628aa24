"""The numpy reference model against the stored outputs of the public model: what judges others is judged first."""
from __future__ import annotations

import numpy as np
import pytest
from reference import GOLDENS, TASK_LORAS, ReferenceModel, rotary_angles, softmax

# The goldens are float64 results stored as float32; logits of size 10 then carry rounding of about 1e-6.
FEATURES, LOGITS = 1e-6, 1e-5

# Mean and standard deviation of CLIP's pixels (public preprocessing).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.mark.parametrize("folder", ["t1", "t2"])
def test_vision(folder):
    model, golden = ReferenceModel(GOLDENS / folder), np.load(GOLDENS / folder / "vision.npz")
    assert np.abs(model.vit_features(golden["vit_tiles"]) - golden["vit_features"]).max() < FEATURES
    names = [key[:-len("_image_u8")] for key in golden.files if key.endswith("_image_u8")]
    assert names
    for name in names:
        pixels = ((golden[f"{name}_image_u8"] / 255 - MEAN) / DEVIATION).transpose(2, 0, 1)
        rows = model.merged_rows(pixels)
        assert np.abs(rows - golden[f"{name}_rows"]).max() < FEATURES
        assert np.abs(model.project(rows) - golden[f"{name}_embeds"]).max() < FEATURES


@pytest.mark.parametrize("mode", TASK_LORAS)
def test_logits(mode):
    model, golden = ReferenceModel(GOLDENS / "t1"), np.load(GOLDENS / "t1" / "llm.npz")
    ids = golden[f"{mode}_ids"]
    embeds = model.embed(ids, golden[f"{mode}_image"][0])
    assert np.abs(embeds - golden[f"{mode}_embeds"]).max() < FEATURES
    assert np.abs(model.logits(embeds[None], (ids < 0)[None], mode)[0] - golden[f"{mode}_logits"]).max() < LOGITS


def test_logits_of_a_padded_batch_and_beyond_the_trained_length():
    model, golden = ReferenceModel(GOLDENS / "t1"), np.load(GOLDENS / "t1" / "llm.npz")
    logits = model.logits(golden["pad_embeds"].astype(np.float64), golden["pad_image_mask"])
    real = golden["pad_attention_mask"] == 1
    assert np.abs(logits - golden["pad_logits"])[real].max() < LOGITS
    long = model.logits(golden["ntk_embeds"][None].astype(np.float64), golden["ntk_image_mask"][None])[0]
    assert np.abs(long[-32:] - golden["ntk_logits_last32"]).max() < LOGITS
    assert not np.allclose(rotary_angles(model.config, 323)[:256], rotary_angles(model.config, 256))


def test_loss():
    model, golden = ReferenceModel(GOLDENS / "t1"), np.load(GOLDENS / "t1" / "train.npz")
    ids, labels = golden["ids"], golden["labels"]
    embeds = np.stack([model.embed(row, golden[f"image_{i}"][0]) for i, row in enumerate(ids)])
    logits = model.logits(embeds, golden["image_mask"])[:, :-1]
    labelled = labels[:, 1:] != -100
    picked = np.take_along_axis(np.log(softmax(logits)), np.maximum(labels[:, 1:], 0)[..., None], -1)[..., 0]
    assert abs(-picked[labelled].mean() - float(golden["loss"])) < LOGITS
