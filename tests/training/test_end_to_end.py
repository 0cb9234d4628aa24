"""The whole path as a user walks it: train the tiny YAML, then ask, evaluate, load and fine-tune the result."""
from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from mindformers_ixc.demo import demo_path

ROOT = Path(__file__).parents[2]
CAT, RECEIPT, ROCKET = (str(demo_path(f"images/{name}")) for name in ("cat.jpg", "receipt.png", "rocket.jpg"))


def mindformers(*words, cwd, check=True):
    """Runs the command as installed beside this interpreter; gives (standard output, standard error)."""
    command = [str(Path(sys.executable).parent / "mindformers"), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(Folder, standard error) of a full run of the tiny YAML, started in an unrelated working directory."""
    folder = tmp_path_factory.mktemp("run")
    config = ROOT / "yaml_configs" / "ixc25_sft_tiny.yaml"
    output, errors = mindformers("run", "--config", config, "--output_dir", "out", cwd=folder)
    assert output == ""
    return folder, errors


def exact_match(output: str) -> float:
    return float(re.fullmatch(r"exact match: ([\d.]+) % \(\d+ of \d+\)", output.splitlines()[-1])[1])


def losses_of(output: Path) -> list[float]:
    """The loss of every step of a run."""
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
class TestTinyRun:
    def test_loss_falls_below_five_percent_of_its_start(self, trained):
        losses = losses_of(trained[0] / "out")
        assert losses[-1] < 0.05 * losses[0]
        line = rf"^step \d+/{len(losses)}: loss ([\d.]+)"
        shown = [float(value) for value in re.findall(line, trained[1], re.MULTILINE)]
        assert len(shown) >= 10 and shown[-1] == pytest.approx(losses[-1], abs=1e-4)

    def test_says_where_the_model_is_and_what_to_type_next(self, trained):
        folder, errors = trained
        lines = errors.strip().splitlines()
        assert "out/model" in lines[-2] and str(folder) not in lines[-2]
        assert lines[-1].strip().startswith("mindformers chat --model")
        assert sorted(path.name for path in (folder / "out" / "model").iterdir()) == [
            "config.json", "digests.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"]

    def test_chat_prints_the_trained_answer_and_nothing_else(self, trained):
        output, _ = mindformers("chat", "--model", "out/model", "--image", ROCKET, "What is shown in the picture?",
                                cwd=trained[0])
        assert output == "a tall rocket\n"

    def test_exact_match_needs_the_right_picture(self, trained):
        words = ("eval", "--model", "out/model", "--data", demo_path("train.json"))
        output, _ = mindformers(*words, "--predictions", "answers.jsonl", cwd=trained[0])
        assert exact_match(output) >= 90
        rows = [json.loads(line) for line in (trained[0] / "answers.jsonl").read_text().splitlines()]
        assert len(rows) == 56
        shuffled, _ = mindformers(*words, "--shuffle_images", cwd=trained[0])
        assert exact_match(shuffled) <= 50

    def test_interactive_chat_keeps_the_conversation(self, trained):
        command = [str(Path(sys.executable).parent / "mindformers"), "chat", "--model", "out/model", "--max_new_tokens",
                   "12"]
        lines = f"/image {CAT}\nWhat is shown in the picture?\n/nonsense\n/new\n/image none.png\n/quit\n"
        done = subprocess.run(command, cwd=trained[0], input=lines, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0
        assert done.stdout == "the face of a cat\n"
        assert "/nonsense is no command" in done.stderr
        assert "none.png" in done.stderr

    def test_finetune_starts_from_the_model_directory(self, trained):
        mindformers(
            "run", "--config", ROOT / "yaml_configs" / "ixc25_sft_tiny.yaml", "--run_mode", "finetune",
            "--load_checkpoint", "out/model", "--output_dir", "again", "--runner_config.epochs", "1",
            "--lr_schedule.learning_rate", "1e-6", cwd=trained[0])
        assert losses_of(trained[0] / "again")[0] < 0.5
        before, after = (load_file(trained[0] / name / "model" / "model.safetensors") for name in ("out", "again"))
        assert before.keys() == after.keys()
        name = "model.layers.0.attention.wqkv.weight"
        assert 0 < abs(after[name] - before[name]).max() < 1e-3

    def test_predict_answers_a_file_of_questions(self, trained):
        questions = [{"query": "What is shown in the picture?", "images": [CAT]},
                     {"query": "What is shown in the picture?", "images": RECEIPT}]
        (trained[0] / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
        mindformers("run", "--config", ROOT / "yaml_configs" / "predict_ixc25.yaml", "--load_checkpoint", "out/model",
                    "--predict_data", "questions.jsonl", "--output_dir", "answers", cwd=trained[0])
        rows = [json.loads(line) for line in (trained[0] / "answers" / "predictions.jsonl").read_text().splitlines()]
        assert [row["answer"] for row in rows] == ["the face of a cat", "a receipt"]

    def test_pipeline_from_the_directory(self, trained):
        from mindformers import pipeline

        chat = pipeline("multimodal_chat", model=str(trained[0] / "out" / "model"), device_target="CPU", mode=0,
                        max_new_tokens=16)
        assert chat({"query": "What is shown in the picture?", "images": [CAT]}) == [
            {"text_generation_text": "the face of a cat"}]
        two = chat([{"query": "What would be a good title?", "images": [ROCKET]},
                    {"query": "What would be a good title?", "images": [RECEIPT]}])
        assert [row["text_generation_text"] for row in two] == ["Before the Launch", "Lunch for Two"]


# Trackers that are here; of MLflow alembic makes the tables, which the small mlflow-skinny does not bring.
TRACKERS = [name for name, needs in (("wandb", "wandb"), ("swanlab", "swanlab"), ("mlflow", "alembic"))
            if importlib.util.find_spec(name) and importlib.util.find_spec(needs)]


@pytest.fixture(scope="module")
def pet_run(tmp_path_factory):
    """Output folder of a short run with PET, an evaluation and, offline, every tracker that is here."""
    folder = tmp_path_factory.mktemp("pet")
    pet = "{pet_type: lora, lora_rank: 2, lora_alpha: 4, lora_dropout: 0.0, target_modules: '.*wqkv'}"
    evaluation = f"{{dataset_dir: {demo_path('train.json')}, metrics: [loss], max_samples: 4}}"
    words = [word for place, name in enumerate(TRACKERS, 2) for key, value in
             (("type", "IXC25Tracker"), ("tracker", name), ("mode", "offline"))
             for word in (f"--callbacks.{place}.{key}", value)]
    output, _ = mindformers("run", "--config", ROOT / "yaml_configs" / "ixc25_sft_tiny.yaml", "--output_dir", "out",
                            "--epochs", 1, "--model.model_config.pet_config", pet, "--evaluation", evaluation, *words,
                            cwd=folder)
    assert output == ""
    return folder / "out"


@pytest.mark.slow
def test_a_pet_run_leaves_its_model_and_the_trained_parts(pet_run):
    parts = load_file(pet_run / "trained_parts" / "adapter_model.safetensors")
    whole = load_file(pet_run / "model" / "model.safetensors")
    assert len(parts) == 2 * 4 and len(whole) > len(parts)
    assert all(".wqkv.lora_" in name for name in parts) and not any("mindpet" in name for name in whole)
    rows = [json.loads(line) for line in (pet_run / "evaluations.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and 0 < rows[0]["loss"] < 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "swanlab", "mlflow"])
def test_a_tracker_has_every_row_and_evaluation_of_a_run(pet_run, name):
    if name not in TRACKERS:
        pytest.skip(f"{name} is not installed")
    identity = json.loads((pet_run / "tracker.json").read_text())[name]
    if name == "mlflow":
        with sqlite3.connect(pet_run / "mlflow.db") as database:
            kept = dict(database.execute("select step, value from metrics where key = 'loss'").fetchall())
            evaluated, = database.execute("select value from metrics where key = 'evaluation/loss'").fetchall()
        assert [kept[step] for step in sorted(kept)] == losses_of(pet_run)
        assert evaluated[0] == json.loads((pet_run / "evaluations.jsonl").read_text())["loss"]
    else:
        file, = pet_run.glob(f"*/*run-*/*{identity}.{name}")
        content = file.read_bytes()
        assert b"evaluation/loss" in content and content.count(b"goodput") >= len(losses_of(pet_run))


BAD_DATA = [
    ('{"id": 1}', "JSON list"),
    ('[{"id": "a", "image": "gone.png", "conversations": [{"from": "human", "value": "q"}, '
     '{"from": "bot", "value": "a"}]}]', "gone.png"),
    ('[{"id": "a", "conversations": [{"from": "bot", "value": "a"}, {"from": "human", "value": "q"}]}]', "alternate"),
    ('[{"id": "a", "conversations": [{"from": "human", "value": "<ImageHere> q"}, {"from": "bot", "value": "a"}]}]',
     "<ImageHere>"),
]


@pytest.mark.parametrize(("text", "word"), BAD_DATA)
def test_bad_data_ends_in_one_sentence_and_leaves_no_model(tmp_path, text, word):
    (tmp_path / "bad.json").write_text(text)
    _, errors = mindformers("run", "--config", ROOT / "yaml_configs" / "ixc25_sft_tiny.yaml", "--output_dir", "out",
                            "--train_dataset_dir", "bad.json", cwd=tmp_path, check=False)
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert word in last
    assert "bad.json" in last
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.slow
def test_damaged_pictures_found_while_training_end_in_one_sentence(tmp_path):
    shutil.copytree(demo_path("images"), tmp_path / "images")
    shutil.copy(demo_path("train.json"), tmp_path / "train.json")
    (tmp_path / "images" / "cat.jpg").write_bytes(Path(CAT).read_bytes()[:9000])   # the header is whole
    _, errors = mindformers("run", "--config", ROOT / "yaml_configs" / "ixc25_sft_tiny.yaml", "--output_dir", "out",
                            "--train_dataset_dir", "train.json", cwd=tmp_path, check=False)
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "damaged" in last
    assert "cat.jpg" in last
    assert not (tmp_path / "out" / "model").exists()


def test_vocabulary_larger_than_the_models(tmp_path):
    _, errors = mindformers("run", "--config", ROOT / "yaml_configs" / "ixc25_sft_tiny.yaml", "--output_dir", "out",
                            "--model.model_config.vocab_size", "1000", cwd=tmp_path, check=False)
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "1024 pieces" in last
    assert "vocab_size 1000" in last


def test_sections_that_contradict_each_other(tmp_path):
    _, errors = mindformers("run", "--config", ROOT / "yaml_configs" / "ixc25_sft_tiny.yaml", "--output_dir", "out",
                            "--train_dataset.seq_length", "128", cwd=tmp_path, check=False)
    last = errors.strip().splitlines()[-1]
    assert "seq_length 160" in last
    assert "seq_length 128" in last
