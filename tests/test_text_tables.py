"""Tables and sentences that suit terminals of any width."""
from __future__ import annotations

import io

import pytest

from mindformers_ixc.tables import Column, broken, columns_of, listed, table, width_of, wrapped

COLUMNS = (Column("stage", 5), Column("purpose", 12, left=True, gap=2), Column("GiB", 9), Column("", left=True, gap=2))
ROWS = [("0", "pipeline", "1.25", "fits"), ("1", "sum", "10.50", "")]


def test_with_room_a_table_has_its_own_widths():
    expected = ["stage  purpose           GiB", "    0  pipeline         1.25  fits", "    1  sum             10.50"]
    assert list(table(COLUMNS, ROWS)) == list(table(COLUMNS, ROWS, 34)) == expected


@pytest.mark.parametrize(("room", "expected"), [
    (28, ["stage  purpose     GiB", "    0  pipeline   1.25  fits", "    1  sum       10.50"]),
    (27, ["stage purpose    GiB", "    0 pipeline  1.25 fits", "    1 sum      10.50"])])
def test_what_does_not_fit_moves_together(room, expected):
    assert list(table(COLUMNS, ROWS, room)) == expected


def test_names_of_columns_take_several_lines_where_that_helps():
    columns = (Column("dp", 4), Column("samples that do not fit", 25), Column("", left=True, gap=2))
    assert list(table(columns, [("4", "12.5%", "best"), ("32", "0.0%", "")], 17)) == [
        "    samples", "    that do", "dp  not fit", " 4    12.5%  best", "32     0.0%"]


def test_what_fits_no_more_has_values_below_the_name_of_its_row():
    assert list(table(COLUMNS, ROWS, 24, heading=2)) == [
        "stage 0, pipeline", "  GiB 1.25, fits", "stage 1, sum", "  GiB 10.50"]


def test_wide_signs_count_twice():
    lines = list(table([Column("名", left=True), Column("数", 4)], [("图片", "1"), ("ab", "20")], 12))
    assert lines == ["名    数", "图片   1", "ab    20"] and {width_of(line) for line in lines} == {8}


@pytest.mark.parametrize("room", [20, 33, 40, 79])
def test_no_line_is_longer_than_the_terminal(room):
    text = "The 24 questions about 12 pictures are in flags/questions.csv; `mindformers eval` asks them all."
    lines = wrapped(text, room, "  ")
    assert max(map(len, lines)) <= max(room, 24) and " ".join(line.strip() for line in lines) == text
    assert all(line.startswith("  ") for line in lines[1:])


def test_where_there_is_no_terminal_lines_stay():
    text = "word " * 100
    assert wrapped(text, None, "  ", "- ") == ["- " + text] and columns_of(io.StringIO()) is None


def test_a_list_breaks_between_its_items():
    assert listed(["layer inputs 5.28", "a decoder layer 2.02", "rest 1"], 30, "  ") == [
        "layer inputs 5.28,", "  a decoder layer 2.02, rest 1"]


def test_colours_take_no_room_and_long_words_stay_whole():
    assert broken("\033[31;1merror:\033[0m " + "/long" * 8 + " is missing", 24) == [
        "\033[31;1merror:\033[0m", "/long" * 8, "is missing"]
    assert broken("  indented text that is long", 20, "    ") == ["  indented text that", "    is long"]
