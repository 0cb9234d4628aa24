"""The page that `mindformers report` makes of a run's log."""
from __future__ import annotations

import base64
import io
import json
import os
import re
import struct
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from mindformers_ixc.cli.report import draw, report
from mindformers_ixc.errors import ConfigError

PNG = b"\x89PNG\r\n\x1a\n"
BASIC = {"loss", "learning_rate", "grad_norm", "throughput"}


def row(step: int, **fields) -> dict:
    return {"step": step, "epoch": 1, "loss": 4.0 / step, "learning_rate": 1e-3 / step, "overflow": False,
            "samples": [0, 1], "grad_norm": 2.0 / step, "seconds": 9.0 if step == 1 else 0.25 * step,
            "samples_per_second": 8.0, **fields}


def write_run(folder, rows, evaluations=(), answers=(), record=None):
    folder.mkdir(exist_ok=True)
    for name, items in (("metrics", rows), ("evaluations", evaluations), ("answers", answers)):
        if items:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    if record is not None:
        (folder / "run_config.json").write_text(json.dumps(record))
    return folder


def make_page(*folders, page=None) -> str:
    """Runs the command; what it says is where the page is."""
    answers = io.StringIO()
    assert report(Namespace(outputs=[str(folder) for folder in folders], page=page, answers=answers)) == 0
    return Path(answers.getvalue().rstrip("\n")).read_text(encoding="utf-8")


def make_run(folder, rows, evaluations=()):
    made = make_page(write_run(folder, rows, evaluations))
    assert made == (folder / "report.html").read_text(encoding="utf-8")
    return made


def charts(page: str) -> dict[str, dict]:
    """What the page's program draws, by title."""
    found, = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', page)
    return {chart["title"]: chart for chart in json.loads(found)}


def pictures_of(folder) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in (folder / "report").iterdir()}


def facts(page: str) -> dict[str, str]:
    return dict(re.findall(r"<tr><th>([^<]*)</th><td>([^<]*)</td></tr>", page))


def test_a_page_needs_nothing_else_and_pictures_lie_beside_it(tmp_path):
    evaluations = [{"step": 2, "loss": 1.5, "exact_match": 25.0}, {"step": 4, "loss": 0.5, "exact_match": 75.0}]
    page = make_run(tmp_path / "run", [row(step) for step in range(1, 5)], evaluations)
    assert not re.search(r"https?:|//|<link|url\(|@import|<script[^>]* src", page)
    drawn = charts(page)
    assert set(drawn) == {"Loss", "Learning rate", "Gradient norm before clipping", "Samples a second",
                          "Held-out scores"}
    assert page.count('<figure class="chart"') == len(drawn)
    pictures = pictures_of(tmp_path / "run")
    assert set(pictures) == BASIC | {"evaluation_loss", "scores"}
    for data in pictures.values():
        assert data.startswith(PNG)
        width, height = struct.unpack(">II", data[16:24])
        assert width > 2 * height > 200
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "evaluations.jsonl", "metrics.jsonl", "report", "report.html"], "nothing unfinished is left"


def test_the_table_sums_the_run_up(tmp_path):
    rows = [row(step, tokens=10 * step, overflow=step == 2) for step in range(1, 5)]
    page = make_run(tmp_path, rows, [{"step": 2, "loss": 1.5}, {"step": 4, "loss": 0.5, "anls": 61.5}])
    assert facts(page) == {
        "steps": "4", "first loss": "4", "last loss": "1", "median seconds a step": "0.75", "time in steps": "11.2 s",
        "labelled tokens": "100",
        "steps skipped for overflow": "1", "samples a second": "8", "held-out loss": "0.5", "held-out anls": "61.5%"}


def test_steps_that_were_skipped_as_spikes_are_counted_and_named(tmp_path):
    skipped = {3, *range(11, 20)}
    page = make_run(tmp_path, [row(step, skipped=step in skipped) for step in range(1, 21)])
    assert facts(page)["steps skipped as spikes"] == "10 (3, 11, 12, 13, 14, 15, 16, 17, ...)"
    page = make_run(tmp_path / "other", [row(step, skipped=False) for step in range(1, 3)])
    assert facts(page)["steps skipped as spikes"] == "0"


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
    assert "MFU" not in facts(page) and not any("MFU" in title for title in charts(page))
    assert "mfu" not in pictures_of(tmp_path)


