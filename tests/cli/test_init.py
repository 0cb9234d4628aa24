"""`mindformers init`: what it asks, what it refuses, and that the file it writes is a run's."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import mindformers_ixc_cli
from mindformers_ixc.cli.init_text import EPOCHS, epochs_for
from mindformers_ixc.cli.yaml_file import merged_fields, read_yaml, tie_data_section
from mindformers_ixc.config import CONFIG_FILE, ModelConfig
from mindformers_ixc.data import preview_data
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.resources import STARTER, resolve_model

DEMO = Path(mindformers_ixc_cli.__file__).parent / "mindformers_ixc" / "demo"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of four pictures with a table of eight questions, below the working directory."""
    monkeypatch.chdir(tmp_path)
    pictures = tmp_path / "my pictures"
    pictures.mkdir()
    lines = ["image,question,answer"]
    for colour in ("red", "green", "blue", "black"):
        Image.new("RGB", (30, 20), colour).save(pictures / f"{colour}.png")
        lines += [f"{colour}.png,Which colour is it?,{colour}", f"{colour}.png,Is it round?,no"]
    (pictures / "questions.csv").write_text("\n".join(lines), encoding="utf-8")
    return pictures


@pytest.fixture
def no_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)


def init(*words):
    """Runs the command in this process, without taking its standard output; returns what it printed there."""
    import io
    from argparse import Namespace

    from mindformers_ixc.cli.init import init as run

    arguments = mindformers_ixc_cli.parse(["init", *words])
    arguments = Namespace(**{**vars(arguments), "answers": io.StringIO()})
    assert run(arguments) == 0
    return arguments.answers.getvalue()


def test_a_folder_becomes_a_run_that_fits_it(folder, no_terminal):
    from mindformers_ixc.cli.run_config import check_fields

    said = init("--data", "my pictures", "--output", "mine")
    fields = read_yaml("mine.yaml")
    tie_data_section(fields)
    check_fields(fields, "mine.yaml")
    data, model = fields["train_dataset"], fields["model"]["model_config"]
    assert (fields["load_checkpoint"], fields["output_dir"], fields["run_mode"]) == (STARTER, "mine", "finetune")
    assert data["data_loader"]["dataset_dir"] == "my pictures/questions.csv"
    assert (data["seq_length"], data["max_tiles"]) == (model["seq_length"], model["max_tiles"])
    assert data["batch_size"] == fields["runner_config"]["batch_size"] == 4
    longest = int(said.split("the longest sample is ")[1].split()[0])
    assert longest <= data["seq_length"] < longest + 8
    assert "8 questions about 4 pictures" in said
    assert said.splitlines()[-3:] == [
        "    mindformers run --config mine.yaml",
        "    mindformers chat --model mine/model --image 'my pictures/red.png' 'Which colour is it?'",
        "    mindformers eval --model mine/model --data 'my pictures/questions.csv'"]


def test_of_much_data_some_is_read(folder, no_terminal, monkeypatch):
    monkeypatch.setattr(preview_data, "MEASURED", 5)
    said = init("--data", "my pictures", "--output", "mine")
    assert "8 samples; 5 of them, drawn by chance, were read: the longest sample is" in " ".join(said.split())
    assert "for my pictures/questions.csv: 8 samples." in Path("mine.yaml").read_text()
    fields = read_yaml("mine.yaml")
    assert fields["runner_config"]["batch_size"] == 4 and fields["runner_config"]["epochs"] == epochs_for(2)


def test_a_run_does_not_go_where_the_pictures_are(folder, no_terminal):
    folder.rename(folder.with_name("flags"))
    init("--data", "flags", "--output", "flags.yaml")
    assert read_yaml("flags.yaml")["output_dir"] == "flags_run"


def test_a_picture_without_a_question_is_named(folder, no_terminal):
    shutil.copy(folder / "red.png", folder / "more.png")
    assert "1 picture is in no question (more.png)." in init("--data", "my pictures")


@pytest.mark.parametrize(("steps", "epochs"), [(1, EPOCHS[1]), (12, 40), (25000, EPOCHS[0])])
def test_little_data_is_seen_more_often(steps, epochs):
    assert epochs_for(steps) == epochs


