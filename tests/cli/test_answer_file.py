"""The answers of an evaluation: gone on from after a kill, and refused when they are of something else."""
from __future__ import annotations

import dataclasses
import importlib
import io
import json
from types import SimpleNamespace

import pytest

from mindformers_ixc.checkpoint.weights_mark import weights_mark
from mindformers_ixc.cli import evaluate as evaluate_module
from mindformers_ixc.cli.answer_file import AnswerFile, run_of
from mindformers_ixc.cli.evaluate import evaluate, score_line, worst_answers
from mindformers_ixc.data.questions import Question
from mindformers_ixc.errors import DataError
from mindformers_ixc.resources import resolve_model
from mindformers_ixc_cli import parse

QUESTIONS = [Question(f"s{i}", f"q{i}?", [], [f"pictures/{i}.jpg"], f"Answer {i}") for i in range(4)]
RUN = {"model": "m", "weights": "0123", "mode": "base", "hd_num": None}


def results(*answers):
    return [{"answer": answer} for answer in answers]


def test_every_answer_is_on_the_disk_once_it_is_there(tmp_path):
    path = tmp_path / "a.jsonl"
    with AnswerFile(str(path), QUESTIONS, RUN) as file:
        assert not path.exists()             # a model that does not load leaves nothing
        file.add(results("a", "b"))
        assert len(path.read_text().splitlines()) == 2
        file.add([{"error": "no picture"}])
        row = json.loads(path.read_text().splitlines()[-1])
    assert row == {"id": "s2", "question": "q2?", "images": ["pictures/2.jpg"], "expected": "Answer 2",
                   "error": "no picture", "run": RUN}


def test_an_interrupted_run_goes_on_behind_the_last_whole_line(tmp_path):
    path = tmp_path / "a.jsonl"
    with AnswerFile(str(path), QUESTIONS, RUN) as file:
        file.add(results("a", "b", "c"))
    whole = path.read_bytes()
    for cut in (whole[:-1], whole[:-20], whole[:whole.rfind(b"{")]):
        path.write_bytes(cut)
        with AnswerFile(str(path), QUESTIONS, RUN) as file:
            assert [row["answer"] for row in file.done] == ["a", "b"]
            file.add(results("c"))
            assert path.read_bytes() == whole
    path.write_bytes(whole[:10])
    with AnswerFile(str(path), QUESTIONS, RUN) as file:
        assert len(file.done) == 0
        file.add(results("a", "b", "c"))
    assert path.read_bytes() == whole


def test_answers_move_with_their_pictures_and_more_questions_may_follow(tmp_path):
    path = tmp_path / "a.jsonl"
    with AnswerFile(str(path), QUESTIONS[:2], RUN) as file:
        file.add(results("a", "b"))
    moved = [dataclasses.replace(one, images=[f"/elsewhere/{i}.jpg"]) for i, one in enumerate(QUESTIONS)]
    with AnswerFile(str(path), moved, {**RUN, "model": "renamed"}) as file:
        assert len(file.done) == 2


@pytest.mark.parametrize(("questions", "run", "words"), [
    (QUESTIONS, {**RUN, "mode": "web"}, r"line 1: an answer with other settings than .*: mode base \(now web\)"),
    (QUESTIONS, {**RUN, "hd_num": 6}, r"hd_num none \(now 6\); choose another file, or delete"),
    (QUESTIONS, {**RUN, "weights": "4567"}, r"of other weights or settings .*weights 0123 \(now 4567\)"),
    (QUESTIONS[:1], RUN, "line 2: the data has 1 questions only"),
    ([QUESTIONS[0], QUESTIONS[2]], RUN, "line 2: an answer to another question than number 2"),
    ([QUESTIONS[0], dataclasses.replace(QUESTIONS[1], expected="other")], RUN, "another question than number 2"),
    ([QUESTIONS[0], dataclasses.replace(QUESTIONS[1], images=["x.jpg"])], RUN, "another question than number 2")])
