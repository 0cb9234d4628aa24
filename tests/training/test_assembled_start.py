"""Stage 1 as it begins: a language model and a tower are put together, and the pre-training recipe starts from that."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from random_model import random_arrays, save
from safetensors.numpy import load_file

from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.config import ModelConfig
from mindformers_ixc.demo import demo_path
from mindformers_ixc.files import read_metrics
from mindformers_ixc.parameters import VISION, part_of

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "yaml_configs" / "ixc25_pretrain_tiny.yaml"
TABLE = f"{VISION}.embeddings.position_embedding.weight"


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def run(folder, *words: object) -> None:
    done = subprocess.run([str(Path(sys.executable).parent / "mindformers"), *map(str, words)], cwd=folder,
                          capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a language model, a tower for pictures of half the side, and eight captions."""
    folder = tmp_path_factory.mktemp("start")
    section = {name: value for name, value in read_yaml(RECIPE)["model"]["model_config"].items() if name != "type"}
    section["vision_config"].pop("type")
    config = ModelConfig(**{**section, "task_lora_ranks": {}})
    (folder / "config.json").write_text(json.dumps(config.to_public_dict()), encoding="utf-8")
    small = ModelConfig(**{**section, "vision_config": {**section["vision_config"], "image_size": 56}})
    arrays = {name: 0.02 * value for name, value in random_arrays(small).items()}
    tower = {"model_type": "clip_vision_model", **{name: getattr(small.vision_config, name) for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")}}
    language = {**config.to_public_dict(), "model_type": "internlm2"}
    for place, fields, part, prefix in (("internlm2", language, "language", ""), ("clip", tower, "vision", VISION)):
        (folder / place).mkdir()
        (folder / place / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        own = {name.replace(prefix, "vision_model") if prefix else name: value for name, value in arrays.items()
               if part_of(name) == part}
        save(folder / place / "model.safetensors", own)
    shutil.copy(demo_path("tokenizer.model"), folder / "internlm2")
    rows = json.loads(demo_path("stages/captions_train.json").read_text(encoding="utf-8"))[:8]
    (folder / "captions.json").write_text(json.dumps([
        {**row, "image": str(demo_path(f"stages/{row['image']}"))} for row in rows]), encoding="utf-8")
    run(folder, "assemble", "internlm2", "clip", "start", "--config", "config.json")
    return folder


def test_the_parts_are_what_they_were(folder):
    start = arrays_of(folder / "start")
    for place, below, part in (("internlm2", "", "language"), ("clip", VISION, "vision")):
        parts = arrays_of(folder / place)
        names = {name: name.replace("vision_model", below, 1) if below else name for name in parts}
        assert set(names.values()) == {name for name in start if part_of(name) == part}
        for name, value in parts.items():
            if names[name] != TABLE:
                assert start[names[name]].tobytes() == value.tobytes(), name
    small = arrays_of(folder / "clip")["vision_model.embeddings.position_embedding.weight"]
    assert len(start[TABLE]) == 65 and len(small) == 17


@pytest.mark.slow
def test_the_recipe_trains_from_it_and_leaves_the_language_model_as_it_was(folder):
    run(folder, "run", "--config", RECIPE, "--load_checkpoint", "start", "--output_dir", "out", "--epochs", 4,
        "--runner_config.batch_size", 4, "--train_dataset.batch_size", 4, "--train_dataset.data_loader.dataset_dir",
        "captions.json", "--evaluation.max_samples", 4, "--evaluation.batch_size", 4)
    rows = read_metrics(folder / "out" / "metrics.jsonl")
    assert len(rows) == 8 and all(np.isfinite(row["loss"]) for row in rows)
    assert "loss" in read_metrics(folder / "out" / "evaluations.jsonl")[0]
    before, after = arrays_of(folder / "start"), arrays_of(folder / "out" / "model")
    changed = {part_of(name) for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {"vision", "projector", "separators", "partial_lora"}
    added = {part_of(name) for name in after.keys() - before.keys()}
    assert added == {"task_lora.sft", "task_lora.dpo", "task_lora.web"}       # which the recipe names
    assert all(np.isfinite(value).all() for value in after.values())
