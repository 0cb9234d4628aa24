"""Every fused operator of the compiled training and inference graphs keeps what is documented of it.

The rules, with their sources, are the table of scripts/ascend_rules.py. First each of them is shown to notice its own
breach; then they walk the training graphs, with heads as the 7B model has them. scripts/compile_ascend.py walks those
of inference (its tests are in tests/generation/test_slots.py).
"""
from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ascend_rules import COMPRESSED, INPUTS, LAYOUTS, RULES, Operator, Value, broken

from mindformers_ixc.config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]

# One layer with the 7B model's heads: 32 of 128 for 8 of keys and values, 16 of 64 in the tower.
HEADS = {"vocab_size": 512, "hidden_size": 4096, "intermediate_size": 256, "num_hidden_layers": 1,
         "num_attention_heads": 32, "num_key_value_heads": 8, "plora_rank": 4, "plora_alpha": 4, "task_lora_ranks": {},
         "vision_config": {"image_size": 56, "num_hidden_layers": 1, "intermediate_size": 32}}
TRAINING = {**HEADS, "seq_length": 64, "max_tiles": 2, "compute_dtype": "bfloat16", "use_flash_attention": True,
            "apply_rope_fusion": True, "noise": True}


def half(*shape: int) -> Value:
    return Value(shape, "bfloat16")


def number(value) -> Value:
    return Value(constant=value)


NONE, INT32 = Value(), "int32"
SETTINGS = {"head_num": number(32), "keep_prob": number(1.0), "scale_value": number(128 ** -0.5),
            "pre_tokens": number(2 ** 31 - 1), "next_tokens": number(2 ** 31 - 1), "inner_precise": number(0),
            "input_layout": number(LAYOUTS.index("BNSD")), "sparse_mode": number(2)}
OPTIONAL = dict.fromkeys(("real_shift", "drop_mask", "padding_mask", "prefix", "actual_seq_qlen", "actual_seq_kvlen"),
                         NONE)
FLASH = Operator("FlashAttentionScore", {
    "query": half(2, 32, 64, 128), "key": half(2, 8, 64, 128), "value": half(2, 8, 64, 128), **OPTIONAL,
    "attn_mask": Value(COMPRESSED, "uint8"), **SETTINGS})
ENDS = Value((32,), "int64")
PACKED = Operator("FlashAttentionScore", {
    **FLASH.inputs, "query": half(128, 32, 128), "key": half(128, 8, 128), "value": half(128, 8, 128),
    "actual_seq_qlen": ENDS, "actual_seq_kvlen": ENDS, "input_layout": number(LAYOUTS.index("TND")),
    "next_tokens": number(0)})
TOWER = Operator("FlashAttentionScore", {**FLASH.inputs, "key": half(2, 32, 64, 128), "value": half(2, 32, 64, 128),
                                         "attn_mask": Value((1, 1, 64, 64), "uint8"), "sparse_mode": number(0)})
PAGED = Operator("PagedAttention", {
    "query": half(2, 1, 4096), "key_cache": half(4, 128, 8, 128), "value_cache": half(4, 128, 8, 128),
    "block_tables": Value((2, 2), INT32), "context_lens": Value((2,), INT32),
    **dict.fromkeys(("antiquant_scale", "antiquant_offset", "attn_mask", "q_seq_lens", "alibi_mask"), NONE),
    "head_num": number(32), "scale_value": number(128 ** -0.5), "kv_head_num": number(8)})
WRITE = Operator("ReshapeAndCache", {
    "key": half(2, 64, 1024), "value": half(2, 64, 1024), "key_cache": half(4, 128, 8, 128),
    "value_cache": half(4, 128, 8, 128), "slot_mapping": Value((128,), INT32)})
NORM = Operator("RmsNorm", {"x": half(128, 4096), "gamma": half(4096), "epsilon": number(1e-5)})
ROTATION = Operator("RotaryPositionEmbedding", {"x": half(2, 64, 40, 128), "cos": half(1, 64, 1, 128),
                                                "sin": half(1, 64, 1, 128), "mode": number(0)})
