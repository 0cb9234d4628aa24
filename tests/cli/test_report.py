"""The page that `mindformers report` makes of a run's log."""
from __future__ import annotations

import base64
import io
import json
import re
import struct
from argparse import Namespace

import pytest

from mindformers_ixc.cli.report import draw, report
from mindformers_ixc.errors import ConfigError

PNG = b"\x89PNG\r\n\x1a\n"
BASIC = {"loss", "learning_rate", "grad_norm", "throughput"}


def row(step: int, **fields) -> dict:
    return {"step": step, "epoch": 1, "loss": 4.0 / step, "learning_rate": 1e-3 / step, "overflow": False,
            "samples": [0, 1], "grad_norm": 2.0 / step, "seconds": 9.0 if step == 1 else 0.25 * step,
            "samples_per_second": 8.0, **fields}


def make_run(folder, rows, evaluations=()):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    if evaluations:
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(item) + "\n" for item in evaluations))
    answers = io.StringIO()
    assert report(Namespace(output=str(folder), answers=answers)) == 0
    assert answers.getvalue() == f"{folder / 'report.html'}\n"
    return (folder / "report.html").read_text(encoding="utf-8")


def pictures_of(folder) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (folder / "report").iterdir()}


def facts(page: str) -> dict[str, str]:
    return dict(re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td></tr>", page))


def test_a_page_holds_every_picture_itself(tmp_path):
    evaluations = [{"step": 2, "loss": 1.5, "exact_match": 25.0}, {"step": 4, "loss": 0.5, "exact_match": 75.0}]
    page = make_run(tmp_path / "run", [row(step) for step in range(1, 5)], evaluations)
    assert not re.search(r"https?:|//|<script|<link|url\(", re.sub(r"base64,[^\"]*", "", page))
    embedded = [base64.b64decode(data, validate=True) for data in re.findall(r'src="data:image/png;base64,([^"]*)"',
                                                                            page)]
    assert page.count("<img") == len(embedded)
    pictures = pictures_of(tmp_path / "run")
    assert set(pictures) == BASIC | {"evaluation_loss", "scores"}
    assert sorted(pictures.values()) == sorted(embedded)
    for data in embedded:
        assert data.startswith(PNG)
        width, height = struct.unpack(">II", data[16:24])
        assert width > 2 * height > 200
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "evaluations.jsonl", "metrics.jsonl", "report", "report.html"], "nothing unfinished is left"


def test_the_table_sums_the_run_up(tmp_path):
    rows = [row(step, tokens=10 * step, overflow=step == 2) for step in range(1, 5)]
    page = make_run(tmp_path, rows, [{"step": 2, "loss": 1.5}, {"step": 4, "loss": 0.5, "anls": 61.25}])
    assert facts(page) == {
        "steps": "4", "first loss": "4", "last loss": "1", "median seconds a step": "0.75", "labelled tokens": "100",
        "steps skipped for overflow": "1", "samples a second": "8", "held-out loss": "0.5", "held-out anls": "61.25"}


def test_speeds_are_medians_of_the_steps_after_the_first_and_have_curves(tmp_path):
    def fast(step):
        return row(step, goodput=0.9 + 0.01 * step, positions_per_second=1000.0 * step, tiles_per_second=2.0 * step,
                   computed_positions_per_second=1200.0 * step, computed_tiles_per_second=3.0 * step,
                   tflops=100.0 * step, mfu=0.1 * step, data_wait=0.5 / step)

    page = make_run(tmp_path, [fast(step) for step in range(1, 5)])
    found = facts(page)
    assert {key: found[key] for key in ("positions a second", "tiles a second", "goodput", "model TFLOPS a device",
                                        "MFU", "waiting for data")} == {
        "positions a second": "3,000", "tiles a second": "6", "goodput": "93.0%", "model TFLOPS a device": "300",
        "MFU": "30.0%", "waiting for data": "16.7%"}
    assert set(pictures_of(tmp_path)) == BASIC | {"goodput", "positions", "tiles", "tflops", "mfu", "data_wait"}


def test_without_a_peak_nothing_is_said_of_its_share(tmp_path):
    page = make_run(tmp_path, [row(step, tflops=1.0) for step in (1, 2)])
    assert "MFU" not in page and "mfu" not in pictures_of(tmp_path)


def test_the_title_is_the_folder_as_text(tmp_path):
    page = make_run(tmp_path / "a<b> & \"c\"", [row(1), row(2)])
    assert "<title>a&lt;b&gt; &amp; &quot;c&quot;</title>" in page
    assert "<b>" not in page


def test_a_folder_without_steps_is_refused(tmp_path):
    arguments = Namespace(output=str(tmp_path), answers=io.StringIO())
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl with steps in it"):
        report(arguments)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo')
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl with steps in it"):
        report(arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_ended_without_a_finite_loss_says_so(tmp_path):
    page = make_run(tmp_path, [row(1), row(2), row(3, loss=None, grad_norm=float("nan"), overflow=True)])
    assert facts(page)["last loss"] == "not finite"
    assert facts(page)["first loss"] == "4"
    assert set(pictures_of(tmp_path)) == BASIC


def test_the_step_without_a_loss_is_not_drawn():
    finite = [row(1), row(2), row(3)]
    curves = [{name: data for name, _, data in draw(rows, [])} for rows in (
        finite, [*finite, row(4, loss=None)], [*finite, row(4)])]
    assert curves[0]["loss"] == curves[1]["loss"] != curves[2]["loss"]
    assert curves[0]["learning_rate"] != curves[1]["learning_rate"] == curves[2]["learning_rate"]


def test_a_run_on_preferences_has_their_curves(tmp_path):
    rewards = {"reward_margin": 0.1, "reward_accuracy": 0.5, "logp_chosen": -30.0}
    page = make_run(tmp_path, [row(step, **{key: value * step for key, value in rewards.items()}) for step in (1, 2)])
    assert set(pictures_of(tmp_path)) == BASIC | set(rewards)
    for title in ("Reward margin", "Reward accuracy", "Log-probability of chosen answers"):
        assert f"<h2>{title}</h2>" in page


def test_sources_share_a_picture(tmp_path):
    sources = {"data/charts.json": {"loss": 2.0, "tokens": 5}, "data/text.json": {"loss": 3.0, "tokens": 7}}
    rows = [row(1, sources=sources), row(2, sources={"data/text.json": {"loss": 1.0, "tokens": 4}})]
    make_run(tmp_path, rows)
    pictures = pictures_of(tmp_path)
    assert set(pictures) == BASIC | {"sources"}
    one = [row(1, sources={"data/text.json": sources["data/text.json"]}), rows[1]]
    assert {name: data for name, _, data in draw(one, [])}["sources"] != pictures["sources"]


def test_a_page_is_written_again_over_the_old_one(tmp_path):
    first = make_run(tmp_path, [row(1), row(2)])
    second = make_run(tmp_path, [row(1), row(2), row(3)])
    assert facts(first)["steps"] == "2"
    assert facts(second)["steps"] == "3"


def test_without_the_drawing_library_the_command_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ConfigError, match=r"need matplotlib; run `pip install 'mindformers_ixc\[report\]'`"):
        make_run(tmp_path, [row(1)])
    assert not (tmp_path / "report.html").exists()
