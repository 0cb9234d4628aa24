"""Scores of answers against values worked out by hand."""
from __future__ import annotations

import importlib
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ixc import scores
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.scores import each_score, score_answers

# no word is in two of them, and each has at least the four words that CIDEr's longest n-grams need
CAPTIONS = ["a chart with two red bars", "the old harbour under heavy snow", "three dogs run along some beach"]



def mean(name: str, answers, expected, **options) -> float:
    return score_answers(answers, expected, [name], **options)[name]


def anls(answers, expected) -> float:
    return mean("anls", answers, expected)


def cider(answers, expected) -> float:
    return mean("cider", answers, expected)


@pytest.mark.parametrize(("answers", "expected", "score"), [
    (["a cat", "a dog"], ["a cat", "a dog"], 100.0), (["a cat", "a dog"], ["a dog", "a cat"], 0.0),
    ([" a cat\n", "A dog", "x"], ["a cat ", "a dog", "x"], 200 / 3), (["", "2"], ["", "3"], 50.0)])
def test_exact_match_counts_equal_answers_spaces_around_them_aside(answers, expected, score):
    assert mean("exact_match", answers, expected) == pytest.approx(score)


def test_exact_match_tells_capitals_apart_unless_told_not_to():
    answers, expected = ["A Cat ", "STRASSE", "no"], ["a cat", "Straße", "yes"]
    assert each_score(answers, expected, ["exact_match"]) == {"exact_match": [0, 0, 0]}
    assert each_score(answers, expected, ["exact_match"], ignore_case=True) == {"exact_match": [1, 1, 0]}


@pytest.mark.parametrize(("answer", "expected", "right"), [
    ("105", "100", True), ("95", "100", True), ("105.1", "100", False), ("94.9", "100", False), ("-95", "-100", True),
    ("95", "-100", False), ("1.05e2", "100", True), ("10.5%", "10%", True), ("0.105", "10%", True),
    ("10.6%", "10%", False), ("0", "0", True), ("0.0", "0", False), ("0.001", "0", False), ("Red ", "red", True),
    ("reds", "red", False), ("about 100", "100", False), ("nan", "NaN", True), ("inf", "100", False),
    ("", "100", False),    ("2020", "year", False), ("0.21", "0.2", True), ("0.69", "0.66666", True)])
def test_relaxed_accuracy_lets_numbers_be_a_twentieth_off(answer, expected, right):
    assert each_score([answer], [expected], ["relaxed_accuracy"]) == {"relaxed_accuracy": [float(right)]}


def test_what_could_not_be_answered_is_wrong_even_where_nothing_was_expected():
    names = list(scores.SCORES)
    found = each_score([None, ""], ["", ""], names)
    assert [found[name][0] for name in names] == [0, 0, 0, 0]
    assert [found[name][1] for name in ("exact_match", "anls", "relaxed_accuracy")] == [1, 1, 1]


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


def test_cider_punishes_a_length_that_differs():
    reference, other = "one two three four five six", "seven eight nine ten eleven twelve"
    longer = "one two three four five six a b c d e f"
    # of n-grams 12 - n + 1 have equal weights (nothing is in both captions), 6 - n + 1 of them the reference's
    cosines = [(7 - n) / ((13 - n) ** 0.5 * (7 - n) ** 0.5) for n in (1, 2, 3, 4)]
    expected = 10 * sum(cosines) / 4 * math.exp(-6 ** 2 / (2 * 6 ** 2))
    assert each_score([longer, other], [reference, other], ["cider"])["cider"] == pytest.approx([expected, 10.0])


def test_cider_of_expectations_without_words_is_nothing():
    assert cider(["a cat", "!"], ["!", "?"]) == 0.0


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
    with pytest.raises(ConfigError, match=rf"The score {name} needs {package}"):
        scores.check_libraries(["exact_match", name])
    scores.check_libraries(["exact_match", "relaxed_accuracy"])
    with pytest.raises(ConfigError, match=rf'needs {package}; install it with `pip install "mindformers_ixc\[eval\]"`'):
        score_answers(["a"], ["b"], [name])
    assert score_answers(["a"], ["a"], ["exact_match"]) == {"exact_match": 100.0}