def test_questions_are_asked_until_the_answers_are_right(folder, monkeypatch, capsys):
    answers = iter(["gone", "my pictures", "", "toaster", "cpu", "asked"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    init()
    assert read_yaml("asked.yaml")["load_checkpoint"] == STARTER
    asked = capsys.readouterr().err
    assert "error: gone does not exist" in asked
    assert "error: 'toaster' is none of the choices CPU, GPU, Ascend." in asked
    assert next(answers, None) is None


def test_options_are_not_asked_for(folder, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked"))
    init("--data", "my pictures", "--model", STARTER, "--device", "CPU", "--output", "my.yaml")


def large_model(folder):
    """A directory whose config.json is that of a 7B model."""
    model = folder / "seven"
    model.mkdir()
    fields = {**ModelConfig().to_public_dict(), "model_type": ModelConfig.model_type}
    (model / CONFIG_FILE).write_text(json.dumps(fields), encoding="utf-8")
    shutil.copy(DEMO / "tokenizer.model", model)
    return model


def test_the_7b_model_takes_the_recipes_for_ascend(folder, no_terminal):
    from mindformers_ixc.cli.run_config import check_fields

    large_model(folder.parent)
    said = init("--data", "my pictures", "--model", "seven", "--devices", "16", "--memory", "32GB")
    fields = read_yaml("my.yaml")
    tie_data_section(fields)
    check_fields(fields, "my.yaml")
    assert fields["parallel_config"]["data_parallel"] == 4              # ixc25_sft_16.yaml's
    assert (fields["context"]["device_target"], fields["context"]["max_device_memory"]) == ("Ascend", "29GB")
    assert fields["train_dataset"]["tokenizer"]["vocab_file"] == "seven/tokenizer.model"
    assert "mindformers launch -n 16 --config my.yaml" in said


def test_a_quantised_model_is_none_to_begin_with(folder, no_terminal):
    from mindformers_ixc.checkpoint.quantise import quantize

    quantize(STARTER, "small")
    with pytest.raises(CheckpointError, match=r"small is quantised, and training needs full weights: .* --to hf"):
        init("--data", "my pictures", "--model", "small")
    assert not Path("my.yaml").exists()


def test_a_run_from_the_starter_says_so(folder, no_terminal):
    from mindformers_ixc.checkpoint.start import STARTER_LINE, Recipe, describe_start

    init("--data", "my pictures")
    arguments = mindformers_ixc_cli.parse(["run", "--config", "my.yaml"])
    start = merged_fields(arguments)["load_checkpoint"]
    assert start == str(resolve_model(STARTER))
    assert describe_start(start, Recipe(), []) == [STARTER_LINE]
    assert describe_start("out/model", Recipe(), []) == []


@pytest.mark.parametrize(("words", "message"), [
    ([], "needs --data"),
    (["--data", "gone"], "gone does not exist"),
    (["--data", "my pictures/red.png"], "is no data by the ending of its name"),
    (["--data", "my pictures", "--device", "tpu"], "'tpu' is none of the choices"),
    (["--data", "my pictures", "--model", "gone"], "gone does not exist; a model directory holds config.json"),
    (["--data", "my pictures", "--model", "seven", "--device", "CPU"], "give --device Ascend"),
    (["--data", "my pictures", "--model", "seven", "--devices", "12"], "'12' is none of the choices 8, 16, 64"),
    (["--data", "my pictures", "--device", "Ascend", "--memory", "32"], "--memory '32' is no size"),
    (["--data", "my pictures", "--output", "there.yaml"], "there.yaml is there already"),
    (["--data", "my pictures", "--output", "gone/my.yaml"], "is no folder"),
    (["--data", "my pictures", "--output", "a\nb: c"], "cannot be printed"),
    (["--data", "bare"], "has 1 pictures and no table of questions"),
    (["--data", "two"], "has 2 files that may be the data (a.csv, b.csv)"),
    (["--data", "sheet"], "save it as CSV"),
    (["--data", "broken"], "red.png"),
])
def test_what_is_refused_leaves_nothing(folder, no_terminal, words, message):
    top = folder.parent
    large_model(top)
    (top / "there.yaml").write_text("kept", encoding="utf-8")
    for name, files in {"bare": ["red.png"], "two": ["a.csv", "b.csv"], "sheet": ["a.xlsx"], "broken": []}.items():
        (top / name).mkdir()
        for file in files:
            shutil.copy(folder / "red.png", top / name / file)
    (top / "broken" / "questions.csv").write_text("image,question,answer\nred.png,What?,red", encoding="utf-8")
    (top / "broken" / "red.png").write_bytes(b"no picture")
    before = sorted(top.rglob("*"))
    with pytest.raises((ValueError, OSError)) as caught:
        init(*words)
    assert message in str(caught.value)
    assert sorted(top.rglob("*")) == before
    assert (top / "there.yaml").read_text(encoding="utf-8") == "kept"


def test_overwrite_replaces_the_file(folder, no_terminal):
    Path("my.yaml").write_text("old", encoding="utf-8")
    init("--data", "my pictures", "--overwrite")
    assert read_yaml("my.yaml")["output_dir"] == "my"


def test_a_sample_too_long_for_the_tiny_model_is_named(folder, no_terminal):
    with open(folder / "questions.csv", "a", encoding="utf-8") as table:
        table.write(f"\nred.png,Tell me more.,{'word ' * 2000}")
    with pytest.raises(ValueError, match=r"line 10.*positions long"):
        init("--data", "my pictures")


def test_mindspore_is_not_imported(folder):
    code = ("import sys, mindformers_ixc_cli as command; code = command.main(['init', '--data', 'my pictures']); "
            "sys.exit(code or 'mindspore' in sys.modules or 'mindformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("Reading my pictures/questions.csv")