def test_answers_of_something_else_are_refused_and_kept(tmp_path, questions, run, words):
    path = tmp_path / "a.jsonl"
    with AnswerFile(str(path), QUESTIONS, RUN) as file:
        file.add(results("a", "b"))
    before = path.read_bytes()
    with pytest.raises(DataError, match=words):
        AnswerFile(str(path), questions, run)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [
    "a note", "a note\n", '[{"id": 1}]\n', "{}\n", '{"id": "s0", "answer": "a"}\n', "7\n", "\x00" * 9,
    '{"id": "s0", "question": "q0?", "images": ["0.jpg"], "expected": "Answer 0", "run": {"model": "m"}}\n'])
def test_other_files_are_refused_and_kept(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="choose another file"):
        AnswerFile(str(path), QUESTIONS, RUN)
    assert path.read_text() == content


def test_two_runs_never_write_one_file(tmp_path):
    path = str(tmp_path / "a.jsonl")
    with AnswerFile(path, QUESTIONS, RUN) as late, AnswerFile(path, QUESTIONS, RUN) as file:
        file.add(results("a"))
        with pytest.raises(OSError, match="Another eval is writing"):
            AnswerFile(path, QUESTIONS, RUN)
        with pytest.raises(OSError, match="has come into being meanwhile"):
            late.add(results("a"))
    with AnswerFile(path, QUESTIONS, RUN) as file:
        assert len(file.done) == 1


def test_the_mark_of_a_model_changes_with_its_weights_and_moves_with_its_digests(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"123")
    marks = [weights_mark(model)]
    (model / "model.safetensors").write_bytes(b"1234")
    marks.append(weights_mark(model))
    (model / "digests.json").write_text("one")
    marks.append(weights_mark(model))
    (model / "digests.json").write_text("other")
    marks.append(weights_mark(model))
    (model / "config.json").write_text("{ }")
    marks.append(weights_mark(model))
    assert len(set(marks)) == 5
    assert weights_mark(model.rename(tmp_path / "moved")) == marks[-1]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`eval` over three questions, answered by a stand-in; gives standard output and what was asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    turns = [[{"from": "user", "value": f"q{i}?"}, {"from": "assistant", "value": text}]
             for i, text in enumerate(["A cat", "100", "a tall rocket"])]
    (tmp_path / "data.json").write_text(json.dumps([{"id": f"s{i}", "conversations": one}
                                                    for i, one in enumerate(turns)]))
    answers = {"q0?": {"answer": "a cat"}, "q1?": {"answer": "103"}, "q2?": {"error": "too long"}}
    asked: list[str] = []

    def answer_questions(assistant, batch, size, mode, options):
        asked.extend(one["query"] for one in batch)
        return [answers[one["query"]] for one in batch]

    found = {"mindformers_ixc.cli.inference": SimpleNamespace(load_assistant=lambda _: None),
             "mindformers_ixc.generation.predict": SimpleNamespace(answer_questions=answer_questions)}
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: found.get(name) or real(name, *rest))

    def run(*words: str) -> tuple[list[str], list[str]]:
        asked.clear()
        arguments = parse(["eval", "--model", "model", "--data", "data.json", "--batch_size", "2", *words])
        arguments.answers = io.StringIO()
        assert evaluate(arguments) == 0
        return arguments.answers.getvalue().splitlines(), list(asked)

    return run


def test_the_last_line_is_the_exact_match_unless_metrics_says_otherwise(command):
    assert command()[0] == ["exact match: 0.0 % (0 of 3)"]
    assert command("--ignore_case")[0] == ["exact match (case ignored): 33.3 % (1 of 3)"]
    names = ("anls", "exact_match", "relaxed_accuracy")
    assert command("--metrics", *names)[0] == ["ANLS: 55.6 %", "exact match: 0.0 % (0 of 3)",
                                               "relaxed accuracy: 66.7 % (2 of 3)"]
    assert command("--metrics", "cider")[0][-1].startswith("CIDEr: ")


def test_what_is_answered_is_not_asked_again(command, tmp_path, capsys):
    path = tmp_path / "answers.jsonl"
    lines, asked = command("--predictions", "answers.jsonl")
    assert asked == ["q0?", "q1?", "q2?"]
    whole = path.read_bytes()
    path.write_bytes(whole[:whole.index(b"\n") + 5])
    capsys.readouterr()
    assert command("--predictions", "answers.jsonl") == (lines, ["q1?", "q2?"])
    assert "1 of 3 answers are in answers.jsonl already." in capsys.readouterr().err
    assert path.read_bytes() == whole
    assert command("--predictions", "answers.jsonl", "--metrics", "anls", "--ignore_case")[1] == []
    with pytest.raises(DataError, match="mode base"):
        command("--predictions", "answers.jsonl", "--mode", "web")


