"""Kills a training run at random steps, resumes it, and compares with one that was never interrupted.

    python benchmarks/resume.py [--kills 3] [--seed 0] [--config yaml_configs/ixc25_sft_tiny.yaml] [--workers 1 2 ...]

The process is killed without warning (SIGKILL) and goes on from its last checkpoint with `--resume_training True`,
with another number of data workers if that is asked for. Every step's loss, gradient norm and samples, and the final
model, must be those of the other run, to the last bit. Further options override keys of the YAML file, in all runs.
"""
from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = 2
COMPARED = ("step", "epoch", "samples", "loss", "learning_rate", "grad_norm", "sources")
CALLBACKS = ("[{type: MFLossMonitor}, {type: CheckpointMonitor, prefix: t, save_checkpoint_steps: 1, "
             "keep_checkpoint_max: 2, integrated_save: True, async_save: False, checkpoint_format: safetensors}]")


def start(config: Path, out: Path, workers: int | None, *words: str) -> subprocess.Popen:
    """Starts a run."""
    if workers:
        words = (*words, "--train_dataset.num_parallel_workers", str(workers))
    command = [str(Path(sys.executable).parent / "mindformers"), "run", "--config", str(config), "--epochs",
               str(EPOCHS), "--callbacks", CALLBACKS, "--output_dir", str(out), *words]
    with open(out.with_suffix(".log"), "w", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def rows_of(out: Path) -> list[dict]:
    """Rows a run has written so far."""
    path = out / "metrics.jsonl"
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def wait_and_kill(process: subprocess.Popen, out: Path, step: int) -> int:
    """Kills a run once it has done a step; returns the step it had come to."""
    while process.poll() is None and len(rows_of(out)) < step:
        time.sleep(0.02)
    process.kill()
    process.wait()
    return len(rows_of(out))


def digest(out: Path) -> str:
    """Of the weights that a run has left."""
    return hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()


def main() -> int:
    """Runs both; returns 0 if they are equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3, help="how often to kill the run")
    parser.add_argument("--seed", type=int, default=0, help="of the steps")
    parser.add_argument("--config", type=Path, default=ROOT / "yaml_configs" / "ixc25_sft_tiny.yaml", help="YAML file")
    parser.add_argument("--workers", type=int, nargs="+", default=[None], metavar="N",
                        help="data workers, of the whole run and then of each piece (default: the file's)")
    arguments, rest = parser.parse_known_args()
    workers = itertools.cycle(arguments.workers)
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        if start(arguments.config, whole, next(workers), *rest).wait():
            raise SystemExit(whole.with_suffix(".log").read_text()[-2000:])
        expected = rows_of(whole)
        steps = sorted(random.Random(arguments.seed).sample(range(2, len(expected) - 1), arguments.kills))
        process = start(arguments.config, broken, next(workers), *rest)
        for step in steps:
            print(f"killed after step {wait_and_kill(process, broken, step)}", flush=True)
            process = start(arguments.config, broken, next(workers), "--resume_training", "True", *rest)
        if process.wait():
            raise SystemExit(broken.with_suffix(".log").read_text()[-2000:])
        found, same_model = rows_of(broken), digest(whole) == digest(broken)
    different = [row["step"] for row, other in zip(expected, found)
                 if any(row.get(key) != other.get(key) for key in COMPARED)]
    print(f"{len(expected)} steps uninterrupted, {len(found)} with {arguments.kills} interruptions; steps that differ: "
          f"{different or 'none'}; the final model is {'the same' if same_model else 'another'}")
    return int(bool(different) or len(expected) != len(found) or not same_model)


if __name__ == "__main__":
    sys.exit(main())
