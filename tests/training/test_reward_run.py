"""A reward model trained from the starter through the command, and what becomes of it."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mindformers_ixc.config import read_config
from mindformers_ixc.demo import demo_path
from mindformers_ixc.files import read_metrics
from mindformers_ixc.generation.scoring import Scorer
from mindformers_ixc.resources import resolve_model

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "yaml_configs" / "ixc25_reward_tiny.yaml"


@pytest.mark.slow
def test_a_reward_model_is_trained_and_scores(tmp_path):
    command = [str(Path(sys.executable).parent / "mindformers"), "run", "--config", str(RECIPE), "--load_checkpoint",
               "starter", "--output_dir", "out", "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "starter writes answers: output.weight is left out, and the score head starts at zero." in done.stderr
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    # all scores are 0 at first: log 2, and 0.01 times the barrier's -2 log 5
    assert rows[0]["loss"] == pytest.approx(np.log(2) - 0.02 * np.log(5), abs=1e-5)
    assert rows[0]["reward_chosen"] == rows[0]["reward_margin"] == rows[0]["reward_accuracy"] == 0
    assert np.mean([row["loss"] for row in rows[-10:]]) < rows[0]["loss"]

    folder = tmp_path / "out" / "model"
    assert read_config(folder).reward_pooling == "last"
    assert "Reward" in json.loads((folder / "config.json").read_text())["architectures"][0]
    before, after = (load_file(next(path.glob("*.safetensors"))) for path in (resolve_model("starter"), folder))
    assert "output.weight" not in after and after["v_head.weight"].any()
    changed = {name for name in after if name in before and (before[name].astype(np.float32) != after[name]).any()}
    assert changed and not any(name.startswith(("vit.", "vision_proj.", "plora_")) for name in changed)
    chat = [{"role": "user", "content": "Which colour are the bars?"}, {"role": "assistant", "content": "red"}]
    chart = demo_path("stages/charts/held_out_000.png")
    alone, twice = Scorer.from_directory(folder), Scorer.from_directory(folder)
    assert alone.scores([chat], [[chart]]) == pytest.approx(twice.scores([chat] * 2, [[chart]] * 2)[:1], abs=1e-5)
