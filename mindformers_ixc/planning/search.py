"""Tries every layout of a number of devices by formula and ranks those that fit by the time of a step."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.parallel.checks import check_possible, layouts_for
from mindformers_ixc.parallel.cuts import check_degree
from mindformers_ixc.parallel.degrees import Degrees
from mindformers_ixc.planning.cost import Assumptions, StepTime, step_time
from mindformers_ixc.planning.memory import StageMemory, stage_memory
from mindformers_ixc.planning.workload import LocalParameter, Workload, local_parameters, refusal
from mindformers_ixc.sections import check_value, whole

GIB = 2 ** 30


@dataclass(frozen=True)
class Candidate:
    """A layout that could run.

    Attributes:
        workload: the step in that layout.
        stage: the fullest pipeline stage.
        memory: of a device of that stage.
        time: of a step.
    """

    workload: Workload
    stage: int
    memory: StageMemory
    time: StepTime


@dataclass(frozen=True)
class Refusal:
    """Layouts that cannot run, for one reason.

    Attributes:
        layouts: what they are called.
        reason: one sentence, or what they need.
        count: how many there are.
    """

    layouts: str
    reason: str
    count: int


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        devices: of the cluster.
        global_batch: samples of a step.
        device_memory: bytes of a device.
        fitting: fastest first.
        refused: by reason.
        tried: combinations of degrees and micro batches.
    """

    devices: int
    global_batch: int
    device_memory: int
    fitting: list[Candidate]
    refused: list[Refusal]
    tried: int


def search(workload: Workload, devices: int, global_batch: int, device_memory: int,
           assumptions: Assumptions) -> Search:
    """Tries all degrees and numbers of micro batches that divide; nothing is compiled.

    Args:
        workload: the step; its own layout does not matter.
        devices: of the cluster.
        global_batch: samples of a step.
        device_memory: bytes of a device.
        assumptions: of the machines.

    Raises:
        ConfigError: for a number that is not above 0.
    """
    for name, value in (("devices", devices), ("global_batch", global_batch)):
        check_value(f"--{name}", value, whole(1))
    refused = _refused_degrees(workload, devices)
    fitting: list[Candidate] = []
    too_large: dict[str, list[Candidate]] = {}
    tried = 0
    for degrees in layouts_for(workload.config, devices):
        layouts = list(_micro_batches(degrees, global_batch))
        if not layouts:
            refused.append(Refusal(str(degrees), _why_no_batch(degrees, global_batch), 1))
        tried += len(layouts)
        parameters = None                        # the same for any number of micro batches
        for layout in layouts:
            placed = workload.with_layout(layout, global_batch // layout.data_parallel // layout.micro_batch_num)
            reason = _cannot(placed)
            if reason:
                refused.append(Refusal(f"{degrees}, {layout.micro_batch_num} micro batches", reason, 1))
                continue
            parameters = parameters or local_parameters(placed)
            candidate = judge(placed, parameters, assumptions)
            of_degrees = fitting if candidate.memory.total <= device_memory else too_large.setdefault(str(degrees), [])
            of_degrees.append(candidate)
    fitting.sort(key=lambda candidate: candidate.time.total)
    for candidate in fitting:        # with another number of micro batches they do fit
        too_large.pop(str(candidate.workload.layout), None)
    refused = [*_grouped(refused), *map(_need, too_large.values())]
    return Search(devices, global_batch, device_memory, fitting, refused, tried)


def judge(workload: Workload, parameters: list[list[LocalParameter]], assumptions: Assumptions) -> Candidate:
    """Memory and time of a workload, whose parameters by stage are given."""
    of_stages = [stage_memory(workload, stage, own) for stage, own in enumerate(parameters)]
    fullest = max(range(len(of_stages)), key=lambda stage: of_stages[stage].total)
    return Candidate(workload, fullest, of_stages[fullest], step_time(workload, assumptions, parameters))


def _micro_batches(degrees: Degrees, global_batch: int) -> Iterator[Degrees]:
    """Layouts with every number of micro batches that divides, a multiple of the stages."""
    share, rest = divmod(global_batch, degrees.data_parallel)
    if rest:
        return
    for count in range(degrees.pipeline_stage, share + 1, degrees.pipeline_stage):
        if share % count == 0:
            yield replace(degrees, micro_batch_num=count)


def _why_no_batch(degrees: Degrees, global_batch: int) -> str:
    parts = degrees.data_parallel * degrees.pipeline_stage
    return f"the global batch of {global_batch} is no multiple of {parts}, the replicas times the stages"


def _cannot(workload: Workload) -> str | None:
    """Why a workload cannot run in its layout."""
    try:
        check_possible(workload.config, workload.layout)
    except ConfigError as error:
        return str(error)
    return refusal(workload)


def _refused_degrees(workload: Workload, devices: int) -> list[Refusal]:
    """Degrees that divide the devices but not the model."""
    found = []
    for degree in range(1, devices + 1):
        if devices % degree:
            continue
        try:
            check_degree(workload.config, degree)
        except ConfigError as error:
            found.append(Refusal(f"tp {degree}", str(error).removeprefix(f"Tensor parallel {degree} "), 1))
        if degree > workload.config.num_hidden_layers:
            layers = workload.config.num_hidden_layers
            found.append(Refusal(f"pp {degree}", f"more stages than the {layers} decoder layers", 1))
    return found


def _grouped(refused: list[Refusal]) -> list[Refusal]:
    """Refusals of one reason as one."""
    names: dict[str, list[str]] = {}
    for entry in refused:
        names.setdefault(entry.reason, []).append(entry.layouts)
    grouped = []
    for reason, layouts in names.items():
        kind = layouts[0].split(" ")[0]
        if all(" x " not in layout for layout in layouts):       # tp 16, tp 32: tp 16, 32
            label = f"{kind} " + ", ".join(layout.removeprefix(f"{kind} ") for layout in layouts)
        else:
            label = layouts[0] + (f" and {len(layouts) - 1} more" if len(layouts) > 1 else "")
        grouped.append(Refusal(label, reason, len(layouts)))
    return grouped


def _need(candidates: list[Candidate]) -> Refusal:
    """Layouts of the same degrees that do not fit, told by the one that needs least."""
    least = min(candidates, key=lambda candidate: candidate.memory.total)
    layout, total = least.workload.layout, least.memory.total / GIB
    micro = f"{layout.micro_batch_num} micro batch" + ("es" if layout.micro_batch_num > 1 else "")
    return Refusal(str(layout), f"does not fit: stage {least.stage} needs {total:.1f} GiB at the least, with {micro}",
                   len(candidates))
