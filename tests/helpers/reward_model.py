"""A small reward model: the parameters of the reference outputs, a random head, and the demo's tokenizer."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from random_model import save
from reference import GOLDENS, ReferenceModel
from safetensors.numpy import load_file

from mindformers_ixc.demo import demo_path
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.image import normalise, partition_pixels
from mindformers_ixc.processing.pictures import load_image

PIECES = 1024                  # of the demo's tokenizer; the reference model has embeddings for half of them


def make_reward_model(folder: Path, pooling: str = "last", said: str = "reward_pooling", length: int = 1024) -> Path:
    """Makes the directory.

    Args:
        folder: to be made.
        pooling: of the scores.
        said: what says that it is a reward model: `reward_pooling`, `architectures`, or nothing but the weights.
        length: trained positions.
    """
    rng = np.random.default_rng(5)
    arrays = load_file(GOLDENS / "t1" / "model.safetensors")
    del arrays["output.weight"]
    known = arrays["model.tok_embeddings.weight"]
    further = rng.standard_normal((PIECES - len(known), known.shape[1])) * known.std()
    arrays["model.tok_embeddings.weight"] = np.concatenate([known, further]).astype(np.float32)
    arrays["v_head.weight"] = rng.standard_normal((1, known.shape[1])).astype(np.float32)
    fields = json.loads((GOLDENS / "t1" / "config.json").read_text())
    fields.update(vocab_size=PIECES, max_position_embeddings=length, hd_num=4)
    fields["architectures"] = ["InternLMXComposer2ForRewardModel" if said == "architectures" else "Other"]
    if said == "reward_pooling":
        fields["reward_pooling"] = pooling
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    shutil.copy(demo_path("tokenizer.model"), folder / "tokenizer.model")
    save(folder / "model.safetensors", arrays)
    return folder


def reference_values(model: ReferenceModel, sample: EncodedSample, pictures: list) -> np.ndarray:
    """float64 values `(n,)` of a sample's positions by the numpy reference; `pictures` are files or images."""
    x = model.weights["model.tok_embeddings.weight"][sample.input_ids]
    if pictures:
        side = model.config["vision_config"]["image_size"]
        cut = [normalise(partition_pixels(load_image(one), model.config["hd_num"], side)) for one in pictures]
        x[sample.image_mask == 1] = np.concatenate([model.project(model.merged_rows(one.astype(np.float64)))
                                                    for one in cut])
    model.weights["output.weight"] = model.weights["v_head.weight"]
    return model.logits(x[None], (sample.image_mask == 1)[None])[0, :, 0]
