"""Checks of the host code against reference outputs of the wide layout (see `parity_wide`).

Each check takes a folder and returns rows of the parity table; those that need the public tokenizer file take its path.
"""
from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import PIL
from parity_host import MEAN_BAR, prompt_parts, read
from parity_rows import Row, differs, row
from PIL import Image

from mindformers_ixc.errors import ImageError
from mindformers_ixc.generation.webpage import html_of
from mindformers_ixc.processing.image import (
    bicubic_resize,
    image_token_count,
    normalise,
    partition_image,
    plan_partition,
)
from mindformers_ixc.processing.prompt import mask_labels
from mindformers_ixc.processing.video import fit_board, frames_to_board, read_frames, sample_frames
from mindformers_ixc.registration import InternLM2Tokenizer, IXC25ImageProcessor, IXC25Processor

# Means of decoded frames depend on the decoder; a released decord is within this much of 255.
FRAME_BAR = 2.0


def check_tokenizer(folder: Path, tokenizer_file: Path) -> list[Row]:
    """Ids and decoded texts, lists of ids that encode no text, and batches."""
    reference, tokenizer = read(folder / "tokenizer.json"), InternLM2Tokenizer(str(tokenizer_file))
    cases = [case for case in reference["cases"] if not case.get("version_dependent")]

    def decoded(ids: str, expected: str, skip: bool) -> list[int]:
        return [differs(tokenizer.decode(case[ids], skip_special_tokens=skip), case[expected]) for case in cases]

    lists = [case for case in reference["decode"] if not case.get("version_dependent")]
    batch = tokenizer(reference["batch"]["texts"], padding=True)["input_ids"]
    return [row("tokenizer: ids", [differs(tokenizer(case["text"], add_special_tokens=False)["input_ids"], case["ids"])
                                   for case in cases]),
            row("tokenizer: ids with <s>", [differs(tokenizer(case["text"])["input_ids"], case["ids_with_special"])
                                            for case in cases]),
            row("tokenizer: decoded", decoded("ids", "decoded", False)),
            row("tokenizer: decoded without specials", decoded("ids", "decoded_skip_special", True)),
            row("tokenizer: decoded with <s>", decoded("ids_with_special", "decoded_with_special", False)),
            row("tokenizer: lists of ids", [differs(tokenizer.decode(case["ids"]), case["decoded"]) for case in lists]),
            row("tokenizer: batch", [differs([list(ids) for ids in batch], reference["batch"]["input_ids"])])]


def check_prompts(folder: Path, tokenizer_file: Path) -> list[Row]:
    """Ids of chat prompts without their pictures, places of these, and their sizes.

    Cases that this package refuses, because pictures and places do not match or the prompt is cut, are left out.
    """
    processor = IXC25Processor(IXC25ImageProcessor(), InternLM2Tokenizer(str(tokenizer_file)))
    ids, spans = [], []
    for case in read(folder / "prompts.json")["chat"]:
        if case["warns_count_mismatch"] or case["total_length"] != case["untruncated_length"]:
            continue
        pictures = [Image.new("RGB", tuple(size)) for size in case["image_sizes_wh"]]
        sample = processor.encode_chat(case["query"], pictures, [tuple(pair) for pair in case["history"]],
                                       case["meta_instruction"], case["hd_num"] if len(pictures) == 1 else None,
                                       control_tokens=True)      # as the public code reads </s> in a question
        counts = [image_token_count(grid, 20) for grid in sample.grids]
        ids.append(differs(sample.input_ids[sample.image_mask == 0].tolist(), case["text_ids"]))
        position, found = 0, []
        for part in prompt_parts(sample.input_ids, sample.image_mask, counts):
            length = counts[part["value"]] if part["kind"] == "img" else len(part["value"])
            if part["kind"] == "img":
                found.append([position, length, part["value"]])
            position += length
        spans.append(differs(found, case["image_spans"]))
    return [row("prompts: ids", ids), row("prompts: image spans", spans)]


def check_labels(folder: Path) -> list[Row]:
    """Labels of every case."""
    reference = read(folder / "labels.json")
    marks = (reference["end_mark"], reference["eos"])
    errors = [differs(mask_labels(np.array(case["ids"]), *marks).tolist(), case["targets"])
              for case in reference["cases"]]
    rows = [differs(mask_labels(np.array(ids), *marks).tolist(), targets)
            for ids, targets in zip(reference["batch"]["ids"], reference["batch"]["targets"])]
    return [row("labels", errors), row("labels: rows of a batch", rows)]


