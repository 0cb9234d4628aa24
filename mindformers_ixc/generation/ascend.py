"""Inference on Ascend: what MindSpore must know before the first graph, and what the device's memory holds."""
from __future__ import annotations

import os

import mindspore as ms
import mindspore.common.dtype as mstype
from mindspore.context import get_jit_config

from mindformers_ixc.checkpoint.dtypes import dtype_bytes
from mindformers_ixc.device import is_parallel, on_ascend
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.models.configuration import IXC25Config

# PagedAttention and ReshapeAndCache exist as internal kernels only, which MindSpore looks for while infer_boost is on;
# that takes jit_level O0 and an Atlas A2 (documentation of mindspore.JitConfig). MindFormers sets the same for run_mode
# predict (mindformers/core/context/build_context.py, _set_predict_jit_config).
BOOST = {"jit_level": "O0", "infer_boost": "on"}

# MindFormers' defaults for use_past (the same file, set_env).
ENVIRONMENT = {"MS_ALLOC_CONF": "enable_vmm:False", "CPU_AFFINITY": "True",
               "MS_INTERNAL_DISABLE_CUSTOM_KERNEL_LIST": "PagedAttention"}

# What paged attention takes (PagedAttentionOperation of CANN's Ascend Transformer Boost): blocks of a multiple of 16
# positions, at most 128 x 128 numbers of a head; 128 positions are recommended.
BLOCK_MULTIPLE, BLOCK_NUMBERS = 16, 128 * 128

# Part of the memory beside the weights that keys and values of a server's answers may take: the rest is for prompts,
# scores, and searches with beams, which have caches of their own.
POOL_SHARE = 2 / 3


def prepare_inference(paged: bool = False) -> None:
    """Switches this process's graphs to Ascend's inference kernels; every door to inference comes by here.

    Nothing happens on other devices, and nothing is said twice. What was set before, by the caller or by MindFormers'
    context, stays. A process that trains never comes by: its model has no `use_past`.

    Args:
        paged: whether paged attention is about to be built.

    Raises:
        ConfigError: for paged attention where the caller's own jit_config rules its kernels out.
    """
    if not on_ascend():
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    given = {key: value for key, value in get_jit_config().items() if value}
    wanted = {**BOOST, **given}
    if wanted["jit_level"] == BOOST["jit_level"] and wanted != given:
        ms.set_context(jit_config=wanted)
        given = wanted
    if paged and given.get("infer_boost") != "on":
        raise ConfigError(f"jit_config is {given}, but Ascend has paged attention only with infer_boost on, which "
                          "takes jit_level O0. Leave jit_config out, or set use_past to False.")


def check_paged_dtype(config: IXC25Config) -> None:
    """Refuses a dtype that paged and flash attention do not take.

    Raises:
        ConfigError: for float32.
    """
    if config.compute_dtype == mstype.float32:
        raise ConfigError("compute_dtype is float32; paged and flash attention take float16 or bfloat16. Choose "
                          "one of them, or use_past: False for attention that takes all.")


def check_blocks(config: IXC25Config) -> None:
    """Refuses blocks that paged attention does not take.

    Raises:
        ConfigError: naming `block_size` and what it may be.
    """
    most = BLOCK_NUMBERS // config.head_size // BLOCK_MULTIPLE * BLOCK_MULTIPLE
    if config.block_size % BLOCK_MULTIPLE or config.block_size > most:
        raise ConfigError(f"block_size is {config.block_size}; Ascend's paged attention takes multiples of "
                          f"{BLOCK_MULTIPLE} up to {most} for heads of {config.head_size}. Choose one of them.")


def blocks_needed(config: IXC25Config, rows: int, positions: int) -> int:
    """Blocks of the paged cache that rows of up to `positions` positions share.

    A cache is built for a batch of prompts whose lengths, with their new tokens, are known by then. So unless
    `num_blocks` says otherwise it has what these rows can fill: any request up to the model's longest is served as far
    as the device's memory goes, and a short one takes little of it.

    Raises:
        ConfigError: when `num_blocks` is fewer.
    """
    needed = rows * -(-positions // config.block_size)
    if config.num_blocks is not None and needed > config.num_blocks:
        raise ConfigError(f"num_blocks is {config.num_blocks}, but {rows} row(s) of up to {positions} positions take "
                          f"{needed} blocks of block_size {config.block_size}; leave num_blocks out, raise it or ask "
                          "for less at once.")
    return config.num_blocks or needed


def pool_blocks(config: IXC25Config, rows: int, positions: int, weights: int) -> int:
    """Blocks of the paged cache that the answers of a server share, the one that is nobody's included.

    `num_blocks` where it is set. Else what `rows` answers of `positions` positions can fill, as far as that is no more
    than `POOL_SHARE` of the memory that the device has beside the weights.

    Args:
        config: sizes and dtypes.
        rows: answers at once.
        positions: of each.
        weights: bytes of the model on this device; they may still be on their way to the device.

    Raises:
        ConfigError: when that is less than the blocks of a single answer.
    """
    each = -(-positions // config.block_size)
    blocks, memory = config.num_blocks or rows * each + 1, device_memory()
    if config.num_blocks is None and memory is not None:
        free = memory - max(weights, ms.runtime.memory_allocated())
        block = 2 * config.num_hidden_layers * config.block_size * config.num_key_value_heads * config.head_size
        block = block * dtype_bytes(config.compute_dtype) // devices(config)
        blocks = min(blocks, int(free * POOL_SHARE) // block)
    if blocks < each + 1:
        what = f"num_blocks is {blocks}" if config.num_blocks else f"the device has memory for {max(blocks, 0)} blocks"
        raise ConfigError(f"{what}, but an answer of up to {positions} positions takes {each} blocks of block_size "
                          f"{config.block_size}, and one is nobody's. Ask for fewer positions (--max_positions)"
                          f"{' or leave num_blocks out' if config.num_blocks else ''}.")
    return blocks


def prompt_bytes(config: IXC25Config, rows: int, positions: int) -> int:
    """About what a layer's tensors of whole prompts take: three of the model's width, three of the MLP's."""
    itemsize = dtype_bytes(config.compute_dtype)
    return 3 * rows * positions * (config.hidden_size + config.intermediate_size) * itemsize


def devices(config: IXC25Config) -> int:
    """Devices that share keys and values: their heads by tensor parallel, their layers by stages."""
    options = config.parallel_config
    return options.model_parallel * options.pipeline_stage if is_parallel() else 1


def device_memory() -> int | None:
    """Bytes of this process's Ascend that tensors may have together; `None` where that cannot be known.

    The device's memory, or what `mindspore.set_context(max_device_memory=...)` allows where that is less.
    """
    if ms.get_context("device_target") != "Ascend":     # its graphs are compiled without it
        return None
    properties = ms.hal.get_device_properties(ms.get_context("device_id"), "Ascend")
    total = getattr(properties, "total_memory", 0)       # 0 before the device is used
    limit = int(float(str(ms.get_context("max_device_memory")).removesuffix("GB")) * 2**30)
    return min(total, limit) if total else None
