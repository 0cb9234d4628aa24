"""Epoch plans: pure functions, so properties are stated for any sizes."""
from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindformers_ixc.data.mixture import make_epoch_planner, mixture_weights
from mindformers_ixc.data.sampling import MixtureSource, PlanSampler, plan_epoch, plan_mixture, spread
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
    assert plan_epoch(groups, 4, seed, 3, True) == plan_epoch(groups, 4, seed, 3, True)
    assert plan_epoch(groups, 4, seed, 3, True) != plan_epoch(groups, 4, seed, 4, True)
    assert plan_epoch(groups, 4, seed, 3, True) != plan_epoch(groups, 4, seed + 1, 3, True)
    assert plan_epoch(groups, 4, seed, 3, False) == plan_epoch(groups, 4, seed, 4, False)


def sampler(groups, size, seed=7, shard=(0, 1)):
    return PlanSampler(lambda batch, epoch: plan_epoch(groups, batch, seed, epoch, True), 200, size, shard)


@given(kinds(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_ranks_share_global_batches_without_overlap(groups, size, ranks, epoch):
    whole = [index for batch in plan_epoch(groups, size * ranks, 7, epoch, True) for index in batch]
    parts = [sampler(groups, size, shard=(rank, ranks)).indices(epoch) for rank in range(ranks)]
    steps = len(whole) // (size * ranks)
    joined = [parts[rank][step * size + i] for step in range(steps) for rank in range(ranks) for i in range(size)]
    assert joined == whole
    places = sorted(code // 200 for rank in range(ranks)
                    for code in sampler(groups, size, shard=(rank, ranks)).codes(epoch))
    assert places == list(range(epoch * len(whole), (epoch + 1) * len(whole)))


def test_every_iteration_is_the_next_epoch():
    epochs = sampler([list(range(12)), []], 4)
    assert [list(epochs), list(epochs)] == [epochs.codes(0), epochs.codes(1)]


@given(kinds().filter(lambda groups: sum(map(len, groups)) > 0), st.integers(1, 4), st.integers(0, 20))
def test_a_start_at_any_step_gives_the_rest_of_the_run(groups, size, step):
    whole, resumed = sampler(groups, size), sampler(groups, size)
    everything = [code for _ in range(step + 4) for code in whole]
    resumed.start_at(step)
    rest = [code for _ in range(2) for code in resumed]
    assert rest == everything[step * size:step * size + len(rest)]
    assert whole.batch(step) == [code % 200 for code in everything[step * size:(step + 1) * size]]


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
    plan = make_epoch_planner(["a"] * 8 + ["b"] * 4, [True] * 8 + [False] * 4, ["a", "b"],
                     {"weights": [1, 1], "samples_per_epoch": 40}, 0, True, True)
    batches = plan(4, 0)
    assert len(batches) == 10
    assert sum(batch[0] < 8 for batch in batches) == 5
