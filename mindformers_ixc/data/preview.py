"""Some data as a run would read it: what is wrong with it, what is cut, and single samples as the model sees them.

Everything is asked of the functions that a run reads by (`conversations`, `preferences`, `fitting`,
`Processor.encode_conversation`), so what is shown is what is learnt. A sample that a run refuses ends nothing here: it
is listed.
"""
from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mindformers_ixc import terminal
from mindformers_ixc.data.advice import processor_of
from mindformers_ixc.data.conversations import (
    CAPTION_PROMPTS,
    PROGRESS_FROM,
    Conversation,
    Problems,
    load_conversations,
    named_sources,
    read_image_sizes,
)
from mindformers_ixc.data.fitting import first_pairs, fit_pairs
from mindformers_ixc.data.packer import Budget
from mindformers_ixc.data.preferences import load_preferences
from mindformers_ixc.data.sections import row_budget
from mindformers_ixc.errors import DataError, ImageError, PromptError, VideoError
from mindformers_ixc.processing.image import HD_NUM_TRAINING, Grid, plan_partition
from mindformers_ixc.processing.processor import EncodedSample, Processor
from mindformers_ixc.processing.prompt import IGNORE_INDEX, shift_labels
from mindformers_ixc.processing.stored import StoredFile
from mindformers_ixc.processing.video import BoardSize

# Samples whose lengths are measured; of more, so many are drawn.
MEASURED = 5000

# Bytes that the tiles of a sample may take; a sample that no row holds can have any number of pictures.
LARGEST = 1 << 29

# What a position is: of a picture, one that the model learns to predict, or any other.
PICTURE, LEARNT, GIVEN = "picture", "learnt", "given"


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


@dataclass
class Source:
    """A file of samples.

    Attributes:
        name: of the file.
        first: number of its first sample among all.
        count: samples in it, usable or not.
        taken: samples that an epoch takes of it, by a list file; `None`: every one once.
    """

    name: str
    first: int
    count: int
    taken: int | None


@dataclass
class Entry:
    """A sample, and what it needs once it is measured.

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
    positions: int = 0
    tiles: int = 0
    rounds: int = 0
    kept: int = 0

    @property
    def where(self) -> str:
        """Names it in messages."""
        return self.sides[0].where


@dataclass
class Data:
    """What was read.

    Attributes:
        reader: reads samples.
        sources: the files.
        entries: samples that can be used, by number.
        problems: samples for which a run refuses the data, by number, with the reason.
        uncut: samples that a run leaves out, for a picture that no tiles can be made of, likewise.
        measured: of the entries those whose lengths are known.
    """

    reader: Reader
    sources: list[Source] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    problems: Problems = field(default_factory=list)
    uncut: Problems = field(default_factory=list)
    measured: list[Entry] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Samples of all sources, usable or not."""
        return sum(source.count for source in self.sources)


def read_data(reader: Reader, files: str | os.PathLike | Sequence[str], guess: bool = False) -> Data:
    """Reads and measures data; no pixels are decoded.

    Args:
        reader: reads samples.
        files: what `dataset_dir` may be.
        guess: whether preference pairs are read where they are found in place of conversations, or refused.

    Raises:
        DataError: when a file is none of data, or no sample can be used.
        FileNotFoundError: for a file that is not there.
    """
    data = _read(reader, files)
    if not data.entries and not reader.pairs:
        try:
            pairs = _read(replace(reader, pairs=True), files)
        except DataError:
            pairs = data        # a table, say
        if pairs.entries and not guess:
            raise DataError(f"{pairs.sources[0].name} has preference pairs, and the YAML trains on conversations; "
                            "train_dataset_task.type is IXC25PreferenceDataset where pairs are read.")
        data = pairs if pairs.entries else data
    measure(data, _some(data.entries, MEASURED, reader.seed))
    if not data.measured:
        bad = sorted([*data.problems, *data.uncut])
        raise DataError(bad[0][1] if len(bad) == 1 else f"None of the {len(bad)} samples that were looked at can be "
                        f"used. The first: {bad[0][1]}")
    return data


def _read(reader: Reader, files: str | os.PathLike | Sequence[str]) -> Data:
    data, loader = Data(reader), reader.loader
    folder, root, ignored = loader.get("image_folder"), loader.get("image_root"), loader.get("ignore_keys") or ()
    for path, taken in named_sources(files):
        first, problems, sides = data.count, Problems(), list[tuple[Conversation, ...]]()
        if reader.pairs:
            sides += [(chosen, rejected) for chosen, rejected, _ in
                      load_preferences(path, folder, root, ignored, problems)]
        else:
            prompts = loader.get("caption_prompts") or CAPTION_PROMPTS
            sides += [(sample,) for sample in
                      load_conversations(path, folder, prompts, reader.seed, root, ignored, problems)]
        data.sources.append(Source(str(path), first, len(sides) + len(problems), taken))
        data.entries += [Entry(first + one[0].index, one) for one in sides]
        data.problems += [(first + index, sentence) for index, sentence in problems]
    return data


