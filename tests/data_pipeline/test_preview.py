"""Samples as `mindformers data preview` looks at them, against the rows that a run reads."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from indexed import fit_samples, load_sources, read_image_sizes
from PIL import Image

from mindformers_ixc.cli.preview_page import headline
from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.data import preview, preview_data
from mindformers_ixc.data.batch import BATCH_COLUMNS, PACKING_COLUMNS
from mindformers_ixc.data.preferences import PreferenceTable, load_preferences
from mindformers_ixc.data.preview import GIVEN, LEARNT, PICTURE, look
from mindformers_ixc.data.preview_data import Reader, choose, named, read_data
from mindformers_ixc.data.rows import ConversationTable
from mindformers_ixc.errors import DataError

ROOT = Path(__file__).parents[2]
DEMO = "pkg:mindformers_ixc/demo/train.json"
MULTI = "pkg:mindformers_ixc/demo/multi.json"
PAIRS = "pkg:mindformers_ixc/demo/stages/preferences.json"
VIDEO = ROOT / "tests" / "data" / "goldens" / "video_port.mp4"


def reader(pairs: bool = False, **fields) -> Reader:
    return Reader.of({**read_yaml("ixc25_own_tiny")["train_dataset"], **fields}, pairs)


def talk(*texts: str, **keys) -> dict:
    return {"conversations": [{"from": "human" if i % 2 == 0 else "bot", "value": said}
                              for i, said in enumerate(texts)], **keys}


@pytest.fixture
def folder(tmp_path):
    """Pictures of several shapes, one of them damaged behind its header, one missing."""
    Image.new("RGB", (400, 300), "red").save(tmp_path / "wide.png")
    Image.new("RGB", (90, 700), "blue").save(tmp_path / "tall.png")
    Image.effect_noise((300, 300), 80).convert("RGB").save(tmp_path / "whole.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:5000])
    Image.new("RGB", (3000, 2), "blue").save(tmp_path / "line.png")
    return tmp_path


def write(folder: Path, *rows: dict, name: str = "data.json") -> str:
    (folder / name).write_text(json.dumps(rows))
    return str(folder / name)


def rows_of(reading: Reader, files: object, packed: bool = False) -> ConversationTable:
    """The table that MindSpore's worker processes read, made as a run makes it."""
    samples = load_sources(files, seed=reading.seed)
    read_image_sizes(samples)
    budget, segments = reading.budget, reading.budget.max_segments if packed else None
    fitted = fit_samples(reading.processor, samples, budget.seq_length, budget.max_tiles, reading.hd_num,
                         max_images=budget.max_images, max_segments=segments)
    columns = (*BATCH_COLUMNS, *(PACKING_COLUMNS if packed else ()))
    return ConversationTable(reading.processor, fitted, budget.seq_length, budget.max_tiles,
                             reading.hd_num, max_images=budget.max_images, max_segments=segments, columns=columns)


def check_row(seen: preview.Seen, boards: list[preview.Board], row: dict[str, np.ndarray], max_tiles: int,
              pad: int) -> None:
    """Compares everything that is shown of a conversation with the row of a batch."""
    targets = np.flatnonzero(row["labels"] != -100) + 1
    count = seen.positions
    assert count == targets[-1] + 1, "the last position that is not padding is the end of the text, which is learnt"
    assert seen.supervised == len(targets)
    shown = {kind: [one.first + i for one in seen.stretches if one.kind == kind for i in range(len(one.ids))]
             for kind in (PICTURE, LEARNT, GIVEN)}
    assert shown[LEARNT] == targets.tolist()
    assert shown[PICTURE] == np.flatnonzero(row["image_mask"]).tolist()
    assert sorted(place for places in shown.values() for place in places) == list(range(count))
    assert [index for one in seen.stretches for index in one.ids] == row["input_ids"][:count].tolist()
    assert (row["input_ids"][count:] == pad).all()
    assert [one.positions for one in boards] == [len(one.ids) for one in seen.stretches if one.kind == PICTURE]
    views = np.flatnonzero(row["view_index"]).tolist()
    assert [one.first for one in boards] == views
    assert seen.encoded.tiles == sum(one.grid.tiles + 1 for one in boards) <= max_tiles
    side = row["pixel_values"].shape[-1]
    for board in boards:
        for number in range(board.grid.tiles):
            top, left = (side * place for place in divmod(number, board.grid.columns))
            shown_tile = board.pixels[top:top + side, left:left + side]
            assert np.array_equal(shown_tile.transpose(2, 0, 1), row["pixel_values"][board.first + 1 + number])