QUANTISED = Operator("WeightQuantBatchMatmul", {
    "x": half(200, 4096), "weight": Value((4096, 3072), "qint4x2"), "antiquant_scale": half(32, 6144),
    "antiquant_offset": half(32, 6144), **dict.fromkeys(("quant_scale", "quant_offset", "bias"), NONE),
    "transpose_x": number(0), "transpose_weight": number(0), "antiquant_group_size": number(128)})
EIGHT_BITS = Operator("WeightQuantBatchMatmul", {
    **QUANTISED.inputs, "weight": Value((6144, 4096), "int8"), "antiquant_scale": half(6144), "antiquant_offset": NONE,
    "transpose_weight": number(1), "antiquant_group_size": number(0)})
ONE_GROUP = Operator("WeightQuantBatchMatmul", {
    **QUANTISED.inputs, "x": half(3, 128), "weight": Value((128, 3072), "qint4x2"),
    **dict.fromkeys(("antiquant_scale", "antiquant_offset"), half(1, 6144)), "antiquant_group_size": number(0)})
RIGHT = [FLASH, PACKED, TOWER, PAGED, WRITE, NORM, ROTATION, QUANTISED, EIGHT_BITS, ONE_GROUP]

# An operator, what is changed of it, and how the rule begins that must notice.
BREACHES = [
    (FLASH, {"query": Value((2, 32, 64, 128), "float32")}, "query, key and value are float16"),
    (FLASH, {"key": Value((2, 8, 64, 128), "float16")}, "query, key and value are float16"),
    (FLASH, {"input_layout": number(LAYOUTS.index("TH"))}, "the layout is one"),
    (FLASH, {"query": half(2, 64, 4096)}, "the layout is one"),
    (FLASH, {x: half(2, 8, 64, 72) for x in ("query", "key", "value")}, "a head's size"),
    (FLASH, {x: half(2, 8, 64, 528) for x in ("query", "key", "value")}, "a head's size"),
    (FLASH, {"value": half(2, 8, 64, 64)}, "a head's size"),
    (FLASH, {"head_num": number(16)}, "head_num is"),
    (FLASH, {"key": half(2, 5, 64, 128), "value": half(2, 5, 64, 128)}, "head_num is"),
    (FLASH, {"query": half(2, 32, 600_000, 128)}, "lengths are 1"),
    (FLASH, {"query": half(3, 32, 64, 128)}, "batch sizes"),
    (FLASH, {x: half(2049, n, 64, 128) for x, n in (("query", 32), ("key", 8), ("value", 8))}, "batch sizes"),
    (FLASH, {"scale_value": number(1.0)}, "scale_value"),
    (FLASH, {"drop_mask": Value((2, 32, 64, 8), "uint8")}, "without dropout"),
    (FLASH, {"padding_mask": half(2, 64)}, "padding_mask"),
    (FLASH, {"sparse_mode": number(7), "attn_mask": NONE}, "sparse_mode is 0 to 4"),
    (FLASH, {"attn_mask": half(*COMPRESSED)}, "a mask is uint8"),
    (FLASH, {"attn_mask": Value((64, 64), "uint8")}, "sparse_mode 2, 3 and 4"),
    (FLASH, {"attn_mask": NONE}, "sparse_mode 2, 3 and 4"),
    (TOWER, {"attn_mask": Value(COMPRESSED, "uint8")}, "in sparse_mode 0 and 1"),
    (FLASH, {"actual_seq_qlen": ENDS, "actual_seq_kvlen": ENDS}, "only TND"),
    (PACKED, {"actual_seq_kvlen": NONE}, "only TND"),
    (PACKED, {"actual_seq_kvlen": Value((31,), "int64")}, "only TND"),
    (PACKED, {x: Value((32,), "int32") for x in ("actual_seq_qlen", "actual_seq_kvlen")}, "only TND"),
    (PACKED, {x: Value((1025,), "int64") for x in ("actual_seq_qlen", "actual_seq_kvlen")}, "only TND"),
    (PACKED, {x: Value((2, 16), "int64") for x in ("actual_seq_qlen", "actual_seq_kvlen")}, "only TND"),
    (PACKED, {x: number((64, 64, 128)) for x in ("actual_seq_qlen", "actual_seq_kvlen")}, "only TND"),    # an empty one
    (PACKED, {x: number((64, 100)) for x in ("actual_seq_qlen", "actual_seq_kvlen")}, "only TND"),
    (PACKED, {"sparse_mode": number(0), "attn_mask": NONE}, "TND is causal"),
    (PACKED, {"next_tokens": number(5)}, "TND is causal"),
    (PACKED, {"pre_tokens": number(100)}, "TND is causal"),
    (PAGED, {"query": Value((2, 1, 4096), "float32")}, "query and caches"),
    (PAGED, {"block_tables": Value((2, 2), "int64")}, "block tables and lengths"),
    (PAGED, {"context_lens": Value((3,), INT32)}, "block tables and lengths"),
    (PAGED, {"value_cache": half(4, 128, 4, 128)}, "caches are"),
    (PAGED, {"kv_head_num": number(4)}, "caches are"),
    (PAGED, {"query": half(2, 1, 2048)}, "key/value heads divide"),
    (PAGED, {x: half(4, 100, 8, 128) for x in ("key_cache", "value_cache")}, "a block is"),
    (PAGED, {x: half(4, 256, 8, 128) for x in ("key_cache", "value_cache")}, "a block is"),
    (PAGED, {"block_tables": Value((2, 5), INT32)}, "a row's blocks"),
    (PAGED, {"attn_mask": half(2, 64)}, "without quantization"),
    (WRITE, {"key_cache": Value((4, 128, 8, 128), "float16")}, "keys and values have"),
    (WRITE, {"slot_mapping": Value((64,), INT32)}, "slot_mapping is int32"),
    (WRITE, {"slot_mapping": Value((128,), "int64")}, "slot_mapping is int32"),
    (WRITE, {x: half(4, 128, 4, 128) for x in ("key_cache", "value_cache")}, "a position's keys"),
    (NORM, {"gamma": Value((4096,), "float32")}, "x and gamma"),
    (NORM, {"gamma": half(128)}, "gamma is"),
    (NORM, {"epsilon": number(0.0)}, "epsilon"),
    (ROTATION, {"cos": Value((1, 64, 1, 128), "float32")}, "x, cos and sin"),
    (ROTATION, {"mode": number(1)}, "heads turn"),
    (ROTATION, {"x": half(2, 64, 40, 1024)}, "a head's size is even"),
    (ROTATION, {"sin": half(1, 64, 128, 1)}, "tables have"),
    (ROTATION, {x: half(64, 1, 1, 128) for x in ("cos", "sin")}, "tables have"),
    (QUANTISED, {"x": Value((200, 4096), "float32")}, "x is float16 or"),
    (QUANTISED, {"x": half(2, 100, 4096)}, "x is float16 or"),
    (QUANTISED, {"transpose_x": number(1)}, "x is float16 or"),
    (QUANTISED, {"weight": Value((4096, 768), "int32")}, "a weight is int8"),
    (EIGHT_BITS, {"weight": Value((1, 6144, 4096), "int8")}, "a weight is int8"),
    (QUANTISED, {"x": half(200, 4097)}, "x is as wide"),
    (EIGHT_BITS, {"x": half(200, 6144)}, "x is as wide"),
    (EIGHT_BITS, {"weight": Value((92544, 4096), "int8")}, "a weight has 1"),
    (QUANTISED, {"weight": Value((4096, 46272), "qint4x2")}, "a weight has 1"),
    (QUANTISED, {"antiquant_scale": Value((32, 6144), "float16")}, "scales have"),
    (QUANTISED, {"antiquant_scale": half(6144)}, "scales have"),
    (EIGHT_BITS, {"antiquant_scale": half(6144, 1)}, "scales have"),
    (QUANTISED, {"antiquant_offset": half(31, 6144)}, "offsets are"),
    (QUANTISED, {"antiquant_offset": Value((32, 6144), "int32")}, "offsets are"),
    (QUANTISED, {"antiquant_group_size": number(100)}, "a group is"),
    (ONE_GROUP, {"antiquant_group_size": number(128)}, "a group is"),
    (QUANTISED, {"transpose_weight": number(1)}, "with groups a weight"),
    (EIGHT_BITS, {"transpose_weight": number(0)}, "with groups a weight"),
    (EIGHT_BITS, {"quant_scale": Value((6144,), "float32")}, "outputs that stay"),
]


