"""Trains the same steps alone and in parallel layouts over CPU processes, and compares losses and weights.

    python scripts/parallel_parity.py [--layouts tp2 pp2 ...] [--steps 20] [--out FOLDER]

Everything goes through `mindformers launch`: MindFormers' Trainer, the tiny YAML with real pictures, everything
training (Partial LoRA and the web pair among it), gradient clipping, losses by source and a moving average, from one
checkpoint. Every step's loss, gradient norm and losses of sources, and the weights and averages joined from the ranks
must be those of the single process within 1e-5. `resume` interrupts a run twice and goes on in another layout each time
(tp 2, single, pp 2). `preferences` trains one pair by DPO, all else frozen; losses, gradient norms and rewards are
compared, and `rewards` a reward model the same way. `extras` trains with noise on the embeddings and loss on the last
of two rounds. `inference` answers questions with a cache: logits of prompts and steps within 1e-5 of the largest, ids
of greedy decoding and beams equal, and the file that run mode predict writes the same. Prints a table; returns 1 if a
bar is missed.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from parallel_answers import STEPS as ANSWER_STEPS
from parallel_answers import launch

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "yaml_configs" / "ixc25_sft_tiny.yaml"
PREFERENCES = CONFIG.with_name("ixc25_dpo_tiny.yaml")
REWARDS = CONFIG.with_name("ixc25_reward_tiny.yaml")
PREDICT = CONFIG.with_name("predict_ixc25.yaml")
OTHERS = ("resume", "preferences", "rewards", "extras", "inference")
BAR = 1e-5
SMALLEST = 1.0               # rewards begin near 0, as differences of large sums
GLOBAL_BATCH, STEPS_AN_EPOCH = 8, 7          # 56 samples


class Layout(NamedTuple):
    """Degrees of a run: data parallel, tensor parallel, stages, micro batches; what else is on."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    micro: int = 1
    options: dict = {}


SHARDED = {"parallel.enable_parallel_optimizer": True,
           "parallel.parallel_optimizer_config": "{parallel_optimizer_threshold: 0}"}
SEQUENCE = {"parallel_config.use_seq_parallel": True}
ACCUMULATED = {"runner_config.gradient_accumulation_steps": 2}
LAYOUTS = {"tp2": Layout(tp=2), "dp2": Layout(dp=2), "pp2": Layout(pp=2, micro=2), "dp2tp2": Layout(2, 2),
           "tp2pp2": Layout(tp=2, pp=2, micro=2), "dp2opt": Layout(dp=2, options=SHARDED),
           "tp2seq": Layout(tp=2, options=SEQUENCE),
           "tp2vit": Layout(tp=2, options={"model.model_config.vision_parallel": "replicated"}),
           "tp2accumulated": Layout(tp=2, options=ACCUMULATED),
           "tp2seqaccumulated": Layout(tp=2, options={**SEQUENCE, **ACCUMULATED}),
           "dp2own": Layout(dp=2, options={"parallel.full_batch": False}),       # replicas read their own samples
           "dp2tp2pp2": Layout(2, 2, 2, 2)}
PAIR_LAYOUTS = ("tp2", "dp2", "tp2accumulated", "pp2")
SAMPLES = 160                                # pairs: 20 steps
FEW_STEPS = {"dp2tp2pp2": STEPS_AN_EPOCH}    # eight processes on two cores
CALLBACKS = ("[{type: MFLossMonitor}, {type: CheckpointMonitor, prefix: p, save_checkpoint_steps: %d, "
             "keep_checkpoint_max: 1, integrated_save: False, async_save: False, checkpoint_format: safetensors}]")
NOISE_COLUMNS = ("input_ids", "labels", "pixel_values", "global_views", "view_index", "vision_index", "image_mask",
                 "noise_seed", "lengths", "source")