def _some(entries: list[Entry], count: int, seed: int) -> list[Entry]:
    """The entries, or as many of them as are asked for, drawn by chance."""
    if len(entries) <= count:
        return entries
    return [entries[i] for i in sorted(random.Random(seed).sample(range(len(entries)), count))]


def measure(data: Data, entries: list[Entry]) -> None:
    """Finds out what some entries need, and whether a row holds them; those with a bad picture are none any more."""
    problems, uncut = Problems(), Problems()
    read_image_sizes([entry.sides[0] for entry in entries], data.reader.processor.image_processor.exif, problems)
    problems = [(entries[place].number, sentence) for place, sentence in problems]
    bad = {number for number, _ in problems}
    good = [entry for entry in entries if entry.number not in bad]
    for entry in terminal.current.counted(good, len(good), "measuring samples", "sample",
                                          disable=len(good) < PROGRESS_FROM or None):
        try:
            _measure(data.reader, entry)
        except (ImageError, PromptError) as error:
            (uncut if isinstance(error, ImageError) else problems).append((entry.number, str(error)))
            bad.add(entry.number)
    data.problems, data.uncut = sorted([*data.problems, *problems]), sorted([*data.uncut, *uncut])
    data.entries = [entry for entry in data.entries if entry.number not in bad]
    data.measured += [entry for entry in good if entry.number not in bad]


def _measure(reader: Reader, entry: Entry) -> None:
    """Fills in what an entry needs, by what a run measures."""
    if reader.pairs:
        entry.sides = (entry.sides[0], replace(entry.sides[1], sizes=entry.sides[0].sizes))
    fits = []
    for side in entry.sides:
        entry.rounds = (len(side.turns) - (side.turns[0][0] == "system")) // 2
        kept, needed = fit_pairs(reader.processor, side, reader.longest, reader.budget.max_tiles, reader.hd_num,
                                 reader.max_images)
        if kept < entry.rounds:
            needed = reader.processor.conversation_length(side.turns, side.sizes, reader.hd_num, side.where,
                                                          side.images)
        fits.append(kept)
        entry.positions, entry.tiles = max(entry.positions, needed[0]), max(entry.tiles, needed[1])
    entry.kept = min(fits)


def choose(data: Data, count: int) -> list[Entry]:
    """So many of the measured entries, evenly over each source; every source has one if there are not more of them."""
    numbers = [source.first for source in data.sources]
    members: dict[int, list[Entry]] = {}
    for entry in data.measured:
        members.setdefault(int(np.searchsorted(numbers, entry.number, side="right")), []).append(entry)
    if len(members) > count:
        members = {0: data.measured}
    shares = dict.fromkeys(members, 1)
    for _ in range(min(count, len(data.measured)) - len(shares)):       # to the one that lacks the most
        open_ones = [key for key in shares if shares[key] < len(members[key])]
        shares[max(open_ones, key=lambda key: len(members[key]) / (shares[key] + 1))] += 1
    return [entry for key in sorted(members) for entry in _evenly(members[key], shares[key])]


def _evenly(entries: list[Entry], count: int) -> list[Entry]:
    if count == 1:
        return entries[:1]
    return [entries[round(i * (len(entries) - 1) / (count - 1))] for i in range(count)]


def named(data: Data, numbers: Sequence[int]) -> list[Entry]:
    """Entries by number.

    Raises:
        DataError: for a number that there is not, or of a sample that cannot be used.
    """
    found = {entry.number: entry for entry in data.entries}
    for number in numbers:
        _refuse_unusable(data, number)
        if number not in found:
            raise DataError(f"--sample {number} is none of the data: its {data.count} samples are numbered 0 to "
                            f"{data.count - 1}.")
    known = {entry.number for entry in data.measured}
    measure(data, [found[number] for number in dict.fromkeys(numbers) if number not in known])
    for number in numbers:
        _refuse_unusable(data, number)
    return [found[number] for number in dict.fromkeys(numbers)]


def _refuse_unusable(data: Data, number: int) -> None:
    sentence = dict([*data.problems, *data.uncut]).get(number)
    if sentence:
        raise DataError(sentence)


