"""Files of requests: order, errors in their place, and runs that were interrupted."""
from __future__ import annotations

import json

import pytest
from random_model import make

from mindformers_ixc.errors import DataError
from mindformers_ixc.generation import predict as predicting
from mindformers_ixc.generation.predict import Predictions, predict, predict_run
from mindformers_ixc.generation.requests import read_requests

LINES = ['{"query": "a"}', '{"query": "b", "images": "gone.png"}', "{not json", '{"query": "c", "colour": 1}', "",
         '{"messages": [{"role": "user", "content": "d"}]}', '{"query": "e"}']


class Answering:
    """Stands for an assistant: answers with the question in capitals, counts batches and can be killed."""

    def __init__(self, die_after: int = 100):
        self.batches, self.die_after = [], die_after

    def encode(self, question):
        if question["images"]:
            raise FileNotFoundError(f"the picture {question['images'][0]} does not exist.")
        return question["query"]

    def answer_samples(self, samples, mode, **options):
        if len(self.batches) == self.die_after:
            raise KeyboardInterrupt
        self.batches.append(list(samples))
        return [sample.upper() for sample in samples]


@pytest.fixture
def requests(tmp_path):
    (tmp_path / "requests.jsonl").write_text("\n".join(LINES), encoding="utf-8")
    return read_requests(tmp_path / "requests.jsonl")


def answers(rows):
    return [row.get("answer") for row in rows]


def go(answering, requests, folder, run=None, size=2):
    return predict(lambda: answering, requests, folder, run or {"model": "m"}, size, "base", {})


def test_every_line_has_its_answer_or_its_error_in_order(tmp_path, requests):
    answering = Answering()
    rows = go(answering, requests, tmp_path)
    assert answers(rows) == ["A", None, None, None, "D", "E"]
    assert "gone.png" in rows[1]["error"]
    assert "requests.jsonl, line 3 is not valid JSON" in rows[2]["error"]
    assert "line 4: unknown key colour (value " in rows[3]["error"]
    assert rows[2]["request"] == "{not json"
    assert {len(batch) for batch in answering.batches} == {2}     # one batch size, one graph
    written = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert written == rows
    assert not (tmp_path / "predictions.part.jsonl").exists()


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, requests):
    with pytest.raises(KeyboardInterrupt):
        go(Answering(die_after=1), requests, tmp_path)
    part = tmp_path / "predictions.part.jsonl"
    assert not (tmp_path / "predictions.jsonl").exists()
    whole = len(part.read_text().splitlines())
    part.write_text(part.read_text() + '{"request": {"query"')     # killed while it wrote
    answering = Answering()
    rows = go(answering, requests, tmp_path)
    assert answers(rows) == ["A", None, None, None, "D", "E"]
    assert whole >= 2
    assert ["a", "a"] not in answering.batches                     # not answered again
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 6


def test_a_finished_run_answers_nothing_again(tmp_path, requests):
    first = go(Answering(), requests, tmp_path)
    assert go(None, requests, tmp_path) == first


@pytest.mark.parametrize("change", ["requests", "run"])
def test_answers_of_another_run_are_not_overwritten(tmp_path, requests, change):
    go(Answering(), requests, tmp_path)
    before = (tmp_path / "predictions.jsonl").read_bytes()
    with pytest.raises(DataError, match=r"predictions\.jsonl.*another"):
        if change == "requests":
            go(Answering(), requests[::-1], tmp_path)
        else:
            go(Answering(), requests, tmp_path, {"model": "other"})
    assert (tmp_path / "predictions.jsonl").read_bytes() == before


def test_other_weights_of_the_same_name_are_another_run(tmp_path):
    make(tmp_path / "model")
    make(tmp_path / "reward")
    options = {"best_of": 2, "reward": str(tmp_path / "reward")}
    before = predict_run(tmp_path / "model", options)
    assert predict_run(tmp_path / "model", options) == before
    for name in ("model", "reward"):
        file = tmp_path / name / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        after = predict_run(tmp_path / "model", options)
        assert after != before
        before = after


def test_a_run_that_failed_before_its_first_answer_leaves_nothing_of_itself(tmp_path, requests):
    def fails():
        raise OSError("no such model")

    with pytest.raises(OSError, match="no such model"):
        predict(fails, requests, tmp_path, {"model": "typo"}, 2, "base", {})
    done = Predictions(tmp_path, requests, {"model": "right"})
    done.add([{"answer": "x"}] * len(requests))
    done.close()
    assert Predictions(tmp_path, requests, {"model": "right"}).finished


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no requests"):
        read_requests(tmp_path / "none.jsonl")


def test_of_parallel_processes_one_writes_and_all_know_the_answers(tmp_path, requests, monkeypatch):
    monkeypatch.setattr(predicting, "rank", lambda: 1)
    assert answers(go(Answering(), requests, tmp_path)) == ["A", None, None, None, "D", "E"]
    assert not list(tmp_path.glob("predictions*"))
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        go(Answering(1), requests, tmp_path)
    with open(tmp_path / "predictions.part.jsonl", "a", encoding="utf-8") as file:
        file.write('{"half')
    left = (tmp_path / "predictions.part.jsonl").read_bytes()
    monkeypatch.setattr(predicting, "rank", lambda: 1)
    answering = Answering()
    assert answers(go(answering, requests, tmp_path)) == ["A", None, None, None, "D", "E"]
    assert answering.batches == [["d", "e"]]          # what is there already is not asked again
    assert (tmp_path / "predictions.part.jsonl").read_bytes() == left
