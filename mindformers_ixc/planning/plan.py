"""The plan of a training step on a cluster: memory of every stage, messages, how each parameter is cut.

By default MindSpore's compiler makes the graph of one rank of each pipeline stage, without devices, and the plan is
read from that; otherwise it is the formulae of `workload`, `memory` and `cost` alone.
"""
from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mindformers_ixc.checkpoint.dtypes import dtype_bytes
from mindformers_ixc.cpu_cluster.simulated import run_rank
from mindformers_ixc.parallel.degrees import DEGREES
from mindformers_ixc.parameters import OPTIMIZER_STATE, layer_of, part_of
from mindformers_ixc.planning.cost import Assumptions, StepTime, Traffic, stage_traffic, step_time
from mindformers_ixc.planning.memory import MOMENT_BYTES, StageMemory, stage_memory
from mindformers_ixc.planning.rows import Usage, usage
from mindformers_ixc.planning.workload import LocalParameter, Workload, local_parameters

GIB = 2 ** 30

# Between operators of the language model and before its head, where sequence parallel gathers positions.
_OF_THE_LANGUAGE_MODEL = re.compile(r"/model-InternLM2Model/|/chunked_losses-HeadLosses/")

# A share of the memory from which the batch itself is worth a word.
_LARGE_BATCH = 0.1


@dataclass(frozen=True)
class StagePlan:
    """What one pipeline stage holds, sends and takes to compile.

    Attributes:
        stage: number.
        rank: whose graph this is, the first of the stage.
        layers: first and last decoder layer, `None` if there is none.
        parameters: of that graph.
        memory: of a device.
        traffic: messages of a step.
        warnings: gathers that were not meant.
        seconds: the compilation took; `None` if nothing was compiled.
        peak_bytes: it took.
    """

    stage: int
    rank: int
    layers: tuple[int, int] | None
    parameters: list[LocalParameter]
    memory: StageMemory
    traffic: list[Traffic]
    warnings: list[str]
    seconds: float | None = None
    peak_bytes: int | None = None

    def fits(self, device_memory: int) -> bool:
        """Whether it fits on a device of so many bytes."""
        return self.memory.total <= device_memory


@dataclass(frozen=True)
class Plan:
    """A step on a cluster.

    Attributes:
        workload: the step.
        device_memory: bytes of a device.
        assumptions: that the time rests on.
        compiled: whether graphs were compiled.
        stages: in order.
        time: of a step.
        checked: parameters whose slices were added up.
        problems: parameters whose slices do not make the whole, or that no stage has.
        notes: what else is worth knowing.
        usage: what the step is worth for the data.
    """

    workload: Workload
    device_memory: int
    assumptions: Assumptions
    compiled: bool
    stages: list[StagePlan]
    time: StepTime
    checked: int
    problems: list[str]
    notes: list[str]
    usage: Usage

    @property
    def fits(self) -> bool:
        """Whether every stage fits."""
        return all(stage.fits(self.device_memory) for stage in self.stages)

    def to_dict(self) -> dict:
        """The plan as JSON has it."""
        layout = self.workload.layout
        return {"devices": layout.devices, "layout": asdict(layout), "global_batch": self.workload.global_batch,
                "micro_batch_samples": self.workload.samples, "device_memory": self.device_memory, "fits": self.fits,
                "compiled": self.compiled, "stages": [self._stage(stage) for stage in self.stages],
                "parameters": cut_table(self.stages), "slices": {"checked": self.checked, "problems": self.problems},
                "time": {**asdict(self.time), "total": self.time.total, "efficiency": self.time.efficiency},
                "rows": asdict(self.workload.rows) if self.workload.rows else None, "usage": asdict(self.usage),
                "assumptions": asdict(self.assumptions), "notes": self.notes,
                "warnings": [warning for stage in self.stages for warning in stage.warnings]}

    def _stage(self, stage: StagePlan) -> dict:
        memory = stage.memory
        return {"stage": stage.stage, "rank": stage.rank, "layers": list(stage.layers) if stage.layers else None,
                "memory": {"parameters": memory.parameters, "gradients": memory.gradients,
                           "optimizer": memory.optimizer, "activations": memory.activations, "terms": memory.terms,
                           "total": memory.total, "margin": self.device_memory - memory.total,
                           "fits": stage.fits(self.device_memory)},
                "communication": [{**asdict(one), "group": list(one.group), "group_size": len(one.group),
                                   "seconds": one.seconds(self.assumptions)} for one in stage.traffic],
                "compilation": None if stage.seconds is None else {"seconds": stage.seconds,
                                                                   "peak_bytes": stage.peak_bytes}}