def test_the_worst_answers_are_shown_on_standard_error(command, capsys):
    command("--ignore_case")
    assert capsys.readouterr().err.splitlines()[-9:] == [
        "The 2 answers without full marks, the worst first:", "  sample s2", "    question  q2?",
        "    expected  a tall rocket", "    error     too long", "  sample s1", "    question  q1?",
        "    expected  100", "    answer    103"]
    command("--ignore_case", "--worst", "1")
    assert "The 1 worst of 2 answers without full marks:" in capsys.readouterr().err
    command("--worst", "0")
    assert "full marks" not in capsys.readouterr().err


def test_answers_are_scored_some_at_a_time(command, monkeypatch, tmp_path):
    names = ("--metrics", "cider", "exact_match", "anls", "relaxed_accuracy")
    lines, _ = command(*names)
    monkeypatch.setattr(evaluate_module, "TOGETHER", 1)
    assert command(*names, "--predictions", "a.jsonl")[0] == lines
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3


def test_only_the_questions_of_a_batch_are_read(tmp_path):
    given = iter(QUESTIONS)
    questions = SimpleNamespace(taken=0)

    class Counted:
        def __len__(self):
            return len(QUESTIONS)

        def __iter__(self):
            for question in given:
                questions.taken += 1
                yield question

    with AnswerFile(None, Counted(), RUN) as file:
        assert [one.sample for one in file.ahead(2)] == ["s0", "s1"] == [one.sample for one in file.ahead(2)]
        assert questions.taken == 2
        file.add(results("a", "b"))
        assert [one.sample for one in file.ahead(9)] == ["s2", "s3"]
        file.add(results("c", "d"))
        assert file.ahead(9) == [] and [row["answer"] for row in file.done] == ["a", "b", "c", "d"]


def test_worse_answers_come_first():
    rows = [{"id": str(i), "question": "q", "images": [], "expected": "a tall rocket", "answer": answer}
            for i, answer in enumerate(["a tall rocket", "a tall racket", "a small rocket", "", "zzz"])]
    text = worst_answers(rows, {"exact_match": [1.0, 0.0, 0.0, 0.0, 0.0]}, 9)
    order = [line.split()[1] for line in text.splitlines() if line.startswith("  sample")]
    assert order == ["3", "4", "2", "1"]
    assert "    answer    (empty)" in text
    assert worst_answers(rows[:1], {"exact_match": [1.0]}, 3) == "No answer is wrong."
    assert worst_answers(rows[:1], {"cider": [5.0]}, 3) == "No answer is wrong."
    assert "only answer without full marks" in worst_answers(rows[:2], {"exact_match": [1.0, 0.0]}, 3)
    odd = [{"id": "1", "question": "q\x1b[2J" + "x" * 500, "images": ["a.jpg"], "expected": "a", "answer": "b\nc"}]
    shown = worst_answers(odd, {"exact_match": [0.0]}, 1)
    assert "\x1b" not in shown
    assert "answer    b c" in shown
    assert max(map(len, shown.splitlines())) < 220


def test_a_score_is_one_line():
    assert score_line("cider", [10.0, 0.0], False) == "CIDEr: 500.0"
    assert score_line("anls", [0.5, 1.0], True) == "ANLS: 75.0 %"


def test_a_run_is_told_by_weights_and_settings(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    words = ["eval", "--model", str(tmp_path), "--data", "d"]
    runs = [run_of(parse([*words, *more])) for more in (
        [], ["--batch_size", "9"], ["--metrics", "anls"], ["--mode", "web"], ["--shuffle_images"], ["--hd_num", "3"],
        ["--exif", "apply"], ["--max_new_tokens", "5"])]
    assert runs[0] == runs[1] == runs[2]
    assert len({json.dumps(run) for run in runs}) == 6


def test_answers_of_the_shipped_model_are_known_by_its_weights(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = run_of(parse(["eval", "--model", "starter", "--data", "d"]))
    assert run["model"] == "starter" and run["weights"] == weights_mark(resolve_model("starter"))
