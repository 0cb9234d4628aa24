"""The loop from a model's own answers to its training on them: sample, label, DPO."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mindformers_ixc.demo import demo_path
from mindformers_ixc.files import read_metrics
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.resources import STARTER
from mindformers_ixc_cli import main

RECIPE = Path(__file__).parents[2] / "yaml_configs" / "ixc25_dpo_tiny.yaml"
# The pictures of the demo have up to 4 tiles and a global view, as the starter was trained on them.
SIZES = {"train_dataset.hd_num": 4, **dict.fromkeys(("train_dataset.seq_length", "model.model_config.seq_length"), 160),
         **dict.fromkeys(("train_dataset.max_tiles", "model.model_config.max_tiles"), 5)}


def right(model, samples) -> float:
    """Share of questions that a model answers in mode write as it was taught."""
    asked = [{"query": one["conversations"][0]["value"], "images": [str(demo_path(one["image"]))]} for one in samples]
    answers = Assistant.from_directory(model).answer(asked, "write", max_new_tokens=16)
    return float(np.mean([answer == one["conversations"][1]["value"] for answer, one in zip(answers, samples)]))


@pytest.mark.slow
def test_pairs_of_its_own_answers_train_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("mindformers_ixc.cli.inference.quiet_mindformers", lambda: None)
    monkeypatch.chdir(tmp_path)
    samples = json.loads(demo_path("train.json").read_text(encoding="utf-8"))[:24]
    Path("q.jsonl").write_text("".join(json.dumps({
        "id": one["id"], "query": one["conversations"][0]["value"], "images": [str(demo_path(one["image"]))]}) + "\n"
        for one in samples), encoding="utf-8")
    assert main(["sample", "--model", STARTER, "--mode", "write", "--data", "q.jsonl", "--output_dir", "samples",
                 "--num_samples", "6", "--max_new_tokens", "16", "--temperature", "1.5"]) == 0
    expected = {one["id"]: one["conversations"][1]["value"] for one in samples}
    drawn = [json.loads(line) for line in Path("samples/samples.jsonl").read_text(encoding="utf-8").splitlines()]
    Path("judge.json").write_text(json.dumps({
        row["id"]: [float(one["answer"] == expected[row["id"]]) for one in row["samples"]] for row in drawn}))
    assert main(["label", "samples/samples.jsonl", "pairs.json", "--judge", "judge.json"]) == 0
    pairs = json.loads(Path("pairs.json").read_text(encoding="utf-8"))
    assert len(pairs) >= 8 and all(pair["chosen"] == expected[pair["id"]] != pair["rejected"] for pair in pairs)

    words = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    command = [str(Path(sys.executable).parent / "mindformers"), "run", "--config", str(RECIPE), "--load_checkpoint",
               STARTER, "--output_dir", "out", "--train_dataset.data_loader.dataset_dir", "pairs.json", "--epochs", "6",
               *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    margins = [row["reward_margin"] for row in read_metrics(Path("out/metrics.jsonl"))]
    assert margins[0] == 0 and margins[-1] > 0.02
    assert right("out/model", samples) >= right(STARTER, samples) > 0.5