SHARED = {"run_mode": "finetune", "model.model_config.adapter_mode": "web", "model.model_config.plora_dropout": 0.0,
          "train_parts": "[vision, projector, separators, partial_lora, language, task_lora.web]",
          "runner_wrapper.ema_decay": 0.9,
          "lr_schedule.learning_rate": 1e-4,
          "model.model_config.loss_chunk": 150}      # several chunks, the last one shorter


def write_start(folder: Path, config: Path = CONFIG) -> None:
    """A random model directory for all runs; pairs whose second half were zero would hide errors."""
    import mindspore as ms
    from mindspore import Tensor

    from mindformers_ixc import IXC25Config, IXC25ForCausalLM
    from mindformers_ixc.checkpoint.model_directory import save_model_directory
    from mindformers_ixc.cli.yaml_file import read_yaml
    from mindformers_ixc.demo import demo_path

    ms.set_seed(1)
    section = read_yaml(config)["model"]["model_config"]
    section.pop("type")
    model = IXC25ForCausalLM(IXC25Config(**section))
    rng = np.random.default_rng(1)
    for parameter in model.get_parameters():
        if parameter.name.endswith("_B.weight"):
            parameter.set_data(Tensor(rng.normal(0, 0.02, parameter.shape).astype(np.float32)))
    save_model_directory(model, folder, demo_path("tokenizer.model"))


def options_of(layout: Layout, epochs: int, save_steps: int) -> dict:
    """Overrides of a run in a layout, for the same global batch."""
    dp, tp, pp, micro, extra = layout
    options = {**SHARED, "runner_config.epochs": epochs, "callbacks": CALLBACKS % save_steps, **extra}
    size = GLOBAL_BATCH // (dp * micro * extra.get("runner_config.gradient_accumulation_steps", 1))
    options.update({"runner_config.batch_size": size, "train_dataset.batch_size": size})
    if dp * tp * pp > 1:
        options.update({"auto_trans_ckpt": True, "parallel.parallel_mode": 1, "parallel.full_batch": True,
                        "parallel.gradients_mean": False,
                        "parallel_config.data_parallel": dp, "parallel_config.model_parallel": tp,
                        "parallel_config.pipeline_stage": pp, "parallel_config.micro_batch_num": micro,
                        "parallel_config.vocab_emb_dp": False})
    return options


def start(layout: Layout, out: Path, options: dict, config: Path = CONFIG) -> subprocess.Popen:
    """Starts a run."""
    devices = layout.dp * layout.tp * layout.pp
    command = [str(Path(sys.executable).with_name("mindformers"))]
    command += ["launch", "-n", str(devices)] if devices > 1 else ["run"]
    command += ["--config", str(config), "--output_dir", str(out)]
    if not options.get("resume_training"):
        command.append("--overwrite")
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".log"), "a", encoding="utf-8") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def run(layout: Layout, out: Path, options: dict, config: Path = CONFIG) -> None:
    """Runs to the end."""
    if start(layout, out, options, config).wait():
        raise SystemExit(f"{out.name}: {out.with_suffix('.log').read_text()[-3000:]}")


def write_sources(folder: Path, earlier: str = "") -> dict:
    """Two sources of the recipe's samples, a first round with this answer before each; the override that names them."""
    from mindformers_ixc.demo import demo_path

    train = demo_path("train.json")
    rows = json.loads(train.read_text(encoding="utf-8"))
    for row in rows:
        row["image"] = str(train.parent / row["image"])
        if earlier:
            row["conversations"][0]["value"] = f"<ImageHere>{row['conversations'][0]['value']}"
            row["conversations"][:0] = [{"from": "human", "value": row["id"]}, {"from": "bot", "value": earlier}]
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"source_{number}.json" for number in range(2)]
    for number, file in enumerate(files):
        file.write_text(json.dumps(rows[number::2]), encoding="utf-8")
    return {"train_dataset.data_loader.dataset_dir": f"[{files[0]}, {files[1]}]"}