@pytest.mark.parametrize("packed", [False, True], ids=["alone", "packed"])
def test_what_is_shown_is_the_row_that_a_run_reads(folder, packed):
    path = write(folder, talk("What?", "A wall", image="wide.png"),
                 talk("<ImageHere> or <ImageHere>?", "this", "Why? <s>", "so", image=["tall.png", "wide.png"]),
                 talk("Only text, 中文?", "Ja"), talk("moving", "yes", video=str(VIDEO)))
    reading = reader(seq_length=700, max_tiles=24, max_images=4, packing=packed, max_segments=4, hd_num=6)
    data = read_data(reading, [path, MULTI])
    table = rows_of(reading, [path, MULTI], packed)
    assert len(data.measured) == len(table) == 10
    for entry, place in zip(data.measured, range(len(table))):
        found = look(reading, entry)
        row = dict(zip(table.columns, table[place]))
        check_row(found.seen[0], found.boards, row, 24, reading.processor.pad_token_id)
        assert (entry.positions, entry.tiles) == (found.seen[0].positions, found.seen[0].encoded.tiles)
        if packed:
            assert row["segment_ends"][0] == found.seen[0].positions


def test_control_tokens_are_learnt_as_a_run_learns_them(folder):
    path = write(folder, talk("Say [UNUSED_TOKEN_145] now", "yes </s> no", "and", "on"))
    reading = reader(control_tokens=True, seq_length=400)
    entry, = read_data(reading, path).measured
    table = rows_of(reading, path)
    row, seen = dict(zip(table.columns, table[0])), look(reading, entry).seen[0]
    targets = (np.flatnonzero(row["labels"] != -100) + 1).tolist()
    assert [one.first + i for one in seen.stretches if one.kind == LEARNT for i in range(len(one.ids))] == targets
    assert 0 < seen.supervised == len(targets)


def test_both_sides_of_a_pair_are_shown():
    reading = reader(True)
    data = read_data(reading, PAIRS)
    pairs = load_preferences(PAIRS)
    read_image_sizes(pairs)
    table = PreferenceTable(reading.processor, pairs, seq_length=160, max_tiles=5, hd_num=4)
    for number in (0, 50):
        found = look(reading, data.measured[number])
        row = dict(zip(table.columns, table[number]))
        for side, seen in enumerate(found.seen):
            own = {**row, **{name: row[name][side] for name in ("input_ids", "labels", "image_mask", "vision_index")}}
            check_row(seen, found.boards, own, 5, reading.processor.pad_token_id)
    assert len(data.measured) == 96 and data.measured[0].positions == max(seen.positions for seen in look(
        reading, data.measured[0]).seen)


def test_pairs_are_found_out_or_refused():
    assert read_data(reader(), PAIRS, guess=True).reader.pairs
    with pytest.raises(DataError, match="has preference pairs, and the YAML trains on conversations"):
        read_data(reader(), PAIRS)


def test_what_is_cut_and_what_is_left_out(folder):
    long = talk(*(f"{word} {i}" for i in range(30) for word in ("question", "answer")))
    path = write(folder, long, talk("a " * 200, "b"), talk("What?", "A wall", image="wide.png"))
    reading = reader()
    cut, out, fits = read_data(reading, path).measured
    assert (fits.kept, fits.rounds, out.kept, out.rounds, cut.rounds) == (1, 1, 0, 1, 30)
    table = rows_of(reading, path)
    assert 0 < cut.kept < 30 and 2 * cut.kept == len(table.samples[0].turns)
    assert cut.positions > 160 < out.positions, "what is measured is uncut"
    check_row(look(reading, cut).seen[0], [], dict(zip(table.columns, table[0])), 5, reading.processor.pad_token_id)
    assert look(reading, out).seen[0].positions == out.positions


def test_what_is_wrong_is_listed_and_ends_nothing(folder):
    path = write(folder, talk("ok?", "ok"), talk("?", "x", image="gone.png"), talk("?", "x", imgs="y"),
                 talk("?", "x", image="line.png"), talk("?", "x", image="broken.jpg"), talk("ok?", "ok too"))
    (folder / "cell.csv").write_text("image,question,answer\nwide.png,Q,A\nnone.png,Q,A\n")
    data = read_data(reader(), [path, str(folder / "cell.csv")])
    assert [entry.number for entry in data.measured] == [0, 4, 5, 6]
    assert [(number, word in sentence) for (number, sentence), word in zip(
        data.problems, ("gone.png does not exist", "imgs", "none.png does not exist"))] == [
        (1, True), (2, True), (7, True)]
    (number, sentence), = data.uncut
    assert number == 3 and "line.png" in sentence and "too elongated" in sentence
    assert data.count == 8
    assert "broken.jpg is damaged" in look(data.reader, data.measured[1]).problem


