"""Some data as a run would read it: what it needs, what is wrong with it, and which samples are looked at.

Everything is asked of what a run reads by (`conversations`, `preferences`, `index`). A sample that a run refuses ends
nothing here: it is listed. Of much data some samples are drawn and read; where there is an index, it knows all of them.
"""
from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindformers_ixc import terminal
from mindformers_ixc.data.advice import processor_of
from mindformers_ixc.data.conversations import PROGRESS_FROM, Conversation, named_sources
from mindformers_ixc.data.fitting import Shapes
from mindformers_ixc.data.index.building import looking_through
from mindformers_ixc.data.index.kinds import KINDS, open_reader
from mindformers_ixc.data.index.measuring import Measurer
from mindformers_ixc.data.index.samples import IndexedSource, fitting_rounds, needs_of_rounds
from mindformers_ixc.data.index.sources import reading_options
from mindformers_ixc.data.packer import Budget
from mindformers_ixc.data.records.base import Place
from mindformers_ixc.data.sections import row_budget
from mindformers_ixc.errors import DataError, ImageError, PromptError
from mindformers_ixc.processing.image import HD_NUM_TRAINING
from mindformers_ixc.processing.processor import Processor

# Samples that are wrong, by their numbers, each with a sentence that says why.
Problems = list[tuple[int, str]]

# Samples that are read and measured; of more, so many are drawn.
MEASURED = 5000


@dataclass(frozen=True)
class Reader:
    """How a `train_dataset` section reads samples.

    Attributes:
        processor: encodes them.
        hd_num: tiles of a picture at most.
        budget: of a row.
        longest: positions of a sample at most.
        max_images: pictures of a sample at most.
        seed: of the choices.
        loader: section `data_loader`.
        pairs: whether the samples are preference pairs.
    """

    processor: Processor
    hd_num: int
    budget: Budget
    longest: int
    max_images: int
    seed: int
    loader: Mapping
    pairs: bool = False

    @classmethod
    def of(cls, section: Mapping, pairs: bool = False) -> Reader:
        """The reader of a checked section (`mindformers_ixc.data.sections.check_dataset_section`)."""
        budget = row_budget(section)
        longest = budget.longest if section.get("packing") else budget.seq_length
        return cls(processor_of(section), section.get("hd_num") or HD_NUM_TRAINING, budget, longest, budget.max_images,
                   section.get("seed") or 0, section["data_loader"], pairs)

    @property
    def kind(self) -> str:
        """Of the samples, of `KINDS`."""
        return "pair" if self.pairs else "sample"

    @property
    def limits(self) -> tuple[int, int, int]:
        """Positions, tiles and pictures of a sample at most."""
        return self.longest, self.budget.max_tiles, self.max_images


@dataclass
class Source:
    """A file of samples.

    Attributes:
        name: of the file.
        first: number of its first sample among all.
        places: of its samples, int64 `(n, 3)`.
        taken: samples that an epoch takes of it, by a list file; `None`: every one once.
        measurer: reads and measures single ones.
    """

    name: str
    first: int
    places: np.ndarray
    taken: int | None
    measurer: Measurer

    @property
    def count(self) -> int:
        """Samples in it, usable or not."""
        return len(self.places)


@dataclass
class Entry:
    """A sample, and what it needs.

    Attributes:
        number: among all samples.
        sides: the conversation; of a preference pair that with the chosen answer and that with the rejected one.
        positions: it takes uncut; of a pair those of the longer side.
        tiles: it takes uncut, global views included.
        rounds: question-answer pairs.
        kept: of them, from the first on, that a row holds; 0: a run leaves the sample out.
    """

    number: int
    sides: tuple[Conversation, ...]
    positions: int
    tiles: int
    rounds: int
    kept: int

    @property
    def where(self) -> str:
        """Names it in messages."""
        return self.sides[0].where


class Known(NamedTuple):
    """What samples need, as `Entry` has it: int arrays `(n,)`."""

    numbers: np.ndarray
    positions: np.ndarray
    tiles: np.ndarray
    rounds: np.ndarray
    kept: np.ndarray


