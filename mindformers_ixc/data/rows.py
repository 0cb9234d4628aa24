"""Rows of the training data: conversations encoded, packed and padded to fixed shapes, read by worker processes."""
from __future__ import annotations

import logging
import multiprocessing
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Union

import numpy as np

from mindformers_ixc.config import default_max_images
from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.data.conversations import Conversation
from mindformers_ixc.data.learning import ALL, with_loss_on
from mindformers_ixc.data.packing import join_samples
from mindformers_ixc.data.sampling import RunPlan
from mindformers_ixc.errors import DataError, ImageError, VideoError
from mindformers_ixc.processing.image import HD_NUM_SINGLE, HD_NUM_TRAINING
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.processing.prompt import IGNORE_INDEX
from mindformers_ixc.processing.tokenizer import SentencePieceText, Tokenizer

logger = logging.getLogger(__name__)

# Share of samples whose images fail to decode above which a run stops: more than a stray damaged file.
MAX_BAD_SHARE = 0.01


def bad_share_of(section: Any) -> float:
    """The share that a `train_dataset` section gives, as a mapping."""
    share = section.get("max_bad_share")
    return MAX_BAD_SHARE if share is None else share


# One column of a row.
Column = Union[np.ndarray, np.int32]


class SharedFlags:
    """One flag a sample, in memory that all worker processes share."""

    def __init__(self, count: int):
        self._bits: Any = multiprocessing.Array("B", -(-count // 8))
        self._raised = multiprocessing.Value("q", 0, lock=False)       # its lock is that of the bits

    def __getitem__(self, index: int) -> bool:
        return bool(self._bits.get_obj()[index // 8] >> index % 8 & 1)

    def set(self, index: int) -> None:
        """Marks the row `index`, for all processes."""
        with self._bits.get_lock():
            if not self[index]:
                self._bits.get_obj()[index // 8] |= 1 << index % 8
                self._raised.value += 1

    def count(self) -> int:
        """Number of raised flags."""
        return self._raised.value


class Samples(Protocol):
    """The samples of a table, in memory (`ListedSamples`) or on disk (`mindformers_ixc.data.index.samples.SampleSet`).

    Attributes:
        names: of the sources, each once.
        images: pictures of each sample, int `(n,)`.
    """

    names: list[str]
    images: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...

    def where(self, index: int) -> str:
        """Names a sample in messages."""

    @property
    def name_numbers(self) -> np.ndarray:
        """Number of the name of each sample's source, int `(n,)`."""

    def name_number(self, index: int) -> int:
        """Number of the name of one sample's source."""


class ListedSamples:
    """Samples in memory; see `Samples`."""

    def __init__(self, samples: Sequence[Conversation]):
        self.samples = list(samples)
        self.names = list(dict.fromkeys(sample.source for sample in samples))
        self.images = np.array([len(sample.images) for sample in samples], np.int32)
        numbers = {name: number for number, name in enumerate(self.names)}
        self.name_numbers = np.array([numbers[sample.source] for sample in samples], np.int32)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Conversation:
        return self.samples[index]

    def name_number(self, index: int) -> int:
        """Number of the name of one sample's source."""
        return int(self.name_numbers[index])

    def where(self, index: int) -> str:
        """Names a sample in messages."""
        return self.samples[index].where


class ConversationTable:
    """Encoded, padded rows by their places in the run; MindSpore's worker processes read from it.

    A row is one conversation, or several packed into one sequence, as the plan of the run says. A sample with an image
    that turns out to be damaged only when it is decoded is left out of its row; a row that has no other sample takes
    the next sample of the same kind instead.

    Args:
        processor: encodes samples.
        samples: conversations that fit.
        seq_length: positions of a row.
        max_tiles: tiles of a row.
        hd_num: tiles of an image at most.
        max_bad_share: share of damaged samples above which reading stops.
        needs: positions of each sample's sequence (of a pair both) and its tiles, int `(n, 2)` or `(n, 3)`; by default
            they are measured when they are asked for.
        columns: what a row holds, of `mindformers_ixc.data.batch`.
        seed: of the noise.
        max_images: pictures of a row; by default half the tiles.
        max_segments: segments of a packed row; without it rows are not packed.
        plan: which samples the row at a place of the run holds; without one, samples take turns.
        loss_on: which answers carry loss (`mindformers_ixc.data.learning`).

    Raises:
        DataError: for a sample with more pictures.
    """

    def __init__(self, processor: Processor, samples: Samples | list[Conversation], seq_length: int, max_tiles: int,
                 hd_num: int, max_bad_share: float = MAX_BAD_SHARE, needs: np.ndarray | None = None,
                 columns: Sequence[str] = BATCH_COLUMNS, seed: int = 0, max_images: int | None = None,
                 max_segments: int | None = None, plan: RunPlan | None = None, loss_on: str = ALL):
        self.processor, self.loss_on = processor, loss_on
        self.samples: Samples = ListedSamples(samples) if isinstance(samples, list) else samples
        self.seq_length, self.max_tiles, self.hd_num = seq_length, max_tiles, hd_num
        self.max_images, self.max_segments = max_images or default_max_images(max_tiles), max_segments
        self.max_bad_share, self.columns, self.seed, self.plan = max_bad_share, tuple(columns), seed, plan
        self.source_names = self.samples.names
        self._needs = needs
        self._bad = SharedFlags(len(self.samples))
        if isinstance(self.samples, ListedSamples):          # of others those that do not fit are left out
            check_images(self.samples, self.max_images)

    def __deepcopy__(self, memo: dict) -> ConversationTable:
        return self       # MindSpore copies what it reads from; mapped columns would be in memory, flags not shared

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, place: int) -> tuple[Column, ...]:
        """The row at a place of the run.

        Raises:
            DataError: when too many samples are damaged, or an answer is empty.
        """
        place = int(place)
        row = [place % len(self)] if self.plan is None else self.plan.row(place)
        members = [(index, sample) for index in row if (sample := self._try(index)) is not None]
        columns = self._join(members or [self._instead_of(row[0])], place)
        return tuple(columns[name] for name in self.columns)

    def _try(self, index: int) -> Any:
        """A sample encoded, `None` if an image of it is damaged."""
        if self._bad[index]:
            return None
        try:
            return self._encode(index)
        except (ImageError, VideoError) as failure:
            self._bad.set(index)
            logger.warning(f"Left out: {failure}")
            if self.bad_samples > max(1, self.max_bad_share * len(self)):
                raise self._too_many(failure) from failure
            return None

    def _instead_of(self, index: int) -> tuple[int, Any]:
        """The next sample of the kind of a damaged one, with its number."""
        for step in range(1, len(self)):
            candidate = (index + step) % len(self)
            if self.is_multimodal(candidate) == self.is_multimodal(index):
                sample = self._try(candidate)
                if sample is not None:
                    return candidate, sample
        raise self._too_many("there is no other sample of its kind")

    def _too_many(self, last: object) -> DataError:
        return DataError(f"{self.bad_samples} of {len(self)} samples have damaged pictures or were changed, more "
                         f"than the share max_bad_share {self.max_bad_share} allows. The last one: {last}")

    @property
    def bad_samples(self) -> int:
        """Samples found damaged so far, by any worker."""
        return self._bad.count()

    @property
    def needs(self) -> np.ndarray:
        """Positions of every sample's sequence and its tiles, int `(n, 2)`."""
        if self._needs is None:
            self._needs = np.array([self._measure(self.samples[i]) for i in range(len(self))],
                                   np.int32).reshape(-1, 2)
        return self._needs

    def _measure(self, sample: Conversation) -> tuple[int, int]:
        return self.processor.conversation_length(sample.turns, sample.sizes, self.hd_num, sample.where, sample.images)

    def is_multimodal(self, index: int) -> bool:
        """Whether a sample has images."""
        return bool(self.samples.images[index])

    def source_of(self, index: int) -> str:
        """Name of a sample's source."""
        return self.source_names[self.samples.name_number(index)]

    def describe(self, index: int) -> str:
        """Names a sample in messages."""
        return self.samples.where(index)

    def _encode(self, index: int) -> Any:
        """A sample as `_join` takes it.

        Raises:
            ImageError: for a damaged picture; VideoError for a video.
        """
        sample = self.samples[index]
        encoded = self.processor.encode_conversation(sample.turns, sample.images, sample.where, self.hd_num)
        if self._needs is not None and (len(encoded.input_ids), encoded.tiles) != tuple(self._needs[index].tolist()):
            raise ImageError(f"{sample.where}: its pictures have other sizes than when the data were measured; it "
                             f"takes {len(encoded.input_ids)} positions and {encoded.tiles} tiles now.")
        if not (encoded.labels[1:] != IGNORE_INDEX).any():       # nothing predicts the first one
            raise DataError(f"{self.describe(index)}: nothing in it carries loss; its answers are empty.")
        return with_loss_on(encoded, self.loss_on, sample.weights, sample.where)

    def _join(self, members: list[tuple[int, Any]], place: int) -> dict[str, Column]:
        """Columns of a row of samples with their numbers."""
        joined = join_samples([encoded for _, encoded in members], self.seq_length, self.max_tiles,
                              self.processor.pad_token_id, self.max_images, self.max_segments)
        source, end = np.zeros(self.seq_length, np.int32), 0     # any number in the padding, where no label is
        lengths = np.zeros(self.seq_length, np.int32)
        for index, encoded in members:
            first, end = end, end + len(encoded.input_ids)
            source[first:end], lengths[first:end] = self.samples.name_number(index), end - first
        return {**joined, "noise_seed": noise_seed(self.seed, place), "source": source, "lengths": lengths}


def check_images(samples: Samples, max_images: int) -> None:
    """Refuses samples with more pictures than a row has global views.

    Raises:
        DataError: naming the sample with the most of them.
    """
    if not len(samples):
        return
    most = int(np.argmax(samples.images))
    if samples.images[most] > max_images:
        raise DataError(f"{samples.where(most)}: its {samples.images[most]} pictures do not fit "
                        f"train_dataset.max_images {max_images}; raise that and model.model_config.max_images, or "
                        "leave the sample out.")


def noise_seed(seed: int, place: int) -> np.int32:
    """Seed of the dropout noise of the row at a place of the run."""
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
    # questions during training are encoded as the model directory, which notes hd_num, will have them encoded
    images = ImageProcessor(config.image_size or 560, config.patch_size or 14, config.hd_num or HD_NUM_SINGLE,
                            hd_num_training=hd_num, training_transform=config.image_transform or "training",
                            transparency=config.transparency or "white", exif=config.exif or "ignore")
    return Processor(images, tokenizer, bool(config.control_tokens))


def own_tokenizer(section: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a `train_dataset` section, without MindFormers.

    Raises:
        DataError: when it is one of another kind.
    """
    options = {key: value for key, value in section["tokenizer"].items() if key != "type"}
    if not has_own_tokenizer(section):
        raise DataError(f"train_dataset.tokenizer is {dict(section['tokenizer'])!r:.200}; to measure data it must have "
                        "the type InternLM2Tokenizer and a vocab_file.")
    return Tokenizer(**options)


def has_own_tokenizer(section: Mapping[str, Any]) -> bool:
    """Whether the tokenizer of a section is made without MindFormers."""
    tokenizer = section["tokenizer"]
    return tokenizer.get("type", "InternLM2Tokenizer") == "InternLM2Tokenizer" and "vocab_file" in tokenizer


class SectionOptions:
    """Keys of a section as attributes, `None` where there are none: `ImageOptions` of a plain mapping."""

    def __init__(self, section: Mapping[str, Any]):
        self._section = section

    def __getattr__(self, name: str) -> Any:
        return self._section.get(name)
