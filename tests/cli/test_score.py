"""`mindformers score`: lines of every form, what is wrong with some, resuming, and the sentences at once."""
from __future__ import annotations

import json

import pytest
from PIL import Image
from random_model import make
from reward_model import make_reward_model

from mindformers_ixc.cli.inference import load_best_of
from mindformers_ixc.errors import PromptError
from mindformers_ixc.generation.judged_requests import read_judged
from mindformers_ixc_cli import main

LINES = [
    {"query": "What is shown?", "images": ["red.png"], "answer": "Red."},
    {"query": "What is shown?", "images": ["red.png"], "answers": ["Red.", "Blue."]},
    {"messages": [{"role": "user", "content": "What is shown?"},
                  {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}], "images": ["red.png"]},
    {"request": {"query": "Hello"}, "answer": "Hello.", "samples": [], "score": 3},
    {"query": "a <ImageHere>", "answer": "b"},
    {"query": "no answer"},
]


PREDICT = ["run", "--config", "predict_ixc25", "--predict_data", "answers.jsonl", "--output_dir", "o"]
TRAIN = ["run", "--config", "ixc25_reward_tiny", "--load_checkpoint", "starter", "--output_dir", "o"]


@pytest.fixture(autouse=True)
def logs_as_they_are(monkeypatch):
    """What quietens MindFormers in this process would do so for all tests that come after."""
    monkeypatch.setattr("mindformers_ixc.cli.inference.quiet_mindformers", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    make_reward_model(folder / "model")
    make_reward_model(folder / "by_weights", said="nothing")
    make(folder / "writer")
    Image.new("RGB", (90, 50), (200, 10, 10)).save(folder / "red.png")
    lines = [json.dumps(line).replace("red.png", str(folder / "red.png")) for line in LINES]
    (folder / "answers.jsonl").write_text("\n".join(lines) + "\nno json\n", encoding="utf-8")
    return folder


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_line_gets_its_scores_or_its_error(folder, monkeypatch, capsys):
    monkeypatch.setenv("LOG_MF_PATH", str(folder / "log"))
    words = ["score", "--model", str(folder / "model"), "--data", str(folder / "answers.jsonl"), "--output_dir",
             str(folder / "out"), "--batch_size", "2"]
    assert main(words) == 0
    found = rows(folder / "out" / "scores.jsonl")
    one, several, messages, predicted, no_place, no_answer, no_json = found
    assert one["score"] == pytest.approx(several["scores"][0], abs=1e-5) == pytest.approx(messages["score"], abs=1e-5)
    assert several["scores"][0] != several["scores"][1] and isinstance(predicted["score"], float)
    assert "1 <ImageHere> for 0 pictures" in no_place["error"] or "<ImageHere>" in no_place["error"]
    assert "line 6: a line needs 'answer'" in no_answer["error"] and "line 7" in no_json["error"]
    assert "answers.jsonl, line 5: the questions have 1 <ImageHere>" in capsys.readouterr().err
    assert [row["request"] for row in found[:1]] == [json.loads((folder / "answers.jsonl").read_text().split("\n")[0])]

    # stopped after three lines, with half of the fourth, it goes on with the fourth and ends alike
    text = (folder / "out" / "scores.jsonl").read_text(encoding="utf-8")
    kept = "".join(text.splitlines(keepends=True)[:3])
    (folder / "out" / "scores.jsonl").unlink()
    (folder / "out" / "scores.part.jsonl").write_text(kept + '{"requ', encoding="utf-8")
    assert main(words) == 0
    again = rows(folder / "out" / "scores.jsonl")
    assert again[:3] == found[:3] and again[3]["score"] == pytest.approx(predicted["score"], abs=1e-5)
    assert main([*words, "--hd_num", "1"]) == 1
    assert "of another model or other options" in capsys.readouterr().err


def test_without_a_folder_scores_go_to_standard_output(folder, capfd):
    (folder / "two.jsonl").write_text("\n".join(json.dumps({"query": "Hello", "answer": text}) for text in "ab"),
                                      encoding="utf-8")
    assert main(["score", "--model", str(folder / "model"), "--data", str(folder / "two.jsonl")]) == 0
    printed = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["request"]["answer"] for row in printed] == ["a", "b"]