@dataclass
class Data:
    """What is known of some data.

    Attributes:
        reader: reads samples.
        sources: the files.
        measured: the samples that were read and can be used, by number; none where an index knows all.
        indexed: what an index knows of all that can be used.
        problems: samples for which a run refuses the data, by number, with the reason.
        uncut: samples that a run leaves out, for a picture that no tiles can be made of, likewise.
        pictures: of the usable samples; each file once, unless an index counted them.
        questions: of the usable samples.
        text_only: usable samples without a picture.
        named: whether only samples that were named have been read.
    """

    reader: Reader
    sources: list[Source] = field(default_factory=list)
    measured: list[Entry] = field(default_factory=list)
    indexed: Known | None = None
    problems: Problems = field(default_factory=list)
    uncut: Problems = field(default_factory=list)
    pictures: int = 0
    questions: int = 0
    text_only: int = 0
    named: bool = False

    @property
    def count(self) -> int:
        """Samples of all sources, usable or not."""
        return sum(source.count for source in self.sources)

    @property
    def known(self) -> Known:
        """What the usable samples need, as far as they were looked at."""
        if self.indexed is not None:
            return self.indexed
        rows = [(one.number, one.positions, one.tiles, one.rounds, one.kept) for one in self.measured]
        return Known(*np.array(rows, np.int64).reshape(-1, len(Known._fields)).T)

    @property
    def looked_at(self) -> int:
        """Samples that were looked at, usable or not."""
        return len(self.known.numbers) + len(self.problems) + len(self.uncut)


def read_data(reader: Reader, files: str | os.PathLike | Sequence[str], guess: bool = False,
              wanted: Sequence[int] = ()) -> Data:
    """Reads and measures data; no pixels are decoded.

    Args:
        reader: reads samples.
        files: what `dataset_dir` may be.
        guess: whether preference pairs are read where they are found in place of conversations, or refused.
        wanted: numbers of samples; of much data only these are read.

    Raises:
        DataError: when a file is none of data, or no sample can be used.
        FileNotFoundError: for a file that is not there.
    """
    data = look_through(reader, files, wanted)
    if not data.measured and not reader.pairs:
        try:
            pairs = look_through(replace(reader, pairs=True), files, wanted)
        except DataError:
            pairs = data        # a table, say
        if pairs.measured and not guess:
            raise DataError(f"{pairs.sources[0].name} has preference pairs, and the YAML trains on conversations; "
                            "train_dataset_task.type is IXC25PreferenceDataset where pairs are read.")
        data = pairs if pairs.measured else data
    bad = sorted([*data.problems, *data.uncut])
    if not data.measured and bad:
        raise DataError(bad[0][1] if len(bad) == 1 else f"None of the {len(bad)} samples that were looked at can be "
                        f"used. The first: {bad[0][1]}")
    return data


def look_through(reader: Reader, files: str | os.PathLike | Sequence[str], wanted: Sequence[int] = ()) -> Data:
    """The same, whatever is wrong with the samples; arguments and errors as of `read_data`."""
    data = Data(reader)
    options = reading_options(reader.loader, reader.seed, reader.kind)
    for path, taken in named_sources(files):
        source = open_reader(path, options)
        with looking_through(source.records) as bar:
            places = source.records.places(bar.update)
        data.sources.append(Source(str(path), data.count, places, taken,
                                   Measurer(source, reader.processor, reader.hd_num)))
    numbers: Sequence[int] = range(data.count)
    if len(numbers) > MEASURED:
        data.named = bool(wanted)
        numbers = sorted({number for number in wanted if 0 <= number < data.count} if wanted else
                         random.Random(reader.seed).sample(numbers, MEASURED))
    for number in terminal.current.counted(numbers, len(numbers), "reading samples", "sample",
                                           disable=len(numbers) < PROGRESS_FROM or None):
        _look_at(data, number)
    data.pictures = len({path for entry in data.measured for path in entry.sides[0].images})
    data.questions = sum(entry.rounds for entry in data.measured)
    data.text_only = sum(not entry.sides[0].images for entry in data.measured)
    return data


