"""Rows of the training data: conversations encoded, packed and padded to fixed shapes, read by worker processes."""
from __future__ import annotations

import logging
import multiprocessing
import zlib
from collections.abc import Sequence
from typing import Protocol, Union

import numpy as np

from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.data.conversations import Conversation
from mindformers_ixc.data.packing import join_samples
from mindformers_ixc.errors import DataError, ImageError, VideoError
from mindformers_ixc.processing.image import HD_NUM_TRAINING
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.processing.prompt import IGNORE_INDEX
from mindformers_ixc.processing.tokenizer import SentencePieceText

logger = logging.getLogger(__name__)

# Share of samples whose images fail to decode above which a run stops: more than a stray damaged file.
MAX_BAD_SHARE = 0.01

# One column of a row.
Column = Union[np.ndarray, np.int32]


class SharedFlags:
    """One flag a sample, shared by all worker processes.

    MindSpore deep-copies a source before it forks the workers; a copy must still be the same memory.
    """

    def __init__(self, count: int):
        self._flags = multiprocessing.Array("b", count)

    def __deepcopy__(self, memo: dict) -> SharedFlags:
        return self

    def __getitem__(self, index: int) -> bool:
        return bool(self._flags[index])

    def set(self, index: int) -> None:
        """Marks the row `index`, for all processes."""
        self._flags[index] = 1

    def count(self) -> int:
        """Number of raised flags."""
        return sum(self._flags[:])


class ConversationTable:
    """Random access to encoded, padded samples; MindSpore's worker processes read from it.

    A row is one conversation, or several packed into one sequence. A row with an image that turns out to be damaged
    only when it is decoded is replaced by the next row of the same kind.

    Args:
        processor: encodes samples.
        samples: conversations that fit.
        seq_length: positions of a row.
        max_tiles: tiles of a row.
        hd_num: tiles of an image at most.
        max_bad_share: share of damaged rows above which reading stops.
        packs: indices of the samples of each row; by default every sample is a row.
        columns: what a row holds, of `mindformers_ixc.data.batch`.
        seed: of the noise.
    """

    def __init__(self, processor: Processor, samples: Sequence[Conversation], seq_length: int, max_tiles: int,
                 hd_num: int, max_bad_share: float = MAX_BAD_SHARE, packs: Sequence[Sequence[int]] | None = None,
                 columns: Sequence[str] = BATCH_COLUMNS, seed: int = 0):
        self.processor, self.samples = processor, list(samples)
        self.packs = [[i] for i in range(len(self.samples))] if packs is None else [list(pack) for pack in packs]
        self.seq_length, self.max_tiles, self.hd_num = seq_length, max_tiles, hd_num
        self.max_bad_share, self.columns, self.seed = max_bad_share, tuple(columns), seed
        self.source_names = list(dict.fromkeys(sample.source for sample in self.samples))
        self._bad = SharedFlags(len(self.packs))

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, code: int) -> tuple[Column, ...]:
        """The row `code % len(self)`; `code // len(self)` is its place in the run (`PlanSampler`)."""
        place, index = divmod(int(code), len(self))
        kind, error = self.is_multimodal(index), None
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self.is_multimodal(candidate) != kind or self._bad[candidate]:
                continue
            try:
                return self._encode(candidate, place)
            except (ImageError, VideoError) as failure:
                error = failure
                self._bad.set(candidate)
                logger.warning(f"Left out: {failure}")
                if self.bad_samples > max(1, self.max_bad_share * len(self)):
                    break
        raise DataError(f"{self.bad_samples} of {len(self)} samples have damaged pictures, more than the share "
                        f"max_bad_share {self.max_bad_share} allows. The last one: {error}")

    @property
    def bad_samples(self) -> int:
        """Rows found damaged so far, by any worker."""
        return self._bad.count()

    def is_multimodal(self, index: int) -> bool:
        """Whether a row has images."""
        return bool(self.samples[self.packs[index][0]].images)

    def source_of(self, index: int) -> str:
        """Name of a row's source."""
        return self.samples[self.packs[index][0]].source

    def describe(self, index: int) -> str:
        """Names a row's samples in messages."""
        return " and ".join(self.samples[i].where for i in self.packs[index])

    def _encode(self, index: int, place: int) -> tuple[Column, ...]:
        members = [self.samples[i] for i in self.packs[index]]
        encoded = [self.processor.encode_conversation(sample.turns, sample.images, sample.where, self.hd_num)
                   for sample in members]
        joined = join_samples(encoded, self.seq_length, self.max_tiles, self.processor.pad_token_id)
        if not (joined["labels"] != IGNORE_INDEX).any():
            raise DataError(f"{self.describe(index)}: nothing in it carries loss; its answers are empty.")
        columns: dict[str, Column] = {**joined, "noise_seed": noise_seed(self.seed, place),
                                      "source": np.full(self.seq_length, self.source_names.index(members[0].source),
                                                        np.int32)}
        return tuple(columns[name] for name in self.columns)


def noise_seed(seed: int, place: int) -> np.int32:
    """Seed of the dropout noise of the sample at a place of the run."""
    return np.int32(zlib.crc32(f"{seed} {place}".encode()) & 0x7FFFFFFF)


class ImageOptions(Protocol):
    """What a `train_dataset` section says of images and text; `None` where it says nothing."""

    hd_num: int | None
    image_size: int | None
    patch_size: int | None
    image_transform: str | None
    control_tokens: bool | None
    transparency: str | None
    exif: str | None


def make_processor(config: ImageOptions, tokenizer: SentencePieceText) -> Processor:
    """The processor of a `train_dataset` section, with its tokenizer."""
    hd_num = config.hd_num or HD_NUM_TRAINING
    images = ImageProcessor(config.image_size or 560, config.patch_size or 14, hd_num_training=hd_num,
                            training_transform=config.image_transform or "training",
                            transparency=config.transparency or "white", exif=config.exif or "ignore")
    return Processor(images, tokenizer, bool(config.control_tokens))
