"""Videos to one tall or wide image: sampled frames, captioned and stacked, which then goes the way of any image."""
from __future__ import annotations

import contextlib
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mindformers_ixc.errors import VideoError
from mindformers_ixc.processing.image import Grid, ImageSource, image_to_tiles
from mindformers_ixc.processing.pictures import shown
from mindformers_ixc.processing.stored import StoredFile
from mindformers_ixc.processing.video_process import VideoProcess
from mindformers_ixc.reading import reading

# Public video loading: at most this many frames, one a second.
FRAME_LIMIT = 32

# Long side of a frame on the board, height of its caption (and of the caption's font), gap between frames and width
# of the line in the middle of the gap, all in pixels (public video loading).
FRAME_SIDE = 1120
CAPTION = 40
GAP = 10
LINE = 2

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


# File names that are taken for videos where an image could stand as well: what decord's FFmpeg reads, the video streams
# of MPEG-4, Matroska, AVI, Flash, Windows Media, 3GPP, MPEG (program and transport streams) and Ogg.
SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".flv", ".f4v", ".wmv", ".asf", ".3gp", ".3g2", ".mpg",
            ".mpeg", ".vob", ".ts", ".mts", ".m2ts", ".ogv")

# FFmpeg follows a playlist (HLS, DASH, SDP, its own list) under any name to files and addresses that nobody named; it
# knows one by its first bytes.
HEAD = 4096
PLAYLIST = re.compile(rb"\A(#EXTM3U|ffconcat version)|<MPD|<CompositionPlaylist|^(v=0\r?$|c=IN IP)|\A\s*\[playlist\]",
                      re.MULTILINE)


def is_video(source: ImageSource) -> bool:
    """Whether an image's source names a video file."""
    return isinstance(source, (str, os.PathLike, StoredFile)) and str(source).lower().endswith(SUFFIXES)


def sample_frames(frame_count: int, fps: float, limit: int = FRAME_LIMIT) -> list[int]:
    """Numbers of the frames to take: one a second from the first on, thinned out evenly above the limit.

    Args:
        frame_count: frames of the video.
        fps: frames a second; below 1.5 every frame is taken.
        limit: frames at most.

    Returns:
        Ascending frame numbers; none for a video without frames.

    Raises:
        VideoError: when `limit` is below 1 or `fps` is no finite number.
    """
    if limit < 1:
        raise VideoError(f"The limit of frames of a video is {limit}; it must be at least 1.")
    if not math.isfinite(fps):
        raise VideoError(f"The frame rate of a video is {fps}; it must be a finite number of frames a second.")
    picked: Sequence[int] = range(0, frame_count, max(1, round(fps)))   # no list: a damaged file may say any number
    if len(picked) > limit:
        # the divisor is one above the limit: the last second is never reached (public rule); the step is rounded to
        # double precision before it is multiplied, as there, which decides about some whole numbers (45 seconds, i 11)
        step = len(picked) / (limit + 1)
        picked = [picked[int(i * step)] for i in range(limit)]
    return list(picked)


def read_frames(source: ImageSource, limit: int = FRAME_LIMIT, indices: Sequence[int] | None = None,
                transform: Callable[[Image.Image], Image.Image] | None = None) -> list[Image.Image]:
    """Decodes the sampled frames of a video file, and only those.

    Args:
        source: path of the file; nothing else of a video is taken.
        limit: frames at most, for `sample_frames`.
        indices: frame numbers to decode instead of the sampled ones.
        transform: applied to each frame as it is decoded, so that large frames need not all be held at once.

    Returns:
        RGB images in the video's own size, or what `transform` made of them.

    Raises:
        VideoError: for a missing, empty, damaged or frameless file, frame numbers it does not have or a source that is
            no path.
    """
    with _open_video(source) as video:
        numbers = _sampled(video, limit) if indices is None else [int(index) for index in indices]
        wrong = [number for number in numbers if not 0 <= number < video.count]
        if wrong or not numbers:
            asked = f"{wrong[0]} was" if wrong else "none were"
            raise VideoError(f"Frames of the video {video.name} are numbered 0 to {video.count - 1}; {asked} asked "
                             "for.")
        frames = map(Image.fromarray, video.frames(numbers))
        return [frame if transform is None else transform(frame) for frame in frames]


def _sampled(video: VideoProcess, limit: int) -> list[int]:
    try:
        return sample_frames(video.count, video.fps, limit)
    except VideoError as error:
        raise VideoError(f"The video {video.name} cannot be sampled: {error}") from error


