"""What is documented of Ascend's fused operators, as a table, and a reader of compiled graphs to hold against it.

Nothing here needs a device: graphs are compiled by MindSpore's front end (scripts/compile_ascend.py,
tests/helpers/ascend_primitives.py), which accepts shapes and attributes that a kernel would refuse.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

# Where the rules come from.
OPS = "mindspore 2.9.0, documentation of ops.FlashAttentionScore"
INFER = "mindspore 2.9, shape and type inference of FlashAttentionScore (C++)"
PAGED = "mindspore 2.9, type inference of PagedAttention (C++)"
ATB = "CANN 8.0.RC2, Ascend Transformer Boost, PagedAttentionOperation"
CACHE = "mindspore 2.9, shape and type inference of ReshapeAndCache (C++)"
ROTARY = "mindspore 2.9.0, documentation of ops.rotary_position_embedding"
NORM = "mindspore 2.9.0, documentation of ops.rms_norm"
QUANTISED = "CANN, documentation of aclnnWeightQuantBatchMatmulV2, for Atlas A2"
QUANTISED_INFER = "mindspore 2.9, shape and type inference of WeightQuantBatchMatmul (C++)"

LAYOUTS = ("BSH", "BNSD", "SBH", "BSND", "TND", "TH")      # by MindSpore's numbers
COMPRESSED = (2048, 2048)

_SETTINGS = ("head_num", "keep_prob", "scale_value", "pre_tokens", "next_tokens", "inner_precise", "input_layout",
             "sparse_mode")

# Names of each operator's inputs, in order.
INPUTS: dict[str, tuple[str, ...]] = {
    "FlashAttentionScore": ("query", "key", "value", "real_shift", "drop_mask", "padding_mask", "attn_mask", "prefix",
                            "actual_seq_qlen", "actual_seq_kvlen", *_SETTINGS),
    "FlashAttentionScoreGrad": ("query", "key", "value", "dy", "real_shift", "drop_mask", "padding_mask", "attn_mask",
                                "softmax_max", "softmax_sum", "softmax_in", "attention_in", "prefix",
                                "actual_seq_qlen", "actual_seq_kvlen", *_SETTINGS),
    "PagedAttention": ("query", "key_cache", "value_cache", "block_tables", "context_lens", "antiquant_scale",
                       "antiquant_offset", "attn_mask", "q_seq_lens", "alibi_mask", "head_num", "scale_value",
                       "kv_head_num"),
    "ReshapeAndCache": ("key", "value", "key_cache", "value_cache", "slot_mapping"),
    "RmsNorm": ("x", "gamma", "epsilon"),
    "RmsNormGrad": ("dy", "x", "rstd", "gamma"),
    "RotaryPositionEmbedding": ("x", "cos", "sin", "mode"),
    "RotaryPositionEmbeddingGrad": ("x", "cos", "sin", "forward", "mode"),
    "WeightQuantBatchMatmul": ("x", "weight", "antiquant_scale", "antiquant_offset", "quant_scale", "quant_offset",
                               "bias", "transpose_x", "transpose_weight", "antiquant_group_size"),
}


@dataclass(frozen=True)
class Value:
    """An input of an operator.

    Attributes:
        shape: of a tensor; `None` for what is none.
        dtype: of a tensor, by its name in small letters.
        constant: a number, tuple of numbers or None that the graph holds; a tensor has none.
    """

    shape: tuple[int, ...] | None = None
    dtype: str = ""
    constant: Any = None

    @property
    def is_none(self) -> bool:
        """Whether nothing is given."""
        return self.shape is None and self.constant is None


@dataclass(frozen=True)
class Operator:
    """An operator of a compiled graph; inputs are its attributes by their names in `INPUTS`."""

    name: str
    inputs: dict[str, Value] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Value:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.inputs[name]

    @property
    def layout(self) -> str:
        """Layout of a flash attention's query, key and value."""
        return LAYOUTS[self.input_layout.constant]

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key/value heads that a flash attention's tensors have."""
        axis = {"BNSD": 1, "BSND": 2, "TND": 1}[self.layout]
        return self.query.shape[axis], self.key.shape[axis]

    @property
    def lengths(self) -> tuple[int, int]:
        """Positions of a flash attention's queries and keys."""
        axis = {"BNSD": 2, "BSND": 1, "TND": 0}[self.layout]
        return self.query.shape[axis], self.key.shape[axis]