def make_plan(fields: dict, workload: Workload, device_memory: int, assumptions: Assumptions, compiled: bool = True,
              progress: Callable[[str], None] = lambda _: None, every_layer: bool = False,
              steps: int | None = None) -> Plan:
    """Memory, messages and time of a training step, stage by stage.

    Args:
        fields: of the YAML, overrides applied.
        workload: what they ask for, placed on a cluster.
        device_memory: bytes of a device.
        assumptions: of the machines.
        compiled: compile the graphs; otherwise everything is by formula.
        progress: is told what is being done.
        every_layer: compile all layers; otherwise three of a kind, which the others are like (`few_layers`).
        steps: of the run, if known.

    Raises:
        BuildError: when the simulation of a cluster cannot be built here.
        LayoutError: when a graph does not compile.
    """
    by_formula = local_parameters(workload)
    stages = []
    if compiled:
        with tempfile.TemporaryDirectory() as scratch:
            for stage in range(workload.layout.pipeline_stage):
                progress(f"compiling stage {stage} of {workload.layout.pipeline_stage}, rank "
                         f"{workload.first_rank(stage)} of {workload.layout.devices}")
                answer = compile_stage(fields, workload, stage, Path(scratch), every_layer)
                stages.append(read_stage(workload, stage, answer))
    else:
        stages = [StagePlan(stage, workload.first_rank(stage), _layers(workload, stage), own,
                            stage_memory(workload, stage, own), stage_traffic(workload, stage, own), [])
                  for stage, own in enumerate(by_formula)]
    time = step_time(workload, assumptions, [stage.parameters for stage in stages], [one.traffic for one in stages])
    problems = check_slices(by_formula, stages)
    return Plan(workload, device_memory, assumptions, compiled, stages, time,
                sum(len(stage.parameters) for stage in stages), problems,
                _notes(fields, workload, device_memory, by_formula, stages),
                usage(workload.config, workload.trained_parts, workload.rows, workload.global_batch, time.total, steps))


def compile_stage(fields: dict, workload: Workload, stage: int, folder: Path, every_layer: bool = False) -> dict:
    """What MindSpore's compiler makes of the step of a stage's first rank; see `step.compile_step`.

    Few micro batches are compiled, what they send is multiplied.

    Args:
        fields: of the YAML.
        workload: the step.
        stage: pipeline stage.
        folder: for the job's files.
        every_layer: as in `make_plan`.

    Raises:
        BuildError: when the simulation of a cluster cannot be built here.
        LayoutError: when the graph does not compile.
    """
    target = folder / f"stage_{stage}.json"
    job = {"fields": _placed_fields(fields, workload), "devices": workload.layout.devices,
           "rank": workload.first_rank(stage), "micro_batches": _compiled_micro_batches(workload),
           "every_layer": every_layer, "target": str(target)}
    run_rank("mindformers_ixc.planning.step", job, folder,
             f"The step of stage {stage} did not compile for {workload.layout}")
    return json.loads(target.read_text(encoding="utf-8"))


def _compiled_micro_batches(workload: Workload) -> int:
    """As few as make the graph of all: a single one is another step cell, and gathers weights before their cast."""
    return max(workload.layout.pipeline_stage, 2 if workload.accumulates else 1)


def _placed_fields(fields: dict, workload: Workload) -> dict:
    """The YAML's fields with the layout of a workload."""
    placed = copy.deepcopy(fields)
    placed["parallel_config"] = {**(placed.get("parallel_config") or {}),
                                 **{name: getattr(workload.layout, name) for name in DEGREES}}
    if not workload.accumulates:     # as MindFormers' trainer does
        placed["model"]["model_config"]["disable_lazy_inline"] = True
    placed["runner_config"] = {**(placed.get("runner_config") or {}), "batch_size": workload.samples}
    return placed