def test_the_title_is_the_folder_as_text(tmp_path):
    page = make_run(tmp_path / "a<b> & \"c\"", [row(1), row(2)])
    assert "<title>a&lt;b&gt; &amp; &quot;c&quot;</title>" in page
    assert "<h1>a&lt;b&gt; &amp; &quot;c&quot;</h1>" in page and "<b>" not in page


def test_a_folder_without_steps_is_refused(tmp_path):
    arguments = Namespace(outputs=[str(tmp_path)], page=None, answers=io.StringIO())
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
        assert f"<h3>{title}</h3>" in page and len(charts(page)[title]["lines"][0]["y"]) == 2


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


def test_without_the_drawing_library_the_page_is_there_and_the_command_says_what_to_install(tmp_path, monkeypatch,
                                                                                            capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert charts(make_run(tmp_path, [row(1), row(2)]))
    assert "run `pip install 'mindformers_ixc[report]'`" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.fixture
def without_pictures(monkeypatch):
    """Leaves out the PNGs, which take most of the time."""
    monkeypatch.setattr("mindformers_ixc.cli.report._write_pictures", lambda *_: None)


@pytest.mark.usefixtures("without_pictures")
def test_held_out_loss_stands_beside_the_training_loss(tmp_path):
    page = make_run(tmp_path, [row(step) for step in range(1, 5)],
                    [{"step": 2, "loss": 1.5, "shuffled_loss": 3.0}, {"step": 4, "loss": 0.5, "shuffled_loss": 3.5}])
    training, held_out, shuffled = charts(page)["Loss"]["lines"]
    assert (training["name"], training["x"], training["y"]) == ("training", [1, 2, 3, 4], [4.0, 2.0, 1.33333, 1.0])
    assert training["smooth"] and "smooth" not in held_out
    assert "smooth" not in charts(page)["Learning rate"]["lines"][0]      # nothing of it is a measurement
    assert (held_out["name"], held_out["x"], held_out["y"]) == ("held-out", [2, 4], [1.5, 0.5])
    assert (shuffled["name"], shuffled["y"]) == ("held-out, shuffled loss", [3.0, 3.5])
    # 9 s for the first step, then 0.25 s times the step's number
    assert training["t"] == pytest.approx([9 / 3600, 9.5 / 3600, 10.25 / 3600, 11.25 / 3600], rel=1e-5)


@pytest.mark.usefixtures("without_pictures")
def test_held_out_pairs_stand_beside_those_of_training(tmp_path):
    page = make_run(tmp_path, [row(step, reward_accuracy=0.25 * step) for step in (1, 2)],
                    [{"step": 2, "reward_accuracy": 0.75, "shuffled_reward_accuracy": 0.5, "reward_chosen": 2.0}])
    lines = charts(page)["Reward accuracy"]["lines"]
    assert [(line["name"], line["y"]) for line in lines] == [
        ("training", [0.25, 0.5]), ("held-out", [0.75]), ("held-out, shuffled reward accuracy", [0.5])]
    assert [line["name"] for line in charts(page)["Held-out scores"]["lines"]] == ["reward chosen"]
    assert "No answers were written down" not in page


@pytest.mark.usefixtures("without_pictures")
def test_a_row_that_is_missing_takes_its_time_all_the_same(tmp_path):
    page = make_run(tmp_path, [row(1), row(3)])
    assert facts(page)["time in steps"] == "10.5 s"


def picture(path, colour=(200, 30, 30)):
    Image.new("RGB", (600, 300), colour).save(path)
    return str(path)


@pytest.mark.usefixtures("without_pictures")
def test_answers_are_shown_with_their_pictures_and_as_they_changed(tmp_path):
    seen, gone = picture(tmp_path / "seen.png"), str(tmp_path / "gone.png")
    answers = [{"step": step, "answers": [
        {"sample": "1", "question": "What <b>?", "images": [seen, gone], "expected": "a cat", "answer": said},
        {"sample": "2", "question": "Where?", "images": [], "expected": "there", "answer": ""}]}
        for step, said in ((10, "a <i>dog"), (20, "a <i>dog"), (30, " a cat"))]
    page = make_page(write_run(tmp_path / "run", [row(1), row(2)], answers=answers))
    first, second = re.findall(r'<article class="answer">(.*?)</article>', page, re.DOTALL)
    image, = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', first)
    assert Image.open(io.BytesIO(base64.b64decode(image, validate=True))).size == (360, 180)
    assert "gone.png cannot be shown" in first and "What &lt;b&gt;?" in first and "<i>" not in page
    steps = re.findall(r"<dt>(.*?)</dt><dd><span class=\"(.*?)\">.*?</span> (.*?)</dd>", first)
    assert steps == [("step 10 to 20", "bad", "a &lt;i&gt;dog"), ("step 30", "good", " a cat")]
    assert "<img" not in second and "(an empty answer)" in second and "step 10 to 30" in second


@pytest.mark.usefixtures("without_pictures")
def test_of_many_versions_of_an_answer_the_first_and_the_last_are_among_those_shown(tmp_path):
    answers = [{"step": step, "answers": [{"sample": "1", "question": "?", "expected": "x", "answer": str(step)}]}
               for step in range(1, 101)]
    page = make_page(write_run(tmp_path, [row(1), row(2)], answers=answers))
    steps = re.findall(r"<dt>step (\d+)</dt>", page)
    assert steps[0] == "1" and steps[-1] == "100" and len(steps) == 8


@pytest.mark.usefixtures("without_pictures")
def test_without_answers_the_page_says_how_to_get_them(tmp_path):
    page = make_run(tmp_path, [row(1), row(2)], [{"step": 2, "loss": 1.0}])
    assert "No answers were written down" in page


RECORD = {"layout": [2, 1, 2], "run": "beef", "seed": 42, "model": {"model_config": {"hidden_size": 64}},
          "lr_schedule": {"learning_rate": 0.001}, "finished": ["model"], "ended": "2026-01-01 02:00:00 +0000",
          "starts": [{"time": "2026-01-01 01:00:00 +0000", "device_target": "CPU",
                      "command": "mindformers run --config 'a<b>.yaml'"}]}


@pytest.mark.usefixtures("without_pictures")
def test_settings_commands_and_devices_are_those_of_the_record(tmp_path):
    page = make_page(write_run(tmp_path, [row(1), row(2)], record=RECORD))
    assert ("2 steps, finished. Its steps took 9.5 s on 4 devices (CPU), 38 s of a device in all; from start to end it "
            "took 1 h 0 min.") in page
    assert "<pre>mindformers run --config &#x27;a&lt;b&gt;.yaml&#x27;</pre>" in page
    found = facts(page)
    assert (found["lr_schedule.learning_rate"], found["model.model_config.hidden_size"]) == ("0.001", "64")
    assert found["devices"] == "4" and "run" not in found and "starts" not in found


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("change", [{"ended": None}, {"ended": "soon"}, {"starts": RECORD["starts"] * 2},
                                    {"starts": []}, {"starts": "never"}])
def test_how_long_a_run_took_is_said_only_where_it_is_known(tmp_path, change):
    page = make_page(write_run(tmp_path, [row(1), row(2)], record={**RECORD, **change}))
    assert "on 4 devices" in page and "from start to end" not in page


@pytest.mark.usefixtures("without_pictures")
def test_a_damaged_record_is_named_and_the_rest_is_shown(tmp_path, capsys):
    write_run(tmp_path, [row(1), row(2)])
    (tmp_path / "run_config.json").write_text('{"layout": [1,')
    page = make_page(tmp_path)
    assert "The settings are not shown" in page and "run_config.json is not valid JSON" in capsys.readouterr().err
    assert "on which devices was not written down" in page and charts(page)


@pytest.mark.usefixtures("without_pictures")
def test_rows_with_values_of_other_kinds_do_not_stop_a_report(tmp_path):
    odd = row(2, learning_rate="fast", sources=[1], tokens="many", grad_norm=None)
    page = make_run(tmp_path, [row(1, sources={"a": {"loss": 1.0}}), odd, {**row(3), "seconds": "long"}],
                    [{"step": "x", "loss": 1.0}, {"step": 2, "loss": "low"}])
    assert facts(page)["steps"] == "2" and charts(page)["Learning rate"]["lines"][0]["x"] == [1]


@pytest.mark.usefixtures("without_pictures")
def test_several_runs_are_compared_on_one_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = {**RECORD, "lr_schedule": {"learning_rate": 0.01}}
    first = write_run(tmp_path / "first", [row(1), row(2)], [{"step": 2, "loss": 0.5, "anls": 1.0}], record=RECORD)
    second = write_run(tmp_path / "second", [row(1), row(2), row(3)], record=other)
    page = make_page(first, second)
    assert page == (tmp_path / "comparison.html").read_text(encoding="utf-8")
    lines = charts(page)["Loss"]["lines"]
    assert [(line["name"], line["colour"], len(line["x"])) for line in lines] == [
        ("first", 0, 2), ("second", 1, 3), ("first, held-out", 0, 1)]
    assert "<td class=word>lr_schedule.learning_rate</td><td class=word>0.001</td><td class=word>0.01</td>" in page
    assert "<td class=word>steps</td><td>2</td><td>3</td>" in page and "hidden_size" not in page
    assert not (first / "report").exists() and not (first / "report.html").exists()
    assert "Last answers" not in page
    make_page(first, second)       # the page of before is replaced


@pytest.mark.usefixtures("without_pictures")
def test_compared_runs_show_their_last_answers_to_the_same_questions(tmp_path):
    def said(step, answer, question="What?"):
        return {"step": step, "answers": [{"sample": "1", "question": question, "expected": "cat", "answer": answer}]}

    runs = [write_run(tmp_path / "a", [row(1)], answers=[said(1, "old"), said(2, "cat")]),
            write_run(tmp_path / "b", [row(1)], answers=[said(3, "dog")]),
            write_run(tmp_path / "c", [row(1)], answers=[said(3, "x", "Another?")]),
            write_run(tmp_path / "d", [row(1)])]
    page = make_page(*runs, page=str(tmp_path / "all.html"))
    card, = re.findall(r'<article class="answer">(.*?)</article>', page, re.DOTALL)
    assert re.findall(r"<dt>(.*?)</dt><dd><span class=\"(.*?)\">.*?</span> (.*?)</dd>", card) == [
        ("a, step 2", "good", "cat"), ("b, step 3", "bad", "dog")]


@pytest.mark.usefixtures("without_pictures")
def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / name / "out", [row(1)]) for name in ("a", "b") if (tmp_path / name).mkdir() is None]
    page = make_page(*runs, page=str(tmp_path / "both.html"))
    assert [line["name"] for line in charts(page)["Loss"]["lines"]] == ["a/out", "b/out"]


