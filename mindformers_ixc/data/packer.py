"""Which samples share a row: pure functions over arrays of numbers.

A row has four budgets: positions, tiles, pictures and segments. Its padding is cut into non-empty segments too
(`mindformers_ixc.data.batch`), so n samples fit when n is below `max_segments` and their positions and
`max_segments` - n more are within `seq_length`. In other words, the positions of each sample less one must add up to at
most `seq_length` - `max_segments`.

`pack` makes classes of samples that are nearly of one size and looks for one row of classes at a time, which it then
makes as often as there are samples. So its time grows with the number of classes of a block, a few thousand, and with
n log n only for sorting.
"""
from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappush, heapreplace
from typing import NamedTuple

import numpy as np

from mindformers_ixc.data.columns import blocks, highest, sorted_by, unmap
from mindformers_ixc.errors import DataError

# Samples that are packed among themselves: rows get no fuller in larger blocks, and the memory stays small.
BLOCK = 65536

# Rows that are worked on together.
PART = 1 << 16

# Classes of a block, about; and samples of a class at most. More classes fill rows no better.
CLASSES, CLASS_SIZE = 2048, 32

# Segments are scarce when the samples left need this share of the rows that their positions or tiles need.
SEGMENTS_SCARCE = 0.9

# Samples for a row's second place that are tried to the row's end.
TRIED_SECONDS = 8

# The scarcer of positions and tiles counts more when a row is filled, by this power of the ratio; found by trying.
SCARCITY = 4


def longest_sample(seq_length: int, max_segments: int) -> int:
    """Positions of a sample that fits a packed row, see `Budget.longest`."""
    return seq_length - max_segments + 1


class Budget(NamedTuple):
    """What a row holds at most.

    Attributes:
        seq_length: positions.
        max_tiles: tiles, global views included.
        max_images: pictures.
        max_segments: samples and segments of padding, exactly as many.
    """

    seq_length: int
    max_tiles: int
    max_images: int
    max_segments: int

    @property
    def longest(self) -> int:
        """Positions of a sample at most: alone in a row it has `max_segments` - 1 segments of padding behind it."""
        return longest_sample(self.seq_length, self.max_segments)

    def check(self) -> None:
        """Checks that a row holds anything at all.

        Raises:
            DataError: when it does not.
        """
        if self.max_segments < 2 or self.longest < 1:
            raise DataError(f"Rows of seq_length {self.seq_length} with max_segments {self.max_segments} hold no "
                            "sample: max_segments must be at least 2 (a sample and its padding) and seq_length at "
                            "least as much; raise seq_length or lower max_segments.")


