"""Epoch plans: pure functions, so properties are stated for any sizes."""
from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ixc.data.mixture import make_planner, mixture_weights
from mindformers_ixc.data.packed_plan import Packing
from mindformers_ixc.data.packer import Budget
from mindformers_ixc.data.sampling import (
    MixtureSource,
    PlanSampler,
    plan_batches,
    plan_epoch,
    plan_mixture,
    spread,
)
from mindformers_ixc.errors import DataError


@st.composite
def kinds(draw):
    multimodal, text = draw(st.integers(0, 30)), draw(st.integers(0, 30))
    return [list(range(multimodal)), list(range(100, 100 + text))]


@given(kinds(), st.integers(1, 7), st.integers(0, 5), st.integers(0, 3), st.booleans(), st.booleans())
def test_batches_are_full_unmixed_and_fair(groups, size, seed, epoch, shuffle, drop):
    batches = plan_epoch(groups, size, seed, epoch, shuffle, drop)
    assert all(len(batch) == size for batch in batches)
    assert all(len({index >= 100 for index in batch}) == 1 for batch in batches)
    seen = Counter(index for batch in batches for index in batch)
    for group in groups:
        times = [seen[index] for index in group]
        if len(group) % size == 0:
            assert set(times) <= {1}
        elif len(group) > size and drop:
            assert set(times) <= {0, 1}
            assert times.count(0) == len(group) % size
        else:
            assert all(times)
            assert max(times) - min(times) <= 1


@given(kinds(), st.integers(1, 5))
def test_kinds_alternate_while_both_last(groups, size):
    batches = [batch[0] >= 100 for batch in plan_epoch(groups, size, 0, 0, True)]
    both = 2 * min(batches.count(True), batches.count(False))
    assert all(first != second for first, second in zip(batches[:both], batches[1:both]))


@given(st.integers(20, 40), st.integers(0, 9))
def test_order_depends_on_seed_and_epoch_only(count, seed):
    groups = [list(range(count)), []]
    def order(seed, epoch, shuffle=True):
        return plan_epoch(groups, 4, seed, epoch, shuffle).tolist()

    assert order(seed, 3) == order(seed, 3)
    assert order(seed, 3) != order(seed, 4)
    assert order(seed, 3) != order(seed + 1, 3)
    assert order(seed, 3, False) == order(seed, 4, False)


def sampler(groups, size, seed=7, shard=(0, 1)):
    plan = plan_batches(lambda batch, epoch: plan_epoch(groups, batch, seed, epoch, True), size * shard[1])
    return PlanSampler(plan, size, shard)


@given(kinds(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_ranks_share_global_batches_without_overlap(groups, size, ranks, epoch):
    whole = [index for batch in plan_epoch(groups, size * ranks, 7, epoch, True) for index in batch]
    samplers = [sampler(groups, size, shard=(rank, ranks)) for rank in range(ranks)]
    places = [one.places(epoch) for one in samplers]
    steps = len(whole) // (size * ranks)
    joined = [places[rank][step * size + i] for step in range(steps) for rank in range(ranks) for i in range(size)]
    assert joined == list(range(epoch * len(whole), (epoch + 1) * len(whole)))
    assert [samplers[0].plan.row(place) for place in joined] == [[index] for index in whole]
    for step in range(steps):
        assert samplers[0].batch(epoch * steps + step) == whole[step * size * ranks:(step + 1) * size * ranks]


def test_every_iteration_is_the_next_epoch():
    epochs = sampler([list(range(12)), []], 4)
    assert [list(epochs), list(epochs)] == [epochs.places(epoch).tolist() for epoch in range(2)]


@given(kinds().filter(lambda groups: sum(map(len, groups)) > 0), st.integers(1, 4), st.integers(0, 20))
def test_a_start_at_any_step_gives_the_rest_of_the_run(groups, size, step):
    whole, resumed = sampler(groups, size), sampler(groups, size)
    everything = [place for _ in range(step + 4) for place in whole]
    resumed.start_at(step)
    rest = [place for _ in range(2) for place in resumed]
    assert rest == everything[step * size:step * size + len(rest)]
    assert whole.rows(step) == [whole.plan.row(place) for place in everything[step * size:(step + 1) * size]]


weights = st.lists(st.floats(0.01, 10), min_size=1, max_size=5)


@given(weights, st.integers(0, 2000), st.integers(1, 400))
def test_every_stretch_of_a_mixture_has_its_shares(shares, start, length):
    chosen = spread(shares, start, start + length)
    for i, share in enumerate(shares):
        # the discrepancy of the golden-ratio sequence grows with the logarithm of the length only
        assert abs((chosen == i).sum() - length * share / sum(shares)) <= 2 + 2 * math.log2(length + 1)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 9))
