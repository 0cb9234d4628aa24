"""Reading safetensors in pieces: whatever the size of a piece, every tensor comes out as it went in."""
from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from mindformers_ixc.checkpoint import model_directory


@pytest.mark.parametrize("piece", [1, 64, 500, 2**26])
def test_tensors_come_out_as_they_went_in(tmp_path, monkeypatch, piece):
    rng = np.random.default_rng(0)
    tensors = {"matrix": rng.standard_normal((100, 30)).astype(np.float32), "none": np.zeros((0, 3), np.float16),
               "scalar": np.array(3.0, np.float32), "row": np.arange(7, dtype=np.int32),
               "half": rng.standard_normal((9, 2, 5)).astype(np.float16)}
    save_file(tensors, str(tmp_path / "x.safetensors"))
    monkeypatch.setattr(model_directory, "MAPPED_BYTES", piece)
    found = dict(model_directory.tensors_of(tmp_path / "x.safetensors"))
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_weights_are_readable_by_others(tmp_path):
    from mindformers_ixc import IXC25Config, IXC25ForCausalLM

    config = IXC25Config(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, plora_rank=2, task_lora_ranks={},
                         vision_config={"image_size": 28, "hidden_size": 8, "num_hidden_layers": 1,
                                        "num_attention_heads": 1, "intermediate_size": 8})
    model = IXC25ForCausalLM(config)
    model_directory.save_model_directory(model, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode & 0o044 == 0o044
    again = model_directory.load_model(tmp_path / "model")
    for before, after in zip(model.get_parameters(), again.get_parameters()):
        np.testing.assert_array_equal(before.asnumpy(), after.asnumpy())
