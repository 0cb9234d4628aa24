"""Our cells in float32 against transformers' PyTorch classes in float64, at drawn configurations and random weights."""
from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.models.configuration import IXC25Config, IXC25VisionConfig
from mindformers_ixc.models.vision import IXC25VisionModel

# Every drawn configuration compiles a graph: a few seconds each.
OPTIONS = {"max_examples": 8, "deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}

# float32 against float64 through a few layers; relative to the largest output.
TOLERANCE = 1e-5


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def randomise(model, seed: int) -> None:
    """Gives every parameter a value that shows: none is zero, norms are near one."""
    rng = np.random.default_rng(seed)
    for parameter in model.get_parameters():
        scale = 0.3 / np.sqrt(parameter.shape[-1]) if len(parameter.shape) > 1 else 0.1
        value = rng.standard_normal(parameter.shape) * scale + ("norm" in parameter.name and "weight" in parameter.name)
        parameter.set_data(Tensor(value.astype(np.float32)))


def double(array) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float64)


@settings(**OPTIONS)
@given(st.data())
def test_vision_tower(data):
    heads, size = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([4, 8, 16]))
    sizes = {"hidden_size": heads * size, "num_attention_heads": heads,
             "num_hidden_layers": data.draw(st.integers(1, 3)),
             "intermediate_size": data.draw(st.integers(4, 40)), "patch_size": data.draw(st.sampled_from([7, 14]))}
    sizes["image_size"] = 2 * sizes["patch_size"] * data.draw(st.integers(1, 3))
    ours = IXC25VisionModel(IXC25VisionConfig(**sizes))
    randomise(ours, data.draw(st.integers(0, 99)))
    ours.set_train(False)
    theirs = CLIPVisionModel(CLIPVisionConfig(**sizes, hidden_act="quick_gelu", layer_norm_eps=1e-5)).double()
    state = {f"vision_model.{p.name}": double(p.asnumpy()) for p in ours.get_parameters()}
    theirs.load_state_dict(state, strict=False)
    pixels = np.random.default_rng(1).standard_normal((2, 3, sizes["image_size"], sizes["image_size"]))
    with torch.no_grad():
        expected = theirs(double(pixels), output_hidden_states=True).hidden_states[-1][:, 1:].numpy()
    assert relative_error(ours(Tensor(pixels.astype(np.float32))).asnumpy(), expected) < TOLERANCE


def split_qkv(weight: np.ndarray, config: IXC25Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value matrices of a consolidated one: each group holds its queries, its key, its value."""
    groups = weight.reshape(config.num_key_value_heads, config.query_groups + 2, config.head_size, -1)
    width = weight.shape[-1]
    return (groups[:, :-2].reshape(-1, width), groups[:, -2].reshape(-1, width), groups[:, -1].reshape(-1, width))


def llama_of(model: IXC25ForCausalLM) -> LlamaForCausalLM:
    """The same language model with separate q, k and v."""
    config = model.config
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, rms_norm_eps=config.rms_norm_eps, rope_theta=config.rope_theta,
        max_position_embeddings=config.max_position_embeddings, attn_implementation="eager")).double()
    values = {p.name: p.asnumpy() for p in model.get_parameters()}
    state = {"model.embed_tokens.weight": values["model.tok_embeddings.weight"],
             "model.norm.weight": values["model.norm.weight"], "lm_head.weight": values["output.weight"]}
    names = {"self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
             "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm",
             "post_attention_layernorm": "ffn_norm"}
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        for theirs_name, ours_name in names.items():
            state[f"{prefix}{theirs_name}.weight"] = values[f"{prefix}{ours_name}.weight"]
        parts = split_qkv(values[f"{prefix}attention.wqkv.weight"], config)
        for name, value in zip("qkv", parts):
            state[f"{prefix}self_attn.{name}_proj.weight"] = value
    theirs.load_state_dict({name: double(value) for name, value in state.items()})
    return theirs


@settings(**OPTIONS)
@given(st.data())
def test_language_model(data):
    kv, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    heads, size = kv * groups, data.draw(st.sampled_from([4, 8, 16]))
    length = data.draw(st.integers(2, 40))
    config = IXC25Config(
        vocab_size=data.draw(st.integers(5, 90)), hidden_size=heads * size, num_attention_heads=heads,
        num_key_value_heads=kv, num_hidden_layers=data.draw(st.integers(1, 3)),
        intermediate_size=data.draw(st.integers(4, 60)), max_position_embeddings=64, seq_length=length, plora_rank=2,
        task_lora_ranks={}, rope_theta=float(data.draw(st.sampled_from([1e3, 1e6]))), max_tiles=1,
        vision_config={"image_size": 28, "hidden_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1,
                       "intermediate_size": 4})
    ours = IXC25ForCausalLM(config)
    randomise(ours, data.draw(st.integers(0, 99)))
    ours.set_train(False)
    ids = np.random.default_rng(2).integers(0, config.vocab_size, (2, length))
    with torch.no_grad():
        expected = llama_of(ours)(torch.tensor(ids)).logits.numpy()
    assert relative_error(ours(Tensor(ids.astype(np.int32))).asnumpy(), expected) < TOLERANCE
