"""Pairs of sampled answers: the best and the worst, the limits, what is left out and why; training reads them."""
from __future__ import annotations

import pytest
from PIL import Image

from mindformers_ixc.data.preferences import load_preferences
from mindformers_ixc.errors import DataError
from mindformers_ixc.generation import preference_pairs
from mindformers_ixc.generation.judge_file import Verdict
from mindformers_ixc.generation.preference_pairs import PairOptions, label, write_pairs
from mindformers_ixc.generation.requests import read_request
from mindformers_ixc.generation.sampled_answers import SampledPrompt
from mindformers_ixc.processing.prompt import chat_turns


def prompt(identity, answers, request="What?", finished=None) -> SampledPrompt:
    return SampledPrompt(identity, request, read_request(request), answers, finished or [True] * len(answers))


def made(prompts, verdicts, target="pairs.json", **options):
    return label(prompts, verdicts, target, PairOptions(**options))


def test_the_best_and_the_worst_make_a_pair():
    found = made([prompt(7, ["so", "good ", "bad"])], {"7": Verdict((0.0, 2.5, -1.0))})
    assert found.rows == [{"id": 7, "prompt": "What?", "chosen": "good", "rejected": "bad",
                           "metadata": {"margin": 3.5}}]
    assert found.margins == [3.5] and found.lengths == [(4, 3)] and not found.dropped


def test_a_judges_pair_is_taken_as_it_is():
    found = made([prompt(7, ["so", "good", "bad"])], {"7": Verdict(pair=(0, 1))})
    assert found.rows == [{"id": 7, "prompt": "What?", "chosen": "so", "rejected": "good"}] and not found.margins
    with pytest.raises(DataError, match=r"--min_margin is 0\.5, but the verdict on the prompt 7 names a pair"):
        made([prompt(7, ["so", "good"])], {"7": Verdict(pair=(0, 1))}, min_margin=0.5)


def test_a_margin_that_no_number_holds_is_refused():
    with pytest.raises(DataError, match=r"The verdict on the prompt 7 has 1e\+308 and -1e\+308, whose difference is"):
        made([prompt(7, ["so", "good"])], {"7": Verdict((1e308, -1e308))})


@pytest.mark.parametrize(("one", "verdict", "options", "reason"), [
    (SampledPrompt(1, "x"), None, {}, preference_pairs.FAILED),
    (prompt(1, ["a", "b"]), None, {}, preference_pairs.UNJUDGED),
    (prompt(1, ["a", "a ", ""]), Verdict((1, 2, 3)), {}, preference_pairs.ALIKE),
    (prompt(1, ["a", "a"]), None, {}, preference_pairs.ALIKE),
    (prompt(1, ["a", "b"], finished=[True, False]), Verdict((1, 2)), {}, preference_pairs.ALIKE),
    (prompt(1, ["a", "b"], finished=[True, False]), Verdict(pair=(0, 1)), {}, preference_pairs.UNUSABLE),
    (prompt(1, ["a", "b"]), Verdict((2, 2)), {}, preference_pairs.CLOSE),
    (prompt(1, ["a", "b"]), Verdict((2, 1.5)), {"min_margin": 0.6}, preference_pairs.CLOSE),
    (prompt(1, ["aaaa", "b"]), Verdict((2, 1)), {"max_length_ratio": 3}, preference_pairs.LONG),
    (prompt(1, ["a", "b"], "What is <video>?"), Verdict((2, 1)), {}, preference_pairs.UNREADABLE),
])
def test_what_makes_no_pair_is_counted_by_its_reason(one, verdict, options, reason):
    found = made([one], {} if verdict is None else {"1": verdict}, **options)
    assert not found.rows and found.dropped == {reason: 1}


def test_limits_keep_what_is_just_within_them():
    assert len(made([prompt(1, ["a", "b"])], {"1": Verdict((2, 1.5))}, min_margin=0.5).rows) == 1
    assert len(made([prompt(1, ["aaa", "b"])], {"1": Verdict((2, 1))}, max_length_ratio=3).rows) == 1
    # the worst of all is cut short, so the next one is rejected
    one = prompt(1, ["a", "b", "c"], finished=[True, True, False])
    assert made([one], {"1": Verdict((2, 1, 0))}).rows[0]["rejected"] == "b"


def test_of_equal_prompts_the_first_with_a_pair_is_taken():
    prompts = [prompt(1, ["a", "a"]), prompt(2, ["a", "b"]), prompt(3, ["c", "d"]), prompt(4, ["e", "f"], "Why?")]
    found = made(prompts, {str(i): Verdict((1, 0)) for i in range(1, 5)})
    assert [row["id"] for row in found.rows] == [2, 4]
    assert found.dropped == {preference_pairs.ALIKE: 1, preference_pairs.REPEATED: 1}
    assert found.report() == ("2 pairs of 4 prompts.\n"
                              "Chosen answers have 1.0 characters on average, rejected ones 1.0.\n"
                              "The margin is 1.000 on average.\n"
                              f"Left out: 1 that {preference_pairs.ALIKE}.\n"
                              f"Left out: 1 that {preference_pairs.REPEATED}.")


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
def test_training_reads_the_turns_that_were_sampled_from(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for picture in ("red.png", "blue.png"):
        Image.new("RGB", (20, 10), picture.split(".")[0]).save(tmp_path / picture)
    requests = [{"query": "What?", "images": ["red.png"], "meta_instruction": "Be brief."},
                {"query": "And <ImageHere>?", "images": ["red.png", str(tmp_path / "blue.png")],
                 "history": [["What is <ImageHere>?", "Red."]]},
                {"query": "", "images": "blue.png"},
                {"messages": [{"role": "user", "content": [{"type": "image", "image": "red.png"},
                                                           {"type": "text", "text": "What?"}]}]}]
    prompts = [prompt(i, ["good", "bad"], request) for i, request in enumerate(requests)]
    target = f"out/{name}"
    found = made(prompts, {str(i): Verdict((1, 0)) for i in range(len(requests))}, target)
    assert not found.dropped
    write_pairs(found.rows, target)
    assert found.rows[0]["image"] == ["../red.png"]
    monkeypatch.chdir("/")      # the file's own folder is where its pictures are looked for
    pairs = load_preferences(tmp_path / target)
    for pair, one in zip(pairs, prompts):
        turns = chat_turns(one.question["query"], one.question.get("history", ()),
                           one.question.get("meta_instruction", ""))
        assert pair.turns == [*turns, ("assistant", "good")] and pair.rejected == [*turns, ("assistant", "bad")]
        assert [image.name for image in pair.images] == [image.rpartition("/")[2] for image in one.question["images"]]


def test_a_picture_that_is_not_there_is_named():
    request = {"query": "What?", "images": ["nowhere.png"]}
    with pytest.raises(DataError, match=r"The picture nowhere\.png of the prompt 1 does not exist; label where"):
        made([prompt(1, ["a", "b"], request)], {"1": Verdict((1, 0))})
