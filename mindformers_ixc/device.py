"""The device that graphs are made for, and this process's part in a parallel run; nothing else asks MindSpore."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms
from mindspore.communication import management

_assumed: str | None = None


def on_ascend() -> bool:
    """Whether graphs are made for Ascend's kernels."""
    return (_assumed or ms.get_context("device_target")) == "Ascend"


@contextmanager
def assume_device(name: str) -> Iterator[None]:
    """Lets cells that are built meanwhile be those of a device that is not there, to compile its graphs without it.

    Args:
        name: MindSpore's name of the device, such as `Ascend`.
    """
    global _assumed
    before, _assumed = _assumed, name
    try:
        yield
    finally:
        _assumed = before


def rank() -> int:
    """Number of this process; by the launcher's variable as long as MindSpore's communication is not set up."""
    try:
        return management.get_rank()
    except RuntimeError:
        return int(os.environ.get("RANK_ID", "0"))


def group_size() -> int:
    """Number of processes, asked for like `rank`."""
    try:
        return management.get_group_size()
    except RuntimeError:
        return int(os.environ.get("RANK_SIZE", "1"))


def is_parallel() -> bool:
    """Whether graphs are made by MindSpore's parallel compiler."""
    return ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")


def _first_of_last_stage() -> int:
    size, stages = group_size(), ms.get_auto_parallel_context("pipeline_stages") or 1
    return size - size // stages


def reports_loss() -> bool:
    """Whether this process is the one that records what a step gave: the first rank of the last stage."""
    if not is_parallel():
        return rank() == 0      # replicas of data parallel mode are all alike
    return rank() == _first_of_last_stage()


def has_loss() -> bool:
    """Whether this process's pipeline stage computes the loss."""
    return not is_parallel() or rank() >= _first_of_last_stage()


def share_results() -> None:
    """Lets every rank have what the last pipeline stage computes: each of them chooses the next token."""
    ms.set_auto_parallel_context(pipeline_result_broadcast=True)


def compute_alone() -> None:
    """Lets this rank's graphs be its own from now on, as of a process by itself.

    Of replicas that answer each has a whole model, and they have nothing to exchange.
    """
    ms.reset_auto_parallel_context()


@contextmanager
def measuring() -> Iterator[None]:
    """Lets graphs be compiled and run that measure a model while it trains, beside the graph of its step.

    Their inputs are whole batches on every device, every rank gets what they compute, and the strategy file stays the
    training step's: MindSpore writes it anew for each graph that it compiles, and checkpoints are joined by it.
    """
    if not is_parallel():
        yield
        return
    names = ("pipeline_result_broadcast", "strategy_ckpt_save_file", "dataset_strategy")
    before = {name: ms.get_auto_parallel_context(name) for name in names}
    full_batch = ms.get_auto_parallel_context("full_batch")
    if not isinstance(before["dataset_strategy"], str):      # it is given as lists and taken as tuples
        before["dataset_strategy"] = tuple(tuple(cut) for cut in before["dataset_strategy"])
    ms.set_auto_parallel_context(dataset_strategy=())       # or it would be asked for, whatever full_batch is
    # the compiler sets the number of micro batches for a step that accumulates, and would look for them in these graphs
    # too; it sets it again whenever it compiles such a step, and nobody else may
    ms.set_auto_parallel_context(pipeline_result_broadcast=True, strategy_ckpt_save_file="",
                                 dataset_strategy="full_batch", grad_accumulation_step=1)
    try:
        yield
    finally:
        if not full_batch:
            ms.set_auto_parallel_context(dataset_strategy="data_parallel")      # a strategy alone would leave it on
        ms.set_auto_parallel_context(**before)