def test_no_sample_of_a_mixture_is_forgotten_or_favoured(first, second, text, size, batches):
    sources = [MixtureSource(0, 2.0, list(range(first))), MixtureSource(0, 1.0, list(range(20, 20 + second))),
               MixtureSource(1, 1.0, list(range(50, 50 + text)))]
    seen = Counter()
    for epoch in range(6):
        plan = plan_mixture(sources, size, 3, epoch, batches)
        assert len(plan) == batches
        assert all(len(batch) == size and len({index >= 50 for index in batch}) == 1 for batch in plan)
        seen.update(index for batch in plan for index in batch)
    for source in sources:
        times = [seen[index] for index in source.indices]
        assert max(times) - min(times) <= 1


def test_a_temperature_flattens_the_weights():
    sizes = {"a": 900, "b": 100}
    assert mixture_weights(sizes, {"temperature": 1}) == sizes
    flat = mixture_weights(sizes, {"temperature": 2})
    assert flat["a"] / flat["b"] == pytest.approx(3)


@pytest.mark.parametrize(("sizes", "section", "message"), [
    ({"a": 3, "b": 0}, {"weights": [1, 1]}, "The source b has no samples left"),
    ({"a": 3, "b": 2}, {"weights": [1, 0]}, "weight of the source b is 0, so none of its samples"),
    ({"a": 3, "b": 2}, {"weights": [1]}, "has 1 weights for 2 sources"),
    ({"a": 3, "b": 2}, {"weights": {"a": 1, "c": 1}}, "names? every source and no other; 'b'"),
    ({"a": 3}, {"weights": [1], "temperature": 1}, "either weights or a temperature"),
    ({"a": 3}, {"temperature": 0}, "temperature is 0; it must be a number above 0"),
    ({"a": 3}, {"temperatur": 1}, "Unknown key train_dataset.data_loader.mixture.temperatur"),
])
def test_unusable_mixtures_are_refused(sizes, section, message):
    with pytest.raises(DataError, match=message):
        mixture_weights(sizes, section)


def test_a_mixture_counts_its_epoch_in_samples():
    planner = make_planner(np.repeat([0, 1], [8, 4]), np.repeat([True, False], [8, 4]), ["a", "b"],
                           {"weights": [1, 1], "samples_per_epoch": 40}, 0, True, True)
    plan = planner(4)
    assert plan.epoch_rows == 40
    assert sum(plan.batch(step)[0][0] < 8 for step in range(10)) == 5


@pytest.mark.parametrize("packed", [False, True])
def test_a_weight_that_leaves_a_source_out_of_epochs_is_refused(packed):
    section = {"weights": [1, 1e-3], "samples_per_epoch": 100}
    with pytest.raises(DataError, match=r"weight 0\.001 of the source b is 0\.001 of all weights, less than one of the "
                                        "100 samples of an epoch"):
        make_planner(np.repeat([0, 1], [8, 4]), np.full(12, True), ["a", "b"], section, 0, True, True,
                     packing_of(12) if packed else None)


