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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ixc.data.columns import unmap
from mindformers_ixc.data.conversations import LISTED_ERRORS, Conversation, ConversationReader
from mindformers_ixc.data.drawing import resampled
from mindformers_ixc.data.fitting import Shapes, check_bad_pictures
from mindformers_ixc.data.index.cleaning import MADE_OF, make_room
from mindformers_ixc.data.index.folders import SAMPLES, folder_of_runs, writing
from mindformers_ixc.data.index.holding import Held, is_there, made, put_in_place, unfinished
from mindformers_ixc.data.index.keys import key_of
from mindformers_ixc.data.index.kinds import KINDS, Kind
from mindformers_ixc.data.index.measuring import as_sizes, is_the_same
from mindformers_ixc.data.index.seals import is_sealed, seal
from mindformers_ixc.data.index.store import ColumnWriter, SourceIndex, mapped
from mindformers_ixc.data.records.base import Place
from mindformers_ixc.errors import DataError, ImageError, SampleError
from mindformers_ixc.files import read_json, write_whole
from mindformers_ixc.processing.stored import StoredFile

logger = logging.getLogger(__name__)

# Changes whenever the columns, or what makes them, do.
VERSION = 2

# Samples that are looked at together.
BLOCK = 1 << 18

# Samples that are read before what was mapped of the columns is let go of: each may map 64 kB of each of them.
LOOKS = 64


def _columns(kind: Kind) -> dict[str, tuple[Any, int]]:
    """Columns, as `store.COLUMNS`; what they are, `SampleSet` says."""
    return {"source": (np.uint16, 0), "sample": (np.int32, 0), "pairs": (np.int32, 0),
            "needs": (np.int32, kind.together + 1), "images": (np.int32, 0)}


SUMMARY = "samples.json"
FILES = ("source.npy", "sample.npy", "pairs.npy", "needs.npy", "images.npy", SUMMARY)


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
        return resampled(len(self.index), self.drawn, random.Random(self.seed))


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
        self.folder, self._held = folder, Held(folder)
        for name, form in _columns(sources[0].kind).items():
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

    def __getitem__(self, number: int) -> Conversation:
        """A sample, with the rounds of it that are used and the sizes of their pictures.

        Raises:
            SampleError: when it is not what it was when it was indexed, or a picture is gone.
        """
        source, sample = self.sources[int(self.source[number])], int(self.sample[number])
        index = source.index
        self._unmap_sometimes(index)
        found = _read(source, sample)
        first, end = index.picture_starts[sample:sample + 2].tolist()
        found.sizes = as_sizes(index.sizes[first:end].tolist())
        return source.kind.used(found, int(self.pairs[number]))

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


def _read(source: IndexedSource, sample: int) -> Conversation:
    """A sample, compared with what the index says of it.

    Raises:
        SampleError: when it cannot be read, though it could be, or is another one.
    """
    index, reader = source.index, source.reader
    try:
        found = reader.read(sample, Place(*index.places[sample].tolist()))
    except DataError as error:
        where = reader.records.where(sample)
        raise SampleError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error
    except OSError as error:
        raise SampleError(f"{reader.records.where(sample)}: cannot be read any more ({error.strerror or error}).") \
            from error
    first, end = index.picture_starts[sample:sample + 2].tolist()
    # what pictures inside a changed source show is compared with nothing
    unknown = reader.records.changed and any(isinstance(image, StoredFile) for image in found.images)
    if unknown or len(found.images) != end - first or not is_the_same(found, int(index.digests[sample])):
        raise SampleError(f"{found.where}: is not what it was when the data were indexed; the file was changed, or the "
                          f"index is damaged (remove {index.folder}, and it is built anew).")
    return found


@dataclass
class Summary:
    """What the fitting of samples found.

    Attributes:
        total: samples before.
        multimodal: samples with pictures, of those that are used.
        unusable: samples that no run uses (`Description.left_out`).
        first: sentences about the first of them.
        last: about the last one.
        cut: samples that are used in part.
        dropped: samples of which not even the first round fits.
        least: positions, tiles and pictures that the first rounds of those need at least, each by itself.
        most: at most.
    """

    total: int = 0
    multimodal: int = 0
    unusable: int = 0
    first: list[str] = field(default_factory=list)
    last: str = ""
    cut: int = 0
    dropped: int = 0
    least: tuple[int, int, int] = (0, 0, 0)
    most: tuple[int, int, int] = (0, 0, 0)

    def add_unusable(self, sentences: list[str]) -> None:
        """Counts samples that no run uses, by what is said of each."""
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
    root = folder_of_runs(folder)
    target = root / SAMPLES / key_of(VERSION, keys, asdict(shapes))

    def make(alone: bool) -> SampleSet:
        held = _make(sources, shapes, target, alone)
        samples = _opened(sources, target)
        make_room(root)
        del held
        return samples

    with writing(root):
        samples = made(partial(_kept, sources, target), make, target.with_suffix(".lock"),
                       "waiting for the samples that {who} fits to the rows")
    _tell(Summary(**read_json(target / SUMMARY)), shapes, max_bad_share, sources[0].kind is KINDS["pair"])
    return samples


def _kept(sources: Sequence[IndexedSource], folder: Path) -> SampleSet | None:
    """The samples that are there, if there are some."""
    if not is_there(folder) or not is_sealed(folder, FILES):
        return None
    try:
        return _opened(sources, folder)
    except (OSError, ValueError):        # damaged, or removed just now
        return None


def _opened(sources: Sequence[IndexedSource], folder: Path) -> SampleSet:
    return SampleSet(sources, folder, Summary(**read_json(folder / SUMMARY)).multimodal)


def _make(sources: Sequence[IndexedSource], shapes: Shapes, target: Path, alone: bool) -> Held:
    """Writes a set of samples; the folder is whole or not there, and not removed as long as the value is kept."""
    part = unfinished(target, alone)
    shutil.rmtree(part, ignore_errors=True)          # of a process that was killed
    part.mkdir()
    try:
        _write(sources, shapes, part)
        described = [source.index.description for source in sources]
        write_whole(part / MADE_OF, json.dumps({
            "indices": [[one.key, one.content] for one in described], "samples": sum(one.samples for one in described),
            "names": list(dict.fromkeys(one.path or one.source for one in described))}), sync=True)
        return put_in_place(part, target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _write(sources: Sequence[IndexedSource], shapes: Shapes, folder: Path) -> None:
    kind = sources[0].kind
    writers = {name: ColumnWriter(folder / f"{name}.npy", *form) for name, form in _columns(kind).items()}
    summary, least, most = Summary(), list[np.ndarray](), list[np.ndarray]()
    for number, source in enumerate(sources):
        entries, index = source.entries(), source.index
        summary.total += len(entries)
        sentences = index.description.left_out
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
            summary.multimodal += int(np.count_nonzero(needs[:, 0, 2]))
            columns = {"source": np.full(int(kept.sum()), number), "sample": block[kept], "pairs": fitting[kept],
                       "needs": np.concatenate([needs[..., 0], needs[:, :1, 1]], 1), "images": needs[:, 0, 2]}
            for name, column in columns.items():
                writers[name].add(column)
            unmap(index.pair_starts, index.needs)
    for writer in writers.values():
        writer.close()
    if least:
        summary.least, summary.most = tuple(np.min(least, 0).tolist()), tuple(np.max(most, 0).tolist())
    write_whole(folder / SUMMARY, json.dumps(asdict(summary)), sync=True)
    seal(folder, FILES)


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
