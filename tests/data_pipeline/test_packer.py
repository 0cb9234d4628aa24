"""Which samples share a row, and in which order rows come: properties that hold for any sizes."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ixc.data.ordering import mix_rows
from mindformers_ixc.data.packer import Budget, Rows, pack, split_rows
from mindformers_ixc.errors import DataError


@st.composite
def pools(draw):
    """Sizes of samples, and a budget that each of them fits alone."""
    segments = draw(st.integers(2, 12))
    budget = Budget(draw(st.integers(segments, 300)), draw(st.integers(1, 12)), draw(st.integers(1, 6)), segments)
    samples = draw(st.lists(st.tuples(st.integers(1, budget.longest), st.integers(0, budget.max_tiles),
                                      st.integers(0, budget.max_images)), max_size=120))
    return np.array(samples, np.int64).reshape(-1, 3), budget


def check_rows(rows: Rows, needs: np.ndarray, budget: Budget) -> None:
    assert rows.order.dtype == rows.starts.dtype == np.int32
    assert sorted(rows.order.tolist()) == list(range(len(needs)))
    for row in rows.lists():
        positions, tiles, images = needs[row].sum(0)
        assert 1 <= len(row) <= budget.max_segments - 1
        assert positions + budget.max_segments - len(row) <= budget.seq_length
        assert tiles <= budget.max_tiles
        assert images <= budget.max_images


@settings(deadline=None)
@given(pools(), st.integers(0, 5), st.integers(1, 50))
def test_every_sample_is_in_one_row_and_the_budgets_hold(pool, seed, block):
    needs, budget = pool
    rows = pack(*needs.T, seed, **budget._asdict(), block=block)
    check_rows(rows, needs, budget)
    again = pack(*needs.T, seed, **budget._asdict(), block=block)
    np.testing.assert_array_equal(rows.order, again.order)
    np.testing.assert_array_equal(rows.starts, again.starts)
    assert len(pack(*needs.T, seed + 1, **budget._asdict(), block=block)) == len(rows)
    mixed = mix_rows(rows, np.arange(len(needs)) % 3, seed)
    assert sorted(mixed.lists()) == sorted(rows.lists())
    more = split_rows(rows, len(rows) + 5)
    check_rows(more, needs, budget)
    assert len(more) == min(len(rows) + 5, len(needs))


def test_the_order_of_the_samples_does_not_change_how_many_rows_there_are():
    rng = np.random.default_rng(0)
    needs = np.stack([rng.integers(20, 900, 3000), rng.integers(0, 7, 3000), rng.integers(0, 2, 3000)])
    budget = Budget(2048, 12, 6, 16)
    rows = [pack(*needs[:, order], seed, **budget._asdict(), block=1000)
            for seed, order in enumerate((np.arange(3000), rng.permutation(3000)))]
    assert len(rows[0]) == len(rows[1])
    assert list(rows[0].lists()) != list(rows[1].lists())


def reference_like(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and tiles, and sources, of a mixture like one of supervised fine-tuning: captions, pages, text."""
    rng = np.random.default_rng(seed)
    shares, sizes = [0.45, 0.2, 0.2, 0.15], np.array([[2091, 5], [4081, 10], [6900, 17], [0, 0]])
    source = rng.choice(4, count, p=shares)
    text = 20 + np.exp(np.log([120, 60, 60, 1100])[source] + 0.6 * rng.standard_normal(count)).astype(int)
    positions = np.minimum(sizes[source, 0] + text, 8000)
    return np.stack([positions, sizes[source, 1], (sizes[source, 1] > 0).astype(int)]), source


@pytest.mark.parametrize(("count", "seq_length", "max_tiles", "least"), [
    (3000, 16384, 36, 0.94), (3000, 9216, 20, 0.89), (30000, 16384, 36, 0.94)])      # 35 tiles are the most that fit
def test_both_budgets_are_filled(count, seq_length, max_tiles, least):
    (positions, tiles, images), _ = reference_like(count, 1)
    rows = pack(positions, tiles, images, 0, seq_length=seq_length, max_tiles=max_tiles, max_images=12,
                max_segments=32)
    needed = max(positions.sum() / seq_length, tiles.sum() / max_tiles)      # rows at least, whoever packs
    assert needed / len(rows) > least


