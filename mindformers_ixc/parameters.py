"""The one table of parameters: name, part and shape, as functions of the configuration.

The cells carry the public checkpoint's names, so there is nothing to translate; what converters, inspection, freezing
and learning-rate groups need is which parameters a configuration has, which part each belongs to and its shape.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.fields import TASK_LORAS

VISION = "vit.vision_tower.vision_model"
# What a reward model has in place of `output.weight`.
SCORE_HEAD = "v_head.weight"

# Parts in the order they are computed, and what the names of their parameters look like. First match wins.
PARTS = {
    "vision": r"vit\.",
    "projector": r"vision_proj\.",
    "separators": r"plora_(glb|sub)_GN$",
    "partial_lora": r"model\..*\.Plora_[AB]\.weight$",
    **{f"task_lora.{task}": rf"model\..*\.lora_{task}_[AB]\.weight$" for task in TASK_LORAS},
    "lora": r"model\..*\.mindpet_delta_lora_([ABab]|magnitude$)",
    "reward_head": r"v_head\.",
    "language": r"(model\.|output\.)",
}

# Buffers that some versions of the public code save beside the weights; they are computed here, never loaded.
BUFFERS = re.compile(r".*(\.position_ids|\.rotary_emb\.inv_freq)$")

# Parameters of OmniLive's base that its memory model feeds and nothing here computes with; conversions carry them on.
UNUSED = tuple(f"video_mem_proj.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias"))

# What MindFormers' optimizers put in front of a parameter's name for its moments; cut and placed like the parameter.
OPTIMIZER_STATE = re.compile(r"^(adam_m|adam_v|moment1|moment2|accu_grads|accum)\.")

# What a row's norm is taken to be at least where DoRA divides by it: a row of zeros stays one.
LEAST_NORM = 1e-12

# Weights along the input that share a scale and a zero where a weight is kept in four bits (`checkpoint.packing`).
INT4_GROUP = 128

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Entry:
    """One parameter of a configuration.

    Attributes:
        name: public name, which is the cell's as well.
        part: key of `PARTS`.
        shape: of the whole parameter.
    """

    name: str
    part: str
    shape: tuple[int, ...]


def part_of(name: str) -> str | None:
    """The part a parameter belongs to, `None` for a name this model does not have."""
    return next((part for part, pattern in PARTS.items() if re.match(pattern, name)), None)


def layer_of(name: str) -> int | None:
    """Index of the decoder layer a parameter belongs to, `None` outside the layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def base_name(name: str) -> str:
    """The parameter an optimizer state belongs to; other names come back as they are."""
    return OPTIMIZER_STATE.sub("", name)


def parameter_table(config: ModelConfig) -> dict[str, Entry]:
    """Every parameter of a configuration by name, in the order of the public checkpoint's parts."""
    shapes = [*_vision_shapes(config), *_projector_shapes(config), *_language_shapes(config)]
    return {name: _entry(name, shape) for name, shape in shapes}


def _entry(name: str, shape: tuple[int, ...]) -> Entry:
    part = part_of(name)
    assert part is not None, name       # PARTS covers every name that is made below
    return Entry(name, part, shape)


def _with_bias(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _layer_norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _vision_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    vision = config.vision_config
    width, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    yield f"{VISION}.embeddings.class_embedding", (width,)
    yield f"{VISION}.embeddings.patch_embedding.weight", (width, 3, patch, patch)
    yield f"{VISION}.embeddings.position_embedding.weight", (vision.patches_per_side ** 2 + 1, width)
    yield from _layer_norm(f"{VISION}.pre_layrnorm", width)
    for i in range(vision.num_hidden_layers):
        layer = f"{VISION}.encoder.layers.{i}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _with_bias(f"{layer}.self_attn.{projection}", width, width)
        yield from _layer_norm(f"{layer}.layer_norm1", width)
        yield from _with_bias(f"{layer}.mlp.fc1", inner, width)
        yield from _with_bias(f"{layer}.mlp.fc2", width, inner)
        yield from _layer_norm(f"{layer}.layer_norm2", width)
    yield from _layer_norm(f"{VISION}.post_layernorm", width)


def _projector_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    merged, width = 4 * config.vision_config.hidden_size, config.hidden_size
    yield from _with_bias("vision_proj.0", width, merged)
    yield from _with_bias("vision_proj.2", width, width)
    yield "plora_glb_GN", (1, 1, merged)
    yield "plora_sub_GN", (1, 1, 1, merged)


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Shapes `(out, in)` of the five linears of a decoder layer, by their path below the layer."""
    heads = config.num_attention_heads * config.head_size
    qkv = heads + 2 * config.num_key_value_heads * config.head_size
    width, inner = config.hidden_size, config.intermediate_size
    return {"attention.wqkv": (qkv, width), "attention.wo": (width, heads), "feed_forward.w1": (inner, width),
            "feed_forward.w3": (inner, width), "feed_forward.w2": (width, inner)}


def _language_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    pairs = {"Plora": config.plora_rank, **{f"lora_{task}": rank for task, rank in config.task_lora_ranks.items()}}
    pairs = {name: rank for name, rank in pairs.items() if rank}      # a plain InternLM2 has none
    yield "model.tok_embeddings.weight", (config.vocab_size, config.hidden_size)
    for i in range(config.num_hidden_layers):
        for path, (rows, columns) in linear_shapes(config).items():
            linear = f"model.layers.{i}.{path}"
            yield f"{linear}.weight", (rows, columns)
            for pair, rank in pairs.items():
                yield f"{linear}.{pair}_A.weight", (rank, columns)
                yield f"{linear}.{pair}_B.weight", (rows, rank)
        yield f"model.layers.{i}.attention_norm.weight", (config.hidden_size,)
        yield f"model.layers.{i}.ffn_norm.weight", (config.hidden_size,)
    yield "model.norm.weight", (config.hidden_size,)
    if config.reward_pooling is None:
        yield "output.weight", (config.vocab_size, config.hidden_size)
    else:
        yield SCORE_HEAD, (1, config.hidden_size)
