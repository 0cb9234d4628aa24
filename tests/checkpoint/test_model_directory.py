"""Model directories: every format of weights goes in and out unchanged."""
from __future__ import annotations

import mindspore
import numpy as np
import pytest

from mindformers_ixc import IXC25Config, IXC25ForCausalLM
from mindformers_ixc.checkpoint.inspection import inspect
from mindformers_ixc.checkpoint.model_directory import numpy_type, save_model_directory
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.generation.loading import load_model

SIZES = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1, "plora_rank": 2, "task_lora_ranks": {},
         "vision_config": {"image_size": 28, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
                           "intermediate_size": 8}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "bool_"])
def test_numpys_type_of_a_tensor_is_its_own(dtype):
    dtype = getattr(mindspore, dtype)
    assert mindspore.Tensor(np.zeros(2, numpy_type(dtype))).dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_come_back(tmp_path, dtype):
    model = IXC25ForCausalLM(IXC25Config(**SIZES, param_init_type=dtype))
    save_model_directory(model, tmp_path / "model")
    # readable by others, too
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o044 == 0o044
    again = load_model(tmp_path / "model", param_init_type=dtype)
    for before, after in zip(model.get_parameters(), again.get_parameters()):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before.asnumpy().view(np.uint8), after.asnumpy().view(np.uint8))


def test_bfloat16_weights_become_float32_exactly(tmp_path):
    model = IXC25ForCausalLM(IXC25Config(**SIZES, param_init_type="bfloat16"))
    save_model_directory(model, tmp_path / "model")
    for before, after in zip(model.get_parameters(), load_model(tmp_path / "model").get_parameters()):
        np.testing.assert_array_equal(before.asnumpy().astype(np.float32), after.asnumpy())


def test_what_is_written_has_digests(tmp_path):
    model = IXC25ForCausalLM(IXC25Config(**SIZES, param_init_type="bfloat16"))
    save_model_directory(model, tmp_path / "model")
    save_model_directory(model, tmp_path / "trained_parts", parameters=["output.weight", "plora_glb_GN"])
    for folder in ("model", "trained_parts"):
        assert open_source(tmp_path / folder).has_digests
        report = inspect(tmp_path / folder, verify=True)
        assert report.damaged == [] and report.verified
    path = tmp_path / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"output\.weight .* differs from its digest"):
        load_model(tmp_path / "model")
