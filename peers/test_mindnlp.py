"""Our tower against Hugging Face's CLIPVisionModel, both on MindSpore: mindnlp runs the latter. Full ViT-L/14 shape."""
from __future__ import annotations

import mindnlp  # noqa: F401 - makes `torch` and transformers compute with MindSpore
import numpy as np
import torch
from mindspore import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from mindformers_ixc.models.configuration import IXC25VisionConfig
from mindformers_ixc.models.vision import IXC25VisionModel

# The tower of the 7B model.
SIZES = {"image_size": 560, "patch_size": 14, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
         "intermediate_size": 4096}


def test_vit_l_14():
    ours = IXC25VisionModel(IXC25VisionConfig(**SIZES))
    ours.set_train(False)
    rng = np.random.default_rng(0)
    for parameter in ours.get_parameters():
        scale = 0.02 if len(parameter.shape) > 1 else 0.1
        value = rng.standard_normal(parameter.shape, np.float32) * np.float32(scale)
        parameter.set_data(Tensor(value + np.float32("norm" in parameter.name and "weight" in parameter.name)))
    theirs = CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_act="quick_gelu", layer_norm_eps=1e-5))
    theirs.eval()
    values = {f"vision_model.{p.name}": p.asnumpy() for p in ours.get_parameters()}
    for name, parameter in theirs.named_parameters():
        parameter.data = torch.tensor(values.pop(name))
    assert not values
    pixels = rng.standard_normal((1, 3, 560, 560), np.float32)
    expected = theirs(torch.tensor(pixels), output_hidden_states=True).hidden_states[-1].detach().numpy()[:, 1:]
    error = np.abs(ours(Tensor(pixels)).asnumpy() - expected).max()
    assert error <= 1e-4