def write_pairs(folder: Path, recipe: Path, samples: int) -> dict:
    """The first pairs of a recipe; the override that names their file."""
    from mindformers_ixc.cli.yaml_file import read_yaml
    from mindformers_ixc.demo import demo_path

    given = read_yaml(recipe)["train_dataset"]["data_loader"]["dataset_dir"]
    file = demo_path(given.removeprefix("pkg:mindformers_ixc/demo/"))
    rows = json.loads(file.read_text(encoding="utf-8"))[:samples]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / file.name
    target.write_text(json.dumps([{**row, "image": str(file.parent / row["image"])} for row in rows]),
                      encoding="utf-8")
    return {"train_dataset.data_loader.dataset_dir": target}


def rows_of(out: Path, name: str = "metrics.jsonl") -> list[dict]:
    """What a run has written so far of its steps, or of its evaluations."""
    path = out / name
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def weights_of(out: Path) -> dict[str, np.ndarray]:
    """Weights and averages of a run's last checkpoint, joined from its ranks."""
    from mindformers_ixc.checkpoint.model_directory import read_as
    from mindformers_ixc.checkpoint.sources import AVERAGE_PREFIX, open_source
    from mindformers_ixc.parameters import part_of

    source = open_source(out / "checkpoint")
    return {name: read_as(tensor, "F32") for name, tensor in source.tensors.items()
            if part_of(name.removeprefix(AVERAGE_PREFIX))}


def numbers_of(row: dict) -> dict[str, float]:
    """What a step's row says that is the same in every layout."""
    found = {key: value for key, value in row.items()
             if key in ("loss", "grad_norm", "tokens") or key.startswith(("reward_", "logp_", "nll_"))}
    for source, values in row.get("sources", {}).items():
        found.update({f"{source} {key}": value for key, value in values.items()})
    return found


def worst_difference(ours: list[dict], theirs: list[dict]) -> float:
    """Largest difference of a number of the steps that both have, relative to it (or to 1, of those below)."""
    worst = 0.0
    for mine, other in zip(map(numbers_of, ours), map(numbers_of, theirs), strict=False):
        assert mine.keys() == other.keys()
        worst = max(worst, *(abs(mine[key] - other[key]) / max(abs(other[key]), SMALLEST) for key in mine))
    return worst


def compare(expected: Path, out: Path) -> tuple[int, float, float]:
    """Steps, largest relative difference of a number, and largest difference of a weight relative to the largest."""
    ours, theirs = rows_of(out), rows_of(expected)
    worst = worst_difference(ours, theirs)
    assert [row["samples"] for row in ours] == [row["samples"] for row in theirs[:len(ours)]]
    if len(ours) < len(theirs):
        return len(ours), worst, float("nan")
    whole, joined = weights_of(expected), weights_of(out)
    assert any(name.startswith("ema.") for name in joined)
    differences = [float(np.abs(joined[name] - whole[name]).max() / max(np.abs(whole[name]).max(), 1.0))
                   for name in joined]
    return len(ours), worst, max(differences)


def told(name: str, steps: int, worst: float, other: str, began: float, good: bool) -> int:
    """Prints a row of the table; returns 1 if its bar is missed."""
    print(f"{name:14} {steps:5} {worst:15.1e} {other:>18} {time.perf_counter() - began:8.0f} "
          f"{'ok' if good else 'MISSED'}", flush=True)
    return int(not good)


