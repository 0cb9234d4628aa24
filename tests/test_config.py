"""IXC25Config: public names, MindFormers' aliases, and the sizes it refuses."""
from __future__ import annotations

import pytest

from mindformers_ixc.config import read_fields
from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.models.configuration import IXC25Config, IXC25VisionConfig

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2}


def test_defaults_are_the_public_7b_model():
    config = IXC25Config()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (92544, 4096, 32)
    assert (config.query_groups, config.head_size, config.plora_scale) == (4, 128, 1.0)
    assert (config.vision_config.patches_per_side, config.vision_config.tokens_per_tile) == (40, 400)
    assert config.task_lora_ranks == {"sft": 256, "dpo": 256, "web": 512}


def test_mindformers_names_are_aliases():
    config = IXC25Config(**{**SMALL, "num_hidden_layers": 9}, num_layers=3, num_heads=8)
    assert (config.num_hidden_layers, config.num_layers, config.num_attention_heads) == (3, 3, 8)


def test_public_dict_comes_back_and_holds_nothing_of_the_run():
    config = IXC25Config(**SMALL, seq_length=77, plora_rank=4, vision_config={"image_size": 56, "hidden_size": 32})
    fields = config.to_public_dict()
    assert not {"seq_length", "parallel_config", "compute_dtype", "mindformers_version"} & set(fields)
    fields.pop("model_type")
    again = IXC25Config(**fields)
    assert again.to_public_dict() == config.to_public_dict()
    assert again.vision_config.image_size == 56


@pytest.mark.parametrize(("fields", "words"), [
    ({"hidden_size": 33}, ["hidden_size 33", "num_attention_heads 4"]),
    ({"num_key_value_heads": 3}, ["num_attention_heads 4", "num_key_value_heads 3"]),
    ({"hidden_act": "gelu"}, ["'gelu'", "'silu'"]),
    ({"tie_word_embeddings": True}, ["tie_word_embeddings is True"]),
    ({"rope_scaling": {"type": "yarn"}}, ["'yarn'", "'dynamic'"]),
    ({"task_lora_ranks": {"math": 4}}, ["math", "sft"]),
    ({"adapter_mode": "draw"}, ["'draw'", "base"]),
    ({"adapter_mode": "web", "task_lora_ranks": {}}, ["web", "task_lora_ranks"]),
    ({"use_flash_attention": True}, ["use_flash_attention", "float32", "bfloat16"]),
    ({"vision_parallel": "tiles"}, ["'tiles'", "heads, replicated"]),
    ({"offset": "even"}, ["'even'", "auto"]),
])
def test_contradictions_are_refused_by_name(fields, words):
    with pytest.raises(ConfigError) as error:
        IXC25Config(**{**SMALL, **fields})
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("fields", "word"), [({"image_size": 570}, "570"), ({"hidden_size": 1000}, "1000"),
                                              ({"hidden_act": "gelu"}, "quick_gelu")])
def test_vision_sizes_are_checked(fields, word):
    with pytest.raises(ConfigError, match=word):
        IXC25VisionConfig(**fields)


def test_a_byte_order_mark_is_read_and_other_texts_are_refused_by_place(tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"model_type": "internlmxcomposer2", "vocab_size": 64}')
    assert read_fields(tmp_path)["vocab_size"] == 64
    for content, words in [('{"a": "\u4e2d\u6587"}'.encode("gbk"), "byte 0xD6 at place 7"), (b"{", "not valid JSON"),
                           ("{}".encode("utf-16"), "is UTF-16"), (b'{"a":' * 100_000, "nested too deeply")]:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"config\.json .*{words}"):
            read_fields(tmp_path)
