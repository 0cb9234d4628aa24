"""When each stage of a pipeline works at which micro batch: a drawing of the formula of the step's time.

Every stage does its first forward passes, then a backward pass for each further forward pass, then what is left (one
forward, one backward). That order is also what the memory's formula takes to be in flight.
"""
from __future__ import annotations

from dataclasses import dataclass

from mindformers_ixc.planning.cost import Traffic, stage_work
from mindformers_ixc.planning.plan import Plan

# Share of the messages of a purpose that belongs to the forward pass; the others belong to the backward pass. Changes
# of layout and messages between stages come in both.
FORWARD_SHARE = {"forward": 1.0, "layout_change": 0.5, "pipeline": 0.5}

# Blocks that are drawn at most; of a step with more micro batches the first ones are.
BLOCKS = 1600


@dataclass(frozen=True)
class StageSeconds:
    """How long a stage takes.

    Attributes:
        forward: for the forward pass of a micro batch, its messages included.
        backward: for the backward pass, with what is computed again.
        update: for what is sent once a step.
    """

    forward: float
    backward: float
    update: float


@dataclass(frozen=True)
class Block:
    """A stage at work.

    Attributes:
        stage: number.
        micro_batch: number; `None` for the update.
        kind: `forward`, `backward` or `update`.
        start: seconds since the step began.
        end: seconds since the step began.
    """

    stage: int
    micro_batch: int | None
    kind: str
    start: float
    end: float


def stage_seconds(plan: Plan) -> list[StageSeconds]:
    """How long each stage of a plan takes."""
    workload, operations = plan.workload, plan.assumptions.operations
    found = []
    for stage in plan.stages:
        work = stage_work(workload, stage.stage, stage.parameters)
        forward, backward, once = _messages(stage.traffic, plan)
        found.append(StageSeconds((work.forward + work.reference) / operations + forward / workload.micro_batches,
                                  (work.backward + work.again) / operations + backward / workload.micro_batches, once))
    return found


def _messages(traffic: list[Traffic], plan: Plan) -> tuple[float, float, float]:
    """Seconds of a step's messages in forward passes, in backward passes, and once."""
    forward = backward = once = 0.0
    for one in traffic:
        seconds = one.seconds(plan.assumptions)
        if one.per_step:
            once += seconds
        else:
            share = FORWARD_SHARE.get(one.purpose, 0.0)
            forward += share * seconds
            backward += (1 - share) * seconds
    return forward, backward, once


def drawn_micro_batches(stages: int, micro_batches: int) -> int:
    """How many micro batches of a step are drawn."""
    return min(micro_batches, max(2 * stages, BLOCKS // (2 * stages)))


def timeline(seconds: list[StageSeconds], micro_batches: int) -> list[Block]:
    """A step, block by block.

    Args:
        seconds: of each stage.
        micro_batches: of the step.

    Returns:
        Blocks of all stages; the updates follow when all stages are done, since the norm of the gradient is of all.
    """
    count = len(seconds)
    waiting = [_order(count, stage, micro_batches) for stage in range(count)]
    free, ends, blocks = [0.0] * count, dict[tuple[str, int, int], float](), list[Block]()
    while any(waiting):
        for stage, own in enumerate(waiting):
            while own and (ready := _ready(ends, count, stage, *own[0])) is not None:
                kind, number = own.pop(0)
                start = max(free[stage], ready)
                free[stage] = ends[kind, stage, number] = start + getattr(seconds[stage], kind)
                blocks.append(Block(stage, number, kind, start, free[stage]))
    done = max(free)
    return blocks + [Block(stage, None, "update", done, done + one.update) for stage, one in enumerate(seconds)
                     if one.update]


def _order(stages: int, stage: int, micro_batches: int) -> list[tuple[str, int]]:
    """What a stage does, in its order."""
    before = min(micro_batches, stages - stage - 1)
    order = [("forward", number) for number in range(before)]
    for number in range(micro_batches):
        if before + number < micro_batches:
            order.append(("forward", before + number))
        order.append(("backward", number))
    return order


def _ready(ends: dict[tuple[str, int, int], float], stages: int, stage: int, kind: str, number: int) -> float | None:
    """When what a pass needs of another stage is there; `None` if that is not known yet."""
    other = stage - 1 if kind == "forward" else stage + 1
    return ends.get((kind, other, number)) if 0 <= other < stages else 0.0