def check_layouts(out: Path, names: list[str], epochs: int) -> int:
    """Runs and compares layouts; returns how many miss the bar."""
    failed = 0
    for name in names:
        few = FEW_STEPS.get(name)
        began = time.perf_counter()
        run(LAYOUTS[name], out / name, {**options_of(LAYOUTS[name], -(-few // STEPS_AN_EPOCH) if few else epochs, 1000),
                                        **({"lr_schedule.total_steps": epochs * STEPS_AN_EPOCH} if few else {}),
                                        **write_sources(out), "load_checkpoint": out / "start"})
        steps, loss, weight = compare(out / "single", out / name)
        shown = "" if np.isnan(weight) else f"{weight:.1e}"
        failed += told(name, steps, loss, shown, began, loss <= BAR and not weight > BAR)
    return failed


def check_resume(out: Path, epochs: int) -> int:
    """tp 2, killed; single, killed; pp 2 to the end: the losses are those of the single run. Returns 1 if not."""
    began, target = time.perf_counter(), out / "resumed"
    total = epochs * STEPS_AN_EPOCH
    legs = [(LAYOUTS["tp2"], total // 3), (Layout(), 2 * total // 3), (LAYOUTS["pp2"], total)]
    previous = None
    for number, (layout, until) in enumerate(legs):
        leg = target.with_name(f"resumed_{number}")
        options = {**options_of(layout, epochs, 1), **write_sources(out), "load_checkpoint": previous or out / "start"}
        if previous:
            options["resume_training"] = True
        process = start(layout, leg, options)
        while process.poll() is None and (not rows_of(leg) or rows_of(leg)[-1]["step"] < until):
            time.sleep(0.05)
        if until < total:
            subprocess.run(["pkill", "-9", "-f", str(leg)], check=False)
        if process.wait() and until == total:
            raise SystemExit(leg.with_suffix(".log").read_text()[-3000:])
        previous = leg
    rows: dict[int, dict] = {}
    for number in range(len(legs)):
        rows.update({row["step"]: row for row in rows_of(target.with_name(f"resumed_{number}"))})
    expected = rows_of(out / "single")
    loss = max(abs(rows[row["step"]]["loss"] - row["loss"]) / row["loss"] for row in expected)
    good = loss <= BAR and all(rows[row["step"]]["samples"] == row["samples"] for row in expected)
    return told("resume", len(rows), loss, "", began, good)


def check_preferences(out: Path, names: tuple[str, ...] = PAIR_LAYOUTS, samples: int = SAMPLES) -> int:
    """DPO of one pair, everything else frozen, in some layouts; returns how many miss the bar."""
    return _check(out, "dpo", PREFERENCES, names, {
        **write_pairs(out / "dpo_pairs", PREFERENCES, samples), "train_parts": "[task_lora.dpo]",
        "model.model_config.adapter_mode": "write", "model.model_config.preference.rpo_alpha": 0.5})


def check_rewards(out: Path, names: tuple[str, ...] = PAIR_LAYOUTS, samples: int = SAMPLES) -> int:
    """A reward model in some layouts, with held-out pairs; returns how many miss the bar."""
    return _check(out, "reward", REWARDS, names, {
        **write_pairs(out / "reward_pairs", REWARDS, samples),
        "train_parts": "[language, partial_lora, reward_head]", "model.model_config.adapter_mode": "base",
        "model.model_config.reward.loss": "focal", "evaluation.max_samples": 6, "evaluation.batch_size": 4})


def check_extras(out: Path, names: tuple[str, ...] = ("tp2", "dp2", "pp2")) -> int:
    """Noise on embeddings and loss on last answers in some layouts; returns how many miss the bar."""
    return _check(out, "extras", CONFIG, names, {
        "train_dataset.data_loader.loss_on": "last", "model.model_config.neftune_alpha": 5.0,
        "train_dataset.input_columns": f"[{', '.join(NOISE_COLUMNS)}]",
        **write_sources(out / "rounds", "It is one of the pictures of the demo.")}, CONFIG)


def _check(out: Path, kind: str, recipe: Path, names: tuple[str, ...], changes: dict, start: Path = PREFERENCES) -> int:
    """A recipe in some layouts, against the single process."""
    failed, first = 0, out / f"{kind}_start"
    write_start(first, start)
    for name, layout in (("single", Layout()), *((name, LAYOUTS[name]) for name in names)):
        began = time.perf_counter()
        options = {**options_of(layout, 1, 1000), "load_checkpoint": first, **changes}
        run(layout, out / f"{kind}_{name}", options, recipe)
        if name == "single":
            continue
        own, single = out / f"{kind}_{name}", out / f"{kind}_single"
        steps, worst, weight = compare(single, own)
        held_out = [rows_of(folder, "evaluations.jsonl") for folder in (own, single)]
        assert len(held_out[0]) == len(held_out[1])
        worst = max(worst, worst_difference(*held_out))
        failed += told(f"{kind} {name}", steps, worst, f"{weight:.1e}", began, max(worst, weight) <= BAR)
    return failed


def predict(layout: Layout, out: Path, first: Path, pictures: list[str]) -> bytes:
    """What run mode predict answers in a layout."""
    requests = out.with_suffix(".jsonl")
    requests.write_text("".join(json.dumps(question) + "\n" for question in (
        {"query": "What does the picture show?", "images": pictures[:1], "hd_num": 2}, {"query": "Who are you?"},
        {"query": "Broken", "images": ["nowhere.png"]}, {"query": "And this?", "images": pictures[1:2], "hd_num": 1})))
    run(layout, out, {"load_checkpoint": first, "predict_data": requests, "generation.max_new_tokens": 12,
                      "predict_batch_size": 2, "parallel_config.data_parallel": layout.dp,
                      "parallel_config.model_parallel": layout.tp, "parallel_config.pipeline_stage": layout.pp},
        PREDICT)
    return (out / "predictions.jsonl").read_bytes()


def check_inference(out: Path) -> int:
    """Answers in tp 2, pp 2 and both; returns how many miss the bar."""
    from mindformers_ixc.demo import demo_path

    failed, found, first = 0, {}, out / "start"
    pictures = [str(demo_path(f"images/{name}.jpg")) for name in ("astronaut", "cameraman")]
    for name, layout in (("single", Layout()), ("tp2", Layout(tp=2)), ("pp2", Layout(pp=2)),
                         ("tp2pp2", Layout(tp=2, pp=2))):
        began, result = time.perf_counter(), out / f"answers_{name}.npz"
        launch(first, Path(pictures[0]), layout.tp, layout.pp, result)
        found[name] = {**np.load(result), "file": predict(layout, out / f"predict_{name}", first, pictures)}
        if name == "single":
            continue
        ours, alone = found[name], found["single"]
        worst = np.abs(ours["logits"] - alone["logits"]).max() / np.abs(alone["logits"]).max()
        same = all(np.array_equal(ours[key], alone[key]) for key in ("greedy", "beams", "file"))
        failed += told(f"answers {name}", ANSWER_STEPS, worst, "ids equal" if same else "IDS DIFFER", began,
                       worst <= BAR and same)
    return failed


def main() -> int:
    """Runs everything; returns 0 if all bars hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=[*LAYOUTS, *OTHERS], default=[*LAYOUTS, *OTHERS],
                        help="what to run")
    parser.add_argument("--steps", type=int, default=20, help="steps to compare, in whole epochs of 7")
    parser.add_argument("--out", type=Path, help="where runs go (a temporary folder)")
    arguments = parser.parse_args()
    epochs = -(-arguments.steps // STEPS_AN_EPOCH)
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        if not (out / "start").is_dir():
            write_start(out / "start")
        trains = set(arguments.layouts) & {*LAYOUTS, "resume"}
        if trains and not (out / "single" / "model").is_dir():
            run(Layout(), out / "single", {**options_of(Layout(), epochs, 1000), **write_sources(out),
                                           "load_checkpoint": out / "start"})
        print(f"{'layout':14} {'steps':>5} {'loss, relative':>15} {'weights, relative':>18} {'seconds':>8}")
        failed = check_layouts(out, [name for name in arguments.layouts if name in LAYOUTS], epochs)
        if "resume" in arguments.layouts:
            failed += check_resume(out, epochs)
        if "preferences" in arguments.layouts:
            failed += check_preferences(out)
        if "rewards" in arguments.layouts:
            failed += check_rewards(out)
        if "extras" in arguments.layouts:
            failed += check_extras(out)
        if "inference" in arguments.layouts:
            failed += check_inference(out)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