@dataclass(frozen=True)
class Rows:
    """Rows of sample indices, one after the other.

    Attributes:
        order: int32 `(n,)`, samples of all rows.
        starts: int32 `(rows + 1,)`, where each row begins in `order`, and the end.
    """

    order: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.starts) - 1

    def row(self, number: int) -> list[int]:
        """Samples of a row."""
        return self.order[self.starts[number]:self.starts[number + 1]].tolist()

    def parts(self, rows: int = PART) -> Iterator[Rows]:
        """The rows, so many at a time."""
        for part in blocks(len(self), rows):
            first, end = self.starts[part.start], self.starts[part.stop]
            yield Rows(self.order[first:end], self.starts[part.start:part.stop + 1] - first)

    def lists(self) -> Iterator[list[int]]:
        """Samples of every row."""
        return (self.row(number) for number in range(len(self)))

    def row_numbers(self) -> np.ndarray:
        """Number of the row of each entry of `order`, int64 `(n,)`."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def take(self, numbers: np.ndarray) -> Rows:
        """The rows of the given numbers, in their order."""
        lengths = np.diff(self.starts)
        starts = np.zeros(len(numbers) + 1, np.int32)
        np.cumsum(lengths[numbers], dtype=np.int32, out=starts[1:])
        order = np.empty(starts[-1], self.order.dtype)
        for part in blocks(len(numbers), PART):
            chosen, first, end = numbers[part], starts[part.start], starts[part.stop]
            moved = np.repeat(self.starts[chosen] - starts[part], lengths[chosen])
            order[first:end] = self.order[moved + np.arange(first, end)]
        return Rows(order, starts)


def pack(positions: np.ndarray, tiles: np.ndarray, images: np.ndarray, seed: int, *, seq_length: int, max_tiles: int,
         max_images: int, max_segments: int, block: int = BLOCK, drawn: np.ndarray | None = None) -> Rows:
    """Rows of several samples that fill both positions and tiles.

    Each row begins with the sample that is largest by the budgets and takes what then leaves the least room, by both
    budgets at once: where pictures have taken the tiles, text fills the positions. For the second place the
    numbers of tiles that suit best are all tried to the end.

    The number of rows depends on the sizes only, not on the seed or the order of the samples.

    Args:
        positions: of each sample, whole numbers `(n,)`.
        tiles: of each sample, global views included.
        images: pictures of each sample.
        seed: chooses among samples of one size.
        seq_length: see `Budget`.
        max_tiles: see `Budget`.
        max_images: see `Budget`.
        max_segments: see `Budget`.
        block: samples that are packed among themselves at most.
        drawn: indices of the samples that are packed, int32, each as often as it is drawn; by default all, once.

    Returns:
        Rows in which every sample is once, or as often as it is drawn, as indices into the arrays.

    Raises:
        DataError: when a sample does not fit alone.
    """
    budget = Budget(seq_length, max_tiles, max_images, max_segments)
    positions, tiles, images = (np.asanyarray(values).astype(np.int32, copy=False)
                                for values in (positions, tiles, images))
    _check_fit(positions, tiles, images, budget)
    shuffled = np.arange(len(positions), dtype=np.int32) if drawn is None else np.array(drawn, np.int32)
    count = len(shuffled)
    if count == 0:
        return Rows(np.zeros(0, np.int32), np.zeros(1, np.int32))
    np.random.default_rng([seed & 0xFFFFFFFF, count]).shuffle(shuffled)
    sizes = _Sizes(positions, tiles, images)
    by_size = sorted_by(shuffled, sizes.codes)
    del shuffled
    number = -(-count // block)
    order, end, lengths = np.empty(count, np.int32), 0, []
    for first in range(number):        # every block has the sizes of the whole
        members = by_size[first::number]
        places, length = _pack_block(*sizes.at(members), budget)
        order[end:end + len(members)] = members[places]
        lengths.append(length.astype(np.int32))
        end += len(members)
    starts = np.zeros(sum(map(len, lengths)) + 1, np.int32)
    np.cumsum(np.concatenate(lengths), dtype=np.int32, out=starts[1:])
    return Rows(order, starts)


def _check_fit(positions: np.ndarray, tiles: np.ndarray, images: np.ndarray, budget: Budget) -> None:
    budget.check()
    for name, values, most in (("positions", positions, budget.longest), ("tiles", tiles, budget.max_tiles),
                               ("pictures", images, budget.max_images)):
        if len(values) and highest(values) > most:
            place = int(np.argmax(values))
            raise DataError(f"Sample {place} needs {values[place]} {name}, but a row of seq_length "
                            f"{budget.seq_length}, max_tiles {budget.max_tiles}, max_images {budget.max_images} and "
                            f"max_segments {budget.max_segments} has room for {most}; raise the budget of rows.")


class _Sizes:
    """Sizes of samples, one number for each, which is larger the more tiles, then positions, then pictures it has.

    Columns that are mapped into memory are read once, from the first to the last.

    Args:
        positions: of each sample.
        tiles: of each sample.
        images: of each sample.
    """

    def __init__(self, positions: np.ndarray, tiles: np.ndarray, images: np.ndarray):
        self.steps = highest(positions) + 1, highest(images) + 1
        most = (highest(tiles) + 1) * self.steps[0] * self.steps[1]
        self.codes = np.empty(len(positions), np.uint32 if most <= 1 << 32 else np.int64)
        for part in blocks(len(positions)):
            code = tiles[part].astype(np.int64) * self.steps[0] + positions[part]
            self.codes[part] = code * self.steps[1] + images[part]
            unmap(positions, tiles, images)

    def at(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, tiles and pictures of some samples, int32."""
        rest, images = np.divmod(self.codes[places].astype(np.int64), self.steps[1])
        tiles, positions = np.divmod(rest, self.steps[0])
        return positions.astype(np.int32), tiles.astype(np.int32), images.astype(np.int32)


