"""Conversation files: both public forms, list files, and one sentence for each thing that can be wrong."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from indexed import load_sources, read_image_sizes
from PIL import Image

from mindformers_ixc.data.conversations import load_conversations, read_list_file
from mindformers_ixc.data.drawing import resampled
from mindformers_ixc.errors import DataError


def talk(*texts, roles=("human", "bot")):
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def write(folder: Path, rows, name="data.json") -> Path:
    path = folder / name
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / "images" / name)
    return tmp_path


def test_public_form(folder):
    path = write(folder, [{"id": 7, "image": ["images/a.png", "images/b.png"],
                           "conversations": talk("<ImageHere> and <ImageHere>", "yes", "why", "so")}])
    sample = load_conversations(path)[0]
    assert sample.turns == [("user", "<ImageHere> and <ImageHere>"), ("assistant", "yes"), ("user", "why"),
                            ("assistant", "so")]
    assert sample.images == [folder / "images" / "a.png", folder / "images" / "b.png"]
    assert sample.where == f"{path}, sample 0 (id 7)"


@pytest.mark.parametrize("text", ["<image>\nwhat?", "what?\n<image>", "what?"])
def test_single_llava_picture_takes_the_form_without_a_place(folder, text):
    path = write(folder, [{"image": "images/a.png", "conversations": talk(text, "x", roles=("human", "gpt"))}])
    assert load_conversations(path)[0].turns == [("user", "what?"), ("assistant", "x")]


def test_several_llava_pictures_keep_their_places(folder):
    path = write(folder, [{"image": ["images/a.png", "images/b.png"], "conversations": talk("<image> <image>", "x")}])
    assert load_conversations(path)[0].turns[0] == ("user", "<ImageHere> <ImageHere>")


def test_pictures_are_found_as_the_public_examples_name_them(folder):
    rows = [{"image": f"{folder.name}/images/a.png", "conversations": talk("q", "a")}]
    path = write(folder, rows)
    assert load_conversations(path)[0].images == [folder / "images" / "a.png"]
    assert load_conversations(write(folder / "images", rows), folder)[0].images == [folder / "images" / "a.png"]
    assert load_conversations(write(folder, [{"image": "a.png", "conversations": talk("q", "a")}]),
                              image_folder=folder / "images")[0].images == [folder / "images" / "a.png"]


BAD = [
    ({"a": 1}, ["JSON list", "dict"]),
    ([], ["no samples"]),
    ("[1, ", ["not valid JSON"]),
    ([3], ["sample 0", "mapping"]),
    ([{"id": 5}], ["sample 0 (id 5)", "field conversations"]),
    ([{"conversations": []}], ["field conversations"]),
    ([{"conversations": [{"from": "human"}]}], ["conversations[0]", "'value'"]),
    ([{"conversations": talk("q", "a", roles=("human", "robot"))}], ["conversations[1].from", "'robot'", "assistant"]),
    ([{"conversations": talk("a", "q", roles=("bot", "human"))}], ["conversations[0].from", "alternate"]),
    ([{"conversations": talk("q", "a", "q", "q", roles=("human", "bot"))[:3] + talk("q")}], ["alternate"]),
    ([{"conversations": talk("q")}], ["ends without an answer"]),
    ([{"conversations": talk("q", "a", "q", " \n")}], ["conversations[3].value", "answer is empty"]),
    ([{"conversations": talk("<ImageHere>", "a")}], ["1 <ImageHere> for 0 pictures"]),
    ([{"image": ["images/a.png", "images/b.png"], "conversations": talk("<ImageHere>", "a")}],
     ["1 <ImageHere> for 2 pictures"]),
    ([{"image": 3, "conversations": talk("q", "a")}], ["field image", "3"]),
    ([{"image": "images/gone.png", "conversations": talk("q", "a")}], ["field image", "gone.png", "tried"]),
]


@pytest.mark.parametrize(("rows", "words"), BAD)
def test_bad_samples_are_named(folder, rows, words):
    path = write(folder, rows)
    with pytest.raises(DataError) as error:
        load_conversations(path)
    assert all(word in str(error.value) for word in [str(path), *words])


def test_all_errors_come_at_once_up_to_ten(folder):
    path = write(folder, [{"conversations": talk("q")}] * 13)
    with pytest.raises(DataError) as error:
        load_conversations(path)
    assert len(str(error.value).splitlines()) == 11
    assert "3 more" in str(error.value)


def test_a_file_that_is_no_picture_is_named(folder):
    (folder / "images" / "c.png").write_text("x")
    samples = load_conversations(write(folder, [{"id": 1, "image": "images/c.png", "conversations": talk("q", "a")}]))
    with pytest.raises(DataError, match=r"sample 0 \(id 1\), field image.*c.png"):
        read_image_sizes(samples)


def test_sizes_come_from_the_headers(folder):
    samples = load_conversations(write(folder, [{"image": "images/a.png", "conversations": talk("q", "a")}]))
    read_image_sizes(samples)
    assert samples[0].sizes == [(30, 20)]


def test_list_file(folder):
    write(folder, [{"id": i, "conversations": talk("q", str(i))} for i in range(5)], "five.json")
    write(folder, [{"id": i, "conversations": talk("q", str(i))} for i in range(2)], "two.json")
    (folder / "data.txt").write_text(f"# sources\nfive.json 0.003\n\n{folder.name}/two.json 0.005\n")
    assert [count for _, count in read_list_file(folder / "data.txt")] == [3, 5]
    samples = load_sources(str(folder / "data.txt"), seed=1)
    assert len({sample.id for sample in samples[:3]}) == 3
    assert sorted(sample.id for sample in samples[3:]) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
    assert [s.id for s in load_sources(str(folder / "data.txt"), seed=1)] == [s.id for s in samples]
    assert len(load_sources([str(folder / "data.txt"), str(folder / "two.json")])) == 10


@pytest.mark.parametrize(("text", "word"), [("x.json", "line 1"), ("x.json 0", "above 0"), ("x.json two", "thousands"),
                                            ("x.json 1", "x.json does not exist"), ("# nothing", "names no sources")])
def test_bad_list_files(folder, text, word):
    (folder / "data.txt").write_text(text)
    with pytest.raises(DataError, match=word):
        load_sources(str(folder / "data.txt"))


def test_missing_and_empty_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        load_conversations(tmp_path / "gone.json")
    with pytest.raises(FileNotFoundError, match="gone"):
        load_sources(str(tmp_path / "gone.txt"))
    with pytest.raises(DataError, match="dataset_dir is empty"):
        load_sources("")


@given(st.integers(1, 30), st.integers(1, 100), st.randoms())
def test_resampling_takes_every_sample_as_often_as_any_other(size, count, rng):
    taken = resampled(size, count, rng).tolist()
    assert len(taken) == count
    times = [taken.count(i) for i in range(size)]
    assert max(times) - min(times) <= 1
