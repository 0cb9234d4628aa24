"""What `mindformers data preview` writes, prints and refuses."""
from __future__ import annotations

import argparse
import base64
import html
import io
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from needed import chromium
from PIL import Image

from mindformers_ixc import terminal
from mindformers_ixc.cli import preview_page
from mindformers_ixc.cli.data import data as data_command
from mindformers_ixc.cli.data_section import read_section
from mindformers_ixc.cli.inputs import check_inputs
from mindformers_ixc.cli.preview_text import clipped, token_texts, visible
from mindformers_ixc.data.preview import GIVEN, LEARNT, PICTURE, Stretch
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.processing.tokenizer import Tokenizer
from mindformers_ixc_cli import parse

DEMO = "pkg:mindformers_ixc/demo/train.json"
PAIRS = "pkg:mindformers_ixc/demo/stages/preferences.json"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> tuple[str, list[str]]:
    """The page and the lines that the command prints."""
    arguments = parse(["data", "preview", *words])
    arguments.answers = io.StringIO()
    check_inputs(arguments)
    assert data_command(arguments) == 0
    *lines, target = arguments.answers.getvalue().splitlines()
    return Path(target).read_text(encoding="utf-8"), lines


def talk(*texts: str, **keys) -> dict:
    return {"conversations": [{"from": "human" if i % 2 == 0 else "bot", "value": said}
                              for i, said in enumerate(texts)], **keys}


def write(*rows: dict, name: str = "data.json") -> str:
    Path(name).write_text(json.dumps(rows))
    return name


def articles(page: str) -> dict[int, str]:
    return {int(number): inside for number, inside in re.findall(
        r'<article class="sample" id="sample-(\d+)">(.*?)</article>', page, re.DOTALL)}


def plain(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))


def cards(page: str) -> dict[str, str]:
    return dict(re.findall(r'<div class="card"><span>([^<]*)</span><strong>([^<]*)</strong>', page))


def test_the_demo_as_a_page():
    page, lines = run(DEMO)
    assert lines == []
    assert not re.search(r"https?:|<link|url\(|@import|<script[^>]* src", page) and len(page) < 500_000
    assert cards(page) == {"samples": "56", "pictures": "12", "questions": "56", "without a picture": "0", "cut": "0",
                           "left out": "0"}
    shown = articles(page)
    assert list(shown) == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55]
    first = shown[0]
    assert "119 positions, 10 of them with loss (8.4%), 5 tiles" in plain(first)
    assert "train.json, sample 0, id astronaut-00" in plain(first)
    assert "324 x 448 → 162 x 224, 2 x 2 tiles and the global view, 93 positions" in plain(first)
    learnt, = re.findall(r'<span class="learnt" data-p="109">(.*?)</span>', first, re.DOTALL)
    assert plain(learnt) == "a smiling astronaut[UNUSED_TOKEN_145]↵\n</s>"
    assert first.count("data-t=") == 119 - 93 and first.count("data-tip=\"tile ") == 5
    assert "since no --config was given" in plain(page) and "seq_length 160, max_tiles 5, hd_num 4" in plain(page)


def test_pieces_of_tokens_are_in_the_page():
    page, _ = run(DEMO, "--sample", "3")
    pieces, = re.findall(r'<script type="application/json" id="pieces">(.*?)</script>', page)
    tokens = set(re.findall(r"data-t=(\d+)", page))
    tokenizer = Tokenizer(str(demo_path("tokenizer.model")))
    assert json.loads(pieces) == {token: tokenizer.sp_model.IdToPiece(int(token)) for token in tokens}


def test_a_named_sample_is_printed_too():
    page, lines = run(DEMO, "--sample", "3")
    assert list(articles(page)) == [3]
    assert lines == [
        f"sample 3: {DEMO}, sample 3 (id 'astronaut-03')",
        "  fits a row of 160 positions and 5 tiles",
        "  picture 1: astronaut.jpg, 324 x 448 -> 162 x 224, 2 x 2 tiles and the global view, 93 positions",
        "  113 positions, 5 of them with loss (4.4%), 5 tiles",
        "           0-92  picture  1",
        "         93-107  no loss  <s>[UNUSED_TOKEN_146]user\\nWhich colour stands out most?[UNUSED_TOKEN_145]\\n"
        "[UNUSED_TOKEN_146]assistant\\n",
        "        108-112  loss     orange[UNUSED_TOKEN_145]\\n</s>"]


