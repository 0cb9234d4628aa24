"""Sources that grow: what is appended to JSON lines is measured alone, and the index is the one of the whole file."""
from __future__ import annotations

import json
import os

import numpy as np
import pytest
from test_index import columns, measures, write

from mindformers_ixc.data.conversations import ReadingOptions
from mindformers_ixc.data.index import building, growing
from mindformers_ixc.data.index.building import open_index
from mindformers_ixc.data.index.measuring import Measurer


@pytest.fixture
def measured(monkeypatch):
    """Numbers of the samples that are measured."""
    seen, measure = [], Measurer.measure
    monkeypatch.setattr(building, "PART", 8)
    monkeypatch.setattr(Measurer, "measure", lambda self, places, first: (
        seen.extend(range(first, first + len(places))), measure(self, places, first))[1])
    return seen


def lines(folder, first=0, end=60, captions=False):
    """Lines of conversations, with an empty one among them."""
    rows = json.loads(write(folder, end).read_text())[first:]
    if captions:
        rows = [{"id": row["id"], "image": "1.png", "caption": f"number {row['id']}"} for row in rows]
    text = [json.dumps(row) for row in rows]
    return "\n".join([*text[:3], "", *text[3:]]) + "\n"


def same_as_whole(path, index, folder, options):
    """Whether an index is the one of its source, measured in one go."""
    whole = open_index(path, options, measures(), folder / "whole")
    for name, column in columns(whole).items():
        np.testing.assert_array_equal(column, columns(index)[name])
    np.testing.assert_array_equal(whole.digests, index.digests)
    fields, expected = vars(index.description), vars(whole.description)
    assert sorted(fields["files"]) == sorted(expected["files"])
    return {**fields, "files": 0} == {**expected, "files": 0}


@pytest.mark.parametrize("first", [30, 32, 5])
@pytest.mark.parametrize("newline", [True, False])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_only_what_is_new_is_measured(tmp_path, measured, first, newline, name):
    text = lines(tmp_path)
    begin = "\n".join(text.split("\n")[:first]) + "\n" * newline
    path, options = tmp_path / name, ReadingOptions()
    path.write_text(begin)
    old = open_index(path, options, measures(), tmp_path / "index")
    kept = len(old) // 8 * 8
    del old
    measured.clear()
    path.write_text(text)
    index = open_index(path, options, measures(), tmp_path / "index")
    assert measured == list(range(kept, 60))
    assert len(list(index.folder.parent.glob("*/index.json"))) == 1
    assert same_as_whole(path, index, tmp_path, options)


def test_it_grows_again_and_again_and_goes_on_where_it_was_interrupted(tmp_path, measured, monkeypatch):
    text, path = lines(tmp_path).split("\n"), tmp_path / "data.jsonl"
    for end in (21, 39):
        path.write_text("\n".join(text[:end]) + "\n")
        open_index(path, ReadingOptions(), measures(), tmp_path / "index")
    measured.clear()
    path.write_text("\n".join(text))
    with monkeypatch.context() as patch:
        patch.setattr(building, "write_index", lambda *words: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            open_index(path, ReadingOptions(), measures(), tmp_path / "index")
    assert measured == list(range(32, 60))
    index = open_index(path, ReadingOptions(), measures(), tmp_path / "index")
    assert measured == list(range(32, 60))
    assert same_as_whole(path, index, tmp_path, ReadingOptions())


def another_byte(path, folder):
    content = bytearray(path.read_bytes())
    place = content.index(b"what is it?")
    content[place:place + 4] = b"this"
    path.write_bytes(content)


def another_picture(path, folder):
    os.utime(folder / "1.png", ns=(1, 1))


def joined(path, folder):
    """What was a line goes on now."""
    path.write_bytes(path.read_bytes().rstrip(b"\n") + b" ")


@pytest.mark.parametrize("change", [another_byte, another_picture, joined])
def test_a_beginning_that_changed_is_measured_anew(tmp_path, measured, change):
    text, path = lines(tmp_path).split("\n"), tmp_path / "data.jsonl"
    path.write_text("\n".join(text[:31]) + "\n")
    open_index(path, ReadingOptions(), measures(), tmp_path / "index")
    measured.clear()
    change(path, tmp_path)
    with open(path, "a") as file:
        file.write(("\n" if change is joined else "") + "\n".join(text[31:]))
    index = open_index(path, ReadingOptions(), measures(), tmp_path / "index")
    assert measured == list(range(60))
    assert same_as_whole(path, index, tmp_path, ReadingOptions())


def test_captions_of_another_seed_are_measured_anew(tmp_path, measured):
    text, path = lines(tmp_path, captions=True).split("\n"), tmp_path / "data.jsonl"
    for seed, end, expected in ((0, 31, range(30)), (0, 41, range(24, 40)), (1, 62, range(60))):
        measured.clear()
        path.write_text("\n".join(text[:end]) + "\n")
        options = ReadingOptions(seed=seed)
        index = open_index(path, options, measures(), tmp_path / "index")
        assert measured == list(expected)
    assert same_as_whole(path, index, tmp_path, options)


def test_what_was_measured_otherwise_is_not_taken(tmp_path, measured):
    text, path = lines(tmp_path).split("\n"), tmp_path / "data.jsonl"
    path.write_text("\n".join(text[:31]) + "\n")
    open_index(path, ReadingOptions(), measures(hd_num=2), tmp_path / "index")
    measured.clear()
    path.write_text("\n".join(text))
    open_index(path, ReadingOptions(), measures(), tmp_path / "index")
    assert measured == list(range(60))


def test_a_list_is_measured_anew(tmp_path, measured):
    path = write(tmp_path, 30)
    open_index(path, ReadingOptions(), measures(), tmp_path / "index")
    measured.clear()
    path.write_text(path.read_text()[:-1] + "," + json.dumps(json.loads(path.read_text())[0]) + "]")
    assert not open_index(path, ReadingOptions(), measures(), tmp_path / "index").description.start
    assert measured == list(range(31))


def test_the_beginning_is_compared_byte_by_byte(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"{}\n" * 100)
    first, second = growing._digests(path, [150, 300])
    assert (first[0], first[2], second[0], second[2]) == (150, 50, 300, 100)
    assert first[1] != second[1]
    assert next(growing._digests(path, [300])) == second