@contextlib.contextmanager
def _open_video(source: ImageSource) -> Iterator[VideoProcess]:
    if isinstance(source, StoredFile):       # decoders read files
        with tempfile.NamedTemporaryFile(suffix=Path(source.name).suffix) as file:
            with reading(source):
                file.write(source.read())
            file.flush()
            with _checked(VideoProcess(_existing_file(file.name, source.name), source.name)) as video:
                yield video
    else:
        with _checked(VideoProcess(_existing_file(source))) as video:
            yield video


def _checked(video: VideoProcess) -> VideoProcess:
    if video.count < 1:
        video.close()
        raise VideoError(f"The video {video.name} has no frames; a video needs at least one.")
    return video


def _existing_file(source: ImageSource, name: str = "") -> Path:
    if not isinstance(source, (str, os.PathLike)):
        raise VideoError(f"A video must be given as the path of its file; found {type(source).__name__}.")
    path, name = Path(source), name or shown(source)
    with reading(name):
        return _checked_file(path, name)


def _checked_file(path: Path, name: str) -> Path:
    """A video's file.

    Raises:
        VideoError: for what is none.
    """
    if not os.path.exists(path):
        raise VideoError(f"The video {name} does not exist.")
    if not path.is_file():
        kind = "a folder, not a file; name the file inside it" if path.is_dir() else "no regular file"
        raise VideoError(f"The video {name} is {kind}.")
    if path.stat().st_size == 0:
        raise VideoError(f"The video {name} is empty (0 bytes); fetch it again.")
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise VideoError(f"The video {name} cannot be read ({error.strerror or error}).") from error
    if PLAYLIST.search(head):
        raise VideoError(f"The video {name} is a playlist, which names other files or addresses; name a video itself.")
    return path


def frames_to_board(frames: Sequence[Image.Image]) -> Image.Image:
    """Stacks frames into one white image: landscape frames below, all others beside each other.

    Every frame is resized to a long side of 1120 pixels and stands below its caption `<IMAGE i>`, counted from 0. The
    caption starts at the frame's left edge; a black line runs through the gap between neighbours.

    Args:
        frames: frames of one size and any mode.

    Returns:
        RGB image of the resized frames with their captions (40 pixels high) and gaps (10 pixels): of landscape frames
        as wide as one and `frames * (40 + height + 10)` high, else `frames * (width + 10)` wide and `40 + height` high.

    Raises:
        VideoError: when there are no frames, their sizes differ or they are too elongated.
    """
    if not frames:
        raise VideoError("There are no frames to put on a board; a video needs at least one.")
    _check_sizes([frame.size for frame in frames])
    return _board([_shrink(frame) for frame in frames], frames[0].width > frames[0].height)


def _check_sizes(sizes: list[tuple[int, int]]) -> None:
    odd = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if odd is not None:
        raise VideoError(f"Frame {odd} has {_by(sizes[odd])} pixels and frame 0 has {_by(sizes[0])}; all frames of a "
                         "video must have one size.")


def _shrink(frame: Image.Image) -> Image.Image:
    """A frame in the size it has on the board."""
    return frame.convert("RGB").resize(_frame_size(*frame.size), Image.Resampling.BILINEAR)


