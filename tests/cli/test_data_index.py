"""`mindformers data index` and `data check`: what is built, kept, removed and printed, and the exit code."""
from __future__ import annotations

import gc
import gzip
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

import mindformers_ixc_cli
from mindformers_ixc.cli.data import data
from mindformers_ixc.cli.data_preview import SAMPLES
from mindformers_ixc.data.conversations import ConversationReader
from mindformers_ixc.data.index.holding import Held
from mindformers_ixc.errors import ConfigError, DataError

DEMO = "pkg:mindformers_ixc/demo/train.json"
PAIRS = "pkg:mindformers_ixc/demo/stages/preferences.json"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINDFORMERS_IXC_INDEX", str(tmp_path / "index"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*words):
    """Exit code and what is printed."""
    arguments = mindformers_ixc_cli.parse(["data", *words])
    arguments.answers = io.StringIO()
    return data(arguments), arguments.answers.getvalue()


def rows_of(text):
    """Numbers of the table, by source and column."""
    lines = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    start = next(place for place, line in enumerate(cells) if line and line[0] == "source")
    rows = []
    for line in cells[start + 1:]:
        if len(line) != len(cells[start]):
            break
        rows.append(line)
    return {row[0]: dict(zip(cells[start][1:], (int(cell.replace(",", "")) for cell in row[1:]))) for row in rows}


def sample(number, image=None, text="what is it?"):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "a square"}]
    return {"id": number, "conversations": turns, **({"image": image} if image else {})}


def write(folder):
    for name, size in (("good.png", (50, 40)), ("strip.png", (5000, 3))):
        Image.new("RGB", size).save(folder / name)
    (folder / "bad.png").write_bytes(b"no picture")
    Image.radial_gradient("L").save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:200])
    rows = [sample(0, "good.png"), sample(1, "nowhere.png"), sample(2, "bad.png"), sample(3, "strip.png"),
            {"id": 4, "conversations": []}, sample(5, "good.png"), sample(6, text="word " * 400), sample(7, "cut.png"),
            sample(8)]
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def test_an_index_is_built_and_used_again(tmp_path, capfd):
    for _ in range(2):
        code, printed = run("index", DEMO, "--config", "ixc25_sft_tiny", "--output", "here")
        assert code == 0
        assert f"{DEMO}: 56 samples, 56 pictures" in printed
        assert "train_dataset.data_loader.index_dir: here" in capfd.readouterr().err
    assert len(list((tmp_path / "here").glob("train.json-*/*/index.json"))) == 1


def test_a_check_counts_what_is_wrong_by_kind(tmp_path, capfd):
    path = write(tmp_path)
    code, printed = run("check", str(path), DEMO)
    assert code == 1
    rows = rows_of(printed)
    assert rows[str(path)] == {"samples": 9, "pictures": 4, "rounds": 5, "missing": 1, "damaged": 1, "wrong": 1,
                               "unusable": 1, "twice": 1, "cut": 0, "left out": 1}
    assert rows["all"]["samples"] == 65
    assert all(text in printed for text in ("nowhere.png does not exist", "bad.png is no image file",
                                              "field conversations", "strip.png", "positions of a sample", "goodput"))
    assert f"4 of 9 samples of {path} cannot be used" in capfd.readouterr().err
    assert "Of 61 samples that can be used, 0 (0.0%) are cut between whole rounds and 1 (1.6%) are left out" in printed


def test_a_source_that_cannot_be_read_is_named_beside_the_others(tmp_path, capfd):
    (tmp_path / "bad.tar").write_bytes(b"no shard" * 200)
    code, printed = run("check", DEMO, str(tmp_path / "bad.tar"), "nowhere.json")
    assert code == 1
    assert rows_of(printed)[DEMO]["samples"] == 56
    assert "bad.tar is no tar file" in printed and "nowhere.json does not exist" in printed
    assert "2 of 3 sources cannot be read" in capfd.readouterr().err
    with pytest.raises(DataError, match=r"bad\.tar is no tar file"):
        run("check", str(tmp_path / "bad.tar"))


def test_everything_that_cannot_be_used_is_listed_in_a_file(tmp_path):
    path = write(tmp_path)
    (tmp_path / "bad.tar").write_bytes(b"no shard" * 200)
    run("check", str(path), str(tmp_path / "bad.tar"), "--bad", "bad.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["sample"], row["kind"]) for row in rows] == [
        (None, "unreadable"), (1, "missing"), (2, "damaged"), (4, "wrong"), (3, "unusable")]
    assert all(row["source"] in row["problem"] for row in rows)


