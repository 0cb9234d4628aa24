"""How answers are understood, against cases worked out by hand from VLMEvalKit's rules."""
from __future__ import annotations

import pytest

from mindformers_ixc.benchmarking.matching import (
    FAILED,
    chosen,
    listed,
    relaxed_correct,
    same_text,
    vqa_accuracy,
    vqa_text,
    without_marks,
    yes_or_no,
)

CHOICES = {"A": "a cat", "B": "two dogs", "C": 7}


@pytest.mark.parametrize(("answer", "letter"), [
    ("B", "B"), ("(B).", "B"), ("Answer: **C**", "C"), ("The first is A", "A"),
    ("A or B", ""),                              # two letters, and no option's text
    ("A is what I would say about it", ""),      # the letter is not among the last four words
    ("a", ""), ("It shows A CAT", "A"), ("7", "C"), ("a cat and two dogs", ""), ("Two dogs, B", "B"),
    ("nothing of this", ""), ("D", ""), ("Z", "Z"), ("Cannot determine the answer, A", "Z"), (FAILED, ""),
    ("it may be a cat, but a cat is not what I would have called it", "")])       # longer than twice all options
def test_an_option_is_its_letter_or_else_its_text(answer, letter):
    assert chosen(answer, CHOICES) == letter


@pytest.mark.parametrize(("answer", "said"), [
    ("Yes", "Yes"), ("no.", "No"), ("Yes, it is no problem", "Unknown"), ("", "Unknown"), ("maybe", "Unknown"),
    ("NO! never", "No"), ("yesterday", "Unknown"), ("yes-man", "Yes")])
def test_yes_and_no_are_words(answer, said):
    assert yes_or_no(answer) == said


@pytest.mark.parametrize(("text", "without"), [
    ("a-b", "a b"), ("a- b", "a b"), ("1,000 (x)", "1000 x"), ("a,b", "a b"), ("3.5 m.", "3.5 m"), ("e.g", "eg"),
    ("x/y, z", "x y z"), ("5.", "5.")])
def test_marks_are_left_out_or_become_blanks(text, without):
    assert without_marks(text) == without


@pytest.mark.parametrize(("text", "compared"), [
    ("The\tCat\n", "cat"), ("An apple, a day", "apple day"), ("Two", "2"), ("none of ten", "0 of 10"),
    ("dont", "don't"), ("couldn'tve", "couldn't've"), ("couldnt've", "couldn't've"), ("couldntve", "couldntve"),
    ("lets", "lets"), ("somebody'd", "somebodyd"), ("ow's'at", "'ow's'at"), ("yall'd've", "y'all'd've")])
def test_texts_are_compared_by_vqas_rule(text, compared):
    assert vqa_text(text) == compared


@pytest.mark.parametrize(("same", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_is_that_of_ten_people(same, accuracy):
    # of 10 answers n are the same: n times n - 1 others, 10 - n times n others, at most 3 of them counted
    formula = (same * min(1, (same - 1) / 3) + (10 - same) * min(1, same / 3)) / 10 if same else 0
    assert vqa_accuracy("The cat!", ["cat"] * same + ["dog"] * (10 - same)) == pytest.approx(accuracy)
    assert formula == pytest.approx(accuracy)


@pytest.mark.parametrize(("answer", "expected", "right"), [
    ("52.5", ["50"], 1.0), ("52.6", ["50"], 0.0), ("47.5", ["9", "50"], 1.0), ("12.5%", ["0.125"], 1.0),
    ("0", ["0"], 1.0), ("0.0", ["0"], 0.0), ("Red ", ["red"], 1.0), ("50 cm", ["50"], 0.0), ("nan", ["nan"], 0.0)])
def test_a_number_may_be_five_percent_off(answer, expected, right):
    assert relaxed_correct(answer, expected) == right


def test_other_texts_are_the_same_or_not():
    assert same_text(" Anna LEE", ["x", "anna lee "]) == 1.0
    assert same_text("Anna", ["Anna Lee"]) == 0.0


@pytest.mark.parametrize(("cell", "texts"), [
    ("['a', \"b\"]", ["a", "b"]), ("a", ["a"]), (7, ["7"]), ("[a", ["[a"]),
    ("[__import__('os')]", ["[__import__('os')]"]),
    ("[]", []), ("[1, 2]", ["1", "2"])])
def test_a_cell_may_hold_a_list_and_is_never_run(cell, texts):
    assert listed(cell) == texts
