"""Fused kernels for the CPU, as operations of MindSpore's graphs.

Those that are made here alone have no gradients and are for the inference graphs (`mindformers_ixc.generation`) only;
`training` has the ones with gradients.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
import mindspore.common.dtype as mstype
from mindspore import ops

from mindformers_ixc.device import is_parallel, on_ascend
from mindformers_ixc.native import is_switched_on, library

# Positions up to which the kernel `linear` is taken instead of MindSpore's product.
FEW_ROWS = 8


def available(*dtypes: mstype.Type) -> bool:
    """Whether the kernels can take the place of MindSpore's for a computation in `dtypes` on the current device.

    The parallel compiler cannot cut them.
    """
    return (all(dtype == mstype.float32 for dtype in dtypes) and ms.get_context("device_target") == "CPU"
            and not on_ascend() and not is_parallel() and is_switched_on())


def kernel(name: str, shape: Callable[..., Any] = lambda x, *_: x, outputs: int = 1,
           bprop: Callable[..., Any] | None = None) -> ops.Custom:
    """An operation for use in a graph.

    Args:
        name: function of the library.
        shape: the outputs' shapes from the inputs' shapes; by default one output of the first input's.
        outputs: number of outputs, all of them float32.
        bprop: gives the gradients of the inputs from them, the outputs and the outputs' gradients.
    """
    dtype = mstype.float32 if outputs == 1 else (mstype.float32,) * outputs
    operation = ops.Custom(f"{library()}:{name}", out_shape=shape, out_dtype=dtype, func_type="aot", bprop=bprop)
    # MindSpore infers shapes once for operations of equal attributes with equal inputs, whatever `shape` encloses: the
    # heads of one model would be those of the next one in this process
    for variable, cell in zip(shape.__code__.co_freevars, shape.__closure__ or ()):
        operation.add_prim_attr(f"shape_{variable}", cell.cell_contents)
    return operation