@pytest.mark.usefixtures("without_pictures")
def test_a_page_of_somebody_else_is_not_replaced_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [str(write_run(tmp_path / name, [row(1)])) for name in ("a", "b")]
    (tmp_path / "comparison.html").write_text("<p>mine</p>")
    with pytest.raises(ConfigError, match=r"comparison\.html is there and is no page of this command"):
        report(Namespace(outputs=runs, page=None, answers=io.StringIO()))
    assert (tmp_path / "comparison.html").read_text() == "<p>mine</p>"
    with pytest.raises(ConfigError, match="is named twice"):
        report(Namespace(outputs=[runs[0], runs[0]], page=None, answers=io.StringIO()))
    with pytest.raises(OSError, match=r"--page .* cannot be written"):
        report(Namespace(outputs=runs, page=str(tmp_path / "no" / "x.html"), answers=io.StringIO()))


def test_the_command_does_not_import_mindspore(tmp_path):
    write_run(tmp_path, [row(1), row(2)])
    program = ("import sys, mindformers_ixc_cli as cli; code = cli.main(['report', sys.argv[1]]); "
               "assert code == 0 and 'mindspore' not in sys.modules and 'mindformers' not in sys.modules")
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env={**os.environ, "LOG_MF_PATH":
                                                                                    str(tmp_path / "log")})
    assert (tmp_path / "report.html").is_file()