@pytest.mark.parametrize("operator", RIGHT, ids=lambda one: one.name)
def test_operators_as_they_should_be_break_nothing(operator):
    assert tuple(operator.inputs) == INPUTS[operator.name] or set(operator.inputs) == set(INPUTS[operator.name])
    assert broken([operator]) == []


@pytest.mark.parametrize("place", range(len(BREACHES)))
def test_a_breach_is_noticed(place):
    operator, changes, says = BREACHES[place]
    notices = [rule for rule in RULES if operator.name in rule.operators and rule.says.startswith(says)]
    changed = Operator(operator.name, {**operator.inputs, **changes})
    assert [rule.says for rule in notices if rule.holds(changed)] == []
    assert len(notices) == 1


def test_every_rule_has_a_source_and_a_breach():
    begins = {says for _, _, says in BREACHES}
    assert [rule.says for rule in RULES if not any(rule.says.startswith(says) for says in begins)] == []
    assert all("mindspore 2.9" in rule.source or "CANN" in rule.source for rule in RULES)


def trained(tensor: int, *given: dict) -> list[dict]:
    """What the helper found in training graphs, each of some fields; in a process that stops at the front end."""
    helper = ROOT / "tests" / "helpers" / "ascend_primitives.py"
    fields = [json.dumps({**TRAINING, **changes}) for changes in given]
    done = subprocess.run([sys.executable, helper, "Ascend", str(tensor), *fields], capture_output=True, text=True,
                          check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "given"), [(1, [{}, {"packing": True}]), (2, [{}])], ids=["alone", "tp2"])
