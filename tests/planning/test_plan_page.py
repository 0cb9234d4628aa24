"""The page of a plan: what is drawn is what was planned, and when the stages of a pipeline work."""
from __future__ import annotations

import re

import pytest
from planned import recipe, workload

from mindformers_ixc.parallel.degrees import Degrees
from mindformers_ixc.planning.cost import Assumptions
from mindformers_ixc.planning.page import plan_page
from mindformers_ixc.planning.plan import Plan, make_plan
from mindformers_ixc.planning.search import search
from mindformers_ixc.planning.timeline import (
    BLOCKS,
    Block,
    StageSeconds,
    drawn_micro_batches,
    stage_seconds,
    timeline,
)

GIB = 2 ** 30


def plan_of(layout: Degrees, memory: int = 64 * GIB) -> Plan:
    fields = recipe("sft")
    return make_plan(fields, workload(fields, layout), memory, Assumptions(), False)


def of_stage(blocks: list[Block], stage: int) -> list[Block]:
    return [block for block in blocks if block.stage == stage and block.kind != "update"]


@pytest.mark.parametrize(("stages", "micro"), [(1, 1), (1, 5), (2, 2), (4, 4), (4, 13), (3, 1)])
def test_equal_stages_wait_for_one_pass_of_every_other_stage(stages, micro):
    blocks = timeline([StageSeconds(1.0, 2.0, 0.0)] * stages, micro)
    assert max(block.end for block in blocks) == pytest.approx((micro + stages - 1) * 3.0)
    assert len(blocks) == 2 * stages * micro


def test_a_pass_begins_when_what_it_needs_is_there_and_its_stage_is_free():
    seconds = [StageSeconds(3.0, 5.0, 0.5), StageSeconds(1.0, 2.0, 0.25), StageSeconds(2.0, 2.5, 0.0)]
    blocks = timeline(seconds, 6)
    at = {(block.kind, block.stage, block.micro_batch): block for block in blocks}
    for stage, own in enumerate(seconds):
        for number in range(6):
            forward, backward = at["forward", stage, number], at["backward", stage, number]
            assert forward.end - forward.start == pytest.approx(own.forward)
            assert backward.end - backward.start == pytest.approx(own.backward)
            assert backward.start >= forward.end
            if stage:
                assert forward.start >= at["forward", stage - 1, number].end
                assert at["backward", stage - 1, number].start >= backward.end
        in_order = sorted(of_stage(blocks, stage), key=lambda block: block.start)
        assert all(one.end <= other.start + 1e-9 for one, other in zip(in_order, in_order[1:]))
        held = [sum(block.start < moment for block in in_order if block.kind == "forward")
                - sum(block.end <= moment for block in in_order if block.kind == "backward")
                for moment in (block.end for block in in_order)]
        assert max(held) == 3 - stage       # micro batches in flight, as the memory's formula has them
    done = max(block.end for block in blocks if block.kind == "backward")
    assert [(block.stage, block.start, block.end) for block in blocks if block.kind == "update"] == [
        (0, done, done + 0.5), (1, done, done + 0.25)]


@pytest.mark.parametrize("layout", [Degrees(1, 8), Degrees(2, 4, 1, 6), Degrees(8, 1, 1, 3)])
def test_without_a_pipeline_the_drawing_adds_up_to_the_time_of_the_step(layout):
    plan = plan_of(layout)
    blocks = timeline(stage_seconds(plan), plan.workload.micro_batches)
    assert max(block.end for block in blocks) == pytest.approx(plan.time.total)


def test_a_pipeline_takes_no_longer_than_the_plan_says():
    plan = plan_of(Degrees(1, 2, 4, 12))
    blocks = timeline(stage_seconds(plan), 12)
    end = max(block.end for block in blocks)
    assert 0.8 * plan.time.total < end <= plan.time.total * (1 + 1e-9)


def test_of_very_many_micro_batches_some_are_drawn():
    assert drawn_micro_batches(4, 16) == 16
    assert 2 * 4 * drawn_micro_batches(4, 10 ** 6) <= BLOCKS
    assert drawn_micro_batches(2000, 10 ** 6) == 4000       # a pipeline is seen as a whole
    plan = plan_of(Degrees(1, 8, 1, 4096))
    page = plan_page("x", plan)
    assert f"Drawn are the first {BLOCKS // 2} of 4096 micro batches" in page and "Drawn like this" not in page


def widths(page: str) -> list[list[float]]:
    """Parts of every bar, in percent of its full width."""
    return [[float(width) for width in re.findall(r'<i class="k\d" style="width:([\d.]+)%', bar)]
            for bar in re.findall(r'<div class="track">(.*?)</div>', page, re.DOTALL)]


def test_bars_stand_for_the_memory_of_each_stage_and_of_the_device():
    plan = plan_of(Degrees(2, 2, 2, 8), memory=40 * GIB)
    page = plan_page("ixc25_sft.yaml", plan)
    whole = 1.02 * max(plan.device_memory, *(stage.memory.total for stage in plan.stages))
    for stage, bar in zip(plan.stages, widths(page)):
        memory = stage.memory
        assert bar == pytest.approx([100 * size / whole for size in (memory.parameters, memory.gradients,
                                                                     memory.optimizer, memory.activations)], abs=1e-3)
    limits = [float(left) for left in re.findall(r'class="limit" style="left:([\d.]+)%', page)]
    assert limits == pytest.approx([100 * plan.device_memory / whole] * 2, abs=1e-3)
    assert "Who works when" in page and "Grey is waiting" in page and "stage 1, backward pass of micro batch 7" in page


def test_the_page_says_whether_it_fits():
    layout = Degrees(2, 4, 1, 6)
    assert '<p class="good">It fits: stage 0, the fullest, leaves ' in plan_page("x", plan_of(layout))
    page = plan_page("x", plan_of(layout, memory=8 * GIB))
    assert '<p class="bad">It does not fit: stage 0 lacks ' in page and 'class="value bad"' in page


def test_the_page_needs_nothing_else_and_names_are_text():
    page = plan_page("a<b>&.yaml", plan_of(Degrees(2, 2, 2, 8)))
    assert not re.search(r"https?:|//|<link|url\(|@import|<script[^>]* src", page)
    assert "<h1>a&lt;b&gt;&amp;.yaml on 8 devices</h1>" in page and "<b>" not in page
    assert "<td class=word>rows / 2, optimizer / 2</td>" in page


def test_a_search_has_its_layouts_and_its_refusals():
    placed = workload(recipe("sft"), Degrees(1, 8, 1, 64))
    found = search(placed, 8, 64, 64 * GIB, Assumptions())
    page = plan_page("x", None, found, top=3)
    assert f"{len(found.fitting)} of {found.tried} combinations fit" in page
    assert len(widths(page)) == min(3, len(found.fitting))
    first, last = widths(page)[0], widths(page)[-1]
    assert sum(first) < sum(last) == pytest.approx(100, abs=0.01)      # the slowest shown is the whole width
    assert "Layouts that do not" in page
    nothing = plan_page("x", None, search(placed, 8, 64, GIB, Assumptions()))
    assert f"0 of {found.tried} combinations fit" in nothing and "Layouts that fit" not in nothing
