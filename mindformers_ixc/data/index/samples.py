"""The samples of a run: those of the indices of its sources that fit the rows, and how much of each."""
from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mindformers_ixc.data.columns import unmap
from mindformers_ixc.data.conversations import Conversation, ConversationReader
from mindformers_ixc.data.drawing import resampled
from mindformers_ixc.data.fitting import Shapes, check_bad_pictures, first_pairs
from mindformers_ixc.data.index.building import index_folder, key_of, locked
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

# Samples that are read before what was mapped of the columns is let go of: each may map 64 kB of each of them.
LOOKS = 64

# Columns, as `store.COLUMNS`: number of the source, of the sample in it, its rounds that are used, the positions and
# tiles that they take, and their pictures.
COLUMNS = {"source": (np.uint16, 0), "sample": (np.int32, 0), "pairs": (np.int32, 0), "needs": (np.int32, 2),
           "images": (np.int32, 0)}

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

    def entries(self) -> np.ndarray:
        """Numbers of the samples of an epoch, int32."""
        if self.drawn is None:
            return np.arange(len(self.index), dtype=np.int32)
        return resampled(len(self.index), self.drawn, random.Random(self.seed))


class SampleSet:
    """Samples that fit, in columns that all processes of a machine share; a sample's text is read when it is asked for.

    Args:
        sources: of the run.
        folder: of the columns, as `make_samples` wrote them.

    Attributes:
        source: number of each sample's source, uint16 `(n,)`.
        sample: its number there, int32 `(n,)`.
        pairs: rounds of it that are used.
        needs: positions and tiles, global views included, that those take, int32 `(n, 2)`.
        images: pictures they have.
        names: of the sources, each once.
        multimodal: how many of the samples have pictures.
        folder: of the columns.
    """

    source: np.ndarray
    sample: np.ndarray
    pairs: np.ndarray
    needs: np.ndarray
    images: np.ndarray

    def __init__(self, sources: Sequence[IndexedSource], folder: Path, multimodal: int):
        self.multimodal = multimodal
        self._looks, self._looked_at = 0, dict[int, SourceIndex]()
        self.sources, all_names = list(sources), [source.reader.name for source in sources]
        self.names = list(dict.fromkeys(all_names))
        self._name_of = np.array([self.names.index(name) for name in all_names], np.uint16)
        self.folder = folder
        for name, form in COLUMNS.items():
            setattr(self, name, mapped(folder / f"{name}.npy", *form))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.sample)

    @property
    def name_numbers(self) -> np.ndarray:
        """Number of the name of each sample's source, uint16 `(n,)`."""
        return self.source if len(self.names) == len(self.sources) else self._name_of[self.source]

    def name_number(self, number: int) -> int:
        """Number of the name of one sample's source."""
        return int(self._name_of[self.source[number]])

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
        self._unmap_sometimes(index)
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
        return first_pairs(found, int(self.pairs[number]))

    def _unmap_sometimes(self, index: SourceIndex) -> None:
        """Keeps what is mapped of the columns small: samples by chance would soon have looked at every page."""
        self._looked_at[id(index)] = index
        self._looks += 1
        if self._looks % LOOKS == 0:
            looked_at, self._looked_at = self._looked_at, {}
            for one in looked_at.values():
                unmap(one.places, one.picture_starts, one.sizes)
            unmap(self.source, self.sample, self.pairs, self.needs, self.images)

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
        multimodal: samples with pictures, of those that are used.
        unusable: samples with a picture that cannot be partitioned, and the last sentence about one.
        cut: samples that are used in part.
        dropped: samples of which not even the first round fits.
        least: positions, tiles and pictures that the first rounds of those need at least, each by itself.
        most: at most.
    """

    total: int = 0
    multimodal: int = 0
    unusable: int = 0
    last: str = ""
    cut: int = 0
    dropped: int = 0
    least: tuple[int, int, int] = (0, 0, 0)
    most: tuple[int, int, int] = (0, 0, 0)


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
    _tell(summary, shapes, max_bad_share)
    return SampleSet(sources, target, summary.multimodal)


def _write(sources: Sequence[IndexedSource], shapes: Shapes, folder: Path) -> None:
    writers = {name: ColumnWriter(folder / f"{name}.npy", *form) for name, form in COLUMNS.items()}
    summary, least, most = Summary(), list[np.ndarray](), list[np.ndarray]()
    for number, source in enumerate(sources):
        entries, index = source.entries(), source.index
        summary.total += len(entries)
        sentences = dict(index.description.unusable)
        for block in (entries[start:start + BLOCK] for start in range(0, len(entries), BLOCK)):
            pairs, fitting = fitting_rounds(index, block, shapes)
            unusable = np.isin(block, list(sentences))
            if unusable.any():
                summary.unusable += int(unusable.sum())
                summary.last = sentences[int(block[np.flatnonzero(unusable)[-1]])]
            dropped = (fitting == 0) & ~unusable
            summary.dropped += int(dropped.sum())
            summary.cut += int(((fitting > 0) & (fitting < pairs)).sum())
            if dropped.any():
                needs = index.needs[index.pair_starts[block[dropped]]]
                least.append(needs.min(0))
                most.append(needs.max(0))
            kept = fitting > 0
            needs = index.needs[index.pair_starts[block[kept]] + fitting[kept] - 1]
            summary.multimodal += int(np.count_nonzero(needs[:, 2]))
            columns = {"source": np.full(int(kept.sum()), number), "sample": block[kept], "pairs": fitting[kept],
                       "needs": needs[:, :2], "images": needs[:, 2]}
            for name, column in columns.items():
                writers[name].add(column)
            unmap(index.pair_starts, index.needs)
    for writer in writers.values():
        writer.close()
    if least:
        summary.least, summary.most = tuple(np.min(least, 0).tolist()), tuple(np.max(most, 0).tolist())
    write_whole(folder / SUMMARY, json.dumps(asdict(summary)))


def fitting_rounds(index: SourceIndex, samples: np.ndarray, shapes: Shapes) -> tuple[np.ndarray, np.ndarray]:
    """Rounds that samples have, and how many of the first ones fit: what they need only grows.

    Args:
        index: of their source.
        samples: their numbers.
        shapes: that they must fit.

    Returns:
        Two arrays, int64 `(n,)`.
    """
    starts, ends = index.pair_starts[samples], index.pair_starts[samples + 1]
    counts = (ends - starts).astype(np.int64)
    rows = np.repeat(starts - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) + np.arange(counts.sum())
    fits = (index.needs[rows] <= np.array(shapes.limits)).all(1)
    passed = np.concatenate([[0], np.cumsum(fits)])
    last = np.cumsum(counts)
    return counts, passed[last] - passed[last - counts]


def _tell(summary: Summary, shapes: Shapes, max_bad_share: float) -> None:
    """Says in the log what was lost.

    Raises:
        DataError: when nothing is left, or too many pictures cannot be used.
    """
    check_bad_pictures([ImageError(summary.last)] * summary.unusable, summary.total, max_bad_share)
    if summary.dropped:
        shapes.tell_dropped(summary.dropped, summary.total, summary.least, summary.most)
    if summary.cut:
        logger.warning(f"{summary.cut} of {summary.total} conversations are cut between whole turns to fit {shapes}.")
