"""A plan and a search as tables, for a terminal of 120 columns or fewer."""
from __future__ import annotations

from collections.abc import Iterable, Iterator

from mindformers_ixc.parameters import PARTS, VISION
from mindformers_ixc.planning.cost import Assumptions
from mindformers_ixc.planning.plan import GIB, Plan, StagePlan, cut_table
from mindformers_ixc.planning.search import Candidate, Search
from mindformers_ixc.planning.workload import Workload
from mindformers_ixc.tables import Column, listed, table, wrapped

COLUMNS = 120

# Words for the purposes of messages, in the order they are printed.
PURPOSES = {"forward": "forward pass", "backward": "backward pass",
            "layout_change": "change of layout", "pipeline": "pipeline", "gradient": "sum of gradients",
            "optimizer": "optimizer sharding", "norm": "norm of the gradient"}

# Terms of the activations, and lines of refusals, that are printed.
LARGEST_TERMS, REFUSALS = 3, 14

MEMORY = (Column("stage", 5), Column("rank", 6), Column("layers", 8, left=True, gap=2), Column("parameters", 12),
          Column("gradients", 11), Column("optimizer", 11), Column("activations", 13), Column("total", 11),
          Column("margin", 12), Column("", 4, left=True, gap=2))
MESSAGES = (Column("stage", 5), Column("purpose", 28, left=True, gap=2), Column("operator", 15, left=True),
            Column("devices", 8), Column("messages", 11))
CUTS = (Column("part", 14, left=True), Column("parameter", 37, left=True), Column("count", 5),
        Column("whole", 14, gap=2), Column("   a device", 18, left=True, gap=1), Column("cut", left=True))
LAYOUTS = (Column("dp", 4), Column("tp", 4), Column("pp", 4), Column("micro batches", 15), Column("samples each", 14),
           Column("GiB", 8), Column("products s", 12), Column("messages s", 12), Column("bubble s", 10),
           Column("step s", 9), Column("efficiency", 12))


def plan_text(name: str, plan: Plan, room: int | None = None) -> str:
    """A plan as the lines that `mindformers plan` prints.

    Args:
        name: of the YAML file.
        plan: what was planned.
        room: columns of the terminal, `None` for what is none.
    """
    head = f"{name} on {plan.workload.layout.devices} devices: {describe(plan.workload)}"
    blocks = [wrapped(head, room, "  "), _memory_lines(plan, room), _message_lines(plan, room), _time_lines(plan, room),
              _cut_lines(plan.stages, room), _remarks(plan, room)]
    return "\n\n".join(text for block in blocks if (text := "\n".join(block)))


def describe(workload: Workload) -> str:
    """Layout and batch in words."""
    noun = "pair" if workload.preference else "row" if workload.config.packing else "sample"
    samples = f"{workload.samples} {noun}{'' if workload.samples == 1 else 's'}"
    micro = "1 micro batch" if workload.micro_batches == 1 else f"{workload.micro_batches} micro batches"
    return f"{workload.layout}, {micro} of {samples}, global batch {workload.global_batch}"


def unit_of(plan: Plan) -> tuple[int, str]:
    """Bytes and name of the unit sizes are told in: toys would be all zeros in GiB."""
    largest = max(stage.memory.total for stage in plan.stages)
    return (GIB, "GiB") if largest >= GIB else (2 ** 20, "MiB")