def test_samples_of_two_sources_may_be_the_same(tmp_path):
    _, printed = run("check", DEMO, DEMO)
    assert "56" in next(line for line in printed.splitlines() if line.startswith("all")).split()


def test_few_bad_samples_are_left_out_and_told(tmp_path, capfd):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([sample(number) for number in range(150)] + [sample(150, "nowhere.png")]))
    code, printed = run("index", str(path))
    assert code == 0 and "151 samples" in printed and "1 left out" in printed
    assert "sample 150" in capfd.readouterr().err
    code, _ = run("check", str(path))
    assert code == 0
    with pytest.raises(DataError, match=r"nowhere\.png does not exist"):
        run("index", str(path), "--train_dataset.max_bad_share", "0")


def test_pixels_are_looked_at_where_that_is_asked_for(tmp_path, capfd):
    path = write(tmp_path)
    _, printed = run("check", str(path), "--decode")
    assert rows_of(printed)[str(path)]["damaged"] == 2


def test_good_data_ends_well():
    code, printed = run("check", DEMO, "--config", "ixc25_sft_tiny")
    assert code == 0
    row = rows_of(printed)[DEMO]
    assert [row[name] for name in ("missing", "damaged", "wrong", "twice")] == [0] * 4


def test_a_check_draws_histograms_and_writes_a_page(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra report")
    run("check", str(write(tmp_path)), "--png", "lengths.png", "--output", "page.html")
    with Image.open("lengths.png") as drawn:
        assert drawn.size[0] > 900 and len(set(drawn.convert("RGB").getdata())) > 3
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "nowhere.png does not exist" in page and "good.png" in page


def readings(monkeypatch):
    """Numbers of the samples that are read from now on."""
    read, seen = ConversationReader.read, []
    monkeypatch.setattr(ConversationReader, "read", lambda self, index, place: (seen.append(index),
                                                                                read(self, index, place))[1])
    return seen


def test_the_page_of_a_check_reads_only_what_it_shows(tmp_path, monkeypatch):
    path = tmp_path / "many.jsonl"
    path.write_text("\n".join(json.dumps(sample(number, text=f"what is {number}?")) for number in range(400)))
    run("index", str(path))
    seen = readings(monkeypatch)
    run("check", str(path), "--output", "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(seen) == SAMPLES == page.count('<article class="sample"')
    assert "<strong>400</strong>" in page and "drawn by chance" not in page
    assert "what" in page and "399" in page


def test_a_page_of_an_index_counts_what_one_of_samples_counts(tmp_path):
    path = str(write(tmp_path))
    run("check", path, "--output", "indexed.html")
    arguments = mindformers_ixc_cli.parse(["data", "preview", path, "--output", "read.html"])
    arguments.answers = io.StringIO()
    data(arguments)
    cards = [re.findall(r'<div class="card"><span>([^<]*)</span><strong>([^<]*)</strong>', Path(name).read_text())
             for name in ("indexed.html", "read.html")]
    numbers = [dict(found) for found in cards]
    assert numbers[0].pop("uses of pictures") == "3" and numbers[1].pop("pictures") == "2"
    assert numbers[0] == numbers[1]


def test_data_without_a_usable_sample_gives_no_page(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([sample(0, "nowhere.png")]))
    with pytest.raises(DataError, match=r"No sample can be used, so .* page\.html is not written"):
        run("check", str(path), "--output", "page.html")
    assert not (tmp_path / "page.html").exists()


def test_preference_pairs_are_indexed_and_checked(tmp_path):
    code, printed = run("index", PAIRS, "--config", "ixc25_dpo_tiny")
    assert code == 0 and f"{PAIRS}: 96 samples, 96 pictures" in printed
    rows = [{"id": 0, "prompt": "what?", "chosen": "a", "rejected": "b"},
            {"id": 1, "prompt": "what?", "chosen": "a", "rejected": "a"},
            {"id": 2, "prompt": "what?", "chosen": "word " * 400, "rejected": "b"},
            {"id": 3, "prompt": "what?", "chosen": "a", "rejected": "b"}]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    code, printed = run("check", str(path), "--config", "ixc25_dpo_tiny", "--output", "page.html")
    assert code == 1
    assert rows_of(printed)[str(path)] == {"samples": 4, "pictures": 0, "rounds": 3, "missing": 0, "damaged": 0,
                                           "wrong": 1, "unusable": 0, "twice": 1, "cut": 0, "left out": 1}
    assert "chosen equals rejected" in printed and "positions of a sample" in printed
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<strong>rejected</strong>") == 3 and "chosen equals rejected" in page


def test_what_is_kept_is_listed_and_cleaned(tmp_path, capfd):
    (tmp_path / "one.json").write_text(json.dumps([sample(0), sample(1)]))
    (tmp_path / "two.json").write_text(json.dumps([sample(0)]))
    assert run("index", "--list") == (0, f"Nothing is kept in {tmp_path / 'index'}.\n")
    run("index", "one.json", "two.json")
    (tmp_path / "two.json").write_text(json.dumps([sample(0), sample(1), sample(2)]))
    _, printed = run("index", "--list")
    lines = [re.split(r"\s{2,}", line) for line in printed.splitlines()]
    assert lines[0] == ["of", "what", "samples", "size", "last used", "state"]
    assert [line[:3] + line[-1:] for line in lines[1:3]] == [
        ["one.json", "index: hd_num 4, 112 pixels", "2", "current"],
        ["two.json", "index: hd_num 4, 112 pixels", "1", "outdated: source has changed"]]
    assert "of them outdated" in printed and "--clean` removes what is outdated" in capfd.readouterr().err
    _, printed = run("index", "--list", "one.json")
    assert "one.json" in printed and "two.json" not in printed
    _, printed = run("index", "--clean")
    assert "two.json" in printed and "Removed 1 entry" in printed and "one.json" not in printed
    assert run("index", "--clean")[1] == f"Nothing in {tmp_path / 'index'} is outdated.\n"
    assert "Removed 1 entry" in run("index", "--clean", "--all")[1]
    assert list((tmp_path / "index").iterdir()) == []


def test_unpacked_files_are_listed_and_cleaned_too(tmp_path):
    with gzip.open("one.jsonl.gz", "wt") as file:
        file.write(json.dumps(sample(0)) + "\n")
    run("index", "one.jsonl.gz")
    printed = run("index", "--list")[1]
    assert [line.split()[:2] for line in printed.splitlines()[1:3]] == [["one.jsonl.gz", "index:"],
                                                                        ["one.jsonl.gz", "unpacked"]]
    gc.collect()
    (tmp_path / "one.jsonl.gz").unlink()
    assert "outdated: source is gone" in (printed := run("index", "--clean")[1]) and "Removed 2 entries" in printed
    assert not list(tmp_path.glob("cache/mindformers_ixc/unpacked/*"))


def test_what_is_in_use_is_said_and_kept(tmp_path, capfd):
    (tmp_path / "one.json").write_text(json.dumps([sample(0)]))
    run("index", "one.json", "--output", "here")
    held = Held(next(tmp_path.glob("here/*/*/index.json")).parent)
    assert "in use" in run("index", "--list", "--output", "here")[1]
    assert run("index", "--clean", "--all", "--output", "here") == (0, "")
    assert "1 entry, " in (said := capfd.readouterr().err) and held.folder.name in said
    assert held.folder.exists()


@pytest.mark.parametrize(("words", "message"), [
    (["check", DEMO, "--list"], "--list, --clean and --all belong to `mindformers data index`"),
    (["index", "--list", "--clean"], "give one of them"),
    (["index", DEMO, "--output", __file__], "--output .* cannot be used: .* is no folder"),
    (["index", "--clean", "--output", __file__], "--output .* cannot be used: .* is no folder"),
    (["index", "--list", "--all"], "--all belongs to --clean"),
    (["index", "--clean", "x.json"], "goes through the whole folder of indices, so x.json cannot be named"),
    (["index", "--list", "--hd_num", "3"], "--hd_num is no option of"),
    (["index", DEMO, "--decode"], "--decode, --png and --bad belong to `mindformers data check`"),
    (["plan", DEMO, "--output", "x"], "--output belongs to"),
    (["check", DEMO, "--png", "no/where.png"], "no is no folder"),
    (["check", "nowhere.json"], "nowhere.json does not exist"),
])
def test_what_cannot_be_done_is_one_sentence(words, message):
    with pytest.raises((ConfigError, DataError, OSError), match=message):
        run(*words)
