"""Which conversations fit the fixed shapes: measured once, cut between whole question-answer pairs, the rest told."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from mindformers_ixc import terminal
from mindformers_ixc.data.conversations import LISTED_ERRORS, PROGRESS_FROM, Conversation
from mindformers_ixc.data.forms import count_places
from mindformers_ixc.data.packer import longest_sample
from mindformers_ixc.data.rows import MAX_BAD_SHARE
from mindformers_ixc.errors import DataError, ImageError
from mindformers_ixc.processing.processor import Processor

logger = logging.getLogger(__name__)


class Fitted(NamedTuple):
    """A conversation that fits.

    Attributes:
        sample: the conversation, perhaps cut.
        positions: it takes.
        tiles: it takes, global views included.
    """

    sample: Conversation
    positions: int
    tiles: int


def fit_pairs(processor: Processor, sample: Conversation, seq_length: int, max_tiles: int, hd_num: int,
              max_images: int | None = None) -> tuple[int, tuple[int, int]]:
    """How many question-answer pairs of a conversation fit, counted from its start.

    Args:
        processor: counts positions and tiles.
        sample: conversation with known image sizes.
        seq_length: positions at most.
        max_tiles: tiles at most.
        hd_num: tiles of an image at most.
        max_images: pictures at most; `None` for any number.

    Returns:
        Number of pairs, and (positions, tiles) of the whole conversation if all fit, else of the first pair that does
        not fit with everything before it.

    Raises:
        ImageError: for a picture that cannot be partitioned, with sample and file.
    """
    for count in range(pair_count(sample), 0, -1):
        part = first_pairs(sample, count)
        needed = processor.conversation_length(part.turns, part.sizes, hd_num, sample.where, part.images)
        few = max_images is None or len(part.images) <= max_images
        if needed[0] <= seq_length and needed[1] <= max_tiles and few:
            return count, needed
        shortest = needed
    return 0, shortest


def pair_count(sample: Conversation) -> int:
    """Question-answer pairs of a conversation."""
    return (len(sample.turns) - (sample.turns[0][0] == "system")) // 2


def first_pairs(sample: Conversation, pairs: int) -> Conversation:
    """The first question-answer pairs of a conversation with the images that belong to them."""
    system = 1 if sample.turns[0][0] == "system" else 0
    turns = sample.turns[:system + 2 * pairs]
    places = count_places(turns) if count_places(sample.turns) else len(sample.images)
    return Conversation(sample.source, sample.index, sample.id, turns, sample.images[:places], sample.sizes[:places])


def check_bad_pictures(errors: Sequence[ImageError], total: int, max_bad_share: float) -> None:
    """Tells which samples are left out for a picture that cannot be partitioned.

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
        logger.warning(f"Left out: {len(errors)} samples in all with such pictures.")
    if errors and (len(errors) > max(1, max_bad_share * total) or len(errors) == total):
        raise DataError(f"{len(errors)} of {total} samples have pictures that cannot be used, more than the share "
                        f"max_bad_share {max_bad_share} allows. The last one: {errors[-1]}")


def fit_samples(processor: Processor, samples: Sequence[Conversation], seq_length: int, max_tiles: int,
                hd_num: int, max_bad_share: float = MAX_BAD_SHARE, max_images: int | None = None,
                max_segments: int | None = None) -> list[Fitted]:
    """Cuts conversations to the fixed shapes, only between whole pairs, and reports what was lost.

    Args:
        processor: counts positions and tiles.
        samples: conversations with known image sizes.
        seq_length: positions at most.
        max_tiles: tiles at most.
        hd_num: tiles of an image at most.
        max_bad_share: share of samples with a picture that cannot be partitioned that may be left out.
        max_images: pictures at most; `None` for any number.
        max_segments: of packed rows, whose padding takes `max_segments` - 1 positions beside a single sample;
            `None` without packing.

    Raises:
        DataError: when nothing fits, with the lengths that would, or too many pictures cannot be used.
    """
    longest = seq_length if max_segments is None else longest_sample(seq_length, max_segments)
    shapes = f"seq_length {seq_length} and max_tiles {max_tiles}" if max_images is None else \
        f"seq_length {seq_length}, max_tiles {max_tiles} and max_images {max_images}"
    if max_segments is not None:
        shapes += f" (max_segments {max_segments} leaves {longest} positions to a sample)"
    kept, cut, dropped, needs, bad = [], 0, [], [], []
    for sample in terminal.current.counted(samples, len(samples), "measuring samples", "sample",
                                           disable=len(samples) < PROGRESS_FROM or None):
        try:
            pairs, needed = fit_pairs(processor, sample, longest, max_tiles, hd_num, max_images)
        except ImageError as error:
            bad.append(error)
            continue
        if pairs == 0:
            dropped.append(len(first_pairs(sample, 1).images))
            needs.append(needed)
            continue
        part = first_pairs(sample, pairs)
        cut += len(part.turns) < len(sample.turns)
        kept.append(Fitted(part, *needed))
    check_bad_pictures(bad, len(samples), max_bad_share)
    if needs:
        pictures = f" and {max(dropped)} pictures" if max_images is not None and max(dropped) > max_images else ""
        fits = (f"the shortest dropped sample's first question and answer need {min(n for n, _ in needs)} positions "
                f"and {min(t for _, t in needs)} tiles, the longest {max(n for n, _ in needs)} and "
                f"{max(t for _, t in needs)}{pictures}")
        if not kept:
            raise DataError(f"None of the {len(samples)} samples fits {shapes}: {fits}. Raise them or lower hd_num "
                            f"(now {hd_num}).")
        logger.warning(f"{len(dropped)} of {len(samples)} samples do not fit {shapes} and are left out: {fits}.")
    if cut:
        logger.warning(f"{cut} of {len(samples)} conversations are cut between whole turns to fit {shapes}.")
    return kept
