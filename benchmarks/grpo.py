"""A half-trained model learns about charts from rewards of its own answers (GRPO), measured.

    python benchmarks/grpo.py [--out FOLDER] [--half FOLDER] [OVERRIDES ...]

Makes the half-trained model first: the starter learns from captions of charts (ixc25_pretrain_tiny.yaml, half of its
epochs), then from a few questions (ixc25_charts_tiny.yaml, on 45 samples). Then runs ixc25_grpo_tiny.yaml,
whose prompts are the questions about the training charts, and asks both models 96 questions about charts that neither
has seen. Prints a table and returns 1 if exact match is below 80 % afterwards or GRPO takes over ten minutes.
"""
from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from stages import LIMIT_SECONDS, ROOT, answers, exact_match, questions, rows_of

BAR = 80.0
WINDOW = 10                    # rounds at either end that numbers of the log are means of


def run(recipe: str, start: Path | str, out: Path, *words: str) -> float:
    """Runs a tiny recipe; returns its seconds."""
    command = [str(Path(sys.executable).parent / "mindformers"), "run", "--config",
               str(ROOT / "yaml_configs" / f"{recipe}.yaml"), "--load_checkpoint", str(start), "--output_dir", str(out),
               "--overwrite", *words]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{recipe}: {done.stderr[-2000:]}")
    return time.perf_counter() - began


def main() -> int:
    """Runs and measures; returns 0 if both bars hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where runs go (a temporary folder)")
    parser.add_argument("--half", type=Path, help="folder of a run that has made one already")
    arguments, words = parser.parse_known_args()
    from mindformers_ixc.cli.inference import quiet_mindformers

    quiet_mindformers()
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        half = arguments.half or out / "half"
        if arguments.half is None:
            spent = run("ixc25_pretrain_tiny", "starter", out / "captions", "--epochs", "25", "--evaluation.every", "0")
            spent += run("ixc25_charts_tiny", out / "captions" / "model", half, "--epochs", "1",
                         "--train_dataset.data_loader.mixture.samples_per_epoch", "45")
            print(f"half-trained model           {spent:.0f} s", flush=True)
        seconds = run("ixc25_grpo_tiny", half / "model", out / "grpo", *words)
        rows, asked = rows_of(out / "grpo", "metrics.jsonl"), questions("vqa_held_out")
        before, after = (exact_match(answers(folder, asked, "write"), asked) for folder in (half, out / "grpo"))
    print(f"GRPO, {len(rows)} rounds             {seconds:.0f} s")
    print(f"exact match on new charts    {before:.1f} % before, {after:.1f} % after")
    for name in ("reward", "reward_std", "exact_match", "kl", "clip_fraction", "answer_length", "equal_groups"):
        first, last = (float(np.mean([row[name] for row in part])) for part in (rows[:WINDOW], rows[-WINDOW:]))
        print(f"{name:28} {first:.3f} first, {last:.3f} last {WINDOW} rounds")
    return int(after < BAR or seconds > LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