def check_images(folder: Path) -> list[Row]:
    """Sizes, tiles, token counts and pixels of every picture, transform and hd_num."""
    reference = read(folder / "image_transforms.json")
    same_pillow = reference["pillow"] == PIL.__version__
    sizes, tokens, pixels = [], [], []
    for case in reference["cases"]:
        training = case["kind"] == "training"
        with Image.open(folder / "images" / case["image"]) as picture:
            # alpha is dropped in the reference
            plain = picture.convert("RGB")
        grid = plan_partition(*plain.size, case["hd_num"], training=training).grid
        padded = partition_image(plain, case["hd_num"], training=training)
        sizes.append(differs([*padded.size, grid.rows, grid.columns],
                             [*case["size_wh"], case["tiles_h"], case["tiles_w"]]))
        tokens.append(abs(image_token_count(grid, 20) - case["tokens"]))
        values = np.asarray(padded)
        if same_pillow:
            pixels.append(differs(hashlib.sha256(values.tobytes()).hexdigest(), case["sha256"]))
        else:
            found = normalise(values).reshape(3, -1).mean(-1)
            pixels.append(np.abs(found - case["norm_mean"]).max() * 255 / 4)      # normalised values span about 4
    bar, how = (0.0, "sha256") if same_pillow else (MEAN_BAR, "mean, another Pillow")
    return [row("image transforms: sizes", sizes), row("image transforms: tokens", tokens),
            row(f"image transforms: pixels ({how})", pixels, bar)]


def check_sizes(folder: Path) -> list[Row]:
    """Sizes and token counts by width, height and hd_num alone; both sides refuse what has no height."""
    errors = []
    for case in read(folder / "image_sizes.json"):
        for kind in ("inference", "training"):
            try:
                plan = plan_partition(*case["size_wh"], case["hd_num"], training=kind == "training")
                found = {"size_wh": list(plan.padded), "tokens": image_token_count(plan.grid, 20)}
            except ImageError:
                found = {"error": "ValueError"}
            errors.append(differs(found, case[kind]))
    return [row("image sizes", errors)]


def check_video(folder: Path) -> list[Row]:
    """Sampled frames, their colours, board and final sizes."""
    reference, names = read(folder / "video.json"), ("frame_indices", "frame_size_wh", "board_size_wh", "final_size_wh")
    errors, colours = {name: [] for name in names}, []
    for case in reference["videos"]:
        frames = read_frames(folder / case["video"])
        board = frames_to_board(frames)
        ours = {"frame_indices": sample_frames(case["frames"], case["avg_fps"]), "frame_size_wh": list(frames[0].size),
                "board_size_wh": list(board.size), "final_size_wh": list(fit_board(board).size)}
        for name in names:
            errors[name].append(differs(ours[name], case[name]))
        for frame, mean in zip(frames, case["frame_mean_rgb"]):
            colours.append(np.abs(np.asarray(frame).reshape(-1, 3).mean(0) - mean).max())
    fitted = [differs(list(fit_board(Image.new("RGB", tuple(case["board_size_wh"]))).size), case["final_size_wh"])
              for case in reference["video_transform_sizes"]]
    return [*(row(f"video: {name}", values) for name, values in errors.items()),
            row("video: board to final size", fitted), row("video: mean colours of frames", colours, FRAME_BAR)]


def check_pages(folder: Path) -> list[Row]:
    """Web pages of answers; what decoding takes out (control pieces) is taken out before.

    The public code leaves an address of the closed service alone when it has no query; this package replaces all.
    """
    errors = []
    for case in read(folder / "webpage.json")["pages"]:
        text = case["generated_text"]
        for piece in ("[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]", "</s>"):
            text = text.replace(piece, "")
        errors.append(differs(html_of(text), html_of(case["webpage"])))
    return [row("web pages", errors)]


def check_global_view(folder: Path) -> list[Row]:
    """The bicubic global view of a model folder's pictures, whole or every seventh pixel."""
    reference, errors = np.load(folder / "vision.npz"), []
    for key in (k for k in reference.files if k.endswith("_image_u8")):
        name, side = key.removesuffix("_image_u8"), 560
        if f"{name}_global_f64" in reference.files:
            expected, step = reference[f"{name}_global_f64"][0], 1
            side = expected.shape[-1]
        else:
            expected, step = reference[f"{name}_global_every7"][0], 7
        ours = bicubic_resize(normalise(reference[key]), side)
        errors.append(np.abs(ours[:, ::step, ::step] - expected).max())
    return [row(f"{folder.name}: bicubic global view", errors, 2e-5)]


# File, check, and whether it needs the tokenizer.
CHECKS = [("tokenizer.json", check_tokenizer, True), ("prompts.json", check_prompts, True),
          ("labels.json", check_labels, False), ("image_transforms.json", check_images, False),
          ("image_sizes.json", check_sizes, False), ("video.json", check_video, False),
          ("webpage.json", check_pages, False)]