def test_the_training_graphs_keep_the_rules(tensor, given):
    for found in trained(tensor, *given):
        assert found["broken"] == []
        # attention of decoder and tower; the decoder's norms and the last one
        expected = {"FlashAttentionScore": 2, "RmsNorm": 3, "RotaryPositionEmbedding": 1}
        assert found["checked"] == {name + end: count for name, count in expected.items() for end in ("", "Grad")}
        assert "Softmax" not in found["primitives"]          # neither the decoder nor the tower holds scores
        # seeded noise: these have aclnn kernels, the shift has none
        assert {"BitwiseAnd", "BitwiseXor", "FloorDiv"} <= set(found["primitives"])
        assert "RightShift" not in found["primitives"]


@pytest.mark.slow
def test_no_tensor_of_a_long_prompt_is_the_square_of_its_length(tmp_path):
    """The mask was: 0.6 GB at 24,576 positions, 9.7 GB at 98,304."""
    fields = {**HEADS, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(ModelConfig(**fields).to_public_dict()), encoding="utf-8")
    script = ROOT / "scripts" / "compile_ascend.py"
    done = subprocess.run([sys.executable, script, "--config", tmp_path, "--rows", "1", "--prompt", "24000", "98000"],
                          capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.findall(r"prefill: .*tensor: \((.*?)\);", done.stdout)
    shapes = [[int(side) for side in shape.split(",")] for shape in found]
    assert [max(shape) for shape in shapes] == [24576, 98304]
    assert all(math.prod(shape) <= 512 * max(shape) for shape in shapes)      # as wide as the linears at most