class Rule(NamedTuple):
    """Something documented.

    Attributes:
        operators: names of those it is about.
        says: what must hold.
        source: who says so.
        holds: whether it does.
    """

    operators: tuple[str, ...]
    says: str
    source: str
    holds: Callable[[Operator], bool]


def _sequences(op: Operator) -> bool:
    """Cumulative lengths of a TND attention: as many of queries as of keys, 1024 at most, none empty."""
    both = op.actual_seq_qlen, op.actual_seq_kvlen
    for value, total in zip(both, op.lengths):
        if value.shape is not None:
            if len(value.shape) != 1 or value.dtype != "int64" or value.shape[0] > 1024:
                return False
        elif not isinstance(value.constant, tuple) or len(value.constant) > 1024 \
                or any(a >= b for a, b in pairwise((0, *value.constant))) or value.constant[-1] != total:
            return False
    count = [value.shape[0] if value.shape is not None else len(value.constant) for value in both]
    return count[0] == count[1]


def _full_mask(op: Operator) -> bool:
    """A mask of the default mode: none, or one of the shapes that broadcast to all heads or to all samples."""
    if op.attn_mask.is_none:
        return True
    batch, (heads, _), lengths = op.query.shape[0], op.heads, op.lengths
    return op.attn_mask.shape in {(batch, heads, *lengths), (batch, 1, *lengths), (1, 1, *lengths), lengths}


def _rotary_tables(op: Operator) -> bool:
    """Tables of x's layout, its heads or its samples being 1: x is BNSD or BSND here."""
    batch, *middle, size = op.x.shape
    shapes = {(rows, *places, size) for rows in (1, batch)
              for places in ((middle[0], 1), (1, middle[1]), tuple(middle))}
    return op.cos.shape == op.sin.shape and op.cos.shape in shapes


def _sides(op: Operator) -> tuple[int, int]:
    """Inputs and outputs of a quantised weight; MindSpore's qint4x2 has two numbers a byte along the last axis."""
    first, last = op.weight.shape[0], op.weight.shape[1] * (2 if op.weight.dtype == "qint4x2" else 1)
    return (last, first) if op.transpose_weight.constant else (first, last)