def test_text_only_samples_fill_the_positions_that_pictures_leave():
    positions, tiles = np.array([700] * 10 + [200] * 10), np.array([4] * 10 + [0] * 10)
    rows = pack(positions, tiles, (tiles > 0).astype(int), 0, seq_length=910, max_tiles=4, max_images=2, max_segments=8)
    assert len(rows) == 10
    assert all(sorted(tiles[row].tolist()) == [0, 4] for row in rows.lists())


def test_short_texts_are_not_left_over_where_segments_are_few():
    rng = np.random.default_rng(0)
    positions = np.minimum(np.exp(np.log(600) + 0.8 * rng.standard_normal(4000)).astype(int) + 20, 16000)
    none = np.zeros(4000, int)
    rows = pack(positions, none, none, 0, seq_length=16384, max_tiles=1, max_images=1, max_segments=32)
    assert len(rows) < 1.01 * positions.sum() / 16384


@pytest.mark.parametrize(("positions", "tiles", "rows"), [
    ([], [], 0), ([57], [3], 1), ([57] * 9, [0] * 9, 9), ([10] * 20, [0] * 20, 4), ([1] * 20, [1] * 20, 7)])
def test_degenerate_pools(positions, tiles, rows):
    packed = pack(np.array(positions), np.array(tiles), np.array(tiles) // 2, 3, seq_length=64, max_tiles=3,
                  max_images=2, max_segments=8)
    assert len(packed) == rows


@pytest.mark.parametrize(("sample", "message"), [
    ((58, 0, 0), "Sample 1 needs 58 positions.*max_segments 8 has room for 57"),
    ((5, 4, 1), "Sample 1 needs 4 tiles.*room for 3"), ((5, 3, 3), "Sample 1 needs 3 pictures.*room for 2")])
def test_a_sample_that_fits_no_row_is_refused(sample, message):
    positions, tiles, images = np.array([(5, 0, 0), sample]).T
    with pytest.raises(DataError, match=message):
        pack(positions, tiles, images, 0, seq_length=64, max_tiles=3, max_images=2, max_segments=8)


@pytest.mark.parametrize(("seq_length", "max_segments"), [(31, 32), (64, 1)])
def test_rows_without_room_are_refused(seq_length, max_segments):
    with pytest.raises(DataError, match=f"seq_length {seq_length} with max_segments {max_segments} hold no sample"):
        pack(np.ones(3), np.zeros(3), np.zeros(3), 0, seq_length=seq_length, max_tiles=1, max_images=1,
             max_segments=max_segments)


def worst_deviation(rows: Rows, source: np.ndarray, stretch: int = 200) -> float:
    """Of any so many consecutive rows, how far a source is off its share, in standard deviations of its samples."""
    numbers = np.zeros((len(rows) + 1, source.max() + 1))
    np.add.at(numbers, (rows.row_numbers() + 1, source[rows.order]), 1)
    shares = numbers.sum(0) / numbers.sum()
    total = np.cumsum(numbers, 0)
    window = total[stretch:] - total[:-stretch]
    samples = window.sum(1, keepdims=True)
    return float(np.max(np.abs(window - samples * shares) / np.sqrt(samples * shares * (1 - shares))))


def test_any_200_rows_hold_the_mixture():
    (positions, tiles, images), source = reference_like(30000, 2)
    source = np.where(np.random.default_rng(0).random(30000) < 0.002, 4, source)        # a rare source too
    rows = pack(positions, tiles, images, 0, seq_length=16384, max_tiles=36, max_images=12, max_segments=32)
    mixed = mix_rows(rows, source, 0)
    assert worst_deviation(mixed, source) < 3
    assert worst_deviation(rows.take(np.random.default_rng(0).permutation(len(rows))), source) > 3, "a shuffle is worse"
    assert list(mixed.lists()) != list(mix_rows(rows, source, 1).lists())
    same = mix_rows(rows, source, 0)
    np.testing.assert_array_equal(mixed.order, same.order)


def test_rows_of_one_source_each_take_turns():
    rows = Rows(np.arange(3000, dtype=np.int32), np.arange(0, 3001, 3, dtype=np.int32))
    source = np.repeat([0, 1], [1500, 1500])
    assert worst_deviation(mix_rows(rows, source, 0), source) < 1


def test_rows_with_most_samples_are_split():
    rows = Rows(np.arange(10, dtype=np.int32), np.array([0, 1, 7, 10], np.int32))
    assert np.diff(split_rows(rows, 5).starts).tolist() == [1, 1, 2, 3, 3]
    assert len(split_rows(rows, 99)) == 10