def read_stage(workload: Workload, stage: int, answer: dict) -> StagePlan:
    """A stage as the compiler sees it.

    Args:
        workload: the step.
        stage: pipeline stage.
        answer: of `step.compile_step`.
    """
    states = [entry for entry in answer["parameters"] if OPTIMIZER_STATE.match(entry["name"])]
    parameters = [_read_parameter(entry, part, stage) for entry in answer["parameters"]
                  if (part := part_of(entry["name"]))]
    memory = stage_memory(workload, stage, parameters)
    gradients = [entry for entry in states if entry["name"].startswith("accu_grads.")]
    moments = [entry for entry in states if not entry["name"].startswith("accu_grads.")]
    # the compiled optimizer keeps its moments in the parameters' dtype, MindFormers' AdamW in float32
    memory = replace(memory, gradients=_bytes(gradients) if gradients else memory.gradients,
                     optimizer=MOMENT_BYTES * sum(math.prod(entry["local"]) for entry in moments), compiled=True)
    return StagePlan(stage, workload.first_rank(stage), _layers(workload, stage), parameters, memory,
                     _read_traffic(workload, answer["operators"]), _unexpected(workload, stage, answer["operators"]),
                     answer["seconds"], answer["peak_bytes"])


def _bytes(entries: list[dict]) -> int:
    return sum(math.prod(entry["local"]) * dtype_bytes(entry["dtype"]) for entry in entries)


def _read_parameter(entry: dict, part: str, stage: int) -> LocalParameter:
    matrix, cuts = entry["device_matrix"], 1
    for axes in entry["tensor_map"]:
        for axis in axes if isinstance(axes, list) else [axes]:
            if axis >= 0:
                cuts *= matrix[len(matrix) - 1 - axis]      # the compiler counts from the right
    shards = entry["optimizer_shards"]
    return LocalParameter(entry["name"], part, tuple(entry["shape"]), tuple(entry["local"]), shards,
                          cuts * shards, math.prod(matrix) // cuts, entry["trained"], dtype_bytes(entry["dtype"]),
                          stage, layer_of(entry["name"]))


def _read_traffic(workload: Workload, operators: list[dict]) -> list[Traffic]:
    """Messages of a whole step from those of the compiled micro batches."""
    compiled = _compiled_micro_batches(workload)
    added: dict[tuple, list[float]] = {}
    for row in operators:
        # of a single micro batch everything is said to be sent once; what is not is known by its purpose
        once = row["purpose"] in ("gradient", "optimizer", "norm") if compiled == 1 else row["per_step"]
        entry = added.setdefault((row["purpose"], row["operator"], tuple(row["group"]), once), [0.0, 0.0])
        times = 1 if once else workload.micro_batches / compiled
        entry[0] += times * row["bytes"]
        entry[1] += times
    return [Traffic(purpose, operator, size, count, group, once)
            for (purpose, operator, group, once), (size, count) in added.items()]


def _unexpected(workload: Workload, stage: int, operators: list[dict]) -> list[str]:
    """A sentence for each place of the forward pass where a tensor is gathered that should not be."""
    found: dict[str, list[int]] = {}
    for row in operators:
        scope = row["scope"]
        if row["operator"] != "AllGather" or row["purpose"] not in ("forward", "layout_change") \
                or scope.startswith("Gradients"):
            continue
        if workload.sequence_parallel and _OF_THE_LANGUAGE_MODEL.search(scope):
            continue
        place = re.sub(r"/AllGather-op\d+$", "", scope)
        found.setdefault(re.sub(r"/\d+-", "/N-", place), []).append(row["bytes"] * row["group_size"])
    return [f"stage {stage}: {len(sizes)} x AllGather in the forward pass at {place}, {sum(sizes) / GIB:.3f} GiB a "
            "compiled step; no operator of the model should need it" for place, sizes in found.items()]


def _layers(workload: Workload, stage: int) -> tuple[int, int] | None:
    layers = [number for number, place in enumerate(workload.layer_stages) if place == stage]
    return (layers[0], layers[-1]) if layers else None


