"""Work on columns block by block: what NumPy and Python say of the whole, and nothing else."""
from __future__ import annotations

import multiprocessing
import random
from heapq import heapify, heappush, heapreplace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexed import resample

from mindformers_ixc.data import columns, packer
from mindformers_ixc.data.columns import count_values, highest, places_where, sorted_by
from mindformers_ixc.data.drawing import resampled, sampled
from mindformers_ixc.data.packer import Budget, Rows, pack, split_rows
from mindformers_ixc.data.rows import SharedFlags


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of a few entries, so that there are several."""
    monkeypatch.setattr(columns.blocks, "__defaults__", (7,))
    monkeypatch.setattr(Rows.parts, "__defaults__", (3,))


numbers = st.lists(st.integers(0, 9), max_size=60).map(lambda values: np.array(values, np.int64))


@given(numbers, st.integers(0, 9), st.integers(0, 12))
def test_counting_and_finding(column, value, least):
    np.testing.assert_array_equal(places_where(column, value), np.flatnonzero(column == value))
    np.testing.assert_array_equal(count_values(column, least=least), np.bincount(column, minlength=least))
    if len(column):
        at = np.arange(0, len(column), 2).repeat(3)
        np.testing.assert_array_equal(count_values(column, at), np.bincount(column[at]))
        assert highest(column) == column.max()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=60), st.integers(0, 9), st.booleans())
def test_sorting_is_that_of_numpy(values, seed, large):
    first, second = np.array(values, np.int64).reshape(-1, 2).T
    if large:                # numbers that do not fit one number together
        first = first << 60
    places = np.random.default_rng(seed).permutation(len(values)).astype(np.int32)
    found = sorted_by(places.copy(), first, second)
    np.testing.assert_array_equal(found, places[np.lexsort((second[places], first[places]))])
    assert found.dtype == np.int32


@given(st.integers(1, 400), st.data(), st.integers(0, 9))
def test_drawing_is_that_of_python(count, data, seed):
    drawn = data.draw(st.integers(0, count))
    ours, theirs = random.Random(seed), random.Random(seed)
    assert sampled(count, drawn, ours).tolist() == theirs.sample(range(count), drawn)
    assert ours.random() == theirs.random()
    drawn = data.draw(st.integers(0, 3 * count))
    assert resampled(count, drawn, ours).tolist() == resample(range(count), drawn, theirs)


def resident(path: Path) -> int:
    """Kilobytes of a file that this process has mapped and looked at."""
    found, of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            of_file = line.endswith(str(path))
        elif of_file and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says what is mapped")
def test_what_was_looked_at_of_a_file_is_let_go_of(tmp_path):
    np.save(tmp_path / "column.npy", np.arange(200_000))
    column = np.load(tmp_path / "column.npy", mmap_mode="r")
    assert column[::2].sum() == sum(range(0, 200_000, 2))
    assert resident(tmp_path / "column.npy") > 1500
    columns.unmap(column[::2], np.arange(3))
    assert resident(tmp_path / "column.npy") == 0
    assert highest(column) == 199_999
    assert resident(tmp_path / "column.npy") == 0


def halved(rows: Rows, count: int) -> list[int]:
    """Where rows begin after those of most samples were halved, by a heap of all."""
    heap = [(-length, start) for length, start in zip(np.diff(rows.starts).tolist(), rows.starts.tolist())]
    heapify(heap)
    starts = rows.starts.tolist()
    while heap and heap[0][0] < -1 and len(heap) < count:
        length, start = heap[0]
        half = -length // 2
        heapreplace(heap, (-half, start))
        heappush(heap, (length + half, start + half))
        starts.append(start + half)
    return sorted(starts)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(0, 60))
def test_the_longest_rows_are_halved(lengths, more):
    rows = Rows(np.arange(sum(lengths), dtype=np.int32), np.cumsum([0, *lengths]).astype(np.int32))
    assert split_rows(rows, len(rows) + more).starts.tolist() == halved(rows, len(rows) + more)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.integers(0, 9))
def test_rows_in_parts_and_in_another_order_are_the_rows(lengths, seed):
    order = np.random.default_rng(seed).permutation(sum(lengths)).astype(np.int32)
    rows = Rows(order, np.cumsum([0, *lengths]).astype(np.int32))
    listed = list(rows.lists())
    assert [row for part in rows.parts() for row in part.lists()] == listed
    places = np.random.default_rng(seed + 1).integers(0, len(rows), 20)
    assert list(rows.take(places).lists()) == [listed[place] for place in places]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=50),
       st.integers(0, 9))
def test_drawn_samples_are_packed_as_if_there_were_no_others(sizes, seed):
    sizes, budget = np.array(sizes), Budget(80, 8, 4, 8)
    drawn = np.random.default_rng(seed).integers(0, len(sizes), 40).astype(np.int32)
    found = pack(*sizes.T, seed, **budget._asdict(), block=9, drawn=drawn)
    alone = pack(*sizes[drawn].T, seed, **budget._asdict(), block=9)
    np.testing.assert_array_equal(found.starts, alone.starts)
    np.testing.assert_array_equal(found.order, drawn[alone.order])


def test_samples_are_sorted_by_size_and_shuffled_where_it_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 5, (300, 3))
    seen = []
    block = packer._pack_block
    monkeypatch.setattr(packer, "_pack_block", lambda *needs: seen.append(needs) or block(*needs))
    rows = pack(*sizes.T, 3, seq_length=40, max_tiles=8, max_images=8, max_segments=8)
    shuffled = np.random.default_rng([3, 300]).permutation(300)
    positions, tiles, images = sizes[shuffled].T
    by_size = shuffled[np.lexsort((images, positions, tiles))]
    np.testing.assert_array_equal(np.stack(seen[0][:3], 1), sizes[by_size])
    places, _ = block(*seen[0])
    np.testing.assert_array_equal(rows.order, by_size[places])


def _raise(flags: SharedFlags, places: range) -> None:
    for place in places:
        flags.set(place)


def test_flags_are_counted_once_whoever_raises_them():
    flags = SharedFlags(1003)
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_raise, args=(flags, range(start, 1003, 3))) for start in (0, 0, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [place for place in range(1003) if flags[place]] == [place for place in range(1003) if place % 3 != 1]
    assert flags.count() == 1003 - len(range(1, 1003, 3))