@dataclass(frozen=True)
class Board:
    """A picture as it is cut.

    Attributes:
        path: of its file.
        size: (width, height) of the picture, or of the board of a video's frames.
        resized: of the picture on the padded board; `None` of a video.
        grid: its local tiles.
        positions: it takes.
        first: number of its global view among the sample's tiles; its local tiles follow.
        pixels: uint8 `(rows * P, columns * P, 3)`, put together of the local tiles that the model gets.
    """

    path: Path | StoredFile
    size: tuple[int, int]
    resized: tuple[int, int] | None
    grid: Grid
    positions: int
    first: int
    pixels: np.ndarray

    @property
    def video(self) -> bool:
        """Whether it is the board of a video."""
        return isinstance(self.size, BoardSize)


@dataclass(frozen=True)
class Stretch:
    """Neighbouring positions of one kind.

    Attributes:
        kind: `PICTURE`, `LEARNT` or `GIVEN`.
        first: position.
        ids: of its tokens.
    """

    kind: str
    first: int
    ids: list[int]


@dataclass(frozen=True)
class Seen:
    """A conversation as the model sees it.

    Attributes:
        encoded: what a run encodes.
        stretches: its positions by kind, each a picture's or of one kind of text.
    """

    encoded: EncodedSample
    stretches: list[Stretch]

    @property
    def positions(self) -> int:
        """Of the sequence."""
        return len(self.encoded.input_ids)

    @property
    def supervised(self) -> int:
        """Positions whose target carries loss, as a row counts them."""
        return int((shift_labels(self.encoded.labels) != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class Look:
    """A sample to be shown.

    Attributes:
        entry: the sample.
        seen: its conversation; of a pair both; empty if it cannot be encoded.
        boards: its pictures, one after the other.
        problem: why it cannot be encoded.
    """

    entry: Entry
    seen: list[Seen] = field(default_factory=list)
    boards: list[Board] = field(default_factory=list)
    problem: str = ""


def look(reader: Reader, entry: Entry) -> Look:
    """Encodes an entry as a run does; of what is too long for a row, all of it if no part of it fits."""
    sides = [first_pairs(side, entry.kept) if 0 < entry.kept < entry.rounds else side for side in entry.sides]
    images = reader.processor.image_processor
    views, tile = len(sides[0].images), 3 * images.image_size ** 2
    if not entry.kept and (entry.tiles + 4 * views) * tile > LARGEST:
        return Look(entry, problem=f"Its {views} pictures have {entry.tiles} tiles, too many to be shown.")
    try:
        cut = images.cut(list(sides[0].images), reader.hd_num, training=True, where=entry.where)
        encoded = [reader.processor.encode_conversation(side.turns, side.images, side.where, reader.hd_num, cut)
                   for side in sides]
    except (ImageError, VideoError) as error:
        return Look(entry, problem=str(error))
    return Look(entry, [Seen(one, list(_stretches(one, reader.processor))) for one in encoded],
                list(_boards(reader, sides[0], encoded[0])))


def _stretches(encoded: EncodedSample, processor: Processor) -> Iterator[Stretch]:
    """Positions by kind; pictures that stand side by side are told apart by their lengths."""
    kinds = np.where(encoded.image_mask == 1, 2, (encoded.labels != IGNORE_INDEX).astype(int))
    counts = iter([processor.image_processor.token_count(grid) for grid in encoded.grids])
    ids, first = encoded.input_ids.tolist(), 0
    while first < len(ids):
        kind = int(kinds[first])
        end = first + next(counts) if kind == 2 else \
            first + int(np.argmax(np.append(kinds[first:] != kind, True)))
        yield Stretch((GIVEN, LEARNT, PICTURE)[kind], first, ids[first:end])
        first = end


def _boards(reader: Reader, sample: Conversation, encoded: EncodedSample) -> Iterator[Board]:
    """Pictures of a sample, put together again of the tiles that the model gets."""
    images, first = reader.processor.image_processor, 0
    for path, size, grid in zip(sample.images, sample.sizes, encoded.grids):
        side, local = images.image_size, encoded.pictures.local[first + 1:first + 1 + grid.tiles]
        shaped = local.reshape(grid.rows, grid.columns, 3, side, side).transpose(0, 3, 1, 4, 2)
        pixels = shaped.reshape(grid.rows * side, grid.columns * side, 3)
        resized = None if isinstance(size, BoardSize) else plan_partition(
            *size, reader.hd_num, side, images.training_transform == "training").resized
        yield Board(path, size, resized, grid, images.token_count(grid), first, pixels)
        first += grid.tiles + 1
