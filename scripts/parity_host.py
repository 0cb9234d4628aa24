"""Checks of the host code against reference outputs of the public code: tokenizer, prompts, labels, pictures.

Each check takes a folder laid out like the reference outputs and returns rows of the parity table; those that need the
public tokenizer file take its path.
"""
from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import PIL
from parity_rows import Row, differs, row
from PIL import Image

from mindformers_ixc.processing.image import (
    bicubic_resize,
    image_token_count,
    normalise,
    partition_image,
    plan_partition,
)
from mindformers_ixc.processing.prompt import mask_labels
from mindformers_ixc.registration import InternLM2Tokenizer, IXC25ImageProcessor, IXC25Processor

# Public token ids of the reference labels: end of turn and </s>.
END_OF_TURN_ID, EOS_ID = 92542, 2

# Pictures' mean colours may differ by this much of 255 when another Pillow resized them.
MEAN_BAR = 0.5


def read(path: Path):
    """A JSON file's content."""
    return json.loads(path.read_text(encoding="utf-8"))


def check_tokenizer(folder: Path, tokenizer_file: Path) -> list[Row]:
    """Ids with and without `<s>`, pieces, decoded texts and the sizes of the vocabulary."""
    reference, tokenizer = read(folder / "tokenizer.json"), InternLM2Tokenizer(str(tokenizer_file))
    sizes = {"vocab_size": tokenizer.vocab_size, "len": len(tokenizer), "bos": tokenizer.bos_token_id,
             "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id,
             "unused145": tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_145]"),
             "unused146": tokenizer.convert_tokens_to_ids("[UNUSED_TOKEN_146]")}
    rows = [row("tokenizer: sizes and special ids", [differs(value, reference[key]) for key, value in sizes.items()])]
    checks = {
        "ids with <s>": lambda case: differs(tokenizer(case["text"])["input_ids"], case["ids_with_bos"]),
        "ids": lambda case: differs(tokenizer(case["text"], add_special_tokens=False)["input_ids"], case["ids"]),
        "pieces": lambda case: differs(tokenizer.tokenize(case["text"]), case["pieces"]),
        "decoded": lambda case: differs(tokenizer.decode(case["ids"]), case["decoded"]),
        "decoded without specials": lambda case: differs(
            tokenizer.decode(case["ids"], skip_special_tokens=True), case["decoded_skip_special"]),
    }
    return rows + [row(f"tokenizer: {name}", [check(case) for case in reference["cases"]])
                   for name, check in checks.items()]


def check_prompts(folder: Path, tokenizer_file: Path) -> list[Row]:
    """Order and ids of a prompt's parts, its image spans, and hd_num.

    The reference counts every picture as a fixed number of tokens; a 28-pixel picture is one tile of one token here,
    so its span is compared after being stretched to that number.
    """
    processor = IXC25Processor(IXC25ImageProcessor(image_size=28), InternLM2Tokenizer(str(tokenizer_file)))
    picture, parts, masks, limits = Image.new("RGB", (28, 28)), [], [], []
    for case in read(folder / "prompts.json"):
        count, each = case["images"], case["image_tokens_each"]
        sample = processor.encode_chat(case["query"], [picture] * count, case["history"], case["meta"])
        spans = [image_token_count(grid, 1) for grid in sample.grids]
        parts.append(differs(prompt_parts(sample.input_ids, sample.image_mask, spans), case["parts"]))
        masks.append(differs(stretched(sample.image_mask, spans, each), case["image_mask"]))
        limits.append(differs([processor.image_processor.hd_num_for(count)] * count, case["hd_num"]))
    return [row("prompts: parts", parts), row("prompts: image spans", masks), row("prompts: hd_num", limits)]


def prompt_parts(ids: np.ndarray, mask: np.ndarray, spans: list[int]) -> list[dict]:
    """A prompt as the reference writes it: text ids and image numbers in order."""
    parts, position, image = [], 0, 0
    while position < len(ids):
        if mask[position]:
            parts.append({"kind": "img", "value": image})
            position += spans[image]
            image += 1
            continue
        start = position
        while position < len(ids) and not mask[position]:
            position += 1
        parts.append({"kind": "ids", "value": ids[start:position].tolist()})
    return parts


def stretched(mask: np.ndarray, spans: list[int], each: int) -> list[int]:
    """The image mask with every span made `each` positions long."""
    result, position, image = [], 0, 0
    while position < len(mask):
        if mask[position]:
            result += [1] * each
            position += spans[image]
            image += 1
        else:
            result.append(0)
            position += 1
    return result


def check_labels(folder: Path) -> list[Row]:
    """Labels of every case."""
    cases = read(folder / "labels.json")["cases"]
    errors = [differs(mask_labels(np.array(case["ids"]), END_OF_TURN_ID, EOS_ID).tolist(), case["labels"])
              for case in cases]
    return [row("labels", errors)]


def check_images(folder: Path) -> list[Row]:
    """Sizes, tiles, token counts and pixels of every picture, transform and hd_num."""
    reference = read(folder / "image_transforms.json")
    same_pillow = reference["pillow"] == PIL.__version__
    sizes, tiles, tokens, pixels = [], [], [], []
    for case in reference["cases"]:
        training = case["kind"] == "training"
        with Image.open(folder / "images" / case["image"]) as picture:
            grid = plan_partition(*picture.size, case["hd_num"], training=training).grid
            padded = partition_image(picture, case["hd_num"], training=training)
        sizes.append(differs(list(padded.size), case["size"]))
        tiles.append(differs([grid.columns, grid.rows], case["tiles_wh"]))
        tokens.append(abs(image_token_count(grid, 20) - case["tokens"]))
        values = np.asarray(padded)
        if same_pillow:
            pixels.append(differs(hashlib.sha256(values.tobytes()).hexdigest(), case["sha256"]))
        else:
            pixels.append(np.abs(values.reshape(-1, 3).mean(0) - case["mean"]).max())
    bar, how = (0.0, "sha256") if same_pillow else (MEAN_BAR, "mean, another Pillow")
    return [row("image transforms: size", sizes), row("image transforms: tiles", tiles),
            row("image transforms: tokens", tokens), row(f"image transforms: pixels ({how})", pixels, bar)]


def check_global_view(folder: Path) -> list[Row]:
    """The bicubic global view of a model folder's pictures."""
    reference, errors = np.load(folder / "vision.npz"), []
    for key in (k for k in reference.files if k.endswith("_image_u8")):
        expected = reference[key.replace("_image_u8", "_global")][0]
        errors.append(np.abs(bicubic_resize(normalise(reference[key]), expected.shape[-1]) - expected).max())
    return [row(f"{folder.name}: bicubic global view", errors, 2e-5)]
