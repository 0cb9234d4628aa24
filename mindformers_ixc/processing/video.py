"""Videos to one tall or wide picture: sampled frames, captioned and stacked, which then goes the way of any picture."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mindformers.models.image_processing_utils import BaseImageProcessor
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from PIL import Image, ImageDraw, ImageFont

from mindformers_ixc.processing.image import Grid, image_to_tiles

# Public video loading: at most this many frames, one a second.
FRAME_LIMIT = 32

# Long side of a frame on the board, height of its caption (and of the caption's font) and gap between frames, all in
# pixels (public video loading).
FRAME_SIDE = 1120
CAPTION = 40
GAP = 10


class VideoError(ValueError):
    """A video that cannot be read."""


def sample_frames(count: int, fps: float, limit: int = FRAME_LIMIT) -> list[int]:
    """Numbers of the frames to take: one a second from the first on, thinned out evenly above the limit.

    Args:
        count: frames of the video.
        fps: frames a second.
        limit: frames at most.

    Returns:
        Ascending frame numbers.
    """
    picked = list(range(0, count, max(1, round(fps))))
    if len(picked) > limit:
        # the divisor is one above the limit: the last second is never reached (public rule)
        picked = [picked[int(i * len(picked) / (limit + 1))] for i in range(limit)]
    return picked


def read_frames(source: str | os.PathLike, limit: int = FRAME_LIMIT) -> list[Image.Image]:
    """Decodes the sampled frames of a video file, and only those.

    Raises:
        VideoError: for a missing, empty, damaged or frameless file.
    """
    path = Path(source)
    if not path.is_file():
        raise VideoError(f"The video {path} does not exist.")
    if path.stat().st_size == 0:
        raise VideoError(f"The video {path} is empty (0 bytes).")
    import decord  # loads the codecs: only when there is a video

    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        numbers = sample_frames(len(reader), reader.get_avg_fps(), limit)
        frames = reader.get_batch(numbers).asnumpy() if numbers else []
    except Exception as error:   # decord raises its own untyped errors
        raise VideoError(f"The video {path} cannot be decoded; it is damaged, truncated or no video "
                         f"({str(error).splitlines()[0][:120]}).") from error
    if len(frames) == 0:
        raise VideoError(f"The video {path} has no frames.")
    return [Image.fromarray(frame) for frame in frames]


def frames_to_board(frames: Sequence[Image.Image]) -> Image.Image:
    """Stacks frames into one white picture: landscape frames below, portrait frames beside each other.

    Above each frame stands its caption `<IMAGE i>`; a black line separates neighbours.

    Args:
        frames: frames of one size.

    Returns:
        RGB picture.
    """
    width, height = frames[0].size
    landscape = width >= height
    scale = FRAME_SIDE / max(width, height)
    size = (int(width * scale), int(height * scale))
    step = (0, size[1] + CAPTION + GAP) if landscape else (size[0] + GAP, 0)
    extent = (size[0], step[1] * len(frames)) if landscape else (step[0] * len(frames), size[1] + CAPTION)
    board = Image.new("RGB", extent, (255, 255, 255))
    draw, font = ImageDraw.Draw(board), ImageFont.load_default(size=CAPTION)   # Pillow's own font: no network
    for i, frame in enumerate(frames):
        left, top = step[0] * i, step[1] * i
        caption = f"<IMAGE {i}>"
        draw.text((left + (size[0] - draw.textlength(caption, font)) / 2, top), caption, (0, 0, 0), font, anchor="lt")
        board.paste(frame.convert("RGB").resize(size, Image.BILINEAR), (left, top + CAPTION))
        if landscape:
            line = (left, top + CAPTION + size[1] + GAP // 2, left + size[0], top + CAPTION + size[1] + GAP // 2)
        else:
            line = (left + size[0] + GAP // 2, top, left + size[0] + GAP // 2, top + extent[1])
        draw.line(line, (0, 0, 0))
    return board


def fit_board(board: Image.Image, tile_size: int = 560) -> Image.Image:
    """Shrinks a board to a short side of one tile and pads the long side with white to whole tiles."""
    width, height = board.size
    if width < height:
        size = (tile_size, int(height * tile_size / width))
    else:
        size = (int(width * tile_size / height), tile_size)
    padded = tuple(-(-side // tile_size) * tile_size for side in size)
    result = Image.new("RGB", padded, (255, 255, 255))
    result.paste(board.resize(size, Image.BILINEAR), (0, 0))
    return result


def load_video(source: str | os.PathLike, tile_size: int = 560, limit: int = FRAME_LIMIT) -> Image.Image:
    """A video as one picture of whole tiles, ready for `image_to_tiles`.

    Raises:
        VideoError: when the file cannot be read.
    """
    return fit_board(frames_to_board(read_frames(source, limit)), tile_size)


@MindFormerRegister.register(MindFormerModuleType.PROCESSOR)
class IXC25VideoProcessor(BaseImageProcessor):
    """Videos to tiles.

    Args:
        image_size: side S of a tile in pixels (public 560).
        frame_limit: frames at most (public 32).
    """

    model_input_names = ["pixel_values"]

    def __init__(self, image_size: int = 560, frame_limit: int = FRAME_LIMIT, **kwargs):
        super().__init__(image_size=image_size, frame_limit=frame_limit, **kwargs)
        self.image_size, self.frame_limit = image_size, frame_limit

    def preprocess(self, images: str | os.PathLike, **kwargs) -> tuple[np.ndarray, Grid]:
        """Tiles of a video file: float32 `(1 + rows * columns, 3, S, S)`, global view first, and their grid."""
        board = load_video(images, self.image_size, self.frame_limit)
        grid = Grid(board.height // self.image_size, board.width // self.image_size)
        return image_to_tiles(board, self.image_size), grid
