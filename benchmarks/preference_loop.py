"""The paper's loop on the tiny model, measured: sample, label by a reward model, train on the pairs (DPO), ask again.

    python benchmarks/preference_loop.py [--out FOLDER] [--prompts 160]

From the starter a model learns charts (`ixc25_charts_tiny.yaml`) and becomes the reward model
(`ixc25_reward_tiny.yaml`). It answers questions about charts that it trained on, 8 times each at temperature 1.7; its
best and worst answers by the reward model are what `ixc25_dpo_tiny.yaml` trains it on. Steps whose result is in FOLDER,
which may be that of `benchmarks/reward.py`, are not done again. Prints a table and returns 1 if a bar is missed.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mindformers_ixc.data.conversations import load_conversations
from mindformers_ixc.data.questions import questions_of
from mindformers_ixc.demo import demo_path
from mindformers_ixc.files import read_metrics

ROOT = Path(__file__).resolve().parent.parent
COMMAND = str(Path(sys.executable).parent / "mindformers")


def run(out: Path, name: str, result: str, *words: str) -> str:
    """Runs a command unless its result is there; returns what it said, and keeps it."""
    log = out / f"{name}.txt"
    if not (out / result).exists():
        began = time.perf_counter()
        done = subprocess.run([COMMAND, *words], cwd=out, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        log.write_text(done.stdout + done.stderr)
        print(f"{name:9} {time.perf_counter() - began:.0f} s", flush=True)
    return log.read_text() if log.exists() else ""


def train(out: Path, name: str, recipe: str, start: str, *words: str) -> None:
    """Runs a tiny recipe unless its model is there."""
    run(out, name, f"{name}/model", "run", "--config", str(ROOT / "yaml_configs" / f"ixc25_{recipe}_tiny.yaml"),
        "--load_checkpoint", start, "--output_dir", name, "--overwrite", *words)


def write_prompts(path: Path, count: int) -> None:
    """Questions about charts, spread over the training data."""
    asked = questions_of(load_conversations(demo_path("stages/vqa_train.json")))
    chosen = asked[::max(1, len(asked) // count)][:count]
    lines = [json.dumps({"id": one.sample, "query": one.query, "images": [str(image) for image in one.images]})
             for one in chosen]
    path.write_text("".join(f"{line}\n" for line in lines))


def exact_match(out: Path, name: str, model: str) -> float:
    """Right answers to questions about new charts in mode write, in percent."""
    file = out / f"{name}.jsonl"
    run(out, name, file.name, "eval", "--model", model, "--mode", "write", "--data",
        str(demo_path("stages/vqa_held_out.json")), "--max_new_tokens", "8", "--batch_size", "16", "--predictions",
        file.name)
    rows = read_metrics(file)
    return 100 * float(np.mean([row.get("answer", "").strip() == row["expected"].strip() for row in rows]))


def right(out: Path, key: str) -> float:
    """Share of pairs whose answer `key` is the right one, in percent."""
    expected = {one.sample: one.expected for one in questions_of(load_conversations(
        demo_path("stages/vqa_train.json")))}
    return 100 * float(np.mean([pair[key] == expected[pair["id"]] for pair in json.loads(
        (out / "pairs.json").read_text())]))


def main() -> int:
    """Runs and measures; returns 0 if every bar holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where everything goes, and what is there is taken (a temporary one)")
    parser.add_argument("--prompts", type=int, default=160, help="that are sampled from")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = (arguments.out or Path(scratch)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        write_prompts(out / "prompts.jsonl", arguments.prompts)
        train(out, "charts", "charts", "starter")
        train(out, "reward", "reward", "charts/model")
        run(out, "sample", "samples/samples.jsonl", "sample", "--model", "charts/model", "--mode", "write", "--data",
            "prompts.jsonl", "--output_dir", "samples", "--num_samples", "8", "--max_new_tokens", "8",
            "--temperature", "1.7")
        said = run(out, "label", "pairs.json", "label", "samples/samples.jsonl", "pairs.json", "--reward",
                   "reward/model", "--min_margin", "1")
        print(said.strip())
        train(out, "dpo", "dpo", "charts/model", "--train_dataset.data_loader.dataset_dir", "pairs.json")
        rows = read_metrics(out / "dpo" / "metrics.jsonl")
        first, last = ([row for row in rows if row["epoch"] == epoch] for epoch in (1, rows[-1]["epoch"]))
        margins = [float(np.mean([row["reward_margin"] for row in part])) for part in (first, last)]
        before, after = exact_match(out, "before", "charts/model"), exact_match(out, "after", "dpo/model")
        bars = [("chosen answers that are right", f"{right(out, 'chosen'):.1f} %", ""),
                ("rejected answers that are right", f"{right(out, 'rejected'):.1f} %", ""),
                ("reward margin of DPO, first and last epoch", f"{margins[0]:.3f} {margins[1]:.3f}",
                 margins[1] > margins[0]),
                ("exact match on new charts, mode write, before and after", f"{before:.1f} % {after:.1f} %",
                 after >= before)]
        for what, value, good in bars:
            print(f"{what:58} {value:20} {'' if good == '' else 'ok' if good else 'MISSED'}")
    return int(any(good is False for _, _, good in bars))


if __name__ == "__main__":
    sys.exit(main())