@pytest.mark.parametrize(("number", "message"), [
    (1, "gone.png does not exist"), (2, "too elongated"), (3, "numbered 0 to 2"), (-1, "numbered 0 to 2")])
def test_a_number_that_cannot_be_shown_is_refused(folder, number, message):
    data = read_data(reader(), write(folder, talk("ok?", "ok"), talk("?", "x", image="gone.png"),
                                     talk("?", "x", image="line.png")))
    with pytest.raises(DataError, match=message):
        named(data, [number])


def test_data_without_a_usable_sample_is_refused(folder):
    with pytest.raises(DataError, match=r"None of the 2 samples that .* can be used\. .*gone\.png does not exist"):
        read_data(reader(), write(folder, talk("?", "x", image="gone.png"), talk("?", "x", image="line.png")))
    with pytest.raises(DataError, match=r"^.*sample 0 .*line\.png: A picture of 3000 x 2"):
        read_data(reader(), write(folder, talk("?", "x", image="line.png")))


def test_a_list_file_says_what_is_taken(folder):
    write(folder, *(talk(f"q{i}", "a") for i in range(3)), name="a.json")
    write(folder, talk("?", "x", image="gone.png"), talk("b", "b"), name="b.json")
    (folder / "list.txt").write_text("a.json 0.2\nb.json 0.001\n")
    data = read_data(reader(), str(folder / "list.txt"))
    assert [(Path(one.name).name, one.first, one.count, one.taken) for one in data.sources] == [
        ("a.json", 0, 3, 200), ("b.json", 3, 2, 1)]
    assert [entry.number for entry in data.measured] == [0, 1, 2, 4]


def test_samples_are_chosen_evenly_and_of_every_source(folder):
    files = [write(folder, *(talk(f"q{i}", "a") for i in range(count)), name=f"{count}.json") for count in (90, 1, 9)]
    data = read_data(reader(), files)
    assert [entry.number for entry in choose(data, 5)] == [0, 44, 89, 90, 91]
    assert [entry.number for entry in choose(data, 12)] == [0, 10, 20, 30, 40, 49, 59, 69, 79, 89, 90, 91]
    assert [entry.number for entry in choose(data, 2)] == [0, 99], "fewer than there are sources"
    assert len(choose(data, 1000)) == 100


def test_of_much_data_some_is_measured_and_any_can_be_shown(folder, monkeypatch):
    monkeypatch.setattr(preview_data, "MEASURED", 10)
    path = write(folder, *(talk(f"q{i}", "a") for i in range(50)))
    data, again = read_data(reader(), path), read_data(reader(), path)
    assert data.count == 50 and len(data.measured) == 10
    assert [entry.number for entry in data.measured] == [entry.number for entry in again.measured]
    assert headline(data)["left out"] == "0.0% of 10" and headline(data)["samples"] == "50"
    other = next(number for number in range(50) if number not in [entry.number for entry in data.measured])
    entry, = named(data, [other, other])
    assert entry.number == other and entry.positions > 0 and entry.kept == 1


def test_of_much_data_only_the_samples_that_are_named_are_read(folder, monkeypatch):
    monkeypatch.setattr(preview_data, "MEASURED", 10)
    path = write(folder, *(talk(f"q{i}", "a", **({"image": "gone.png"} if i == 7 else {})) for i in range(50)))
    data = read_data(reader(), path, wanted=[33, 4, 33])
    assert [entry.number for entry in data.measured] == [4, 33] and data.count == 50 and data.named
    assert [entry.sides[0].turns[0][1] for entry in named(data, [33, 4, 33])] == ["q33", "q4"]
    assert headline(data)["samples"] == "50" and headline(data)["read"] == "2"
    with pytest.raises(DataError, match=r"sample 7 .*gone\.png does not exist"):
        read_data(reader(), path, wanted=[7])
    with pytest.raises(DataError, match=r"--sample 50 is none of the data: its 50 samples are numbered 0 to 49"):
        named(read_data(reader(), path, wanted=[50]), [50])


def test_pictures_that_fill_the_memory_are_not_decoded(folder, monkeypatch):
    monkeypatch.setattr(preview, "LARGEST", 1 << 18)
    path = write(folder, talk("<ImageHere><ImageHere><ImageHere>", "x", image=["wide.png"] * 3))
    reading = reader()
    entry, = read_data(reading, path).measured
    found = look(reading, entry)
    assert not found.seen and found.problem == "Its 3 pictures have 15 tiles, too many to be shown."
