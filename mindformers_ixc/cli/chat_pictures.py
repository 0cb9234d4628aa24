"""Pictures and videos given to a chat: looked at when they are given, and measured as the model will see them."""
from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mindformers_ixc.errors import PromptError
from mindformers_ixc.processing.image import Grid, load_image, plan_partition
from mindformers_ixc.processing.processor import ImageProcessor
from mindformers_ixc.processing.video import BoardSize, board_grid, board_size, is_video


@dataclass(frozen=True)
class Picture:
    """A picture or video of a conversation.

    Attributes:
        path: where it was read.
        source: what `Processor` takes: a picture's bytes, so that a file that changes or goes does not end the
            conversation; a video's path.
        size: (width, height) in pixels; of a video those of the board of its frames.
    """

    path: str
    source: bytes | str
    size: tuple[int, int]

    @property
    def name(self) -> str:
        """The file's name."""
        return os.path.basename(self.path)

    def grid(self, processor: ImageProcessor, count: int, hd_num: int | None) -> Grid:
        """Its tiles when `count` pictures come together.

        Raises:
            ImageError: when it is too elongated to be cut.
        """
        if isinstance(self.source, str):
            return board_grid(BoardSize(*self.size), processor.image_size)
        return plan_partition(*self.size, processor.hd_num_for(count, hd_num), processor.image_size).grid


def read_picture(path: str, processor: ImageProcessor) -> Picture:
    """Reads a picture, or looks at a video's header and first frame.

    Raises:
        ImageError: for a picture that cannot be read.
        VideoError: for a video that cannot be read.
    """
    if is_video(path):
        board = board_size(path)
        return Picture(path, path, (board.width, board.height))
    image = load_image(path, "", processor.transparency, processor.exif)
    return Picture(path, Path(path).read_bytes(), image.size)


def describe(picture: Picture, before: Sequence[Picture], processor: ImageProcessor, hd_num: int | None) -> str:
    """What a picture costs, and what all take together where there are others.

    Args:
        picture: the new one.
        before: those that the conversation has already.
        processor: of the model.
        hd_num: of the session.

    Raises:
        ImageError: when it is too elongated to be cut.
    """
    count = len(before) + 1
    grids = [one.grid(processor, count, hd_num) for one in (*before, picture)]
    tokens = [processor.token_count(grid) for grid in grids]
    what = "board of frames of " if isinstance(picture.source, str) else ""
    text = (f"{picture.name}: {what}{picture.size[0]} x {picture.size[1]} pixels, {grids[-1].columns} x "
            f"{grids[-1].rows} tile{'s' if grids[-1].tiles > 1 else ''} and the whole at a glance, {tokens[-1]:,} "
            "positions.")
    if before:
        text += (f" All {count} pictures take {sum(tokens):,}; when there are several, each is cut into at most "
                 f"{processor.hd_num_several} tiles.")
    return text


def read_paths(text: str) -> list[str]:
    """The paths in what `/image` was given: `~` is the home folder, quotes and backslashes are a shell's.

    A text that is a file's name as it stands is one path, whatever spaces are in it.

    Raises:
        PromptError: when a quote is not closed.
    """
    if os.path.exists(os.path.expanduser(text)):
        return [os.path.expanduser(text)]
    try:
        return [os.path.expanduser(word) for word in shlex.split(text)]
    except ValueError as error:
        raise PromptError(f"{text[:80]} has a quote without its partner; close it, or leave both away.") from error