def packing_of(count: int, seed: int = 0) -> Packing:
    """Samples with pictures and without, from sources 0 to 2, and rows of a few of them."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 4, count)
    return Packing(rng.integers(1, 30, count) + 5 * tiles, tiles, (tiles > 0).astype(int), np.arange(count) % 3,
                   Budget(100, 8, 4, 8))


def packed(count: int, section: dict | None, batch_rows: int, seed: int = 3):
    packing, names = packing_of(count), ["a", "b", "c"]
    planner = make_planner(np.arange(count) % 3, packing.images > 0, names, section,
                           seed, True, True, packing)
    return planner(batch_rows), packing


def check_epoch(plan, packing, epoch: int) -> Counter:
    """How often each sample is in an epoch, whose rows keep the budgets."""
    rows = list(plan.epoch(epoch).lists())
    assert len(rows) == plan.epoch_rows
    assert len(rows) % plan.batch_rows == 0
    for row in rows:
        assert 1 <= len(row) < packing.budget.max_segments
        assert packing.positions[row].sum() + packing.budget.max_segments - len(row) <= packing.budget.seq_length
        assert packing.tiles[row].sum() <= packing.budget.max_tiles
        assert packing.images[row].sum() <= packing.budget.max_images
    return Counter(index for row in rows for index in row)


@settings(deadline=None)
@given(st.integers(1, 90), st.integers(1, 12), st.integers(0, 3))
def test_a_packed_epoch_has_every_sample_once(count, batch_rows, seed):
    plan, packing = packed(count, None, batch_rows, seed)
    for epoch in range(3):
        seen = check_epoch(plan, packing, epoch)
        assert set(seen) == set(range(count))
        if plan.epoch_rows <= count:
            assert set(seen.values()) == {1}
            assert plan.mean_samples == count / plan.epoch_rows
        else:       # a global batch of more rows than samples
            assert max(seen.values()) - min(seen.values()) <= 1
            assert plan.mean_samples == 1
    assert plan.epoch_rows < count / 2 or plan.epoch_rows < len(packing.positions) / 3 + batch_rows + 5


@settings(deadline=None, max_examples=8)
@given(st.integers(6, 90), st.integers(10, 300), st.integers(1, 12))
def test_packed_mixtures_are_exact(count, samples, batch_rows):
    plan, packing = packed(count, {"weights": [3, 2, 1], "samples_per_epoch": samples}, batch_rows)
    total = Counter()
    plan.check(4)
    for epoch in range(4):
        seen = check_epoch(plan, packing, epoch)
        assert sum(seen.values()) == max(samples, plan.epoch_rows)
        total += seen
    if plan.epoch_rows <= samples:
        of_source = [sum(times for index, times in total.items() if index % 3 == source) for source in range(3)]
        for source, share in enumerate((3, 2, 1)):
            assert abs(of_source[source] - share * 4 * samples / 6) <= 2 + 2 * math.log2(4 * samples + 1)
            times = [total[index] for index in range(source, count, 3)]
            assert max(times) - min(times) <= 1, "pass after pass"


def test_packed_rows_mix_sources_and_kinds():
    plan, packing = packed(300, None, 4)
    rows = list(plan.epoch(0).lists())
    assert sum(len(set(packing.sources[row])) > 1 for row in rows) > 0.8 * len(rows)
    assert packing.without_pictures(plan.epoch(0)) < 0.05 * len(rows)
    assert rows != list(plan.epoch(1).lists())


@pytest.mark.parametrize("section", [None, {"temperature": 2, "samples_per_epoch": 200}])
def test_packed_runs_are_the_same_for_any_ranks_and_go_on_anywhere(section):
    one = PlanSampler(packed(300, section, 4)[0], 4)
    two = [PlanSampler(packed(300, section, 4)[0], 2, (rank, 2)) for rank in range(2)]
    steps = one.plan.epoch_rows // 4
    everything = [place for _ in range(5) for place in one]
    assert everything == list(range(5 * one.plan.epoch_rows))
    halves = [[place for _ in range(4) for place in rank] for rank in two]
    for step in range(4 * steps):
        rows = [one.plan.row(place) for place in everything[step * 4:step * 4 + 4]]
        assert rows == one.rows(step) == [two[i // 2].plan.row(halves[i // 2][step * 2 + i % 2]) for i in range(4)]
        assert one.batch(step) == [index for row in rows for index in row]
    for start in (1, steps, 2 * steps + 3):
        resumed = PlanSampler(packed(300, section, 4)[0], 4)
        resumed.start_at(start)
        rest = [place for _ in range(2) for place in resumed]
        assert rest == everything[start * 4:start * 4 + len(rest)]
        assert [resumed.plan.row(place) for place in rest[:8]] == [one.plan.row(place) for place in rest[:8]]


def test_an_epoch_that_needs_more_rows_than_there_are_is_told_before_the_run():
    plan, packing = packed(300, {"weights": [1, 1, 1], "samples_per_epoch": 50}, 1)
    rows = packing.rows

    def larger(drawn, seed):
        return rows(np.concatenate([drawn, drawn]), seed)

    plan.check(40)
    object.__setattr__(packing, "rows", larger)
    with pytest.raises(DataError, match=r"samples of epoch 33 need \d+ rows, but the first epochs .* needed \d+ at"):
        plan.check(40)
