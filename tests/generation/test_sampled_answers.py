"""Files of samples: the prompts they are made of, their lines, and the answers that can be learnt from."""
from __future__ import annotations

import json

import pytest

from mindformers_ixc.errors import DataError, PromptError
from mindformers_ixc.generation.sampled_answers import SampledPrompt, read_prompt, read_prompts, read_samples


def lines(path, *rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def line(**more) -> dict:
    return {"request": {"query": "a"}, "samples": [{"answer": "x"}, {"answer": "y"}], **more}


def test_prompts_have_their_own_id_or_their_number(tmp_path):
    path = lines(tmp_path / "q.jsonl", {"query": "a"}, {"id": "own", "query": "b"}, "no json",
                 {"id": 9, "messages": [{"role": "user", "content": "c"}]})
    requests = read_prompts(path)
    assert [one.question and one.question["id"] for one in requests] == [1, "own", None, 9]
    assert requests[3].question["query"] == "c" and "line 3 is not valid JSON" in requests[2].error
    assert requests[1].line == {"id": "own", "query": "b"}


@pytest.mark.parametrize("identity", ["", " ", 1.5, True, None, [1]])
def test_an_id_is_a_text_or_a_whole_number(identity):
    with pytest.raises(PromptError, match="id must be a text that is not empty or a whole number"):
        read_prompt({"query": "a", "id": identity})


def test_an_id_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="two prompts with the id '2'; a prompt without an id has its number"):
        read_prompts(lines(tmp_path / "q.jsonl", {"query": "a"}, {"query": "b"}, {"id": "2", "query": "c"}))


def test_lines_of_sample_and_of_best_of_are_read(tmp_path):
    path = lines(tmp_path / "s.jsonl", line(id="own"), line(answer="y", logp=-1.0, score=2.0),
                 {"request": "no json", "error": "line 3 is not valid JSON"})
    first, second, failed = read_samples(path)
    assert (first.id, second.id, failed.id) == ("own", 2, 3)
    assert first.answers == ["x", "y"] and first.question["query"] == "a" and not failed.answers


@pytest.mark.parametrize(("row", "message"), [
    ({"query": "a", "answer": "b"}, "line 2: no line of `mindformers sample`.*found query, answer"),
    ([1], "line 2: no line of `mindformers sample`.*found list"),
    (line(error="both"), "no line of `mindformers sample`"),
    (line(samples=[{"answer": "x"}]), "samples has 1; of fewer than 2 none is better"),
    (line(samples=["x", "y"]), "samples must be a list of objects with a text 'answer'"),
    (line(id=[]), "id must be a text"),
    (line(request={"text": "a"}), "line 2, request: unknown key text"),
    ("{", "line 2 is not valid JSON"),
])
def test_a_file_of_another_form_is_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_samples(lines(tmp_path / "s.jsonl", line(), row))


def test_a_file_without_a_line_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no samples"):
        read_samples(lines(tmp_path / "s.jsonl"))
    with pytest.raises(DataError, match="holds no requests"):
        read_prompts(tmp_path / "s.jsonl")


def test_usable_answers_are_whole_not_empty_and_different():
    prompt = SampledPrompt(1, "", {}, ["b", " ", "a", "b ", "c"], [True, True, True, True, False])
    assert prompt.usable() == [0, 2]
