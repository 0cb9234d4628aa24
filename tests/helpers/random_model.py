"""Small random checkpoints in the public layout, without building a model."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mindformers_ixc.checkpoint.tensor_file import TensorFile
from mindformers_ixc.config import ModelConfig
from mindformers_ixc.parameters import parameter_table

# Four key/value groups and four vision heads, so that tensor parallel 4 divides; four layers for pipelines.
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "plora_rank": 2, "plora_alpha": 2, "task_lora_ranks": {"sft": 2, "dpo": 2, "web": 4},
         "vision_config": {"image_size": 28, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4,
                           "intermediate_size": 16}}


def random_arrays(config: ModelConfig, dtype: str = "F32", seed: int = 0) -> dict[str, np.ndarray]:
    """Every parameter, random; bfloat16 as bits."""
    rng = np.random.default_rng(seed)
    storage = {"F32": np.float32, "BF16": np.float32, "F16": np.float16}[dtype]
    table = parameter_table(config).values()
    arrays = {entry.name: rng.standard_normal(entry.shape).astype(storage) for entry in table}
    return {name: (value.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else value
            for name, value in arrays.items()}


def save(path: Path, arrays: dict[str, np.ndarray], dtype: str = "F32") -> Path:
    """Writes one safetensors file."""
    file = TensorFile(path, [(name, dtype, value.shape) for name, value in arrays.items()])
    file.open()
    for name, value in arrays.items():
        file.write(name, 0, value)
    file.close()
    return path


def make(folder: Path, dtype: str = "F32", seed: int = 0, **changes) -> Path:
    """Makes a model directory; `changes` replace sizes."""
    config = ModelConfig(**{**SIZES, **changes})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config.to_public_dict(), "a_public_field": 7}), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(b"tokenizer")
    save(folder / "model.safetensors", random_arrays(config, dtype, seed), dtype)
    return folder
