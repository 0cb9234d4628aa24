"""Which samples fit the fixed shapes: conversations are cut between whole question-answer pairs, the rest is told."""
from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mindformers_ixc.data.conversations import LISTED_ERRORS, Conversation, raise_errors
from mindformers_ixc.data.forms import count_places
from mindformers_ixc.data.packer import longest_sample
from mindformers_ixc.errors import DataError, ImageError
from mindformers_ixc.processing.pictures import load_image
from mindformers_ixc.processing.video import is_video

logger = logging.getLogger(__name__)


def pair_count(sample: Conversation) -> int:
    """Question-answer pairs of a conversation."""
    return (len(sample.turns) - (sample.turns[0][0] == "system")) // 2


def first_pairs(sample: Conversation, pairs: int) -> Conversation:
    """The first question-answer pairs of a conversation with the images that belong to them."""
    system = 1 if sample.turns[0][0] == "system" else 0
    turns = sample.turns[:system + 2 * pairs]
    places = count_places(turns) if count_places(sample.turns) else len(sample.images)
    return Conversation(sample.source, sample.index, sample.id, turns, sample.images[:places], sample.sizes[:places],
                        sample.weights[:pairs])


def check_bad_pictures(errors: Sequence[ImageError], total: int, max_bad_share: float) -> None:
    """Tells which samples are left out: with a picture that cannot be partitioned, or wrong otherwise.

    Args:
        errors: one for each of them.
        total: samples in all.
        max_bad_share: share of them above which nothing may be left out; one always may.

    Raises:
        DataError: when there are more, or nothing else.
    """
    for error in errors[:LISTED_ERRORS]:
        logger.warning(f"Left out: {error}")
    if len(errors) > LISTED_ERRORS:
        logger.warning(f"Left out: {len(errors)} of {total} samples in all.")
    if errors and (len(errors) > max(1, max_bad_share * total) or len(errors) == total):
        raise DataError(f"{len(errors)} of {total} samples cannot be used, more than the share "
                        f"max_bad_share {max_bad_share} allows. The last one: {errors[-1]}")


def check_pixels(samples: Sequence[Conversation]) -> None:
    """Refuses samples with pictures that cannot be decoded; videos are not looked at.

    Raises:
        DataError: listing them.
    """
    errors = []
    for sample in samples:
        try:
            for image in sample.images:
                if not is_video(image):
                    load_image(image)
        except ImageError as error:
            errors.append(f"{sample.where}, field image: {error}")
    raise_errors(errors)


@dataclass(frozen=True)
class Shapes:
    """What the part of a conversation that is used must fit.

    Attributes:
        seq_length: positions of a row.
        max_tiles: tiles at most.
        hd_num: tiles of a picture at most.
        max_images: pictures at most; `None` for any number.
        max_segments: of packed rows, whose padding takes `max_segments` - 1 positions beside a single sample; `None`
            without packing.
    """

    seq_length: int
    max_tiles: int
    hd_num: int
    max_images: int | None = None
    max_segments: int | None = None

    @property
    def longest(self) -> int:
        """Positions at most."""
        return self.seq_length if self.max_segments is None else longest_sample(self.seq_length, self.max_segments)

    @property
    def limits(self) -> tuple[int, int, int]:
        """Positions, tiles and pictures at most."""
        return self.longest, self.max_tiles, sys.maxsize if self.max_images is None else self.max_images

    def __str__(self) -> str:
        parts = [f"seq_length {self.seq_length}", f"max_tiles {self.max_tiles}"]
        if self.max_images is not None:
            parts.append(f"max_images {self.max_images}")
        text = f"{', '.join(parts[:-1])} and {parts[-1]}"
        if self.max_segments is None:
            return text
        return f"{text} (max_segments {self.max_segments} leaves {self.longest} positions to a sample)"

    def tell_dropped(self, dropped: int, total: int, least: tuple[int, int, int], most: tuple[int, int, int]) -> None:
        """Says in the log how many samples do not fit.

        Args:
            dropped: their number.
            total: of all samples.
            least: positions, tiles and pictures that the first rounds of the dropped ones need at least.
            most: at most.

        Raises:
            DataError: when nothing is left.
        """
        pictures = f" and {most[2]} pictures" if most[2] > self.limits[2] else ""
        fits = (f"the shortest dropped sample's first question and answer need {least[0]} positions and {least[1]} "
                f"tiles, the longest {most[0]} and {most[1]}{pictures}")
        if dropped == total:
            raise DataError(f"None of the {total} samples fits {self}: {fits}. Raise them or lower hd_num (now "
                            f"{self.hd_num}).")
        logger.warning(f"{dropped} of {total} samples do not fit {self} and are left out: {fits}.")

    def tell_dropped_pairs(self, dropped: int, total: int, most: tuple[int, int, int]) -> None:
        """The same of preference pairs, of which both answers must fit.

        Raises:
            DataError: when nothing is left.
        """
        message = (f"{dropped} of {total} pairs do not fit {self} (the longest has {most[0]} positions, and {most[1]} "
                   "tiles are the most)")
        if dropped == total:
            raise DataError(f"{message}, so nothing is left to train on; raise them.")
        logger.warning(f"{message} and are left out.")
