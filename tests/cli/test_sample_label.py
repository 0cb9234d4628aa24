"""`mindformers sample` and `label`: samples that a killed run goes on from, pairs by a reward model and by a judge."""
from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from random_model import save
from reward_model import make_reward_model
from safetensors.numpy import load_file

from mindformers_ixc.cli.label import to_be_scored
from mindformers_ixc.data.preferences import load_preferences
from mindformers_ixc.generation.sampled_answers import SampledPrompt
from mindformers_ixc_cli import main

PROMPTS = [{"id": "shown", "query": "What is shown in the picture?", "images": ["red.png"]},
           {"query": "Which colour is it?", "images": ["red.png"]}, {"query": "a <ImageHere>"},
           {"id": "again", "query": "What is shown in the picture?", "images": ["red.png"]}]
SAMPLE = ["sample", "--model", "starter", "--data", "q.jsonl", "--output_dir", "samples", "--num_samples", "4",
          "--max_new_tokens", "12", "--temperature", "2"]
LABEL = ["label", "samples/samples.jsonl", "pairs.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts with their samples, a reward model, and one whose head is no number."""
    folder = tmp_path_factory.mktemp("loop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mindformers_ixc.cli.inference.quiet_mindformers", lambda: None)
        patch.chdir(folder)
        make_reward_model(folder / "reward")
        damaged = make_reward_model(folder / "damaged")
        arrays = load_file(damaged / "model.safetensors")
        save(damaged / "model.safetensors", {**arrays, "v_head.weight": arrays["v_head.weight"] * np.nan})
        Image.new("RGB", (90, 50), (200, 10, 10)).save("red.png")
        (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS), encoding="utf-8")
        assert main(SAMPLE) == 0
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    """Commands are typed there; what quietens MindFormers in this process would do so for all later tests."""
    monkeypatch.setattr("mindformers_ixc.cli.inference.quiet_mindformers", lambda: None)
    monkeypatch.chdir(folder)


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_prompt_has_its_samples_or_its_error(folder):
    shown, colour, refused, again = rows(folder / "samples" / "samples.jsonl")
    assert [row["id"] for row in (shown, colour, refused, again)] == ["shown", 2, 3, "again"]
    assert shown["request"] == PROMPTS[0] and "1 <ImageHere> for 0 pictures" in refused["error"]
    for row in (shown, colour):
        assert len(row["samples"]) == 4 and len({one["answer"] for one in row["samples"]}) > 1
        assert all(one["logp"] < 0 and 1 <= one["tokens"] <= 12 for one in row["samples"])
        assert all(one["finished"] or one["tokens"] == 12 for one in row["samples"])
    # a prompt's id has a part in the random numbers, or all prompts would share them
    assert [one["answer"] for one in again["samples"]] != [one["answer"] for one in shown["samples"]]


def test_a_killed_run_goes_on_and_other_options_are_refused(folder, capsys):
    file = folder / "samples" / "samples.jsonl"
    text = file.read_text(encoding="utf-8")
    file.unlink()
    file.with_suffix(".part.jsonl").write_text(text.splitlines(keepends=True)[0] + '{"requ', encoding="utf-8")
    try:
        assert main(SAMPLE) == 0
        again = rows(file)
    finally:
        file.write_text(text, encoding="utf-8")
    assert [[one["answer"] for one in row.get("samples", ())] for row in again] == \
        [[one["answer"] for one in json.loads(line).get("samples", ())] for line in text.splitlines()]
    assert main([*SAMPLE, "--seed", "1"]) == 1
    assert "holds answers of another model or other options" in capsys.readouterr().err


def test_a_reward_model_makes_pairs_and_its_scores_serve_again(folder, capsys, monkeypatch):
    assert main([*LABEL, "--reward", "reward"]) == 0
    said = capsys.readouterr().err
    assert "2 pairs of 4 prompts." in said and "Left out: 1 that ask what an earlier prompt asks." in said
    pairs = load_preferences("pairs.json")
    assert [pair.images[0].name for pair in pairs] == ["red.png", "red.png"]
    (scored, *_), found = rows(folder / "pairs.scores.jsonl"), json.loads((folder / "pairs.json").read_text())
    best, worst = (scored["request"]["answers"][int(pick(scored["scores"]))] for pick in (np.argmax, np.argmin))
    assert (found[0]["chosen"], found[0]["rejected"]) == (best, worst)
    assert found[0]["metadata"]["margin"] == pytest.approx(max(scored["scores"]) - min(scored["scores"]))

    # another limit asks for no score again: the model is not even loaded
    monkeypatch.setattr("mindformers_ixc.cli.inference.load_scorer", None)
    before = (folder / "pairs.json").read_bytes()
    assert main([*LABEL, "--reward", "reward", "--min_margin", "1000"]) == 1
    assert "gives no pair, so pairs.json is not written" in capsys.readouterr().err
    assert (folder / "pairs.json").read_bytes() == before


