"""Scores of answers against values worked out by hand, and the options of `evaluation`."""
from __future__ import annotations

import importlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.training.scores import anls, cider, exact_match, score_answers
from mindformers_ixc.training_options import EVALUATION, evaluation_options

# no word is in two of them, and each has at least the four words that CIDEr's longest n-grams need
CAPTIONS = ["a chart with two red bars", "the old harbour under heavy snow", "three dogs run along some beach"]


@pytest.mark.parametrize(("answers", "expected", "score"), [
    (["a cat", "a dog"], ["a cat", "a dog"], 100.0), (["a cat", "a dog"], ["a dog", "a cat"], 0.0),
    ([" a cat\n", "A dog", "x"], ["a cat ", "a dog", "x"], 200 / 3), (["", "2"], ["", "3"], 50.0)])
def test_exact_match_counts_equal_answers_spaces_around_them_aside(answers, expected, score):
    assert exact_match(answers, expected) == pytest.approx(score)


@pytest.mark.parametrize(("answer", "expected", "score"), [
    ("kitten", "sitting", 100 * (1 - 3 / 7)),      # the textbook's distance of 3 over the longer of the two
    ("kitten", "kitten", 100.0), (" Kitten\n", "kITTEN", 100.0), ("abcd", "abxy", 50.0), ("abc", "axy", 0.0),
    ("abcde", "abxyz", 0.0), ("20.05.2019", "20.06.2019", 90.0), ("", "five", 0.0), ("12", "1234", 50.0)])
def test_anls_is_the_share_of_the_longer_text_that_needs_no_edit_and_nothing_below_one_half(answer, expected, score):
    assert anls([answer], [expected]) == pytest.approx(score)


def test_anls_is_the_mean_of_the_answers():
    found = anls(["kitten", "abc", "yes"], ["sitting", "axy", "yes"])
    assert found == pytest.approx(100 * (4 / 7 + 0 + 1) / 3)


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(last + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@settings(max_examples=60, deadline=None)
@given(st.text("ab", max_size=7), st.text("abC", min_size=1, max_size=7))
def test_anls_of_any_two_texts_follows_its_formula(answer, expected):
    similarity = 1 - levenshtein(answer.lower(), expected.lower()) / max(len(answer), len(expected))
    assert anls([answer], [expected]) == pytest.approx(100 * similarity if similarity >= 0.5 else 0.0)


def test_cider_of_the_references_themselves_is_ten():
    # every n-gram is in one caption only, so each of the four cosines is 1; CIDEr-D multiplies their mean by 10
    assert cider(CAPTIONS, CAPTIONS) == pytest.approx(1000.0)


def test_cider_needs_the_caption_of_the_own_picture():
    assert cider(CAPTIONS[1:] + CAPTIONS[:1], CAPTIONS) == pytest.approx(0.0, abs=1e-9)
    mixed = [CAPTIONS[0], CAPTIONS[2], CAPTIONS[1]]
    assert cider(mixed, CAPTIONS) == pytest.approx(1000.0 / 3)


def test_cider_of_two_words_is_that_of_the_n_grams_they_have():
    # no 3-grams and 4-grams: two of the four cosines are 1
    assert cider(["red bars", "heavy snow"], ["red bars", "heavy snow"]) == pytest.approx(500.0)
    # the words are the same, but not the pair of them
    assert cider(["bars red", "snow heavy"], ["red bars", "heavy snow"]) == pytest.approx(250.0)


def test_cider_sees_neither_capitals_nor_punctuation():
    assert cider(["A chart, with two red bars.", *CAPTIONS[1:]], CAPTIONS) == pytest.approx(1000.0)


def test_only_the_scores_asked_for_are_there():
    answers = ["kitten", "yes"]
    assert score_answers(answers, ["sitting", "yes"], ["anls", "exact_match"]) == {
        "anls": pytest.approx(100 * (4 / 7 + 1) / 2), "exact_match": 50.0}
    assert score_answers(answers, answers, []) == {}


@pytest.mark.parametrize(("name", "package"), [("anls", "rapidfuzz"), ("cider", "pycocoevalcap")])
def test_a_score_whose_library_is_missing_says_what_to_install(monkeypatch, name, package):
    real = importlib.import_module

    def without(module, *others):
        if module.startswith(package):
            raise ImportError(f"No module named '{module}'")
        return real(module, *others)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=rf'needs {package}; install it with `pip install "mindformers_ixc\[eval\]"`'):
        score_answers(["a"], ["b"], [name])
    assert score_answers(["a"], ["a"], ["exact_match"]) == {"exact_match": 100.0}


def test_options_keep_what_is_given_and_fill_in_the_rest():
    options = evaluation_options({"dataset_dir": "held_out.json", "metrics": ["loss", "anls"], "keep_best": "anls"})
    assert options == {**EVALUATION, "dataset_dir": "held_out.json", "metrics": ["loss", "anls"], "keep_best": "anls"}
    assert EVALUATION["metrics"] == ["loss"]


@pytest.mark.parametrize(("section", "words"), [
    ({"evry": 10}, r"Unknown key evaluation\.evry \(value 10\); the choices are dataset_dir, .*every"),
    ({"metrics": ["loss", "bleu"]}, r"evaluation\.metrics has 'bleu'; the choices are loss, shuffled_loss, exact_"),
    ({"keep_best": "anls"}, r"evaluation\.keep_best is 'anls', which evaluation\.metrics does not name"),
    ({"every": -1}, r"evaluation\.every is -1; it must be a whole number of at least 0"),
    ({"batch_size": "4"}, r"evaluation\.batch_size is '4'; it must be a whole number of at least 1"),
    ({"mode": "paint"}, r"evaluation\.mode is 'paint'; the choices are base"),
    ({"metrics": "loss"}, r"evaluation\.metrics is 'loss'; it must be a list"),
    ({"metrics": ["anls"], "keep_best": "loss"}, r"evaluation\.keep_best is 'loss'"),
    ({"dataset_dir": ""}, r"evaluation\.dataset_dir is empty"), ({"dataset_dir": None}, "dataset_dir is empty")])
def test_options_that_cannot_be_meant_are_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        evaluation_options({"dataset_dir": "held_out.json", **section})