class _Class(NamedTuple):
    """Samples of about one size: the largest of them, and which they are."""

    positions: int       # less one
    images: int
    number: int


def _pack_block(positions: np.ndarray, tiles: np.ndarray, images: np.ndarray,
                budget: Budget) -> tuple[np.ndarray, np.ndarray]:
    """Order of the samples, sorted by tiles and positions, and the lengths of rows in it."""
    size = max(1, min(CLASS_SIZE, len(positions) // CLASSES))
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(tiles)) + 1, [len(tiles)]])
    starts = np.concatenate([np.arange(first, end, size) for first, end in zip(cuts[:-1], cuts[1:])])
    ends = np.append(starts[1:], len(positions))
    finder = _RowFinder(positions[ends - 1] - 1, tiles[starts], np.maximum.reduceat(images, starts), ends - starts,
                        budget)
    taken = starts.copy()
    pieces, lengths = [], []
    for times, row in finder:
        # members of a class one after the other: row i of this kind takes the i-th of each
        columns = []
        for number, repeats in Counter(row).items():
            stop = taken[number] + times * repeats
            columns.append(np.arange(taken[number], stop).reshape(times, repeats))
            taken[number] = stop
        pieces.append(np.concatenate(columns, axis=1).reshape(-1))
        lengths.append(np.full(times, len(row)))
    return np.concatenate(pieces), np.concatenate(lengths)