def _scales(op: Operator) -> bool:
    """Scales of a quantised weight: one for an output, or for each group of inputs and output."""
    (inputs, outputs), group = _sides(op), op.antiquant_group_size.constant
    return op.antiquant_scale.shape in ([(-(-inputs // group), outputs)] if group else [(outputs,), (1, outputs)])


FLASH, NORMS = ("FlashAttentionScore", "FlashAttentionScoreGrad"), ("RmsNorm", "RmsNormGrad")
ROTATIONS = ("RotaryPositionEmbedding", "RotaryPositionEmbeddingGrad")
HALVES = ("float16", "bfloat16")

RULES = [
    Rule(FLASH, "query, key and value are float16 or bfloat16, all alike (float32 would rule infer_boost out)", INFER,
         lambda op: op.query.dtype in HALVES and op.query.dtype == op.key.dtype == op.value.dtype),
    Rule(FLASH, "the layout is one whose heads have an axis, and query, key and value have its rank", OPS,
         lambda op: {len(x.shape) for x in (op.query, op.key, op.value)} == {{"BNSD": 4, "BSND": 4, "TND": 3}
                                                                            .get(op.layout)}),
    Rule(FLASH, "a head's size is a multiple of 16, at most 512, and the same of query, key and value", OPS,
         lambda op: op.query.shape[-1] % 16 == 0 and op.query.shape[-1] <= 512
         and op.query.shape[-1] == op.key.shape[-1] and op.key.shape == op.value.shape),
    Rule(FLASH, "head_num is the query's number of heads, 1 to 256, and key/value heads divide it", OPS,
         lambda op: op.head_num.constant == op.heads[0] and 1 <= op.heads[0] <= 256
         and op.heads[0] % op.heads[1] == 0),
    Rule(FLASH, "lengths are 1 to 512k", OPS, lambda op: all(1 <= length <= 512 * 1024 for length in op.lengths)),
    Rule(FLASH, "batch sizes are 1 to 2k and the same of query and key", OPS,
         lambda op: op.layout == "TND" or (op.query.shape[0] == op.key.shape[0] and 1 <= op.query.shape[0] <= 2048)),
    Rule(FLASH, "scale_value is 1 / sqrt(D)", OPS,
         lambda op: abs(op.scale_value.constant * op.query.shape[-1] ** 0.5 - 1) < 1e-5),
    Rule(FLASH, "without dropout (keep_prob 1) there is no drop_mask", OPS,
         lambda op: op.keep_prob.constant == 1 and op.drop_mask.is_none),
    Rule(FLASH, "padding_mask is not implemented; prefix belongs to sparse_mode 5", OPS,
         lambda op: op.padding_mask.is_none and op.prefix.is_none),
    Rule(FLASH, "sparse_mode is 0 to 4, the implemented ones", OPS, lambda op: op.sparse_mode.constant in range(5)),
    Rule(FLASH, "a mask is uint8 or bool", OPS,
         lambda op: op.attn_mask.is_none or op.attn_mask.dtype in ("uint8", "bool")),
    Rule(FLASH, "sparse_mode 2, 3 and 4 take the compressed mask, 2048 x 2048", OPS,
         lambda op: op.sparse_mode.constant not in (2, 3, 4) or op.attn_mask.shape == COMPRESSED),
    Rule(FLASH, "in sparse_mode 0 and 1 a mask is whole; (1, 1, S, S) is accepted though not documented", INFER,
         lambda op: op.sparse_mode.constant not in (0, 1) or _full_mask(op)),
    Rule(FLASH, "only TND takes lengths of sequences: cumulative, int64, at most 1024, none of them empty", OPS,
         lambda op: _sequences(op) if op.layout == "TND"
         else op.actual_seq_qlen.is_none and op.actual_seq_kvlen.is_none),
    Rule(FLASH, "TND is causal: sparse_mode 2 or 3, next_tokens 0, pre_tokens no less than the longest sequence", OPS,
         lambda op: op.layout != "TND" or (op.sparse_mode.constant in (2, 3) and op.next_tokens.constant == 0
                                           and op.pre_tokens.constant >= op.lengths[0])),

    Rule(("PagedAttention",), "query and caches are float16 or bfloat16, all alike", PAGED,
         lambda op: op.query.dtype in HALVES and op.query.dtype == op.key_cache.dtype == op.value_cache.dtype),
    Rule(("PagedAttention",), "block tables and lengths are int32, one row and one length a token", PAGED,
         lambda op: op.block_tables.dtype == op.context_lens.dtype == "int32" and len(op.block_tables.shape) == 2
         and (op.block_tables.shape[0],) == op.context_lens.shape == op.query.shape[:1]),
    Rule(("PagedAttention",), "caches are (blocks, block size, key/value heads, head size)", ATB,
         lambda op: len(op.key_cache.shape) == 4 and op.key_cache.shape == op.value_cache.shape
         and op.key_cache.shape[2] == op.kv_head_num.constant),
    Rule(("PagedAttention",), "key/value heads divide the query's, which have the query's width together", ATB,
         lambda op: op.head_num.constant % op.kv_head_num.constant == 0
         and op.query.shape[-1] == op.head_num.constant * op.key_cache.shape[-1]),
    Rule(("PagedAttention",), "a block is a multiple of 16 positions, block size x head size at most 128 x 128", ATB,
         lambda op: op.key_cache.shape[1] % 16 == 0 and op.key_cache.shape[1] * op.key_cache.shape[3] <= 128 * 128),
    Rule(("PagedAttention",), "a row's blocks are blocks that there are", ATB,
         lambda op: op.block_tables.shape[1] <= op.key_cache.shape[0]),
    Rule(("PagedAttention",), "without quantization, look-ahead and ALiBi their inputs are none", PAGED,
         lambda op: all(x.is_none for x in (op.antiquant_scale, op.antiquant_offset, op.attn_mask, op.q_seq_lens,
                                            op.alibi_mask))),

    Rule(("ReshapeAndCache",), "keys and values have their caches' dtype, float16 or bfloat16 (or int8, uint8)", CACHE,
         lambda op: op.key.dtype in (*HALVES, "int8", "uint8") and op.key.dtype == op.key_cache.dtype
         and op.value.dtype == op.value_cache.dtype),
    Rule(("ReshapeAndCache",), "slot_mapping is int32 and has a slot for every position of every row", CACHE,
         lambda op: op.slot_mapping.dtype == "int32" and len(op.key.shape) == 3 and op.key.shape == op.value.shape
         and op.slot_mapping.shape == (op.key.shape[0] * op.key.shape[1],)),
    Rule(("ReshapeAndCache",), "a position's keys fill the cache's heads", CACHE,
         lambda op: op.key_cache.shape == op.value_cache.shape
         and op.key.shape[-1] == op.key_cache.shape[2] * op.key_cache.shape[3]),

    Rule(NORMS, "x and gamma have one dtype: float16, bfloat16 or float32", NORM,
         lambda op: op.x.dtype in (*HALVES, "float32") and op.x.dtype == op.gamma.dtype),
    Rule(NORMS, "gamma is x's last axes", NORM, lambda op: op.x.shape[-len(op.gamma.shape):] == op.gamma.shape),
    Rule(("RmsNorm",), "epsilon is above 0 and at most 1", NORM, lambda op: 0 < op.epsilon.constant <= 1),

    Rule(ROTATIONS, "x, cos and sin have four axes and one dtype: float16, bfloat16 or float32", ROTARY,
         lambda op: {len(x.shape) for x in (op.x, op.cos, op.sin)} == {4}
         and op.x.dtype in (*HALVES, "float32") and op.x.dtype == op.cos.dtype == op.sin.dtype),
    Rule(ROTATIONS, "heads turn by halves (mode 0)", ROTARY, lambda op: op.mode.constant == 0),
    Rule(ROTATIONS, "a head's size is even and below 896; batch and heads are below 1000", ROTARY,
         lambda op: op.x.shape[-1] % 2 == 0 and op.x.shape[-1] < 896 and op.x.shape[0] < 1000
         and min(op.x.shape[1:3]) < 1000),
    Rule(ROTATIONS, "tables have x's layout, with one entry for all heads or all samples", ROTARY, _rotary_tables),

    Rule(("WeightQuantBatchMatmul",), "x is float16 or bfloat16 with two axes, not transposed", QUANTISED,
         lambda op: op.x.dtype in HALVES and len(op.x.shape) == 2 and not op.transpose_x.constant),
    Rule(("WeightQuantBatchMatmul",), "a weight is int8 or qint4x2 with two axes; int32 needs a packing of its own",
         QUANTISED_INFER, lambda op: op.weight.dtype in ("int8", "qint4x2") and len(op.weight.shape) == 2),
    Rule(("WeightQuantBatchMatmul",), "x is as wide as the weight has inputs", QUANTISED_INFER,
         lambda op: op.x.shape[-1] == _sides(op)[0]),
    Rule(("WeightQuantBatchMatmul",), "a weight has 1 to 65535 inputs and outputs", QUANTISED,
         lambda op: all(1 <= side <= 65535 for side in _sides(op))),
    Rule(("WeightQuantBatchMatmul",), "scales have x's dtype and are (outputs,), (1, outputs) or (groups, outputs)",
         QUANTISED, lambda op: op.antiquant_scale.dtype == op.x.dtype and _scales(op)),
    Rule(("WeightQuantBatchMatmul",), "offsets are none, or like the scales", QUANTISED,
         lambda op: op.antiquant_offset.is_none or op.antiquant_offset == op.antiquant_scale),
    Rule(("WeightQuantBatchMatmul",), "a group is 0, or a multiple of 32 that is smaller than the inputs", QUANTISED,
         lambda op: op.antiquant_group_size.constant in (0, *range(32, _sides(op)[0], 32))),
    Rule(("WeightQuantBatchMatmul",), "with groups a weight is best as it is, of int8 transposed", QUANTISED,
         lambda op: bool(op.transpose_weight.constant) == (op.weight.dtype == "int8")),
    Rule(("WeightQuantBatchMatmul",), "outputs that stay floating have no quant_scale and no quant_offset", QUANTISED,
         lambda op: op.quant_scale.is_none and op.quant_offset.is_none),
]

TABLED = tuple(INPUTS)


def broken(found: Iterable[Operator]) -> list[str]:
    """Rules that operators break, a sentence each."""
    return [f"{op.name}: {rule.says} ({rule.source}); found {op.inputs}"
            for op in found for rule in RULES if op.name in rule.operators and not rule.holds(op)]


def operators(model: Any, names: Sequence[str] = TABLED) -> list[Operator]:
    """Operators of a compiled graph.

    Args:
        model: MindSpore's `ModelProto` of the graph (`mind_ir`).
        names: of the operators wanted.

    Raises:
        ValueError: when an input's shape is not in the graph.
    """
    known, parts = dict(_values(model)), (model.graph, *model.functions)
    for node in (node for part in parts for node in part.node if kind(node) == "TensorToTuple"):
        # The graph knows how long such a tuple is and none of its numbers: it is the tensor that it is made of.
        known[node.output[0]] = known[node.input[0]]
    found = []
    for part in parts:
        for node in part.node:
            name = kind(node)
            if name in names:
                values = {}
                for place, source in zip(INPUTS[name], node.input):
                    if source not in known:
                        raise ValueError(f"{name}: the graph does not say what its input {place} is.")
                    values[place] = known[source]
                found.append(Operator(name, values))
    return found


def kind(node: Any) -> str:
    """Name of a node's primitive; it is written as "REF::AllReduce:29"."""
    return node.op_type.split("::")[-1].split(":")[0]


def tensors(model: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of all that a graph takes, holds and computes."""
    for _, value in _values(model):
        if value.shape is not None:
            yield value.shape
    for part in (model.graph, *model.functions):
        for node in part.node:
            for attribute in node.attribute:
                for value in (attribute, *attribute.values):
                    yield from (tuple(one.dims) for one in value.tensors)


def _values(model: Any) -> Iterator[tuple[str, Value]]:
    """Names in a graph and what they stand for."""
    for part in (model.graph, *model.functions):
        for parameter in part.parameter:
            yield parameter.name, _tensor(parameter)
        for given in part.input:
            if given.tensor:
                yield given.name, _tensor(given.tensor[0])
        for node in part.node:
            for attribute in node.attribute:
                if attribute.name in ("shape", "value") and node.output:
                    yield node.output[0], _value(attribute)


def _tensor(proto: Any) -> Value:
    # its class names the dtypes
    name = type(proto).DataType.Name(proto.data_type).lower()
    return Value(tuple(proto.dims), {"float": "float32", "double": "float64"}.get(name, name))


def _value(attribute: Any) -> Value:
    if attribute.tensors:
        return _tensor(attribute.tensors[0])
    kinds = type(attribute).AttributeType
    name = kinds.Name(attribute.type)
    if name == "TUPLE":
        return Value(constant=tuple(value.i or (value.ints[0] if value.ints else 0) for value in attribute.values))
    if name == "NONE":
        return Value()
    return Value(constant=attribute.f if name == "FLOAT" else attribute.i)
