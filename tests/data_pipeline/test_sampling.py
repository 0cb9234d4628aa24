"""Epoch plans: pure functions, so properties are stated for any sizes."""
from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from mindformers_ixc.data.sampling import EpochSampler, plan_epoch


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


@given(kinds(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_ranks_share_global_batches_without_overlap(groups, size, ranks, epoch):
    whole = [index for batch in plan_epoch(groups, size * ranks, 7, epoch, True) for index in batch]
    parts = [EpochSampler(groups, size, 7, True, shard=(rank, ranks)).indices(epoch) for rank in range(ranks)]
    steps = len(whole) // (size * ranks)
    joined = [parts[rank][step * size + i] for step in range(steps) for rank in range(ranks) for i in range(size)]
    assert joined == whole


def test_every_iteration_is_the_next_epoch():
    sampler = EpochSampler([list(range(12)), []], 4, 0, True)
    assert [list(sampler), list(sampler)] == [sampler.indices(0), sampler.indices(1)]
