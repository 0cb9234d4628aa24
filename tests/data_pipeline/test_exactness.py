"""What a run must be exact in, whatever its sources, weights, ranks and workers."""
from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ixc.data.index.plans import saved
from mindformers_ixc.data.mixture import make_planner
from mindformers_ixc.data.packed_plan import Packing
from mindformers_ixc.data.packer import Budget
from mindformers_ixc.data.sampling import PlanSampler

RANKS, WORKERS, STEPS = (1, 2, 4), (1, 2, 7), 40


@st.composite
def runs(draw):
    """Sources of a run with pictures and without, whether rows are packed, and the seed."""
    counts = draw(st.lists(st.integers(20, 80), min_size=1, max_size=4))
    sources = np.repeat(np.arange(len(counts)), counts)
    tiles = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 4, len(sources))
    packing = Packing(5 + 5 * tiles, tiles, (tiles > 0).astype(int), sources, Budget(100, 8, 4, 8))
    return packing, draw(st.booleans()), draw(st.integers(0, 3))


def planner_of(packing: Packing, packed: bool, seed: int, section: dict | None):
    """What makes the plan of such a run, with a mixture or without."""
    names = [f"source {number}" for number in range(int(packing.sources.max()) + 1)]
    return make_planner(packing.sources, packing.images > 0, names, section, seed, True, True,
                        packing if packed else None)


def read_by(planner, batch: int, rank: int, ranks: int, workers: int, start: int) -> list[list[list[int]]]:
    """Rows of a rank's batches from a step on: each worker has a plan of its own and reads what is its turn."""
    sampler = PlanSampler(planner(batch), batch // ranks, (rank, ranks))
    sampler.start_at(start)
    places = np.concatenate([sampler.take() for _ in range(2)])[:STEPS * batch // ranks]
    plans, rows = [planner(batch) for _ in range(workers)], dict[int, list[int]]()
    for worker, plan in enumerate(plans):                # one is done before the next one begins
        rows.update({place: plan.row(place) for place in places[worker::workers].tolist()})
    return [[rows[place] for place in step] for step in places.reshape(-1, batch // ranks).tolist()]


@settings(deadline=None, max_examples=20)
@given(runs(), st.booleans(), st.integers(0, 30))
def test_ranks_and_workers_read_the_same_samples(tmp_path_factory, run, weighed, start):
    packing, packed, seed = run
    weights = {"weights": [1 + number for number in range(int(packing.sources.max()) + 1)], "samples_per_epoch": 160}
    seen = []
    for ranks in RANKS:
        planner = saved(planner_of(packing, packed, seed, weights if weighed else None),
                        tmp_path_factory.mktemp("plans"), "a run")           # each machine makes its own
        for workers in WORKERS:
            batches = [read_by(planner, 4, rank, ranks, workers, start) for rank in range(ranks)]
            seen.append([row for step in zip(*batches) for rank in step for row in rank])
    assert all(rows == seen[0] for rows in seen)


@settings(deadline=None, max_examples=30)
@given(runs(), st.sampled_from([1, 4]))
def test_every_sample_is_there_once_an_epoch(tmp_path_factory, run, ranks):
    packing, packed, seed = run
    planner = saved(planner_of(packing, packed, seed, None), tmp_path_factory.mktemp("plans"), "a run")
    plan = planner(ranks)
    samplers = [PlanSampler(plan, 1, (rank, ranks)) for rank in range(ranks)]
    for _ in range(3):
        seen = Counter(number for sampler in samplers for place in sampler.take().tolist()
                       for number in plan.row(place))
        if packed or ranks == 1:
            assert seen == Counter(range(len(packing.sources)))
            continue
        for kind in (True, False):
            times = Counter(seen[number] for number in np.flatnonzero((packing.images > 0) == kind).tolist())
            count = sum(times.values())
            if 0 < count < ranks:                        # of fewer, one global batch is filled from its beginning again
                assert times == Counter(len(part) for part in np.array_split(range(ranks), count))
            else:                                        # of the others what fills no global batch is left out
                assert times == +Counter({1: count - count % ranks, 0: count % ranks})


@settings(deadline=None, max_examples=8)
@given(runs(), st.lists(st.integers(1, 9), min_size=4, max_size=4), st.integers(0, 3))
def test_every_source_has_its_weight_within_three_sigma(run, weights, epoch):
    packing, packed, seed = run
    weights = np.array(weights[:int(packing.sources.max()) + 1])
    samples, batch = 2000, 4
    plan = planner_of(packing, packed, seed, {"weights": weights.tolist(), "samples_per_epoch": samples})(batch)
    seen = np.bincount(packing.sources[plan.epoch(epoch).order], minlength=len(weights))
    assert seen.sum() == samples
    shares = weights / weights.sum()
    assert (np.abs(seen - samples * shares) <= 3 * np.sqrt(samples * shares * (1 - shares))).all()


def test_a_run_goes_on_at_any_step_without_going_through_what_was_before(tmp_path):
    made = []

    def noted(planner, batch_rows):
        plan = planner(batch_rows)
        make = plan._make
        plan._make = lambda epoch: made.append(epoch) or make(epoch)
        return plan

    sources = np.zeros(1000, np.int64)
    planner = make_planner(sources, sources == 0, ["a"], None, 0, True, True)
    everything = PlanSampler(planner(4), 4)
    expected = np.concatenate([everything.take() for _ in range(42)])
    sampler = PlanSampler(saved(partial(noted, planner), tmp_path, "a run")(4), 4)
    sampler.start_at(40 * 250 + 7)
    assert [sampler.plan.row(place) for place in sampler.take()[:20].tolist()] == [
        everything.plan.row(place) for place in expected[(40 * 250 + 7) * 4:][:20].tolist()]
    assert made == [40]
