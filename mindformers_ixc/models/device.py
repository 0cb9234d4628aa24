"""The device graphs are made for; the leaf cells ask here and nowhere else."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mindspore as ms

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