def test_pictures_are_those_that_the_model_gets_and_small():
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (450, 600, 3), np.uint8)).save("noise.png")
    page, _ = run(write(*(talk(f"q{i}", "a", image="noise.png") for i in range(50))), "--samples", "50")
    assert len(page) < 3_000_000
    found = re.findall(r"base64,([^\"]*)\"", page)
    assert len(found) == 50 and sum(map(len, found)) <= preview_page.ALL_PICTURE_BYTES
    image = Image.open(io.BytesIO(base64.b64decode(found[0])))
    assert image.format == "JPEG" and image.width == image.height, "2 x 2 tiles, a quarter of it white"
    assert np.asarray(image)[-image.height // 5:].min() > 240


def test_very_long_talks_leave_the_page_small():
    words = [said for i in range(400) for said in (f"question {i} " + "wörd " * 20, "answer " * 20)]
    long = ("--train_dataset.seq_length", "100000")
    page, _ = run(write(*(talk(*words) for _ in range(4))), *long)
    assert len(page) < 1_000_000
    shown = articles(page)[0]
    total = int(re.search(r"([\d,]+) positions, ", plain(shown))[1].replace(",", ""))
    missing, = re.findall(r"\.\.\. ([\d,]+) positions of text that are not shown", shown)
    tokens = sum(len(ids.split()) for ids in re.findall(r'data-t="?([\d ]+)', shown))
    assert tokens + int(missing.replace(",", "")) == total > 20_000
    assert "question 0 " in plain(shown) and "question 399 " in plain(shown) and "question 200 " not in plain(shown)


def test_what_is_cut_left_out_or_wrong_is_told():
    Image.new("RGB", (300, 200)).save("a.png")
    Path("broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    page, _ = run(write(
        talk(*(f"{word} {i}" for i in range(30) for word in ("question", "answer"))),
        talk("b " * 200, "c", image="a.png"), talk("?", "x", image="gone.png"),
        talk("?", "x", image="broken.jpg"), talk("ok", "ok")))
    assert {name: value for name, value in cards(page).items() if name in ("cut", "left out", "not usable")} == {
        "cut": "1 (33.3%)", "left out": "1 (33.3%)", "not usable": "2 (40.0%)"}
    shown = {number: plain(inside) for number, inside in articles(page).items()}
    assert list(shown) == [0, 1, 4]
    assert "Cut: of its 30 question-answer pairs the first" in shown[0]
    kept = int(re.search(r"pairs the first (\d+) fit", shown[0])[1])
    assert f"The {30 - kept} question-answer pairs that are cut offuser: question {kept}\n" in shown[0]
    assert "Left out: it does not fit; whole it takes" in shown[1]
    assert "gone.png does not exist" in plain(page) and "broken.jpg" in plain(page)
    assert "--config names the YAML file of a run with longer rows" in plain(page)


def test_text_of_users_is_only_text():
    page, lines = run(write(talk("<script>alert(1)</script>\u202e", 'x" onmouseover="y', id="<i>\"")), "--sample", "0")
    assert "<script>alert" not in page and 'x" onmouseover' not in page and "\u202e" not in page + "".join(lines)
    assert "<script>alert(1)</script>\\u202e" in plain(articles(page)[0])


def test_a_sign_of_several_bytes_is_shown_whole():
    tokenizer = Tokenizer(str(demo_path("tokenizer.model")))
    text = "a 中🦊"
    found = token_texts(tokenizer, tokenizer.encode_text(text))
    assert "".join(shown for shown, _ in found) == text
    assert [len(ids) for shown, ids in found if shown in "中🦊"] == [3, 4]
    assert [index for _, ids in found for index in ids] == tokenizer.encode_text(text)
    half = tokenizer.encode_text("中")[-3:-1]
    assert [shown for shown, _ in token_texts(tokenizer, half)] == ["\\xe4", "\\xb8"]
    assert visible("a\n\t\u202e é", "\\n") == "a\\n\\t\\u202e é"


def test_the_middle_of_many_tokens_is_left_out():
    stretches = [Stretch(GIVEN, 0, [1] * 5), Stretch(PICTURE, 5, [0] * 9), Stretch(LEARNT, 14, [2] * 20),
                 Stretch(PICTURE, 34, [0] * 9), Stretch(GIVEN, 43, [3] * 5)]
    found = [(one.kind, one.first, len(one.ids), gap) for one, gap in clipped(stretches, 12)]
    assert found == [(GIVEN, 0, 5, 0), (PICTURE, 5, 9, 0), (LEARNT, 14, 1, 0), (LEARNT, 33, 1, 18), (PICTURE, 34, 9, 0),
                     (GIVEN, 43, 5, 0)]
    assert [one for one, _ in clipped(stretches, 30)] == stretches
    inside = [(one.kind, gap) for one, gap in clipped([Stretch(GIVEN, i, [1]) for i in range(9)], 2)]
    assert inside == [(GIVEN, 0), (GIVEN, 7)]


def test_tables_folders_lists_and_pairs_are_data():
    Path("mine").mkdir()
    Image.new("RGB", (30, 20)).save("mine/a.png")
    Path("mine/questions.tsv").write_text("question\timage\tanswer\nWhat?\ta.png\tnothing\n")
    assert cards(run("mine")[0])["samples"] == "1"
    Path("list.txt").write_text("mine/questions.tsv 0.01\n")
    listed = run("list.txt", DEMO)[0]
    assert "10 an epoch" in listed and "1 to 56" in listed and "all, once" in listed
    pairs, lines = run(PAIRS, "--config", "ixc25_dpo_tiny", "--sample", "2")
    assert cards(pairs)["preference pairs"] == "96"
    assert [line.split(":")[0].strip() for line in lines if "of them with loss" in line] == ["chosen", "rejected"]