def test_a_judge_makes_pairs_without_any_model(folder, capsys):
    answers = [one["answer"] for one in rows(folder / "samples" / "samples.jsonl")[0]["samples"]]
    whole = [number for number in range(4) if answers[number] != answers[0]]
    (folder / "judge.json").write_text(json.dumps({"shown": {"preferred": 0, "rejected": whole[0]}}), encoding="utf-8")
    (folder / "scores.jsonl").write_text('{"id": 2, "ranks": [1, 2, 3, 4]}\n', encoding="utf-8")
    for judge in ("judge.json", "scores.jsonl"):
        main(["label", "samples/samples.jsonl", "judged.jsonl", "--judge", judge])
        assert "4 prompts" in capsys.readouterr().err
    assert [pair.id for pair in load_preferences("judged.jsonl")] == [2]


def test_the_reward_model_does_not_cut_pictures_by_a_requests_limit():
    prompt = SampledPrompt("a", {}, {"query": "q", "images": [], "hd_num": 2}, ["x", "y"], [True, True])
    request = to_be_scored(prompt)
    assert request.question == {"query": "q", "images": [], "answers": ["x", "y"], "several": True}
    assert request.where == "prompt 'a'"


def test_scores_that_are_no_numbers_write_nothing(folder, capsys):
    assert main(["label", "samples/samples.jsonl", "never.json", "--reward", "damaged"]) == 1
    said = capsys.readouterr().err
    assert "which is no finite number; the reward model's weights are damaged" in said
    assert "damaged gave none of 3 prompts' answers a score, so never.json is not written" in said
    assert not (folder / "never.json").exists()


@pytest.mark.parametrize(("words", "message"), [
    ([*SAMPLE, "--num_samples", "1"], "--num_samples is 1; it must be a whole number of at least 2"),
    ([*SAMPLE, "--temperature", "0"], "--temperature is 0.0; at less than 1e-05 all samples would be the likeliest"),
    ([*SAMPLE, "--output_dir", ""], "--output_dir is empty; name a folder"),
    ([*SAMPLE, "--model", "reward"], "reward is a reward model"),
    ([*SAMPLE, "--data", "empty.jsonl"], "empty.jsonl holds no requests"),
    ([*SAMPLE, "--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ([*LABEL, "--reward", "starter"], "starter is a model that writes answers"),
    ([*LABEL, "--reward", "samples"], "config.json"),
    ([*LABEL, "--judge", "unknown.json"], "unknown.json judges 1 prompts that are not among the samples: the ids lost"),
    ([*LABEL, "--judge", "alike.json"], "the preferred answer, sample 1, equals the rejected one, sample 1"),
    (["label", "q.jsonl", "pairs.json", "--judge", "alike.json"], "q.jsonl, line 1: no line of `mindformers sample`"),
    (["label", "empty.jsonl", "pairs.json", "--judge", "alike.json"], "empty.jsonl holds no samples"),
    (["label", "nowhere.jsonl", "pairs.json", "--judge", "alike.json"], "nowhere.jsonl does not exist"),
    (["label", "q.jsonl", "pairs.csv", "--judge", "alike.json"], "pairs.csv; a file of pairs ends in .json or .jsonl"),
    (["label", "q.jsonl", "q.jsonl", "--judge", "alike.json"], "DST is q.jsonl, which the pairs are made of"),
    (["label", "q.jsonl", "no/pairs.json", "--judge", "alike.json"], "DST no/pairs.json cannot be written"),
    (["label", "some.scores.jsonl", "some.json", "--reward", "reward"], "SAMPLES is some.scores.jsonl, which is where"),
    ([*SAMPLE, "--data", "samples/samples.jsonl"], "--data is samples/samples.jsonl, which this command writes"),
    ([*LABEL, "--judge", "alike.json", "--min_margin", "-1"], "--min_margin is -1.0; it must be a number of at least"),
    ([*LABEL, "--judge", "alike.json", "--max_length_ratio", "0"], "--max_length_ratio is 0.0; it must be a number"),
])
def test_bad_input_is_a_sentence_and_writes_nothing(folder, capsys, words, message):
    (folder / "some.scores.jsonl").write_text("{}", encoding="utf-8")
    (folder / "empty.jsonl").write_text("\n", encoding="utf-8")
    (folder / "unknown.json").write_text('{"lost": [1, 2, 3, 4]}', encoding="utf-8")
    (folder / "alike.json").write_text('{"shown": {"preferred": 1, "rejected": 1}}', encoding="utf-8")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(words) == 1
    assert message in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
