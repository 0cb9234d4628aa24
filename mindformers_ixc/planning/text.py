"""A plan and a search as tables for a terminal of 120 columns."""
from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from mindformers_ixc.parameters import PARTS, VISION
from mindformers_ixc.planning.cost import Assumptions
from mindformers_ixc.planning.plan import GIB, Plan, StagePlan, cut_table
from mindformers_ixc.planning.search import Candidate, Search
from mindformers_ixc.planning.workload import Workload

COLUMNS = 120

# Words for the purposes of messages, in the order they are printed.
PURPOSES = {"forward": "forward pass", "backward": "backward pass",
            "layout_change": "change of layout", "pipeline": "pipeline", "gradient": "sum of gradients",
            "optimizer": "optimizer sharding", "norm": "norm of the gradient"}

# Terms of the activations, and lines of refusals, that are printed.
LARGEST_TERMS, REFUSALS = 3, 14


def plan_text(name: str, plan: Plan) -> str:
    """A plan as the lines that `mindformers plan` prints.

    Args:
        name: of the YAML file.
        plan: what was planned.
    """
    blocks = [f"{name} on {plan.workload.layout.devices} devices: {describe(plan.workload)}",
              "\n".join(_memory_lines(plan)), "\n".join(_message_lines(plan)), "\n".join(_time_lines(plan)),
              "\n".join(_cut_lines(plan.stages)), "\n".join(_remarks(plan))]
    return "\n\n".join(block for block in blocks if block)


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


def _memory_lines(plan: Plan) -> Iterator[str]:
    unit, unit_name = unit_of(plan)
    yield f"Memory of a device in {unit_name}, of {plan.device_memory / unit:,.1f}"
    yield (f"{'stage':>5}{'rank':>6}  {'layers':<8}{'parameters':>12}{'gradients':>11}{'optimizer':>11}"
           f"{'activations':>13}{'total':>11}{'margin':>12}")
    for stage in plan.stages:
        memory = stage.memory
        layers = "none" if stage.layers is None else "-".join(map(str, stage.layers))
        sizes = [memory.parameters, memory.gradients, memory.optimizer, memory.activations, memory.total,
                 plan.device_memory - memory.total]
        widths = (12, 11, 11, 13, 11, 12)
        row = "".join(f"{size / unit:>{width},.2f}" for size, width in zip(sizes, widths))
        yield (f"{stage.stage:>5}{stage.rank:>6}  {layers:<8}{row}  "
               f"{'fits' if stage.fits(plan.device_memory) else 'does not fit'}")
    how = "State is as compiled" if plan.compiled else "Nothing was compiled, all is by formula"
    yield f"{how}; activations are an estimate, its largest terms:"
    for stage in plan.stages:
        terms = sorted(stage.memory.terms.items(), key=lambda item: -item[1])[:LARGEST_TERMS]
        yield f"{stage.stage:>5}  " + ", ".join(f"{term} {size / unit:,.2f}" for term, size in terms)


def _message_lines(plan: Plan) -> Iterator[str]:
    rows = [(stage.stage, one) for stage in plan.stages for one in stage.traffic]
    if not rows:
        return
    unit, unit_name = unit_of(plan)
    yield "Messages of a step"
    yield f"{'stage':>5}  {'purpose':<28}{'operator':<15}{'devices':>8}{'messages':>11}{unit_name:>13}{'seconds':>11}"
    order = list(PURPOSES)
    for stage, one in sorted(rows, key=lambda row: (row[0], order.index(row[1].purpose), row[1].operator)):
        yield (f"{stage:>5}  {PURPOSES[one.purpose]:<28}{one.operator:<15}{len(one.group):>8}{one.count:>11,.0f}"
               f"{one.bytes / unit:>13,.3f}{one.seconds(plan.assumptions):>11.4f}")


def _time_lines(plan: Plan) -> Iterator[str]:
    time = plan.time
    yield from _wrapped([f"Time of a step, by formula and {assumed(plan.assumptions)}"])
    yield (f"products {time_text(time.compute)} + messages {time_text(time.communication)} + pipeline bubble "
           f"{time_text(time.bubble)} = {time_text(time.total)}")
    noun = "rows" if plan.workload.config.packing else "samples"
    yield f"{plan.workload.global_batch / time.total:,.2f} {noun} a second; efficiency {time.efficiency:.0%}"
    yield from usage_lines(plan)


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


def _cut_lines(stages: list[StagePlan]) -> Iterator[str]:
    yield "How parameters are cut (N: number of a layer)"
    yield f"{'part':<14}{'parameter':<37}{'count':>5}  {'whole':>14}    {'a device':<15}cut"
    for part, name, count, whole, local, cut in cut_rows(stages):
        yield f"{part:<14}{name:<37}{count:>5}  {whole:>14} -> {local:<15}{cut}".rstrip()


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


def _remarks(plan: Plan) -> Iterator[str]:
    if not plan.problems:
        yield f"{plan.checked} parameters: the slices of all ranks are together the whole."
    yield from _wrapped(f"problem: {problem}" for problem in plan.problems)
    yield from _wrapped(f"warning: {warning}" for stage in plan.stages for warning in stage.warnings)
    yield from _wrapped(f"note: {note}" for note in plan.notes)
    yield verdict(plan)


def verdict(plan: Plan) -> str:
    """Whether a plan fits, in a sentence."""
    left, stage = min((plan.device_memory - stage.memory.total, stage.stage) for stage in plan.stages)
    if plan.fits:
        return f"It fits: stage {stage}, the fullest, leaves {left / GIB:.1f} GiB."
    return f"It does not fit: stage {stage} lacks {-left / GIB:.1f} GiB."


def _wrapped(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield textwrap.fill(line, COLUMNS, subsequent_indent="  ", break_long_words=False)


def search_text(name: str, found: Search, top: int) -> str:
    """A search: the best layouts and why others are none.

    Args:
        name: of the YAML file.
        found: what was found.
        top: layouts shown at most.
    """
    head = (f"{name} on {found.devices} devices of {found.device_memory / GIB:.1f} GiB, global batch "
            f"{found.global_batch}: {len(found.fitting)} of {found.tried} combinations fit, by formula")
    blocks = [head]
    if found.fitting:
        blocks.append("\n".join(_candidate_lines(found.fitting[:top])))
    if found.refused:
        blocks.append("\n".join(_refusal_lines(found)))
    return "\n\n".join(blocks)


def _candidate_lines(candidates: list[Candidate]) -> Iterator[str]:
    yield (f"{'dp':>4}{'tp':>4}{'pp':>4}{'micro batches':>15}{'samples each':>14}{'GiB':>8}{'products s':>12}"
           f"{'messages s':>12}{'bubble s':>10}{'step s':>9}{'efficiency':>12}")
    for one in candidates:
        layout, time = one.workload.layout, one.time
        yield (f"{layout.data_parallel:>4}{layout.model_parallel:>4}{layout.pipeline_stage:>4}"
               f"{layout.micro_batch_num:>15}{one.workload.samples:>14}{one.memory.total / GIB:>8.1f}"
               f"{time.compute:>12.2f}{time.communication:>12.2f}{time.bubble:>10.2f}{time.total:>9.2f}"
               f"{time.efficiency:>12.0%}")


def _refusal_lines(found: Search) -> Iterator[str]:
    yield "Refused"
    for entry in found.refused[:REFUSALS]:
        yield textwrap.fill(f"{entry.layouts}: {entry.reason}", COLUMNS, initial_indent="  ", subsequent_indent="    ")
    if len(found.refused) > REFUSALS:
        yield f"  and {len(found.refused) - REFUSALS} more (--json has all)"
