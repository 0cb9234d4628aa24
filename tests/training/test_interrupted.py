"""Runs that stop: killed and resumed, or ended by a loss that is no number; and the DPO stage from its YAML."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from mindformers_ixc.files import read_metrics
from mindformers_ixc.training.resume import last_checkpoint

COMMAND = str(Path(sys.executable).parent / "mindformers")
HELD = Path(__file__).parents[1] / "helpers" / "held_run.py"
YAMLS = Path(__file__).parents[2] / "yaml_configs"
CALLBACKS = ("[{type: MFLossMonitor}, {type: CheckpointMonitor, prefix: t, save_checkpoint_steps: %d, "
             "keep_checkpoint_max: 2, integrated_save: True, async_save: False, checkpoint_format: safetensors}]")
COMPARED = ("step", "epoch", "samples", "loss", "learning_rate", "grad_norm")


def start(name: str, out: Path, *words, save_steps: int = 1, hold: int = 0) -> subprocess.Popen:
    """Starts a run, which waits after the step `hold` if that is given.

    Runs of one test keep their compiled step, which is the same but for a learning rate.
    """
    program = [sys.executable, str(HELD), str(hold), str(out)] if hold else [COMMAND]
    command = [*program, "run", "--config", str(YAMLS / f"ixc25_{name}.yaml"),
               "--callbacks", CALLBACKS % save_steps, "--output_dir", str(out),
               "--context.enable_compile_cache", "True", "--context.compile_cache_path", str(out.parent / "graphs"),
               *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run(name: str, out: Path, *words, save_steps: int = 1) -> tuple[int, str]:
    process = start(name, out, *words, save_steps=save_steps)
    errors = process.communicate(timeout=1800)[1]
    return process.returncode, errors


def kill_after(process: subprocess.Popen, out: Path, step: int) -> None:
    while process.poll() is None and len(read_metrics(out / "metrics.jsonl")) < step:
        time.sleep(0.02)
    process.kill()
    process.communicate()


def stop_after(process: subprocess.Popen, out: Path, step: int) -> tuple[int, str]:
    errors = []      # read meanwhile: the run would wait for room in a pipe that is full
    reader = threading.Thread(target=lambda: errors.append(process.communicate()[1]), daemon=True)
    reader.start()
    while process.poll() is None and len(read_metrics(out / "metrics.jsonl")) < step:
        time.sleep(0.01)
    process.terminate()
    reader.join(timeout=1800)
    return process.returncode, errors[0]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_losses_and_weights(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    epochs = ("--epochs", 1)
    code, errors = run("sft_tiny", whole, *epochs)
    assert code == 0, errors[-3000:]
    kill_after(start("sft_tiny", broken, *epochs, hold=5), broken, 5)
    code, errors = run("sft_tiny", broken, *epochs, "--lr_schedule.learning_rate", 0.5, "--resume_training", True)
    assert code == 1
    assert "lr_schedule.learning_rate was " in errors.splitlines()[-1]
    assert "is 0.5" in errors.splitlines()[-1]
    code, errors = stop_after(start("sft_tiny", broken, *epochs, "--resume_training", True, hold=8), broken, 8)
    assert code == 143
    assert re.match(r"SIGTERM stopped the run after step \d+; its checkpoint is ", errors.splitlines()[-1])
    code, errors = run("sft_tiny", broken, *epochs)
    assert code == 1 and "already has metrics.jsonl, checkpoint of an earlier run" in errors.splitlines()[-1]
    code, errors = run("sft_tiny", broken, *epochs, "--resume_training", True)
    assert code == 0, errors[-3000:]
    shutil.rmtree(broken / "model")       # as if it had been killed before it wrote it
    code, errors = run("sft_tiny", broken, *epochs, "--resume_training", True)
    assert code == 0, errors[-3000:]
    code, errors = run("sft_tiny", broken, *epochs, "--resume_training", True)
    assert code == 0 and errors.splitlines()[-1].endswith("nothing is done.")
    expected, found = (read_metrics(folder / "metrics.jsonl") for folder in (whole, broken))
    assert len(found) == len(expected) >= 10
    assert all(row["tokens"] == sum(source["tokens"] for source in row["sources"].values()) > 0 for row in found)
    assert [[row[key] for key in COMPARED] for row in found] == [[row[key] for key in COMPARED] for row in expected]
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (broken, whole))
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    code, errors = run("sft_tiny", tmp_path / "out", "--lr_schedule.learning_rate", 1e30, "--epochs", 1)
    assert code == 1
    last = errors.strip().splitlines()[-1]
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert last.startswith(f"error: Step {len(rows)}: the loss of this batch is not finite (its samples: ")
    assert rows[-1]["loss"] is None
    for index in rows[-1]["samples"]:
        assert f"train.json, sample {index} (id " in last
    assert last_checkpoint(tmp_path / "out").name == f"t_rank_0-1_{len(rows) - 1}.safetensors"
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.slow
def test_preferences_train_their_pair_alone_and_are_put_on_the_base_again(tmp_path):
    base, out = tmp_path / "base", tmp_path / "dpo"
    code, errors = run("charts_tiny", base, "--epochs", 1, "--train_dataset.data_loader.mixture.samples_per_epoch", 16,
                       "--evaluation", "null", save_steps=100)
    assert code == 0, errors[-3000:]
    code, errors = run("dpo_tiny", out, "--load_checkpoint", base / "model", "--epochs", 1,
                       "--train_dataset.drop_remainder", False, save_steps=100)
    assert code == 0, errors[-3000:]
    rows = read_metrics(out / "metrics.jsonl")
    assert rows[0]["reward_chosen"] == rows[0]["reward_rejected"] == 0        # the pair does nothing yet
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert rows[-1]["reward_margin"] > 0
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (base, out))
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed
    assert all("lora_dpo" in name for name in changed)
    part = load_file(out / "trained_parts" / "model.safetensors")
    assert changed <= set(part)
    command = [COMMAND, "merge", str(base / "model"), str(tmp_path / "merged"), "--attach", str(out / "trained_parts"),
               "--to", "hf"]
    subprocess.run(command, check=True, capture_output=True)
    merged = load_file(next((tmp_path / "merged").glob("*.safetensors")))
    assert all(merged[name].tobytes() == after[name].tobytes() for name in after)
