"""The samples of a run: those of the indices of its sources that fit the rows, and how much of each."""
from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ixc.data.conversations import LISTED_ERRORS, Conversation, ConversationReader, resample
from mindformers_ixc.data.fitting import Shapes, check_bad_pictures
from mindformers_ixc.data.index.building import index_folder, key_of, locked
from mindformers_ixc.data.index.kinds import KINDS, Kind
from mindformers_ixc.data.index.measuring import as_sizes
from mindformers_ixc.data.index.store import ColumnWriter, SourceIndex, mapped
from mindformers_ixc.data.records.base import Place
from mindformers_ixc.errors import DataError, ImageError
from mindformers_ixc.files import read_json, whole_folder, write_whole

logger = logging.getLogger(__name__)

# Changes whenever the columns, or what makes them, do.
VERSION = 2

# Samples that are looked at together.
BLOCK = 1 << 18

def _columns(kind: Kind) -> dict[str, tuple[Any, int]]:
    """Columns, as `store.COLUMNS`; what they are, `SampleSet` says."""
    return {"source": (np.uint16, 0), "sample": (np.int32, 0), "pairs": (np.int32, 0),
            "needs": (np.int32, kind.together + 1), "images": (np.int32, 0)}


SUMMARY = "samples.json"


@dataclass(frozen=True)
class IndexedSource:
    """A source of a run.

    Attributes:
        index: what is known of its samples.
        reader: reads them.
        drawn: samples of an epoch, by a list file; `None`: all, once.
        seed: of the choice among them.
    """

    index: SourceIndex
    reader: ConversationReader
    drawn: int | None = None
    seed: str = ""

    @property
    def kind(self) -> Kind:
        """What its samples are."""
        return KINDS[self.reader.options.kind]

    def entries(self) -> np.ndarray:
        """Numbers of the samples of an epoch, int32."""
        if self.drawn is None:
            return np.arange(len(self.index), dtype=np.int32)
        numbers = resample(range(len(self.index)), self.drawn, random.Random(self.seed))
        return np.fromiter(numbers, np.int32, self.drawn)


class SampleSet:
    """Samples that fit, in columns that all processes of a machine share; a sample's text is read when it is asked for.

    Args:
        sources: of the run.
        folder: of the columns, as `make_samples` wrote them.

    Attributes:
        source: number of each sample's source, uint16 `(n,)`.
        sample: its number there, int32 `(n,)`.
        pairs: rounds of it that are used; 1 of a preference pair.
        needs: positions and tiles, global views included, that those take, int32 `(n, 2)`; of preference pairs the
            positions of both sides and their tiles, `(n, 3)`.
        images: pictures they have.
        names: of the sources, each once.
        folder: of the columns.
    """

    source: np.ndarray
    sample: np.ndarray
    pairs: np.ndarray
    needs: np.ndarray
    images: np.ndarray

    def __init__(self, sources: Sequence[IndexedSource], folder: Path):
        self.sources, all_names = list(sources), [source.reader.name for source in sources]
        self.names = list(dict.fromkeys(all_names))
        self._name_of = np.array([self.names.index(name) for name in all_names], np.uint16)
        self.folder = folder
        for name, form in _columns(sources[0].kind).items():
            setattr(self, name, mapped(folder / f"{name}.npy", *form))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.sample)

    @property
    def name_numbers(self) -> np.ndarray:
        """Number of the name of each sample's source, uint16 `(n,)`."""
        return self.source if len(self.names) == len(self.sources) else self._name_of[self.source]

    def __deepcopy__(self, memo: dict) -> SampleSet:
        return self       # MindSpore copies what it reads from; this does not change

    def __getitem__(self, number: int) -> Conversation:
        """A sample, with the rounds of it that are used and the sizes of their pictures.

        Raises:
            DataError: when its source has changed.
            ImageError: when a picture is gone.
        """
        source, sample = self.sources[int(self.source[number])], int(self.sample[number])
        index = source.index
        try:
            found = source.reader.read(sample, Place(*index.places[sample].tolist()))
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):      # a picture that was there: as a damaged one
                raise ImageError(str(error)) from error
            raise
        first, end = index.picture_starts[sample:sample + 2].tolist()
        found.sizes = as_sizes(index.sizes[first:end].tolist())
        if len(found.sizes) != len(found.images):
            raise DataError(f"{found.where} has {len(found.images)} pictures, and had {len(found.sizes)} when the data "
                            "were indexed; remove the index, and it is built anew.")
        return source.kind.used(found, int(self.pairs[number]))

    def __iter__(self) -> Iterator[Conversation]:
        return map(self.__getitem__, range(len(self)))

    def where(self, number: int) -> str:
        """Names a sample in messages, with its id if it can be read."""
        with contextlib.suppress(DataError, ImageError, OSError):
            return self[number].where
        return self.sources[int(self.source[number])].reader.records.where(int(self.sample[number]))


@dataclass
class Summary:
    """What the fitting of samples found.

    Attributes:
        total: samples before.
        unusable: samples with a picture that cannot be partitioned.
        first: sentences about the first of them.
        last: about the last one.
        cut: samples that are used in part.
        dropped: samples of which not even the first round fits.
        least: positions, tiles and pictures that the first rounds of those need at least, each by itself.
        most: at most.
    """

    total: int = 0
    unusable: int = 0
    first: list[str] = field(default_factory=list)
    last: str = ""
    cut: int = 0
    dropped: int = 0
    least: tuple[int, int, int] = (0, 0, 0)
    most: tuple[int, int, int] = (0, 0, 0)

    def add_unusable(self, sentences: list[str]) -> None:
        """Counts samples with unusable pictures, by what is said of each."""
        self.unusable += len(sentences)
        self.first += sentences[:LISTED_ERRORS - len(self.first)]
        self.last = sentences[-1] if sentences else self.last