def _board(frames: list[Image.Image], landscape: bool) -> Image.Image:
    """Stacks frames of their final size: below each other for landscape videos, square frames and portrait beside."""
    width, height = frames[0].size
    step = (0, CAPTION + height + GAP) if landscape else (width + GAP, 0)
    extent = (width, step[1] * len(frames)) if landscape else (step[0] * len(frames), CAPTION + height)
    # Image.new knows no limit of pixels, unlike Image.open: a long video is no decompression bomb
    board = Image.new("RGB", extent, WHITE)
    draw, font = ImageDraw.Draw(board), ImageFont.load_default(size=CAPTION)   # Pillow's own font: no network
    for i, frame in enumerate(frames):
        left, top = step[0] * i, step[1] * i
        draw.text((left, top), f"<IMAGE {i}>", BLACK, font)
        board.paste(frame, (left, top + CAPTION))
        if i:
            # in the middle of the gap before this frame
            line = (0, top - GAP // 2, extent[0], top - GAP // 2) if landscape else \
                (left - GAP // 2, 0, left - GAP // 2, extent[1])
            draw.line(line, BLACK, LINE)
    return board


def _frame_size(width: int, height: int) -> tuple[int, int]:
    """Size of a frame of `width` x `height` pixels on the board."""
    ratio = width / height             # divided first, as the public code: one pixel may depend on the rounding
    size = (FRAME_SIDE, int(FRAME_SIDE / ratio)) if width > height else (int(FRAME_SIDE * ratio), FRAME_SIDE)
    if min(size) < 1:
        raise VideoError(f"Frames of {width} x {height} pixels are too elongated: resized to a long side of "
                         f"{FRAME_SIDE} pixels nothing would be left of them. Crop the video.")
    return size


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def fit_board(board: Image.Image, tile_size: int = 560) -> Image.Image:
    """Resizes a board to a short side of one tile and pads the long side with white to whole tiles.

    Args:
        board: RGB image.
        tile_size: side P of a tile in pixels (public 560).

    Returns:
        RGB image, one tile wide and some high or the other way round; the padding is at the bottom or at the right.
    """
    tall = board.width < board.height
    # a tall board is resized lying on its side, as the public code does: Pillow rounds after the horizontal pass
    wide = board.transpose(Image.Transpose.TRANSPOSE) if tall else board
    wide = wide.resize((int(tile_size * (wide.width / wide.height)), tile_size), Image.Resampling.BILINEAR)
    fitted = Image.new("RGB", (math.ceil(wide.width / tile_size) * tile_size, tile_size), WHITE)
    fitted.paste(wide, (0, 0))
    return fitted.transpose(Image.Transpose.TRANSPOSE) if tall else fitted


class BoardSize(NamedTuple):
    """Size of a video's board in pixels, before it is resized to tiles."""

    width: int
    height: int


def board_size(source: ImageSource, limit: int = FRAME_LIMIT) -> BoardSize:
    """Size of the board that `load_video` makes of a file, from its header and its first frame.

    Raises:
        VideoError: when the file cannot be read.
    """
    with _open_video(source) as video:
        frame = next(video.frames([0]))
        frames = len(_sampled(video, limit))
    landscape = frame.shape[1] > frame.shape[0]
    with _named(source):
        width, height = _frame_size(frame.shape[1], frame.shape[0])
    if landscape:
        return BoardSize(width, (CAPTION + height + GAP) * frames)
    return BoardSize((width + GAP) * frames, CAPTION + height)


@contextlib.contextmanager
def _named(source: ImageSource) -> Iterator[None]:
    """Names the video in errors about its frames."""
    try:
        yield
    except VideoError as error:
        raise VideoError(f"The video {source!s}: {error}") from error


def board_grid(size: BoardSize, tile_size: int = 560) -> Grid:
    """Tiles of a board of a size, as `fit_board` makes them."""
    tall = size.width < size.height
    width, height = size[::-1] if tall else size
    tiles = math.ceil(int(tile_size * (width / height)) / tile_size)
    return Grid(tiles, 1) if tall else Grid(1, tiles)


def load_video(source: ImageSource, tile_size: int = 560, limit: int = FRAME_LIMIT) -> Image.Image:
    """A video as one image of whole tiles, ready for `image_to_tiles`.

    Args:
        source: path of the file; nothing else of a video is taken.
        tile_size: side of a tile in pixels (public 560).
        limit: frames at most.

    Returns:
        RGB image; one side is `tile_size`, the other a multiple of it.

    Raises:
        VideoError: when the file cannot be read or its frames are too elongated.
    """
    sizes: list[tuple[int, int]] = []

    def shrink(frame: Image.Image) -> Image.Image:
        sizes.append(frame.size)
        with _named(source):
            return _shrink(frame)

    frames = read_frames(source, limit, transform=shrink)
    with _named(source):
        _check_sizes(sizes)
    board = _board(frames, sizes[0][0] > sizes[0][1])
    del frames   # not to be held beside the board and its resized copies
    return fit_board(board, tile_size)


class VideoProcessor:
    """Videos to the tiles of the board of their frames.

    Args:
        image_size: side P of a tile in pixels (public 560).
        frame_limit: frames at most (public 32).

    Raises:
        VideoError: when a size is below 1.
    """

    def __init__(self, image_size: int = 560, frame_limit: int = FRAME_LIMIT):
        for name, value in (("image_size", image_size), ("frame_limit", frame_limit)):
            if value < 1:
                raise VideoError(f"{name} of IXC25VideoProcessor is {value}; it must be at least 1.")
        self.image_size, self.frame_limit = image_size, frame_limit

    def preprocess(self, images: str | os.PathLike) -> tuple[np.ndarray, Grid]:
        """Tiles of a video.

        Args:
            images: path of the video file (named as MindFormers' base class names it).

        Returns:
            float32 `(1 + rows * columns, 3, P, P)`, normalised, global view first, and the grid of the others.

        Raises:
            VideoError: when the file cannot be read.
        """
        board = load_video(images, self.image_size, self.frame_limit)
        grid = Grid(board.height // self.image_size, board.width // self.image_size)
        return image_to_tiles(board, self.image_size), grid