@pytest.mark.parametrize(("words", "message"), [
    (["score", "--model", "writer", "--data", "answers.jsonl"], "writer is a model that writes answers"),
    (["chat", "--model", "model", "Hello"], "model is a reward model"),
    (["eval", "--model", "model", "--data", "answers.jsonl"], "model is a reward model"),
    (["score", "--model", "model", "--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    (["score", "--model", "model", "--data", "answers.jsonl", "--batch_size", "0"], "--batch_size is 0"),
    (["score", "--model", "model", "--data", "answers.jsonl", "--output_dir", ""], "--output_dir is empty"),
    (["score", "--model", "model", "--data", "answers.jsonl", "--output_dir", "red.png/o"], "red.png is no folder"),
    (["chat", "--model", "starter", "--best_of", "2", "--temperature", "0", "Hello"], "best_of is 2 and temperature"),
    (["chat", "--model", "starter", "--best_of", "1", "Hello"], "best_of is 1; it must be a whole number"),
    (["chat", "--model", "starter", "--reward", "model", "Hello"], "best_of is not said"),
    (["chat", "--model", "starter", "--best_of", "2", "--reward", "writer", "Hello"], "writer is a model that writes"),
    (["chat", "--model", "starter", "--best_of", "2", "--num_beams", "3", "Hello"], "num_beams is 3"),
    (["run", "--config", "ixc25_sft_tiny", "--load_checkpoint", "model", "--output_dir", "o"], "is a reward model"),
    ([*PREDICT, "--load_checkpoint", "by_weights"], "by_weights is a reward model"),
    ([*PREDICT, "--load_checkpoint", "starter", "--generation.best_of", "2", "--generation.reward", "writer"],
     "writer is a model that writes answers"),
    ([*PREDICT, "--load_checkpoint", "starter", "--generation.best_of", "2", "--generation.reward", "nowhere"],
     "nowhere does not exist"),
    ([*PREDICT, "--load_checkpoint", "starter", "--generation.best_of", "1"], "best_of is 1"),
    ([*TRAIN, "--train_dataset.data_loader.dataset_dir", "equal.json"], "sample 0 (id 7): chosen equals rejected"),
    ([*TRAIN, "--evaluation.dataset_dir", "equal.json"], "sample 0 (id 7): chosen equals rejected"),
    ([*TRAIN, "--evaluation.metrics", "[exact_match]"], "evaluation.metrics has 'exact_match'; the choices are loss"),
])
def test_the_other_kind_of_model_is_named_at_once(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    (folder / "writer" / "tokenizer.model").write_bytes((folder / "model" / "tokenizer.model").read_bytes())
    pair = {"id": 7, "prompt": "What?", "chosen": "yes", "rejected": "yes "}
    (folder / "equal.json").write_text(json.dumps([pair]), encoding="utf-8")
    assert main(words) == 1
    assert message in capsys.readouterr().err and not (folder / "o").exists()


@pytest.mark.parametrize(("line", "message"), [
    ("text", "must be an object with a question and 'answer'"),
    ({"request": {"query": "a"}, "error": "it failed"}, "holds an error in place of an answer"),
    ({"query": "a", "answer": "b", "answers": ["c"]}, "found both"),
    ({"query": "a", "answers": []}, "answers must be a list of at least one text, found \\[\\]"),
    ({"query": "a", "answers": "bcd"}, "answers must be a list of at least one text, found 'bcd'"),
    ({"query": "a"}, "needs 'answer' with a text"),
    ({"query": "a", "answer": 5}, "answer must be a text"),
    ({"query": "a", "answer": "b", "anwser": "c"}, "unknown key anwser"),
])
def test_what_is_wrong_with_a_line_is_said(line, message):
    with pytest.raises(PromptError, match=message):
        read_judged(line)


def test_best_of_knows_a_reward_model_by_its_weights_which_reads_as_the_assistant_does(folder, monkeypatch):
    made = []

    def kept(arguments, assistant):
        made.append(load_best_of(arguments, assistant))
        return made[0]

    monkeypatch.setattr("mindformers_ixc.cli.inference.load_best_of", kept)
    words = ["--best_of", "2", "--reward", str(folder / "by_weights"), "--max_new_tokens", "2", "--seed", "0",
             "--control_tokens", "--transparency", "public", "--exif", "apply", "Hello"]
    assert main(["chat", "--model", "starter", *words]) == 0
    assistant, judge = made[0].assistant.processor, made[0].scorer.processor
    assert judge.control_tokens and assistant.control_tokens
    for one in (assistant.image_processor, judge.image_processor):
        assert (one.transparency, one.exif) == ("public", "apply")
