"""A plan as a page: memory by stage, messages, when each stage works, how parameters are cut."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

from mindformers_ixc.pages.page import Markup, cards, page, section, table, text
from mindformers_ixc.planning.plan import GIB, Plan, StagePlan
from mindformers_ixc.planning.search import Search
from mindformers_ixc.planning.text import (
    PURPOSES,
    REFUSALS,
    assumed,
    cut_rows,
    describe,
    time_text,
    unit_of,
    usage_lines,
    verdict,
)
from mindformers_ixc.planning.timeline import Block, drawn_micro_batches, stage_seconds, timeline

# Colours of the style sheet.
MEMORY = {"parameters": 0, "gradients": 1, "optimizer": 4, "activations": 2}
PASSES = {"forward": 0, "backward": 2, "update": 1}
TIMES = {"products": 2, "messages": 1, "pipeline bubble": 8}
WAITING = 8

# Share of a step by which drawing and sum may differ without a word.
SAME = 0.005

# Room at the right of the bars, so that the line of the device's memory is seen.
ROOM = 1.02

# Sizes in the drawing of the pipeline, whose whole width is 1000.
LEFT, ROW, GAP, DIGIT = 62, 24, 6, 7


def plan_page(name: str, plan: Plan | None, found: Search | None = None, top: int = 10) -> str:
    """The page of a plan, of a search, or of a search and the plan of its best layout.

    Args:
        name: of the YAML file.
        plan: what was planned, if anything was.
        found: what a search found.
        top: layouts of a search that are shown at most.
    """
    devices = plan.workload.layout.devices if plan else found.devices if found else 0
    body = f"<h1>{text(name)} on {devices} device{'' if devices == 1 else 's'}</h1>"
    if found is not None:
        body += _found(found, top)
    if plan is not None:
        body += _plan(plan, "The first of them: " if found else "")
    return page(f"{name} on {devices} devices", body)


def _plan(plan: Plan, before: str) -> str:
    how = "Parameters, moments and messages are those of the compiled graphs" if plan.compiled \
        else "Nothing was compiled: all is by formula"
    kind = "good" if plan.fits else "bad"
    return (f'<p class="sub">{text(before + describe(plan.workload))}</p>'
            f'<p class="{kind}">{text(verdict(plan))}</p>'
            f'<p class="note">{how}; activations are an estimate. Times rest on assumptions: '
            f"{text(assumed(plan.assumptions).removeprefix('assumption: '))}. Nothing of this was measured.</p>"
            + _remarks(plan) + cards(_headline(plan)) + section("Memory of a device", _memory(plan))
            + section("Time of a step", _time(plan)) + section("Who works when", _pipeline(plan))
            + section("Messages of a step", _messages(plan)) + section("How parameters are cut", _cuts(plan.stages)))


def _remarks(plan: Plan) -> str:
    lines = [("bad", f"Problem: {problem}") for problem in plan.problems]
    lines += [("bad", f"Warning: {warning}") for stage in plan.stages for warning in stage.warnings]
    lines += [("note", f"Note: {note}") for note in plan.notes]
    return "".join(f'<p class="{kind}">{text(line)}</p>' for kind, line in lines)


def _headline(plan: Plan) -> dict[str, str]:
    time, worth = plan.time, plan.usage
    fullest = max(stage.memory.total for stage in plan.stages)
    unit, unit_name = unit_of(plan)
    noun = "rows" if plan.workload.config.packing else "samples"
    found = {"fullest device": f"{fullest / unit:,.1f} {unit_name}", "a step": time_text(time.total),
             f"{noun} a second": f"{plan.workload.global_batch / time.total:,.3g}",
             "efficiency": f"{time.efficiency:.0%}"}
    if worth.goodput is not None:
        found["goodput"] = f"{worth.goodput:.0%}"
    if worth.days is not None:
        found[f"{worth.steps:,} steps"] = f"{worth.days:,.1f} days"
    return found


def _legend(colours: dict[str, int]) -> str:
    keys = "".join(f'<span class="key"><span class="dot k{colour}"></span>{text(name)}</span>'
                   for name, colour in colours.items())
    return f'<div class="legend">{keys}</div>'


def _bar(parts: Sequence[tuple[int, float, str]], whole: float, limit: float | None = None) -> str:
    """A bar of parts (colour, size, what it is) whose full width stands for `whole`, with a line at a limit."""
    inside = "".join(f'<i class="k{colour}" style="width:{100 * size / whole:.3f}%" data-tip="{text(tip)}"></i>'
                     for colour, size, tip in parts if size > 0)
    line = "" if limit is None else f'<span class="limit" style="left:{100 * limit / whole:.3f}%"></span>'
    return f'<div class="track">{inside}{line}</div>'


def _stage_name(stage: StagePlan) -> str:
    layers = "no layers" if stage.layers is None else f"layers {'-'.join(map(str, stage.layers))}"
    return f"stage {stage.stage}, {layers}"


def _memory(plan: Plan) -> str:
    """Bars of what a device of each stage holds against what it has, and all numbers."""
    unit, unit_name = unit_of(plan)
    whole = ROOM * max(plan.device_memory, *(stage.memory.total for stage in plan.stages))
    bars = ""
    for stage in plan.stages:
        parts = [(colour, getattr(stage.memory, kind), _memory_tip(stage, kind, unit, unit_name))
                 for kind, colour in MEMORY.items()]
        total = stage.memory.total
        bars += (f'<span class="name">{_stage_name(stage)}</span>{_bar(parts, whole, plan.device_memory)}'
                 f'<span class="value{"" if stage.fits(plan.device_memory) else " bad"}">{total / unit:,.1f} of '
                 f"{plan.device_memory / unit:,.1f} {unit_name}</span>")
    rows = ([_stage_name(stage), stage.rank, *(f"{getattr(stage.memory, kind) / unit:,.2f}" for kind in MEMORY),
             f"{stage.memory.total / unit:,.2f}", f"{(plan.device_memory - stage.memory.total) / unit:,.2f}"]
            for stage in plan.stages)
    terms = ([_stage_name(stage), term, f"{size / unit:,.3f}"] for stage in plan.stages
             for term, size in sorted(stage.memory.terms.items(), key=lambda item: -item[1]))
    return (_legend(MEMORY) + f'<div class="bars">{bars}</div>'
            '<p class="note">The red line is the memory of a device.</p>'
            + table([f"in {unit_name}", "rank", *MEMORY, "total", "margin"], rows)
            + "<details><summary>What the activations are</summary>"
            + table(["", "term", unit_name], terms, (0, 1)) + "</details>")


def _memory_tip(stage: StagePlan, kind: str, unit: int, unit_name: str) -> str:
    lines = [f"{kind}: {getattr(stage.memory, kind) / unit:,.2f} {unit_name}"]
    if kind == "activations":
        lines += [f"{term} {size / unit:,.2f}" for term, size
                  in sorted(stage.memory.terms.items(), key=lambda item: -item[1])]
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    time = plan.time
    sizes = (time.compute, time.communication, time.bubble)
    parts = [(colour, size, f"{name}: {time_text(size)}, {size / time.total:.0%}")
             for (name, colour), size in zip(TIMES.items(), sizes)]
    sums = " + ".join(f"{name} {time_text(size)}" for name, size in zip(TIMES, sizes))
    lines = [f"{sums} = {time_text(time.total)}", *usage_lines(plan)]
    return _legend(TIMES) + _bar(parts, time.total) + "".join(f"<p>{text(line)}</p>" for line in lines)


def _pipeline(plan: Plan) -> str:
    """The drawing of when each stage works, and what it leaves out."""
    stages, micro = len(plan.stages), plan.workload.micro_batches
    count = drawn_micro_batches(stages, micro)
    blocks = timeline(stage_seconds(plan), count)
    end = max(block.end for block in blocks)
    busy = sum(block.end - block.start for block in blocks if block.kind != "update")
    last = max(block.end for block in blocks if block.kind != "update")
    idle = 1 - busy / (stages * last)
    lines = [f"Drawn are the first {count} of {micro} micro batches, and the update after the last one."] \
        if count < micro else []
    if stages > 1:
        lines.append(f"Grey is waiting: {idle:.0%} of the time until the update.")
    if count == micro and abs(end - plan.time.total) > SAME * plan.time.total:
        lines.append(f"Drawn like this a step takes {time_text(end)}. The sum above counts a whole pass of every stage "
                     "but the slowest as bubble, which is more than happens where the first stage is the slowest.")
    legend = {**PASSES, **({"waiting": WAITING} if stages > 1 else {})}
    return (_legend(legend) + f'<div class="timeline">{_drawing(blocks, stages, end)}</div>'
            + "".join(f'<p class="note">{line}</p>' for line in lines))


def _drawing(blocks: list[Block], stages: int, end: float) -> str:
    scale, height = (1000 - LEFT) / end, stages * (ROW + GAP) + 18
    parts = []
    done = max(block.end for block in blocks if block.kind != "update")
    for stage in range(stages):
        y = stage * (ROW + GAP)
        parts.append(f'<text x="0" y="{y + 16}">stage {stage}</text><rect class="f{WAITING}" x="{LEFT}" y="{y}" '
                     f'width="{done * scale:.2f}" height="{ROW}"/>')
    parts += [_block(block, scale) for block in blocks]
    for tick in range(6):
        anchor = "end" if tick == 5 else "middle" if tick else "start"
        parts.append(f'<text x="{LEFT + tick / 5 * (1000 - LEFT):.1f}" y="{height - 3}" text-anchor="{anchor}">'
                     f"{time_text(tick / 5 * end)}</text>")
    return (f'<svg viewBox="0 0 1000 {height}" role="img" aria-label="When each stage works at which micro batch">'
            f"{''.join(parts)}</svg>")


def _block(block: Block, scale: float) -> str:
    x, width, y = LEFT + block.start * scale, (block.end - block.start) * scale, block.stage * (ROW + GAP)
    what = "update" if block.micro_batch is None else f"{block.kind} pass of micro batch {block.micro_batch}"
    tip = f"stage {block.stage}, {what}\n{time_text(block.start)} to {time_text(block.end)}"
    number = "" if block.micro_batch is None else str(block.micro_batch)
    label = (f'<text class="on" x="{x + width / 2:.2f}" y="{y + 16}" text-anchor="middle">{number}</text>'
             if number and width > DIGIT * len(number) + 4 else "")
    return (f'<rect class="f{PASSES[block.kind]}" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW}" '
            f'data-tip="{text(tip)}"/>{label}')


def _messages(plan: Plan) -> str:
    """Bars of the seconds that each stage spends on messages, by purpose, and all of them in a table."""
    if not any(stage.traffic for stage in plan.stages):
        return '<p class="note">There are none.</p>'
    unit, unit_name = unit_of(plan)
    colours = {purpose: number for number, purpose in enumerate(PURPOSES)}
    spent = [{purpose: sum(one.seconds(plan.assumptions) for one in stage.traffic if one.purpose == purpose)
              for purpose in PURPOSES} for stage in plan.stages]
    whole = max(sum(own.values()) for own in spent) or 1.0
    bars = ""
    for stage, own in zip(plan.stages, spent):
        parts = [(colours[purpose], size, f"{PURPOSES[purpose]}: {time_text(size)}") for purpose, size in own.items()]
        bars += (f'<span class="name">stage {stage.stage}</span>{_bar(parts, whole)}'
                 f'<span class="value">{time_text(sum(own.values()))}</span>')
    used = {PURPOSES[purpose]: colours[purpose] for purpose in PURPOSES if any(own[purpose] for own in spent)}
    order = list(PURPOSES)
    rows = ([stage.stage, PURPOSES[one.purpose], one.operator, len(one.group), f"{one.count:,.0f}",
             f"{one.bytes / unit:,.3f}", f"{one.seconds(plan.assumptions):.4f}"] for stage in plan.stages
            for one in sorted(stage.traffic, key=lambda one: (order.index(one.purpose), one.operator)))
    return (_legend(used) + f'<div class="bars">{bars}</div><details><summary>Every kind of message</summary>'
            + table(["stage", "purpose", "operator", "devices", "messages", unit_name, "seconds"], rows, (1, 2))
            + "</details>")


def _cuts(stages: list[StagePlan]) -> str:
    return ('<p class="note">N stands for the number of a layer.</p>'
            + table(["part", "parameter", "count", "whole", "a device", "cut"], cut_rows(stages), (0, 1, 5)))


def _found(found: Search, top: int) -> str:
    """The best layouts of a search, and why others are none."""
    body = (f'<p class="sub">global batch {found.global_batch}, {found.device_memory / GIB:.1f} GiB a device: '
            f"{len(found.fitting)} of {found.tried} combinations fit, by formula</p>")
    if found.fitting:
        body += section("Layouts that fit", _candidates(found, top))
    if found.refused:
        more = len(found.refused) - REFUSALS
        lines = "".join(f"<p>{text(entry.layouts)}: {text(entry.reason)}</p>" for entry in found.refused[:REFUSALS])
        lines += f'<p class="note">and {more} more</p>' if more > 0 else ""
        body += f"<details><summary>Layouts that do not</summary>{lines}</details>"
    return body


def _candidates(found: Search, top: int) -> str:
    shown = found.fitting[:top]
    slowest = max(one.time.total for one in shown)

    def rows() -> Iterator[list[object]]:
        for one in shown:
            layout, time = one.workload.layout, one.time
            sizes = (time.compute, time.communication, time.bubble)
            bar = _bar([(colour, size, f"{name}: {time_text(size)}")
                        for (name, colour), size in zip(TIMES.items(), sizes)], slowest)
            yield [layout.data_parallel, layout.model_parallel, layout.pipeline_stage, layout.micro_batch_num,
                   one.workload.samples, f"{one.memory.total / GIB:.1f}", f"{time.total:.2f}",
                   f"{time.efficiency:.0%}", Markup(f'<div class="inline">{bar}</div>')]

    return _legend(TIMES) + table(["dp", "tp", "pp", "micro batches", "samples each", "GiB", "step s", "efficiency",
                                   "of the step"], rows(), (8,))
