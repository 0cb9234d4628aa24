"""Scores of small tables, worked out by hand; scripts/vlmeval_check.py finds the same with VLMEvalKit's scorer."""
from __future__ import annotations

import dataclasses

import pytest
from benchmark_tables import SAID, write_table

from mindformers_ixc.benchmarking.catalogue import BENCHMARKS
from mindformers_ixc.benchmarking.matching import FAILED
from mindformers_ixc.benchmarking.prompts import final_answer
from mindformers_ixc.benchmarking.scoring import anls, can_score, check_rows, never_right, read_back, score
from mindformers_ixc.benchmarking.table_file import BenchmarkTable, Row
from mindformers_ixc.errors import ConfigError, DataError

# What the answers of the tables are worth, with what it follows from.
WORTH = {
    # A right; C is no option's letter that is there; "ginger" has no capital letter; A right
    "MMStar": {"Overall": 50, "animals": 50, "things": 50},
    # of the first question both orders are right, of the second one
    "MMBench_DEV_EN": {"Overall": 50, "identity": 100, "text": 0, "finegrained_perception (instance-level)": 50},
    # "four" is option C, "the departure" has the answer that stands for option A
    "MMMU_DEV_VAL": {"Overall": 100, "dev": 100, "validation": 100, "Art": 100},
    # existence: 3 of 4 and 1 picture of 2; calculation: 1 of 2 and no picture
    "MME": {"Overall": 175, "perception": 125, "reasoning": 50, "existence": 125, "numerical_calculation": 50},
    # 3 of 4 answers, 2 of 3 figures, 3 of 4 questions
    "HallusionBench": {"mean of aAcc, fAcc, qAcc": (75 + 200 / 3 + 75) / 3, "aAcc": 75, "fAcc": 200 / 3, "qAcc": 75,
                       "aAcc VD": 100, "aAcc VS": 50, "aAcc figure": 100, "aAcc chart": 0, "aAcc table": 100},
    # by category 6 rows: yes is said 3 times, 2 times rightly, and right 4 times
    "POPE": {"Overall": 400 / 7, "accuracy": 50, "precision": 200 / 3, "recall": 50, "adversarial": 200 / 3,
             "popular": 200 / 3, "random": 0},
    # 4 of 10 said so: all; 3 of 10: 0.9; "dont" is mended: all
    "TextVQA_VAL": {"Overall": 290 / 3},
    # 6 of 7 letters; 4 of 5; N/A is read back as a missing cell, and nan is no answer
    "DocVQA_VAL": {"Overall": 100 * (6 / 7 + 4 / 5) / 3},
    # 5 % off; 4 % off; the same text; 0 is compared as a text
    "ChartQA_TEST": {"Overall": 75, "human": 100, "augmented": 50},
    "OCRVQA_TESTCORE": {"Overall": 50},
    # "total" within the answer; the formula without blanks; "departures" is not there
    "OCRBench": {"Final Score Norm": 0.2, "Final Score": 2, "Text Recognition": 1, "Scene Text-centric VQA": 0,
                 "Doc-oriented VQA": 0, "Key Information Extraction": 0,
                 "Handwritten Mathematical Expression Recognition": 1}}


def asked(folder, name):
    source = BenchmarkTable(write_table(folder, name), BENCHMARKS[name])
    check_rows(BENCHMARKS[name], source.rows, source.path)
    return source.rows


@pytest.mark.parametrize("name", WORTH)
def test_scores_of_every_kind(tmp_path, name):
    rows, benchmark = asked(tmp_path, name), BENCHMARKS[name]
    found = score(benchmark, rows, [final_answer(benchmark, said) for said in SAID[name]])
    assert found == {key: pytest.approx(value) for key, value in WORTH[name].items()}
    assert next(iter(found)) == benchmark.main or name == "MMMU_DEV_VAL"


@pytest.mark.parametrize("name", WORTH)
def test_no_answer_is_never_right(tmp_path, name):
    rows, benchmark = asked(tmp_path, name), BENCHMARKS[name]
    assert set(score(benchmark, rows, [FAILED] * len(rows)).values()) == {0.0}


