"""A run's bar, header and measurements as lines."""
from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from mindformers_ixc import terminal
from mindformers_ixc.resources import resolve_model
from mindformers_ixc.terminal import Terminal
from mindformers_ixc.training import progress
from mindformers_ixc.training.progress import Progress, bar_of, line_of, measured, part_lines, units

ROW = {"step": 120, "loss": 3.25, "learning_rate": 1e-4, "seconds": 2.0, "samples_per_second": 6.25,
       "positions_per_second": 1234.5, "computed_positions_per_second": 2000.0, "tiles_per_second": 9.0,
       "computed_tiles_per_second": 12.0, "goodput": 0.5, "tflops": 100.0, "mfu": 0.3125, "seconds_left": 240.0}


@pytest.mark.parametrize(("columns", "expected"), [
    (110, "########--------  120/240  loss 3.2500  rate 0.0001  6.25 samples/s  1.23k tokens/s  MFU 31.2%  "
          "4 min 0 s left"),
    (60, "####-----  120/240  loss 3.2500  rate 0.0001  4 min 0 s left"),
    (39, "120/240  loss 3.2500  4 min 0 s left")])
def test_a_bar_has_as_many_numbers_as_fit(columns, expected):
    assert bar_of(ROW, 240, columns, unicode=False) == expected
    assert len(bar_of(ROW, 240, columns, unicode=True)) == len(expected) <= columns


def test_a_bar_says_first_that_data_is_waited_for_where_that_is_much():
    assert bar_of({**ROW, "data_wait": 0.04}, 240, 110, unicode=False) == bar_of(ROW, 240, 110, unicode=False)
    assert bar_of({**ROW, "data_wait": 0.3}, 240, 80, unicode=False) == \
        "####----  120/240  loss 3.2500  waited 30% for data  rate 0.0001  4 min 0 s left"


def test_a_line_has_what_is_looked_at_and_fits_a_hundred_columns():
    assert line_of({**ROW, "data_wait": 0.04}, 240) == \
        "step 120/240: loss 3.2500, rate 0.0001, 6.25 samples/s, 1.23k tokens/s, MFU 31.2%, 4 min 0 s left"
    row = {"step": 3, "loss": None, "seconds": 2.0, "samples_per_second": 8.0, "data_wait": 0.25, "seconds_left": 0.0}
    assert line_of(row, 3) == "step 3/3: loss not finite, 8 samples/s, waited 25% for data"
    assert line_of(ROW, 240, 70) == "step 120/240: loss 3.2500, rate 0.0001, 6.25 samples/s, 4 min 0 s left"
    assert line_of(ROW, 240, 20) == "step 120/240: loss 3.2500, 4 min 0 s left"


def test_without_a_terminal_the_lines_are_short_and_the_log_has_all(monkeypatch):
    stream, log = io.StringIO(), io.StringIO()
    monkeypatch.setattr(terminal, "current", Terminal(stream, log, interactive=False))
    Progress(240, 118, every=1).show(ROW)
    assert "tokens/s" in stream.getvalue() and "goodput" not in stream.getvalue() and len(stream.getvalue()) < 101
    assert "1.23k of 2k positions/s" in log.getvalue() and "goodput 50%" in log.getvalue()


def test_a_loss_that_is_no_number_has_a_bar_too():
    row = {"step": 3, "loss": None, "seconds": 2.0, "samples_per_second": 8.0, "seconds_left": 0.0}
    assert bar_of(row, 3, 70, unicode=False) == f"{'#' * 25}  3/3  loss not finite  8 samples/s  0 s left"


def test_on_a_terminal_there_is_a_bar_and_the_log_has_the_lines(monkeypatch):
    stream, log = io.StringIO(), io.StringIO()
    monkeypatch.setattr(terminal, "current", Terminal(stream, log, interactive=True, columns=80))
    monkeypatch.setattr(terminal, "LIVE_IN_FILE_EVERY_S", 0.0)
    progress = Progress(240, 118, every=1)
    for step in (119, 120, 240):
        progress.show({**ROW, "step": step})
    assert stream.getvalue().count("\n") == 1 and "step 240/240: loss 3.2500" in stream.getvalue()
    assert "119/240" in stream.getvalue() and "\r" in stream.getvalue()
    assert [line.split(":")[0] for line in log.getvalue().splitlines()] == [f"step {n}/240" for n in (119, 120, 240)]


@pytest.mark.parametrize(("count", "text"), [
    (0, "0"), (999, "999"), (1000, "1 k"), (999_499, "999 k"), (999_600, "1 M"), (1_414_000, "1.41 M"),
    (8_590_000_000, "8.59 G"), (2e12, "2e+03 G")])
def test_numbers_of_parameters_have_three_digits(count, text):
    assert units(int(count)) == text


def test_the_parts_fit_a_narrow_terminal():
    lines = part_lines({"vision": (303_000_000, 0), "task_lora.web": (1_230_000_000, 1_230_000_000),
                        "all": (1_533_000_000, 1_230_000_000)})
    assert [line.split() for line in lines[1:]] == [
        ["vision", "303", "M", "-"], ["task_lora.web", "1.23", "G", "1.23", "G"], ["all", "1.53", "G", "1.23", "G"]]
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) <= 31


@pytest.mark.parametrize(("start", "whence"), [
    (resolve_model("starter"), "from starter"), ("starter", "from starter"), ("my/model", "from my/model"),
    (None, "from nothing")])
def test_the_header_says_what_a_run_begins_with(start, whence, monkeypatch):
    monkeypatch.setattr(progress, "part_counts", lambda model: {"all": (1_414_000, 0)})
    config = SimpleNamespace(load_checkpoint=None, resume_training=False)
    trainer = SimpleNamespace(trained_model=None, start=start, config=config)
    assert progress._model(trainer) == [f"1.41 M parameters, {whence}"]


def test_a_measurement_is_a_line():
    assert measured({"step": 7, "loss": 0.123456, "exact_match": 58.333}, 14) == \
        "evaluation after step 7/14: loss 0.1235, exact_match 58.3%"
