"""The search: it tries what divides, ranks what fits, and says why the rest is refused."""
from __future__ import annotations

import time

import pytest
from planned import recipe

from mindformers_ixc import ConfigError
from mindformers_ixc.planning.cost import Assumptions
from mindformers_ixc.planning.search import GIB, search
from mindformers_ixc.planning.workload import read_workload


def searched(devices: int, batch: int, memory: float = 64, **overrides):
    return search(read_workload(recipe("sft", **overrides)), devices, batch, int(memory * GIB), Assumptions())


def test_what_fits_is_ranked_by_time():
    found = searched(8, 64)
    seconds = [candidate.time.total for candidate in found.fitting]
    assert seconds == sorted(seconds) and len(seconds) > 3
    for candidate in found.fitting:
        layout = candidate.workload.layout
        assert layout.devices == 8 and candidate.workload.global_batch == 64
        assert candidate.memory.total <= found.device_memory
        assert layout.micro_batch_num % layout.pipeline_stage == 0


def test_degrees_that_do_not_divide_are_refused_together():
    reasons = {entry.layouts: entry.reason for entry in searched(48, 48).refused}
    assert reasons["tp 3, 6, 12, 16, 24, 48"].startswith("does not divide this model (8 key/value groups")
    assert reasons["pp 48"] == "more stages than the 32 decoder layers"


def test_layouts_that_do_not_fit_say_what_they_need():
    found = searched(8, 64, memory=20)
    assert not found.fitting
    assert all("does not fit: stage" in entry.reason and "GiB at the least" in entry.reason for entry in found.refused)
    assert sum(entry.count for entry in found.refused) == found.tried


def test_a_batch_that_replicas_do_not_divide_is_refused_for_them_once():
    refused, = (entry for entry in searched(8, 4).refused if "global batch" in entry.reason)
    assert (refused.layouts, refused.count) == ("dp 8 x tp 1 x pp 1 and 3 more", 4)
    assert refused.reason == "the global batch of 4 is no multiple of 8, the replicas times the stages"
    counts = [entry.count for entry in searched(16, 12).refused if "no multiple of" in entry.reason]
    assert counts == [4, 5]       # of 8 replicas and stages, of 16


def test_less_memory_leaves_fewer_layouts():
    counts = [len(searched(8, 64, memory).fitting) for memory in (32, 48, 64, 128)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_preference_pairs_are_piped_and_accumulated():
    fields = recipe("dpo", model__model_config__use_flash_attention=True)
    found = search(read_workload(fields), 8, 8, 128 * GIB, Assumptions())
    assert {candidate.workload.layout.pipeline_stage for candidate in found.fitting} >= {1, 2}
    assert any(candidate.workload.micro_batches > 1 for candidate in found.fitting)


def test_hundreds_of_devices_take_seconds():
    began = time.perf_counter()
    searched(512, 2048, parallel__full_batch=False)
    assert time.perf_counter() - began < 30


@pytest.mark.parametrize(("devices", "batch"), [(0, 8), (8, 0)])
def test_nothing_is_no_number(devices, batch):
    with pytest.raises(ConfigError, match="at least 1"):
        searched(devices, batch)