def _memory_lines(plan: Plan, room: int | None) -> Iterator[str]:
    unit, unit_name = unit_of(plan)
    yield f"Memory of a device in {unit_name}, of {plan.device_memory / unit:,.1f}"

    def row(stage: StagePlan) -> list[str]:
        memory = stage.memory
        sizes = (memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.total,
                 plan.device_memory - memory.total)
        layers = "none" if stage.layers is None else "-".join(map(str, stage.layers))
        return [str(stage.stage), str(stage.rank), layers, *(f"{size / unit:,.2f}" for size in sizes),
                "fits" if stage.fits(plan.device_memory) else "does not fit"]

    yield from table(MEMORY, map(row, plan.stages), room)
    how = "State is as compiled" if plan.compiled else "Nothing was compiled, all is by formula"
    yield from wrapped(f"{how}; activations are an estimate, its largest terms:", room, "  ")
    for stage in plan.stages:
        terms = sorted(stage.memory.terms.items(), key=lambda item: -item[1])[:LARGEST_TERMS]
        yield from listed((f"{term} {size / unit:,.2f}" for term, size in terms), room, " " * 7, f"{stage.stage:>5}  ")


def _message_lines(plan: Plan, room: int | None) -> Iterator[str]:
    rows = [(stage.stage, one) for stage in plan.stages for one in stage.traffic]
    if not rows:
        return
    unit, unit_name = unit_of(plan)
    yield "Messages of a step"
    order = list(PURPOSES)
    yield from table([*MESSAGES, Column(unit_name, 13), Column("seconds", 11)], (
        [str(stage), PURPOSES[one.purpose], one.operator, str(len(one.group)), f"{one.count:,.0f}",
         f"{one.bytes / unit:,.3f}", f"{one.seconds(plan.assumptions):.4f}"]
        for stage, one in sorted(rows, key=lambda row: (row[0], order.index(row[1].purpose), row[1].operator))),
        room, heading=3)


def _time_lines(plan: Plan, room: int | None) -> Iterator[str]:
    time = plan.time
    yield from _wrapped([f"Time of a step, by formula and {assumed(plan.assumptions)}"], room)
    noun = "rows" if plan.workload.config.packing else "samples"
    lines = [f"products {time_text(time.compute)} + messages {time_text(time.communication)} + pipeline bubble "
             f"{time_text(time.bubble)} = {time_text(time.total)}",
             f"{plan.workload.global_batch / time.total:,.2f} {noun} a second; efficiency {time.efficiency:.0%}",
             *usage_lines(plan)]
    for line in lines:
        yield from wrapped(line, room, "  ")


def usage_lines(plan: Plan) -> Iterator[str]:
    """What the step is worth for the data."""
    means, worth = plan.workload.rows, plan.usage
    if means is not None and means.positions is not None:
        config, left = plan.workload.config, f"; {means.left_out:,} do not fit" if means.left_out else ""
        yield (f"{means.total:,} samples in {means.rows:,} rows{left}: {means.samples:.2f} samples, "
               f"{means.positions:,.0f} of {config.seq_length:,} positions and {means.tiles:.1f} of {config.max_tiles} "
               f"tiles a row")
    share = "" if worth.goodput is None else f"; goodput {worth.goodput:.0%}"
    if plan.workload.config.packing and worth.samples is not None:
        yield f"{worth.samples:,.0f} samples a step, {worth.samples_per_second:,.2f} useful samples a second{share}"
    elif share:
        yield share.removeprefix("; ")
    if worth.steps is not None:
        yield f"{worth.steps:,} steps take {worth.days:,.1f} days"


def time_text(value: float) -> str:
    """Seconds, or milliseconds of less than one."""
    return f"{value:.2f} s" if value >= 1 or not value else f"{1000 * value:.2f} ms"


def assumed(assumptions: Assumptions) -> str:
    """What a time rests on, in words."""
    return (f"assumption: {assumptions.tflops:g} TFLOPS at {assumptions.utilisation:.0%}, "
            f"{assumptions.server_bandwidth:g} GB/s in a server of {assumptions.devices_per_server}, "
            f"{assumptions.network_bandwidth:g} between servers")


def _cut_lines(stages: list[StagePlan], room: int | None) -> Iterator[str]:
    yield from wrapped("How parameters are cut (N: number of a layer)", room, "  ")
    yield from table(CUTS, ((part, name, str(count), whole, f"-> {local}", cut)
                            for part, name, count, whole, local, cut in cut_rows(stages)), room, heading=2)