def check_slices(expected: list[list[LocalParameter]], stages: list[StagePlan]) -> list[str]:
    """Sentences about parameters whose slices are not together the whole, or that are missing or twice.

    Args:
        expected: parameters of each stage by formula; their shapes come from the name table.
        stages: as they were planned.
    """
    shapes = {parameter.name: parameter.shape for own in expected for parameter in own}
    problems: list[str] = []
    seen: dict[str, int] = {}
    for stage in stages:
        for parameter in stage.parameters:
            name, whole = parameter.name, math.prod(shapes.get(parameter.name, parameter.shape))
            if parameter.size * parameter.slices != whole:
                problems.append(f"{name}: {parameter.slices} slices of {_shape(parameter.local)} are not the whole "
                                f"{_shape(shapes.get(name, parameter.shape))}.")
            if name in seen:
                problems.append(f"{name} is in the graphs of stages {seen[name]} and {stage.stage}.")
            seen[name] = stage.stage
    problems += [f"{name} is in the graph of no stage." for name in shapes if name not in seen]
    return problems + [f"{name} is in a graph but should not be." for name in seen if name not in shapes]


def cut_table(stages: list[StagePlan]) -> list[dict]:
    """How each kind of parameter is cut: parameters that differ only in their layer are one row, by part."""
    rows: dict[tuple, dict] = {}
    for stage in stages:
        for parameter in stage.parameters:
            kind = re.sub(r"\.layers\.\d+\.", ".layers.N.", parameter.name)
            cut, axis = _tensor_cut(parameter)
            key = (parameter.part, kind, parameter.shape, parameter.local, cut)
            row = rows.setdefault(key, {
                "part": parameter.part, "name": kind, "count": 0, "shape": list(parameter.shape),
                "local": list(parameter.local), "axis": axis, "tensor_parallel": cut,
                "optimizer_shards": parameter.optimizer_shards, "copies": parameter.replicas
                // parameter.optimizer_shards, "trained": parameter.trained})
            row["count"] += 1
    return list(rows.values())


def _tensor_cut(parameter: LocalParameter) -> tuple[int, str | None]:
    """Into how many tensor parallel cuts a parameter, and which axis."""
    before = (parameter.local[0] * parameter.optimizer_shards, *parameter.local[1:])
    for axis, (whole, local) in enumerate(zip(parameter.shape, before)):
        if whole != local:
            return whole // local, "rows" if axis == 0 else "columns"
    return 1, None


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _notes(fields: dict, workload: Workload, device_memory: int, by_formula: list[list[LocalParameter]],
           stages: list[StagePlan]) -> list[str]:
    notes = []
    mode = (fields.get("parallel") or {}).get("parallel_mode", 1)
    if mode not in (1, 2, "SEMI_AUTO_PARALLEL", "AUTO_PARALLEL"):
        notes.append(f"parallel.parallel_mode is {mode!r}; the plan is that of mode 1 (semi-auto parallel), in which "
                     "MindSpore cuts the graph.")
    inputs = stages[0].memory.terms.get("inputs of the step", 0)
    if inputs > _LARGE_BATCH * device_memory and workload.full_batch and workload.layout.data_parallel > 1:
        notes.append(f"With parallel.full_batch every device gets the whole batch, {inputs / GIB:.1f} GiB; with "
                     "full_batch False and a dataset_strategy it would be "
                     f"{inputs / workload.layout.data_parallel / GIB:.1f} GiB.")
    elif inputs > _LARGE_BATCH * device_memory:
        notes.append(f"The batch of a step takes {inputs / GIB:.1f} GiB of every device: all micro batches arrive "
                     f"together{_of_views(workload)}.")
    unlike = [parameter.name for own, stage in zip(by_formula, stages)
              for parameter in _unlike(own, stage.parameters)]
    if unlike:
        notes.append(f"The compiler's slices of {len(unlike)} parameters are not those of the formulae, so --search is "
                     f"not to be trusted here: {', '.join(unlike[:3])}{' and more' if len(unlike) > 3 else ''}.")
    return notes


def _of_views(workload: Workload) -> str:
    """What of a batch could be smaller."""
    if "global_views" not in workload.columns:
        return ", and pictures are float32: with global_views and view_index in input_columns tiles are bytes"
    pixels = 3 * workload.config.vision_config.image_size ** 2
    share = 4 * workload.config.max_images / (4 * workload.config.max_images + workload.config.max_tiles)
    return (f"; {share:.0%} of its pictures are the {workload.config.max_images} float32 global views of a row "
            f"({4 * pixels / 2 ** 20:.1f} MiB each), so a smaller max_images helps") if share > 0.5 else ""


def _unlike(own: list[LocalParameter], found: list[LocalParameter]) -> list[LocalParameter]:
    known = {parameter.name: parameter for parameter in own}
    return [parameter for parameter in found
            if parameter.name not in known or known[parameter.name].local != parameter.local]
