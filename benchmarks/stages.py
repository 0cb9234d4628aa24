"""The four tiny stages one after another, each from the result of the one before, and what each is for, measured.

    python benchmarks/stages.py [--out FOLDER] [--stages language pretrain charts dpo web] [--measure_only]

Runs `mindformers run` with the tiny YAML files, then compares the model directories. Prints a table and returns 1 if a
stage misses its bar or takes over ten minutes.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"language": None, "pretrain": "language", "charts": "pretrain", "dpo": "charts", "web": "dpo"}
LIMIT_SECONDS = 600
BATCH = 16


def train(stage: str, out: Path) -> float:
    """Runs a stage; returns its seconds."""
    command = [str(Path(sys.executable).parent / "mindformers"), "run", "--config",
               str(ROOT / "yaml_configs" / f"ixc25_{stage}_tiny.yaml"), "--output_dir", str(out / stage), "--overwrite"]
    if STAGES[stage]:
        command += ["--load_checkpoint", str(out / STAGES[stage] / "model")]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{stage}: {done.stderr[-2000:]}")
    seconds = time.perf_counter() - began
    (out / stage / "seconds.json").write_text(json.dumps(seconds))
    return seconds


def rows_of(folder: Path, name: str) -> list[dict]:
    """Rows of a JSON-lines file."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def changed_parts(before: Path, after: Path) -> set[str]:
    """Parts of which at least one bit differs between two model directories."""
    from mindformers_ixc.parameters import part_of

    old, new = (load_file(folder / "model" / "model.safetensors") for folder in (before, after))
    assert old.keys() == new.keys()
    return {part_of(name) for name in old if old[name].tobytes() != new[name].tobytes()}


def questions(name: str):
    """Questions of one of the stages' files."""
    from mindformers_ixc.data.conversations import load_conversations
    from mindformers_ixc.data.questions import questions_of
    from mindformers_ixc.demo import demo_path

    return questions_of(load_conversations(str(demo_path(f"stages/{name}.json"))))


def answers(folder: Path, asked: list, mode: str = "base", pictures: bool = True, length: int = 8) -> list[str]:
    """Answers of a stage's model, greedy."""
    from mindformers_ixc.generation.assistant import Assistant

    assistant, found = Assistant.from_directory(folder / "model"), []
    for start in range(0, len(asked), BATCH):
        batch = [question.request(None) for question in asked[start:start + BATCH]]
        batch = [request if pictures else {**request, "images": []} for request in batch]
        padded = batch + [batch[-1]] * (BATCH - len(batch))
        found += assistant.answer(padded, mode, max_new_tokens=length)[:len(batch)]
    return found


def exact_match(found: list[str], asked: list) -> float:
    """Share of right answers in percent."""
    return 100 * float(np.mean([answer == question.expected.strip() for answer, question in zip(found, asked)]))


def same_logits(before: Path, after: Path, mode: str, name: str) -> bool:
    """Whether two models give the same bits in a mode, on pictures and questions of a file."""
    from mindspore import Tensor

    from mindformers_ixc.data.batch import BATCH_COLUMNS
    from mindformers_ixc.generation.assistant import Assistant
    from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
    from mindformers_ixc.generation.loading import load_model

    processor = Assistant.from_directory(before / "model").processor
    samples = [processor.encode_chat(**question.request(None)) for question in questions(name)[:8]]
    shape = (max(len(sample.input_ids) for sample in samples), max(sample.tiles for sample in samples))
    images = max(len(sample.pictures.views) for sample in samples)
    padded = [sample.pad(*shape, images, processor.pad_token_id) for sample in samples]
    columns = [None if name == "labels" else Tensor(np.stack([row[name] for row in padded])) for name in BATCH_COLUMNS]
    found = []
    for folder in (before, after):
        model = load_model(folder / "model", IXC25ForCausalLM, adapter_mode=mode, seq_length=shape[0],
                           max_tiles=shape[1])
        found.append(model(*columns).asnumpy())
    return found[0].tobytes() == found[1].tobytes()


