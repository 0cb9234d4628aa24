"""The one table of tensor-parallel cuts; shard strategies and checkpoint shards both derive from it.

A linear cut by ROWS (of its weight `(out, in)`: by output features) takes whole inputs and gives every device a slice
of the outputs; one cut by COLUMNS takes such slices and sums the products over the devices. Each pair of them costs one
all-reduce in the forward pass (Megatron-LM, arXiv 1909.08053). Parameters that are not named here are whole everywhere:
norms, separators, positions and the patch convolution.
"""
from __future__ import annotations

import functools
import math
import re

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.errors import ConfigError

ROWS, COLUMNS = 0, 1     # the axis of the weight (out, in) that is cut

CUTS = {
    "tok_embeddings": ROWS,      # by vocabulary
    "output": ROWS,              # by vocabulary
    "wqkv": ROWS,                # whole key/value groups: query heads, key head and value head stay together
    "wo": COLUMNS,
    "w1": ROWS,
    "w3": ROWS,
    "w2": COLUMNS,
    "q_proj": ROWS,              # the vision tower, by heads
    "k_proj": ROWS,
    "v_proj": ROWS,
    "out_proj": COLUMNS,
    "fc1": ROWS,
    "fc2": COLUMNS,
    "vision_proj.0": ROWS,
    "vision_proj.2": COLUMNS,
}

_LINEAR = re.compile(r"(?:^|\.)(" + "|".join(map(re.escape, CUTS)) + r")\.(.+)$")
_FIRST_OF_PAIR = re.compile(r"(Plora|lora_\w+)_A\.weight$")
_SECOND_OF_PAIR = re.compile(r"(Plora|lora_\w+)_B\.weight$")


@functools.cache
def cut_axis(name: str) -> int | None:
    """The axis along which tensor parallel cuts a parameter, `None` for a parameter that is whole on every device.

    A low-rank pair is cut with its linear: its outer side (A's inputs or B's outputs) has the linear's width, its inner
    side, the rank, stays whole.

    Args:
        name: public parameter name.
    """
    match = _LINEAR.search(name)
    if match is None:
        return None
    axis, leaf = CUTS[match[1]], match[2]
    if _FIRST_OF_PAIR.search(leaf):
        return COLUMNS if axis == COLUMNS else None
    if _SECOND_OF_PAIR.search(leaf):
        return ROWS if axis == ROWS else None
    if leaf == "bias":
        return ROWS if axis == ROWS else None
    return axis


def product_strategy(cut: int | None, dp: int, tp: int) -> tuple:
    """Strategy of a product `(N, in) x (out, in)` whose weight is cut along an axis, or whole (`None`)."""
    if cut == ROWS:
        return (dp, 1), (tp, 1)
    if cut == COLUMNS:
        return (dp, tp), (1, tp)
    return (dp, 1), (1, 1)


def allowed_degrees(config: ModelConfig) -> list[int]:
    """Tensor-parallel degrees that divide everything that is cut, ascending.

    Whole key/value groups, and whole vision heads unless the tower is replicated, must go to one device; vocabulary and
    widths must divide too.
    """
    vision = config.vision_config
    common = math.gcd(config.num_key_value_heads, config.vocab_size, config.intermediate_size, config.hidden_size)
    if config.vision_parallel == "heads":
        common = math.gcd(common, vision.num_attention_heads, vision.intermediate_size)
    return [degree for degree in range(1, common + 1) if common % degree == 0]


def check_degree(config: ModelConfig, degree: int) -> None:
    """Refuses a tensor-parallel degree that would cut a key/value group or a head.

    Raises:
        ConfigError: naming the sizes and the degrees that work.
    """
    allowed = allowed_degrees(config)
    if degree not in allowed:
        vision = config.vision_config
        raise ConfigError(
            f"Tensor parallel {degree} does not divide this model ({config.num_key_value_heads} key/value groups, "
            f"{vision.num_attention_heads} vision heads, vocabulary {config.vocab_size}, widths {config.hidden_size} "
            f"and {config.intermediate_size}); the degrees that do are {', '.join(map(str, allowed))}.")


def check_stages(config: ModelConfig, stages: int) -> None:
    """Refuses a number of pipeline stages that the layers do not fill.

    Raises:
        ConfigError: naming the number of layers.
    """
    if not 1 <= stages <= config.num_hidden_layers:
        raise ConfigError(f"{stages} pipeline stages need as many decoder layers at least; this model has "
                          f"{config.num_hidden_layers}, so choose 1 to {config.num_hidden_layers}.")
