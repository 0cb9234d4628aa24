"""In which order packed rows come: by chance, and every stretch of them with the mixture of the whole.

A plain shuffle does not do: a row often holds several samples of one source, so the numbers of sources in a stretch of
rows would vary more than if its samples had been drawn one by one. Here the rows are halved again and again until
single rows are left, and every time both halves get nearly the same samples: rows that hold alike stand side by side,
of each two neighbours one goes to either half, and the differences between such pairs are set against each other.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mindformers_ixc.data.columns import blocks, count_values, sorted_by, unmap
from mindformers_ixc.data.packer import PART, Rows

# Nodes of more rows are halved by matching equal differences, at once for all pairs; in smaller ones the side of each
# pair is chosen by what the pairs before it have done. Stretches of a few hundred rows depend on the smaller ones.
SMALL_NODE = 2048

# Rows whose contents are held as vectors at a time, which bounds the memory.
CHUNK = 16384


def mix_rows(rows: Rows, sources: np.ndarray, seed: int) -> Rows:
    """Rows in an order by chance in which every stretch has about the mixture of the whole.

    Args:
        rows: of samples.
        sources: number of the source of each sample, from 0.
        seed: of the order.

    Returns:
        The same rows in another order.
    """
    count = len(rows)
    if count < 2:
        return rows
    rng = np.random.default_rng([seed & 0xFFFFFFFF, count])
    held = _Contents(rows, np.asanyarray(sources))
    order = np.arange(count, dtype=np.int32)
    rng.shuffle(order)
    order = sorted_by(order, *held.sorting_keys())
    # equal differences of these numbers are, almost surely, equal differences of what rows hold
    mark = held.weighed(rng.random(held.sources))
    levels = int(count - 1).bit_length()
    path = np.zeros(count, np.int32)              # which half, and which half of that, and so on
    level = 0
    while count >> level > SMALL_NODE:
        order, path = _apply(order, path, _match(order, path, mark, rng))
        level += 1
    ends = np.concatenate([np.flatnonzero(np.diff(path)) + 1, [count]])
    first = 0
    while first < count:                          # whole nodes, about CHUNK rows of them
        end = int(ends[min(int(np.searchsorted(ends, first + CHUNK)), len(ends) - 1)])
        order[first:end] = _halve_small(order[first:end], path[first:end], levels - level, held, rng)
        first = end
    return rows.take(order)


class _Contents:
    """How many samples of each source rows hold; what is not 0 only.

    Args:
        rows: of samples.
        sources: of each sample.

    Attributes:
        sources: their number.
        starts: where the entries of each row begin, and the end.
        source: of each entry.
        number: of samples, of each entry.
        shares: of each source, of all samples.
    """

    def __init__(self, rows: Rows, sources: np.ndarray):
        counts = count_values(sources, rows.order)
        self.rows, self.sources, self.shares = len(rows), len(counts), counts / len(rows.order)
        small = [np.min_scalar_type(most) for most in (self.sources, int(np.diff(rows.starts).max()))]
        entries, source, number = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
        for part in rows.parts():
            pairs, times = np.unique(part.row_numbers() * self.sources + sources[part.order], return_counts=True)
            entries.append(np.bincount(pairs // self.sources, minlength=len(part)).astype(np.int32))
            source.append((pairs % self.sources).astype(small[0]))
            number.append(times.astype(small[1]))
        unmap(sources)
        self.source, self.number = np.concatenate(source), np.concatenate(number)
        self.starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(np.concatenate(entries), dtype=np.int32, out=self.starts[1:])

    def _parts(self) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Some rows at a time: these, their entries, and for each entry its row among them."""
        for rows in blocks(self.rows, PART):
            starts = self.starts[rows.start:rows.stop + 1]
            yield rows, slice(int(starts[0]), int(starts[-1])), np.repeat(np.arange(len(starts) - 1), np.diff(starts))

    def weighed(self, weights: np.ndarray) -> np.ndarray:
        """What rows hold, each source by its weight, float64 `(rows,)`."""
        return np.concatenate([np.bincount(row, weights[self.source[entries]] * self.number[entries],
                                           rows.stop - rows.start) for rows, entries, row in self._parts()])

    def sorting_keys(self) -> list[np.ndarray]:
        """Columns that bring rows together that hold alike, the most important one first.

        Compared are the two sources of which a row holds most, measured by the noise that chance would give.
        """
        keys, step = [np.zeros(self.rows, np.int32) for _ in range(2)], int(self.number.max()) + 1
        for rows, entries, row in self._parts():
            source, number = self.source[entries].astype(np.int64), self.number[entries].astype(np.int64)
            order = np.lexsort((source, -number / np.sqrt(self.shares[source]), row))
            place = np.arange(len(order)) - (self.starts[rows] - entries.start)[row]
            for wanted, key in enumerate(keys):
                chosen = order[place == wanted]
                key[rows][row[chosen]] = (source[chosen] + 1) * step + number[chosen]
        return keys

    def deviations(self, rows: np.ndarray) -> np.ndarray:
        """What rows have beyond the shares of the sources, float32 `(rows, sources)`; 1 is the noise of a sample."""
        lengths = self.starts[rows + 1] - self.starts[rows]
        first = np.repeat(self.starts[rows] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
        entries = first + np.arange(lengths.sum())
        numbers = np.zeros((len(rows), self.sources), np.float32)
        numbers[np.repeat(np.arange(len(rows)), lengths), self.source[entries]] = self.number[entries]
        numbers -= numbers.sum(1, keepdims=True) * self.shares.astype(np.float32)
        return numbers / np.sqrt(np.maximum(self.shares * (1 - self.shares), 1e-12)).astype(np.float32)


class _Pairs:
    """Neighbours in the nodes that a path makes, and what has none.

    Args:
        path: of each row; equal ones, which stand side by side, make a node.
    """

    def __init__(self, path: np.ndarray):
        new = np.concatenate([[True], path[1:] != path[:-1]])
        first = np.flatnonzero(new)
        node = np.cumsum(new, dtype=np.int32) - np.int32(1)
        within = np.arange(len(path), dtype=np.int32) - first[node].astype(np.int32)
        partner = within + 1 < np.diff(np.append(first, len(path)))[node]
        self.nodes = len(first)
        self.left = np.flatnonzero((within % 2 == 0) & partner)          # place of the first of each pair
        self.single = np.flatnonzero((within % 2 == 0) & ~partner)
        self.node, self.single_node = node[self.left], node[self.single]

    def rank(self, order: np.ndarray) -> np.ndarray:
        """Place of each pair in its node, the pairs taken in an order that is sorted by nodes."""
        nodes = self.node[order]
        return np.arange(len(nodes)) - np.searchsorted(nodes, nodes)


def _apply(order: np.ndarray, path: np.ndarray, side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order and path after every row has gone to a side; equal ones keep their order, which is sorted by contents."""
    path = path * 2 + side
    moved = np.argsort(path, kind="stable")
    return order[moved], path[moved]


def _match(order: np.ndarray, path: np.ndarray, mark: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sides by matching: of two pairs with equal differences one goes the other way round."""
    pairs = _Pairs(path)
    difference = mark[order[pairs.left]] - mark[order[pairs.left + 1]]
    alike = np.lexsort((rng.random(len(difference)), np.abs(difference), pairs.node))
    turn = (pairs.rank(alike) + rng.integers(0, 2, pairs.nodes)[pairs.node[alike]]) % 2
    turn = np.where(difference[alike] < 0, 1 - turn, turn)
    side = np.zeros(len(order), np.int8)
    side[pairs.left[alike]], side[pairs.left[alike] + 1] = turn, 1 - turn
    side[pairs.single] = rng.integers(0, 2, len(pairs.single))
    return side


def _halve_small(order: np.ndarray, path: np.ndarray, levels: int, held: _Contents,
                 rng: np.random.Generator) -> np.ndarray:
    """Order of rows whose nodes are halved down to single rows."""
    places, contents = np.arange(len(order)), held.deviations(order)
    for _ in range(levels):
        places, path = _apply(places, path, _balance(places, path, contents, rng))
    return order[places]


def _balance(places: np.ndarray, path: np.ndarray, contents: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sides pair by pair, in all nodes at once: each pair goes the way that brings the halves of its node together.

    Args:
        places: of the rows in `contents`.
        path: of each row.
        contents: deviations of rows.
        rng: where both ways are as good.
    """
    pairs = _Pairs(path)
    difference = contents[places[pairs.left]] - contents[places[pairs.left + 1]]
    largest_first = np.lexsort((-(difference ** 2).sum(1), pairs.node))
    rank = pairs.rank(largest_first)
    turns = largest_first[np.argsort(rank, kind="stable")]
    ends = np.cumsum(np.bincount(rank)) if len(rank) else rank
    side = np.zeros(len(places), np.int8)
    gap = np.zeros((pairs.nodes, contents.shape[1]), np.float32)      # first half less second
    first = 0
    for end in ends:
        now = turns[first:end]
        node, step = pairs.node[now], difference[now]
        dot = (gap[node] * step).sum(1)
        sign = np.where(dot == 0, rng.integers(0, 2, len(now)) * 2 - 1, -np.sign(dot)).astype(np.float32)
        gap[node] += sign[:, None] * step
        side[pairs.left[now]], side[pairs.left[now] + 1] = sign < 0, sign > 0
        first = end
    dot = (gap[pairs.single_node] * contents[places[pairs.single]]).sum(1)
    side[pairs.single] = np.where(dot == 0, rng.integers(0, 2, len(dot)), dot > 0)
    return side
