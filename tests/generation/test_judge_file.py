"""A judge's file in each of its forms, and what is wrong with one that does not judge these samples."""
from __future__ import annotations

import json

import pytest

from mindformers_ixc.errors import DataError
from mindformers_ixc.generation.judge_file import Verdict, read_judge
from mindformers_ixc.generation.sampled_answers import SampledPrompt

PROMPTS = [SampledPrompt(1, "", {}, ["a", "b", "a"], [True] * 3), SampledPrompt("two", "", {}, ["c", "d"], [True] * 2),
           SampledPrompt(3, "no json")]
ENTRIES = [{"id": 1, "ranks": [2, 1, 2], "reason": "shorter"}, {"id": "two", "preferred": 1, "rejected": 0}]
EXPECTED = {"1": Verdict((-2.0, -1.0, -2.0)), "two": Verdict(pair=(1, 0))}


@pytest.mark.parametrize(("name", "text"), [
    ("list.json", json.dumps(ENTRIES)),
    ("lines.jsonl", "\n".join(map(json.dumps, ENTRIES))),
    ("lines.txt", "\n".join(map(json.dumps, ENTRIES))),
    ("object.json", json.dumps({"1": {"ranks": [2, 1, 2]}, "two": ENTRIES[1]})),
])
def test_every_form_says_the_same(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_judge(tmp_path / name, PROMPTS) == EXPECTED


def test_a_list_by_id_is_scores_and_what_failed_needs_no_verdict(tmp_path):
    (tmp_path / "j.json").write_text('{"1": [0.5, 2, -1], "3": [1, 2]}', encoding="utf-8")
    assert read_judge(tmp_path / "j.json", PROMPTS) == {"1": Verdict((0.5, 2.0, -1.0))}


@pytest.mark.parametrize(("content", "message"), [
    ({"1": [1, 2, 3], "4": [1, 2], "x": []}, "judges 2 prompts that are not among the samples: the ids 4, x; give the"),
    ({str(i): [1] for i in range(10, 20)}, "judges 10 prompts .* 10, 11, 12, 13, 14 and 5 more"),
    ({"1": [1, 2]}, "id 1: scores must be a list of 3 numbers, one a sample, found a list of 2"),
    ({"1": [1, float("nan"), 2]}, "id 1: scores has nan, which is no finite number"),
    ({"1": {"ranks": [1, None, 2]}}, "ranks has None, which is no finite number"),
    ({"1": {"score": [1, 2, 3]}}, "needs one of 'scores', 'ranks', and 'preferred' with 'rejected', found score"),
    ({"1": {"scores": [1, 2, 3], "ranks": [1, 2, 3]}}, "needs one of"),
    ({"1": {"preferred": 0, "rejected": 3}}, "rejected must be the number of a sample, from 0 to 2, found 3"),
    ({"1": {"preferred": "a", "rejected": 1}}, "preferred must be the number of a sample"),
    ({"1": {"preferred": 0, "rejected": 2}}, "the preferred answer, sample 0, equals the rejected one, sample 2"),
    ([{"id": 1, "scores": [1, 2, 3]}, {"id": "1", "scores": [1, 2, 3]}], "entry 1: the id 1 was judged before"),
    ([{"scores": [1, 2, 3]}], "entry 0: must be an object with the 'id' of a prompt"),
    (5, "must be an object with the 'id'"),
])
def test_what_is_no_verdict_on_these_samples_is_refused(tmp_path, content, message):
    (tmp_path / "j.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_judge(tmp_path / "j.json", PROMPTS)


@pytest.mark.parametrize(("name", "text"), [
    ("j.json", '{"1": [1, 2, 3], "two": [1, 2], "1": [3, 2, 1]}'),
    ("j.jsonl", '{"id": 1, "scores": [1, 2, 3], "scores": [3, 2, 1]}'),
])
def test_a_key_that_comes_twice_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"('1'|'scores') stands twice in an object; leave one"):
        read_judge(tmp_path / name, PROMPTS)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "j.json").write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match="is empty"):
        read_judge(tmp_path / "j.json", PROMPTS)