def make_samples(sources: Sequence[IndexedSource], shapes: Shapes, max_bad_share: float,
                 folder: str | os.PathLike | None = None) -> SampleSet:
    """The samples of a run, from disk if they were made before.

    Args:
        sources: of the run.
        shapes: that they must fit.
        max_bad_share: share of samples with unusable pictures that may be left out.
        folder: where indices lie; by default in the user's cache.

    Raises:
        DataError: when nothing fits, or too many pictures cannot be used.
    """
    described = [(source, source.index.description) for source in sources]
    keys = [(index.key, index.content, source.drawn, source.seed if source.drawn else "")
            for source, index in described]
    target = index_folder(folder) / "samples" / key_of(VERSION, keys, asdict(shapes))
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.with_suffix(".lock"), "waiting for another process that fits the samples"):
        if not (target / SUMMARY).exists():
            shutil.rmtree(target, ignore_errors=True)
            with whole_folder(target) as part:
                _write(sources, shapes, part)
    summary = Summary(**read_json(target / SUMMARY))
    _tell(summary, shapes, max_bad_share, sources[0].kind is KINDS["pair"])
    return SampleSet(sources, target)


def _write(sources: Sequence[IndexedSource], shapes: Shapes, folder: Path) -> None:
    kind = sources[0].kind
    writers = {name: ColumnWriter(folder / f"{name}.npy", *form) for name, form in _columns(kind).items()}
    summary, least, most = Summary(), list[np.ndarray](), list[np.ndarray]()
    for number, source in enumerate(sources):
        entries, index = source.entries(), source.index
        summary.total += len(entries)
        sentences = dict(index.description.unusable)
        for block in (entries[start:start + BLOCK] for start in range(0, len(entries), BLOCK)):
            pairs, fitting = fitting_rounds(source, block, shapes)
            unusable = np.isin(block, list(sentences))
            summary.add_unusable([sentences[number] for number in block[unusable].tolist()])
            dropped = (fitting == 0) & ~unusable
            summary.dropped += int(dropped.sum())
            summary.cut += int(((fitting > 0) & (fitting < pairs)).sum())
            if dropped.any():
                needs = needs_of_rounds(source, block[dropped], 1).max(1)
                least.append(needs.min(0))
                most.append(needs.max(0))
            kept = fitting > 0
            needs = needs_of_rounds(source, block[kept], fitting[kept])                # the same pictures on all sides
            columns = {"source": np.full(int(kept.sum()), number), "sample": block[kept], "pairs": fitting[kept],
                       "needs": np.concatenate([needs[..., 0], needs[:, :1, 1]], 1), "images": needs[:, 0, 2]}
            for name, column in columns.items():
                writers[name].add(column)
    for writer in writers.values():
        writer.close()
    if least:
        summary.least, summary.most = tuple(np.min(least, 0).tolist()), tuple(np.max(most, 0).tolist())
    write_whole(folder / SUMMARY, json.dumps(asdict(summary)))


def needs_of_rounds(source: IndexedSource, samples: np.ndarray, rounds: np.ndarray | int) -> np.ndarray:
    """What so many first rounds of samples need, side by side, `(n, sides, 3)`: a conversation has one side.

    Args:
        source: of the samples.
        samples: their numbers, all of usable ones.
        rounds: of each, or of all.
    """
    together, index = source.kind.together, source.index
    first = index.pair_starts[samples] + (np.asarray(rounds) - 1) * together
    return index.needs[first[:, None] + np.arange(together)]


def fitting_rounds(source: IndexedSource, samples: np.ndarray, shapes: Shapes) -> tuple[np.ndarray, np.ndarray]:
    """Rounds that samples have, and how many of the first ones fit: what they need only grows.

    A preference pair has one, which fits when both its sides do.

    Args:
        source: of the samples.
        samples: their numbers.
        shapes: that they must fit.

    Returns:
        Two arrays, int64 `(n,)`.
    """
    index, together = source.index, source.kind.together
    starts, ends = index.pair_starts[samples], index.pair_starts[samples + 1]
    counts = (ends - starts).astype(np.int64)
    rows = np.repeat(starts - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(counts.sum())
    fits = (index.needs[rows] <= np.array(shapes.limits)).all(1)
    passed = np.concatenate([[0], np.cumsum(fits)])
    last = np.cumsum(counts)
    return counts // together, (passed[last] - passed[last - counts]) // together


def _tell(summary: Summary, shapes: Shapes, max_bad_share: float, pairs: bool) -> None:
    """Says in the log what was lost.

    Raises:
        DataError: when nothing is left, or too many pictures cannot be used.
    """
    sentences = [*summary.first, *[summary.last] * (summary.unusable - len(summary.first))]
    check_bad_pictures(list(map(ImageError, sentences)), summary.total, max_bad_share)
    total = summary.total - summary.unusable
    if summary.dropped and pairs:
        shapes.tell_dropped_pairs(summary.dropped, total, summary.most)
    elif summary.dropped:
        shapes.tell_dropped(summary.dropped, total, summary.least, summary.most)
    if summary.cut:
        logger.warning(f"{summary.cut} of {summary.total} conversations are cut between whole turns to fit {shapes}.")