class _RowFinder:
    """Finds rows of classes until no sample is left.

    Args:
        positions: of each class, less one; ascending among equal tiles.
        tiles: of each class, ascending.
        images: of each class.
        counts: samples of each class.
        budget: of a row.
    """

    def __init__(self, positions: np.ndarray, tiles: np.ndarray, images: np.ndarray, counts: np.ndarray,
                 budget: Budget):
        self.budget, self.room = budget, max(1, budget.seq_length - budget.max_segments)
        self.sizes, self.tiles = positions.tolist(), tiles.tolist()
        self.left = counts.tolist()
        # what is left over all samples
        self.samples_left = int(counts.sum())
        self.positions_left = int((positions.astype(np.int64) * counts).sum())
        self.tiles_left = int((tiles.astype(np.int64) * counts).sum())
        self.groups: dict[int, list[_Class]] = {}        # by tiles
        for number, entry in enumerate(zip(self.sizes, images.tolist())):
            self.groups.setdefault(self.tiles[number], []).append(_Class(*entry, number))
        self.fewest = {tiles: min(entry.images for entry in group) for tiles, group in self.groups.items()}

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        while self.groups:
            row = self._find()
            repeats = Counter(row)
            times = min(self.left[number] // count for number, count in repeats.items())
            for number, count in repeats.items():
                self._remove(number, times * count)
            yield times, row

    def _remove(self, number: int, count: int) -> None:
        self.left[number] -= count
        self.samples_left -= count
        self.positions_left -= count * self.sizes[number]
        self.tiles_left -= count * self.tiles[number]
        if self.left[number] == 0:
            group = self.groups[self.tiles[number]]
            del group[next(i for i, entry in enumerate(group) if entry.number == number)]
            if not group:
                del self.groups[self.tiles[number]]

    def _find(self) -> list[int]:
        """Classes of the next row."""
        by_positions = self.positions_left / self.room          # rows that what is left would fill
        by_tiles = self.tiles_left / max(1, self.budget.max_tiles)
        rows = max(by_positions, by_tiles, 1e-9)
        # of positions and tiles, that of the squares of what is left free counts
        self.weights = ((by_positions / rows) ** SCARCITY / self.room ** 2,
                        (by_tiles / rows) ** SCARCITY / max(1, self.budget.max_tiles) ** 2)
        self.segments_scarce = self.samples_left / (self.budget.max_segments - 1) > SEGMENTS_SCARCE * rows
        empty = (self.room, self.budget.max_tiles, self.budget.max_images)
        first = min(self._choices(empty, []))
        room, row = _after(empty, first), [first[-1]]
        seconds = sorted(self._choices(room, row))[:TRIED_SECONDS]
        ends = [self._fill(_after(room, second), [*row, second[-1]]) for second in seconds]
        return min(ends)[1] if ends else row

    def _fill(self, room: tuple[int, int, int], row: list[int]) -> tuple[float, list[int]]:
        """Adds to a row while anything fits; also how much room is left, in rows."""
        while choices := self._choices(room, row):
            best = min(choices)
            room = _after(room, best)
            row = [*row, best[-1]]
        return room[0] / self.room + room[1] / max(1, self.budget.max_tiles), row

    def _choices(self, room: tuple[int, int, int], row: list[int]) -> list[tuple[float, int, int, int, int]]:
        """Of each number of tiles the longest class that fits: its score, tiles, positions, images and number."""
        choices: list[tuple[float, int, int, int, int]] = []
        if len(row) >= self.budget.max_segments - 1:
            return choices
        positions, tiles, images = room
        # short samples must not be left over for rows of nothing else, which end before they are full
        even = positions / (self.budget.max_segments - 1 - len(row)) if row and self.segments_scarce else positions
        for count, group in self.groups.items():
            if count > tiles or self.fewest[count] > images:
                continue
            most = even if group[0].positions <= even else positions
            place = bisect_right(group, (most, images, len(self.left))) - 1
            while place >= 0 and (group[place].images > images
                                  or self.left[group[place].number] <= row.count(group[place].number)):
                place -= 1
            if place >= 0:
                size, pictures, number = group[place]
                score = (self.weights[0] * (positions - size) ** 2 + self.weights[1] * (tiles - count) ** 2)
                choices.append((score, count, size, pictures, number))
        return choices


def _after(room: tuple[int, int, int], choice: tuple[float, int, int, int, int]) -> tuple[int, int, int]:
    return room[0] - choice[2], room[1] - choice[1], room[2] - choice[3]


def split_rows(rows: Rows, count: int) -> Rows:
    """As many rows as are asked for: those of most samples are halved, as often as it takes.

    Args:
        rows: fewer than `count`; what fits in a row fits in two.
        count: rows there must be.

    Returns:
        `count` rows; fewer when each has one sample.
    """
    missing = count - len(rows)
    heap = [(-length, start) for length, start in _longest(rows, missing)]
    heapify(heap)
    cuts = list[int]()
    while heap and heap[0][0] < -1 and len(cuts) < missing:
        length, start = heap[0]
        half = -length // 2
        heapreplace(heap, (-half, start))
        cuts.append(start + half)
        heappush(heap, (length + half, start + half))
    return Rows(rows.order, np.sort(np.concatenate([rows.starts, np.array(cuts, np.int32)])).astype(np.int32))


def _longest(rows: Rows, count: int) -> list[tuple[int, int]]:
    """Length and start of as many rows, those of most samples, and of equal ones the first; others are not halved."""
    lengths = np.diff(rows.starts)
    counts = np.cumsum(np.bincount(lengths)[::-1])[::-1]        # rows of so many samples and more
    shortest = max(1, int(np.searchsorted(-counts, -count, side="right")) - 1)
    longer = np.flatnonzero(lengths > shortest)
    chosen = np.concatenate([longer, np.flatnonzero(lengths == shortest)[:max(0, count - len(longer))]])
    return list(zip(lengths[chosen].tolist(), rows.starts[chosen].tolist()))