def cut_rows(stages: list[StagePlan]) -> Iterator[tuple[str, str, int, str, str, str]]:
    """Of every kind of parameter its part, short name, number, whole shape, shape on a device, and how it is cut."""
    order = list(PARTS)
    for row in sorted(cut_table(stages), key=lambda row: order.index(row["part"])):
        name = row["name"].removeprefix(f"{VISION}.").removeprefix("encoder.").removeprefix("model.")
        name = name.removeprefix("layers.")
        cuts = [f"{row['axis']} / {row['tensor_parallel']}"] if row["tensor_parallel"] > 1 else []
        if row["optimizer_shards"] > 1:
            cuts.append(f"optimizer / {row['optimizer_shards']}")
        if not row["trained"]:
            cuts.append("frozen")
        yield (row["part"], name, row["count"], _shape(row["shape"]), _shape(row["local"]), ", ".join(cuts) or "whole")


def _shape(shape: list[int]) -> str:
    return (" x " if len(shape) < 3 else "x").join(map(str, shape))


def _remarks(plan: Plan, room: int | None) -> Iterator[str]:
    if not plan.problems:
        yield from wrapped(f"{plan.checked} parameters: the slices of all ranks are together the whole.", room, "  ")
    yield from _wrapped((f"problem: {problem}" for problem in plan.problems), room)
    yield from _wrapped((f"warning: {warning}" for stage in plan.stages for warning in stage.warnings), room)
    yield from _wrapped((f"note: {note}" for note in plan.notes), room)
    yield from wrapped(verdict(plan), room, "  ")


def verdict(plan: Plan) -> str:
    """Whether a plan fits, in a sentence."""
    left, stage = min((plan.device_memory - stage.memory.total, stage.stage) for stage in plan.stages)
    if plan.fits:
        return f"It fits: stage {stage}, the fullest, leaves {left / GIB:.1f} GiB."
    return f"It does not fit: stage {stage} lacks {-left / GIB:.1f} GiB."


def _wrapped(lines: Iterable[str], room: int | None) -> Iterator[str]:
    """Sentences, which are broken where there is no terminal too."""
    for line in lines:
        yield from wrapped(line, min(room or COLUMNS, COLUMNS), "  ")


def search_text(name: str, found: Search, top: int, room: int | None = None) -> str:
    """A search: the best layouts and why others are none.

    Args:
        name: of the YAML file.
        found: what was found.
        top: layouts shown at most.
        room: columns of the terminal, `None` for what is none.
    """
    head = (f"{name} on {found.devices} devices of {found.device_memory / GIB:.1f} GiB, global batch "
            f"{found.global_batch}: {len(found.fitting)} of {found.tried} combinations fit, by formula")
    blocks = [wrapped(head, room, "  "), table(LAYOUTS, map(_layout_row, found.fitting[:top]), room, heading=3)
              if found.fitting else [], _refusal_lines(found, room) if found.refused else []]
    return "\n\n".join(text for block in blocks if (text := "\n".join(block)))


def _layout_row(one: Candidate) -> list[str]:
    layout, time = one.workload.layout, one.time
    return [str(layout.data_parallel), str(layout.model_parallel), str(layout.pipeline_stage),
            str(layout.micro_batch_num), str(one.workload.samples), f"{one.memory.total / GIB:.1f}",
            f"{time.compute:.2f}", f"{time.communication:.2f}", f"{time.bubble:.2f}", f"{time.total:.2f}",
            f"{time.efficiency:.0%}"]


def _refusal_lines(found: Search, room: int | None) -> Iterator[str]:
    yield "Refused"
    for entry in found.refused[:REFUSALS]:
        yield from wrapped(f"{entry.layouts}: {entry.reason}", min(room or COLUMNS, COLUMNS), "    ", "  ")
    if len(found.refused) > REFUSALS:
        yield f"  and {len(found.refused) - REFUSALS} more (--json has all)"
