"""Rounds of GRPO through the command: what a round reports, and what changes."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mindformers_ixc.files import read_metrics
from mindformers_ixc.parameters import part_of
from mindformers_ixc.resources import resolve_model

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "yaml_configs" / "ixc25_grpo_tiny.yaml"
# questions that the starter answers right now and then
DATA = ["--train_dataset.data_loader.dataset_dir", "pkg:mindformers_ixc/demo/train.json", "--evaluation", "null",
        "--train_dataset.group_size", "4", "--epochs", "1"]


def run(folder: Path, *words: str) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Rows of a run's log, and what trained."""
    done = subprocess.run([str(Path(sys.executable).parent / "mindformers"), "run", "--config", str(RECIPE),
                           "--load_checkpoint", "starter", "--output_dir", str(folder), *DATA, *words],
                          cwd=folder.parent, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(folder / "metrics.jsonl"), load_file(next((folder / "trained_parts").glob("*.safetensors")))


@pytest.mark.slow
def test_rounds_train_the_pair_alone(tmp_path):
    rows, trained = run(tmp_path / "one", "--runner_config.batch_size", "4", "--rollout.updates", "2")
    first = rows[0]
    # the pair does nothing yet: the first of two updates is of the reference's and the sampled probabilities
    assert 0 < first["reward"] == first["exact_match"] <= 1 and 1 <= first["answer_length"] <= 8
    assert 0 < first["reward_std"] <= 0.5 and 0 <= first["equal_groups"] < 1
    assert 0 <= first["kl"] < 0.5 and "tflops" not in first
    assert max(row["kl"] for row in rows) > first["kl"]
    assert {part_of(name) for name in trained} == {"task_lora.dpo"}
    before = load_file(next(resolve_model("starter").glob("*.safetensors")))
    after = load_file(next((tmp_path / "one" / "model").glob("*.safetensors")))
    changed = {part_of(name) for name in before if (before[name].astype(np.float32) != after[name]).any()}
    assert changed == {"task_lora.dpo"}