class Tags(HTMLParser):
    """Checks that every element is closed where it should be."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.whole, self.count = [], True, 0
        self.feed(page)
        self.close()
        self.whole = self.whole and not self.open and self.count > 0

    def handle_starttag(self, tag, attrs) -> None:
        """Notes an element."""
        self.open.append(tag)
        self.count += 1

    def handle_endtag(self, tag) -> None:
        """Closes the innermost element."""
        self.whole = self.whole and bool(self.open) and self.open.pop() == tag


def measure_language(out: Path) -> list[tuple]:
    """The language model that the stages start from."""
    rows = rows_of(out / "language", "metrics.jsonl")
    return [("text loss, first and last step", f"{rows[0]['loss']:.3f} {rows[-1]['loss']:.3f}", "")]


def measure_pretrain(out: Path) -> list[tuple]:
    """Stage 1: what changed, and whether captions need their pictures."""
    rows, last = rows_of(out / "pretrain", "metrics.jsonl"), rows_of(out / "pretrain", "evaluations.jsonl")[-1]
    per_epoch = rows[0] and max(1, sum(row["epoch"] == 1 for row in rows))
    first, final = (float(np.mean([row["loss"] for row in part])) for part in (rows[:per_epoch], rows[-per_epoch:]))
    changed = changed_parts(out / "language", out / "pretrain")
    return [("parts changed", ", ".join(sorted(changed)), "language" not in changed),
            ("caption loss, first and last epoch", f"{first:.3f} {final:.3f}", final <= first / 2),
            ("held-out loss, own and other pictures", f"{last['loss']:.3f} {last['shuffled_loss']:.3f}",
             last["shuffled_loss"] > 1.5 * last["loss"])]


def measure_charts(out: Path) -> list[tuple]:
    """Stage 2: questions about charts it trained on and new ones; the baselines see no picture."""
    trained, held_out = questions("vqa_train"), questions("vqa_held_out")
    train_match = exact_match(answers(out / "charts", trained), trained)
    match = exact_match(answers(out / "charts", held_out), held_out)
    blind = exact_match(answers(out / "charts", held_out, pictures=False), held_out)
    best = {query: Counter(q.expected for q in trained if q.query == query).most_common(1)[0][0]
            for query in {q.query for q in trained}}
    constant = exact_match([best[question.query] for question in held_out], held_out)
    return [("exact match on training pairs", f"{train_match:.1f} %", train_match >= 90),
            ("exact match on new charts", f"{match:.1f} %", match > max(blind, constant)),
            ("the same, asked without pictures", f"{blind:.1f} %", ""),
            ("most frequent answer to each question", f"{constant:.1f} %", "")]


def measure_dpo(out: Path) -> list[tuple]:
    """Stage 3: rewards, and what the base mode says."""
    rows = rows_of(out / "dpo", "metrics.jsonl")
    epochs = {row["epoch"] for row in rows}
    first, last = ([row for row in rows if row["epoch"] == epoch] for epoch in (min(epochs), max(epochs)))
    accuracy = float(np.mean([row["reward_accuracy"] for row in last]))
    margins = [float(np.mean([row["logp_chosen"] - row["logp_rejected"] for row in part])) for part in (first, last)]
    changed = changed_parts(out / "charts", out / "dpo")
    return [("reward accuracy, last epoch", f"{accuracy:.3f}", accuracy > 0.9),
            ("log p(chosen) - log p(rejected), first and last epoch", f"{margins[0]:.2f} {margins[1]:.2f}",
             margins[1] > margins[0]),
            ("parts changed", ", ".join(sorted(changed)), changed == {"task_lora.dpo"}),
            ("base mode bit-unchanged", "", same_logits(out / "charts", out / "dpo", "base", "vqa_held_out"))]


def measure_web(out: Path) -> list[tuple]:
    """Stage 4: pages from screenshots and instructions, and what the other modes say."""
    asked = questions("web")
    found = answers(out / "web", asked, "web", length=200)
    match, whole = exact_match(found, asked), 100 * float(np.mean([Tags(page).whole for page in found]))
    changed = changed_parts(out / "dpo", out / "web")
    return [("pages written as trained", f"{match:.1f} %", match >= 90),
            ("pages that parse", f"{whole:.1f} %", whole == 100),
            ("parts changed", ", ".join(sorted(changed)), changed == {"task_lora.web"}),
            *((f"{mode} mode bit-unchanged", "", same_logits(out / "dpo", out / "web", mode, "vqa_held_out"))
              for mode in ("base", "write"))]


def main() -> int:
    """Runs and measures; returns 0 if every bar holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where runs go, and where earlier stages are (a temporary folder)")
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="stages to run")
    parser.add_argument("--measure_only", action="store_true", help="the runs are in --out already")
    arguments = parser.parse_args()
    measures = {"language": measure_language, "pretrain": measure_pretrain, "charts": measure_charts,
                "dpo": measure_dpo, "web": measure_web}
    from mindformers_ixc.cli.inference import quiet_mindformers

    quiet_mindformers()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        for stage in arguments.stages:
            if not arguments.measure_only:
                train(stage, out)
            seconds = json.loads((out / stage / "seconds.json").read_text())
            for what, value, good in [("seconds", f"{seconds:.0f}", seconds < LIMIT_SECONDS), *measures[stage](out)]:
                failed += good is False
                mark = {"": "", True: "ok", False: "MISSED"}[good if good == "" else bool(good)]
                print(f"{stage:9} {what:55} {value:34} {mark}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