def test_the_yaml_and_overrides_say_how_data_is_read():
    page, _ = run(DEMO, "--config", "ixc25_sft_tiny", "--train_dataset.hd_num", "1", "--samples", "2")
    assert "Read as ixc25_sft_tiny reads it (seq_length 160, max_tiles 5, hd_num 1)" in plain(page)
    assert all("1 tile and the global view, 41 positions" in plain(one) for one in articles(page).values())


@pytest.mark.parametrize(("words", "message"), [
    (["gone.json"], "The data file gone.json does not exist"), (["empty.json"], "one sample, found no samples"),
    ([DEMO, "--sample", "56"], "numbered 0 to 55"), (["gone_picture.json"], "gone.png does not exist"),
    ([DEMO, "--output", "missing/page.html"], "missing is no folder"), ([DEMO, "--output", "."], "is a folder"),
    ([DEMO, "--config", "predict_ixc25"], "has no section train_dataset"), ([DEMO, "--samples", "0"], "at least 1"),
    ([DEMO, "--samples", "51"], "a page has 50 at most"), ([DEMO, "--sample", "1", "--samples", "2"], "one of the two"),
    ([DEMO, "--train_dataset.seq_lenght", "9"], "did you mean seq_length"), (["."], "no table of questions"),
    ([DEMO, "--sample", *map(str, range(51))], "51 samples are asked for"),
    ([DEMO, "--json"], "belong to `mindformers data plan`"), ([DEMO, "--split", "train"], "belong to the published")])
def test_what_is_wrong_is_one_sentence_and_leaves_nothing(words, message):
    write(name="empty.json")
    write(talk("?", "x", image="gone.png"), name="gone_picture.json")
    if words == ["."]:
        for file in Path().iterdir():
            file.unlink()
    before = sorted(Path().iterdir())
    with pytest.raises((ConfigError, DataError, OSError), match=message) as raised:
        run(*words)
    assert "\n" not in str(raised.value)
    assert sorted(Path().iterdir()) == before


def test_somebody_elses_page_stays():
    Path("preview.html").write_text("mine")
    with pytest.raises(ConfigError, match="say with --output"):
        run(DEMO)
    assert Path("preview.html").read_text() == "mine"
    run(DEMO, "--output", "other.html")
    run(DEMO, "--output", "other.html")


def test_options_of_preview_are_refused_elsewhere():
    arguments = parse(["data", "plan", DEMO, "--config", "ixc25_sft_tiny", "--sample", "1"])
    with pytest.raises(DataError, match="belong to `mindformers data preview`"):
        data_command(arguments)
    arguments = parse(["data", "llava", "one.json", "two.json", "--config", "ixc25_sft_tiny"])
    with pytest.raises(DataError, match="--config belongs to"):
        data_command(arguments)


def test_the_terminal_gets_a_summary(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(terminal, "current", terminal.Terminal(said, interactive=False))
    run(DEMO)
    assert said.getvalue().splitlines()[-1] == \
        "56 samples of 1 source: 12 pictures, 56 questions, 0 without a picture, 0 cut, 0 left out."


# Points at a token, at a tile and at a bar, then leaves in the page what is shown.
ACTIONS = """<script>
const out = [], hover = document.getElementById("hover");
const point = (one) => {
  one.dispatchEvent(new PointerEvent("pointermove", {bubbles: true, clientX: 50, clientY: 50}));
  out.push(hover.hidden ? "" : hover.innerText);
};
const learnt = document.querySelector(".tokens .learnt");
point(learnt.children[1]); point(learnt.lastElementChild); point(document.querySelector(".given i"));
point(document.querySelectorAll("rect.over[data-tip^=tile]")[3]); point(document.querySelector("b.picture"));
point(document.querySelector(".histogram rect.over"));
const end = document.createElement("pre"); end.id = "result"; end.textContent = JSON.stringify(out);
document.body.append(end);
</script></body>"""


def test_a_browser_says_what_is_under_the_pointer(tmp_path):
    page, _ = run(DEMO, "--sample", "0")
    path = tmp_path / "acted.html"
    path.write_text(page.replace("</body>", ACTIONS), encoding="utf-8")
    result = subprocess.run([chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                             f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()], capture_output=True, text=True,
                            check=False, timeout=300)
    found, = re.findall(r'<pre id="result">(.*?)</pre>', result.stdout, re.DOTALL)
    second, last, given, tile, picture, bar = json.loads(html.unescape(found))
    assert re.fullmatch(r"position 110: token \d+, .*\nwith loss", second)
    assert last == "position 118: token 2, </s>\nwith loss"
    assert given == "position 93: token 1, <s>\nwithout loss"
    assert tile == "tile 4: row 2 of 2, column 2 of 2, 112 x 112 pixels"
    assert picture.startswith("picture 1: positions 0 to 92") and bar == "75 to 76 positions: 3 samples"


def test_a_key_that_no_yaml_has_is_refused():
    arguments = argparse.Namespace(config=None, rest=["--image_foldr", "x"])
    with pytest.raises(ConfigError, match=r"ixc25_own_tiny: unknown key image_foldr \(value 'x'\)"):
        read_section(arguments)