def test_a_table_without_answers_and_a_set_with_a_judge_have_no_scores(tmp_path):
    rows = asked(tmp_path, "MMStar")
    assert can_score(BENCHMARKS["MMStar"], rows)
    hidden = [dataclasses.replace(row, cells={**row.cells, "answer": None}) for row in rows]
    assert not can_score(BENCHMARKS["MMStar"], hidden)
    assert not can_score(BENCHMARKS["MathVista_MINI"], asked(tmp_path, "MathVista_MINI"))


@pytest.mark.parametrize(("answer", "expected", "worth"), [
    ("abcd", ["abcd"], 1.0), ("abcx", ["abcd"], 0.75), ("abxx", ["abcd"], 0.5), ("axxx", ["abcd"], 0.0),
    ("A  b", ["a b"], 1.0), ("abc", ["zzz", "abcd"], 0.75), ("", ["a"], 0.0)])
def test_anls_is_one_minus_the_share_of_letters_that_differ(answer, expected, worth):
    assert anls(answer, expected) == pytest.approx(worth)


def test_anls_needs_its_library(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "rapidfuzz.distance", None)
    with pytest.raises(ConfigError, match=r"needs rapidfuzz; install it with .*mindformers_ixc\[eval\]"):
        asked(tmp_path, "DocVQA_VAL")


@pytest.mark.parametrize(("column", "texts"), [
    ([2.0, 3.0], ["2", "3"]), ([2.0, 0.5], ["2.0", "0.5"]), ([2.0, None], ["2.0", "nan"]), (["2.0", "x"], ["2.0", "x"]),
    ([1, 2], ["1", "2"]), ([None], ["nan"])])
def test_columns_as_they_come_back_from_a_workbook(column, texts):
    assert read_back(column) == texts


@pytest.mark.parametrize(("name", "cells", "words"), [
    ("HallusionBench", {"index": "VD_1"}, "index 'VD_1' does not end in _SET_FIGURE_QUESTION"),
    ("MMBench_DEV_EN", {"index": "q1"}, "index 'q1' is no whole number"),
    ("MME", {"index": 1, "category": None, "image_path": "a"}, "row 1: 'category' is empty")])
def test_rows_that_could_not_be_scored_are_refused_before_they_are_asked(name, cells, words):
    with pytest.raises(DataError, match=words):
        check_rows(BENCHMARKS[name], [Row({"answer": "A", **cells}, (0, 0), 1)], "t.tsv")


@pytest.mark.parametrize("name", ["DocVQA_VAL", "TextVQA_VAL", "ChartQA_TEST", "GQA_TestDev_Balanced", "OCRBench"])
def test_an_empty_list_of_answers_is_refused_before_anything_is_asked(name):
    with pytest.raises(DataError, match="row 7: 'answer' is an empty list"):
        check_rows(BENCHMARKS[name], [Row({"index": 7, "answer": "[ ]"}, (0, 0), 1)], "t.tsv")


@pytest.mark.parametrize(("name", "cells", "words"), [
    ("MMStar", {"answer": "a", "A": "red", "B": "blue"}, "none of the letters of its options (A, B)"),
    ("MMStar", {"answer": "D", "A": "red", "B": "blue", "D": None}, "none of the letters of its options (A, B)"),
    ("MMBench_DEV_EN", {"answer": "B "}, "none of the letters of its options (it has none)"),
    ("POPE", {"answer": "yes"}, "only Yes and No are counted"), ("MME", {"answer": 1}, "only Yes and No are counted"),
    ("TextVQA_VAL", {"answer": "red"}, "has 1 texts, and 4 that agree"), ("OCRBench", {"answer": None}, "is empty")])
def test_rows_that_no_answer_is_right_for_are_named(name, cells, words):
    good = {"choice": "A", "circular": "A", "vqa": str(["a"] * 4)}.get(BENCHMARKS[name].metric, "Yes")
    rows = [Row({"index": 1, "A": "a", "answer": good}, (0, 0), 1), Row({"index": 2, **cells}, (0, 0), 1)]
    said, = never_right(BENCHMARKS[name], rows)
    assert said.startswith("row 2: 'answer' ") and words in said
