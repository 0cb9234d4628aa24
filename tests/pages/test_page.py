"""What every page is made of, and, where a browser is installed, what its program draws."""
from __future__ import annotations

import json
import re
import subprocess

import pytest
from needed import chromium

from mindformers_ixc.pages.page import POINTS, Markup, chart, duration, line, page, table, text


def test_text_is_only_text():
    assert text('<b> & "c" \'d\'') == "&lt;b&gt; &amp; &quot;c&quot; &#x27;d&#x27;"
    assert text("half \ud83d") == "half ?"


def test_numbers_in_a_page_cannot_end_their_element():
    name = "</script><script>alert(1)</script>&<!--"
    made = page("t", "", [{"title": name, "lines": [line(name, [(1, 2.0)])]}])
    assert "alert(1)</script>" not in made and made.count("<script") == 2
    inside, = re.findall(r'id="charts">(.*?)</script>', made)
    assert json.loads(inside)[0]["title"] == name


def test_what_is_no_number_is_not_drawn():
    found = line("x", [(1, float("nan")), (2, 1.23456789), (3, float("inf"))], clock={1: 0.1, 2: 0.25})
    assert (found["x"], found["y"], found["t"]) == ([2], [1.23457], [0.25])
    assert line("x", [(5, 1.0)], clock={1: 0.1})["t"] == [None]


def test_of_too_many_points_the_peaks_stay():
    points = [(step, 1.0) for step in range(100_000)]
    points[12_345], points[54_321] = (12_345, 99.0), (54_321, -7.0)
    found = line("x", points)
    assert len(found["x"]) <= POINTS and found["x"] == sorted(set(found["x"]))
    assert dict(zip(found["x"], found["y"]))[12_345] == 99.0 and dict(zip(found["x"], found["y"]))[54_321] == -7.0
    means = dict(zip(found["x"], found["mean"]))
    assert means[12_345] == pytest.approx(1.98) and means[0] == 1.0       # of 100 points, one of which is 99
    few = line("x", points[:POINTS])
    assert len(few["x"]) == POINTS and "mean" not in few


def test_cells_of_a_table_are_text_unless_they_say_otherwise():
    made = table(["a<", "b"], [["<i>", Markup("<b>bold</b>")]])
    assert "<th class=word>a&lt;</th><th>b</th>" in made
    assert "<td class=word>&lt;i&gt;</td><td><b>bold</b></td>" in made


@pytest.mark.parametrize(("seconds", "words"), [
    (0.25, "0.25 s"), (59.94, "59.9 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"),
    (90000, "1 d 1 h")])
def test_times_are_said_as_people_do(seconds, words):
    assert duration(seconds) == words


# Presses and points, then leaves in the page what has come of it.
ACTIONS = """<script>
const out = {}, plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
const drawn = () => Array.from(plot.querySelectorAll("path.curve")).map((one) => one.getAttribute("d"));
out.curves = drawn().length; out.raw = plot.querySelectorAll("path.raw").length;
out.marks = plot.querySelectorAll("circle").length; out.before = drawn();
plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width / 2, clientY: box.top + 20}));
out.hover = document.getElementById("hover").innerText;
document.querySelector("figcaption button").click(); out.logarithmic = drawn();
const slider = document.getElementById("smoothing"); slider.value = 0; slider.dispatchEvent(new Event("input"));
out.unsmoothed = plot.querySelectorAll("path.raw").length;
const axis = document.getElementById("axis"); axis.value = "t"; axis.dispatchEvent(new Event("change"));
out.time = axis.innerText + plot.textContent;
document.querySelectorAll(".legend button")[1].click(); out.one = drawn().length;
const end = document.createElement("pre"); end.id = "result"; end.textContent = JSON.stringify(out);
document.body.append(end);
</script></body>"""


def test_a_browser_draws_the_curves_and_follows_the_pointer(tmp_path):
    clock = {step: 6 * step / 3600 for step in range(1, 101)}      # ten minutes
    training = line("<i>training", [(step, 8.0 / step) for step in range(1, 101)], 0, clock, smooth=True)
    held_out = line("held-out", [(50, 0.5), (100, 0.25)], 1, clock, marks=True)
    controls = '<input type="range" id="smoothing" max="0.98" step="0.02" value="0.6"><output id="smoothing-value">' \
               '</output><select id="axis"><option value="x">steps</option><option value="t">hours</option></select>'
    made = page("t", controls + chart(0, "Loss"), [{"title": "Loss", "lines": [training, held_out]}])
    target = tmp_path / "page.html"
    target.write_text(made.replace("</body>", ACTIONS), encoding="utf-8")
    shown = subprocess.run([chromium(), "--headless", "--no-sandbox", "--disable-gpu",
                            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,700", "--dump-dom",
                            target.as_uri()], check=True, capture_output=True, text=True, timeout=300).stdout
    result, = re.findall(r'<pre id="result">(.*?)</pre>', shown)
    found = json.loads(result.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert (found["curves"], found["raw"], found["marks"]) == (2, 1, 2)
    assert "<i>training" in found["hover"] and "smoothed" in found["hover"] and "held-out" in found["hover"]
    step = int(re.search(r"step (\d+)", found["hover"])[1])
    assert 40 < step < 60 and f"{8 / step:.4g}" in found["hover"]
    assert found["logarithmic"] != found["before"] and len(found["logarithmic"]) == 2
    assert "minutes" in found["time"] and "minutes in steps" in found["time"] and "10" in found["time"]
    assert found["unsmoothed"] == 0 and found["one"] == 1
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", found["logarithmic"][0])]
    assert heights == sorted(heights)       # a falling curve falls on a logarithmic axis too
