"""Checks of the video rule against reference outputs of the public code."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from parity_rows import Row, differs, row

from mindformers_ixc.processing.video import fit_board, frames_to_board, read_frames, sample_frames

# The reference means are rounded to two decimals; decord 0.6.0 and decord2 decode the reference videos alike.
COLOUR_BAR = 0.0051

# Side of a tile the reference sizes were made with.
TILE = 560


def check_video(folder: Path) -> list[Row]:
    """Sampled frames, frame colours, board and final size of every reference video.

    Args:
        folder: holds `video.json` and the videos it names.

    Returns:
        One row a property. The reference colours are those of the frames as decoded, before any resize.
    """
    names = ("sampled", "frames_read", "frame_size", "board_size", "final_size", "tiles_wh")
    errors, colours = {name: [] for name in names}, []
    for case in json.loads((folder / "video.json").read_text(encoding="utf-8")):
        frames = read_frames(folder / case["video"])
        board = frames_to_board(frames)
        final = fit_board(board, TILE)
        ours = {"sampled": sample_frames(case["frames"], case["avg_fps"]), "frames_read": len(frames),
                "frame_size": list(frames[0].size), "board_size": list(board.size), "final_size": list(final.size),
                "tiles_wh": [final.width // TILE, final.height // TILE]}
        theirs = {**case, "frames_read": len(case["sampled"])}
        for name in names:
            errors[name].append(differs(ours[name], theirs[name]))
        for frame, mean in zip(frames, case["frame_mean"]):
            colours.append(np.abs(np.asarray(frame).reshape(-1, 3).mean(0) - mean).max())
    rows = [row(f"video: {name}", values) for name, values in errors.items()]
    return [*rows, row("video: mean colours of the first frames", colours, COLOUR_BAR)]