def _look_at(data: Data, number: int) -> None:
    """Reads and measures a sample; what is wrong with it is kept in place of it."""
    source = data.sources[int(np.searchsorted([one.first for one in data.sources], number, side="right")) - 1]
    index, reader, kind = number - source.first, data.reader, KINDS[data.reader.kind]
    try:
        sample: Any = source.measurer.read(index, Place(*source.places[index].tolist()))
    except DataError as error:
        data.problems.append((number, str(error)))
        return
    try:
        needs = np.array(source.measurer.parts(sample))
    except (ImageError, PromptError) as error:
        (data.uncut if isinstance(error, ImageError) else data.problems).append((number, str(error)))
        return
    whole = needs[-kind.together:].max(0)
    fits = int((needs <= np.array(reader.limits)).all(1).sum())
    data.measured.append(Entry(number, getattr(sample, "sides", (sample,)), int(whole[0]), int(whole[1]),
                               len(needs) // kind.together, fits // kind.together))


def indexed_data(reader: Reader, sources: Sequence[IndexedSource], shapes: Shapes) -> Data:
    """The same of data that has an index; nothing is read.

    Args:
        reader: reads samples.
        sources: with their indices, built to list all errors.
        shapes: that samples must fit.
    """
    data, columns = Data(reader), list[np.ndarray]()
    for source in sources:
        index, first = source.index, data.count
        rounds, kept = fitting_rounds(source, np.arange(len(index)), shapes)
        usable = np.flatnonzero(rounds)
        needs = needs_of_rounds(source, usable, rounds[usable]).max(1)
        pictures = np.diff(index.picture_starts)[usable]
        columns.append(np.stack([usable + first, needs[:, 0], needs[:, 1], rounds[usable], kept[usable]]))
        data.problems += [(first + number, sentence) for number, sentence in index.description.errors]
        data.uncut += [(first + number, sentence) for number, sentence in index.description.unusable]
        data.pictures, data.questions = data.pictures + int(pictures.sum()), data.questions + int(rounds.sum())
        data.text_only += int((pictures == 0).sum())
        data.sources.append(Source(source.reader.name, first, index.places, source.drawn,
                                   Measurer(source.reader, reader.processor, reader.hd_num)))
    data.indexed = Known(*np.concatenate(columns, 1))
    return data


def choose(data: Data, count: int) -> list[Entry]:
    """So many of the usable samples, evenly over each source; every source has one if there are not more of them."""
    known = data.known.numbers
    numbers = np.searchsorted([source.first for source in data.sources], known, side="right")
    members = {int(number): known[numbers == number] for number in np.unique(numbers)}
    if len(members) > count:
        members = {0: known}
    shares = dict.fromkeys(members, 1)
    for _ in range(min(count, len(known)) - len(shares)):       # to the one that lacks the most
        open_ones = [key for key in shares if shares[key] < len(members[key])]
        shares[max(open_ones, key=lambda key: len(members[key]) / (shares[key] + 1))] += 1
    chosen = [number for key in sorted(members) for number in _evenly(members[key], shares[key])]
    return _entries(data, chosen)


def _evenly(numbers: np.ndarray, count: int) -> list[int]:
    places = [round(i * (len(numbers) - 1) / (count - 1)) for i in range(count)] if count > 1 else [0]
    return numbers[places].tolist()


def named(data: Data, numbers: Sequence[int]) -> list[Entry]:
    """Samples by number.

    Raises:
        DataError: for a number that there is not, or of a sample that cannot be used.
    """
    for number in numbers:
        if not 0 <= number < data.count:
            raise DataError(f"--sample {number} is none of the data: its {data.count} samples are numbered 0 to "
                            f"{data.count - 1}.")
    entries = _entries(data, list(dict.fromkeys(numbers)))
    bad = dict([*data.problems, *data.uncut])
    for number in numbers:
        if number in bad:
            raise DataError(bad[number])
    return entries


def _entries(data: Data, numbers: Sequence[int]) -> list[Entry]:
    """Samples by number, read where they have not been; without those that cannot be used."""
    known = {number for number, _ in (*data.problems, *data.uncut)}.union(one.number for one in data.measured)
    for number in numbers:
        if number not in known:
            _look_at(data, number)
    found = {one.number: one for one in data.measured}
    return [found[number] for number in numbers if number in found]


def file_names(data: Data) -> str:
    """Names of the files, each once."""
    return " · ".join(dict.fromkeys(Path(source.name).name for source in data.sources))
