"""Samples as other trainers write them, damaged and hostile ones: read right, or refused by file, sample and key."""
from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from indexed import load_sources, read_image_sizes
from PIL import Image

from mindformers_ixc import demo
from mindformers_ixc.data.conversations import load_conversations, read_list_file
from mindformers_ixc.data.fitting import first_pairs
from mindformers_ixc.data.forms import METADATA, SAMPLE_FORMS, open_sample, read_form, read_pair
from mindformers_ixc.data.paths import shown
from mindformers_ixc.data.preferences import load_preferences, read_logps
from mindformers_ixc.data.questions import questions_of
from mindformers_ixc.data.rows import ConversationTable
from mindformers_ixc.data.sections import LOADER_RULES
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.processing.tokenizer import Tokenizer
from mindformers_ixc.sections import check_section

ASKED, TOLD = {"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}


def talk(question: str, *more: str) -> list[dict]:
    texts = (question, *(more or ("a cat",)))
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def chat(content, answer="a cat") -> list[dict]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a.png", "b.png", "c.mp4", "d.mp4"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def write(folder: Path, content, name="data.json") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def read(folder: Path, row, **options):
    sample, = load_conversations(write(folder, [row]), **options)
    return sample.turns, [path.name for path in sample.images]


FRONT = [("user", "what?"), ("assistant", "a cat")]
PLACED = [("user", "<ImageHere>what?"), ("assistant", "a cat")]
BOTH = [("user", "<ImageHere> and <ImageHere>"), ("assistant", "a cat")]
FORMS = [
    ({"images": ["a.png"], "conversations": talk("what?")}, FRONT, ["a.png"]),
    ({"images": "a.png", "conversations": talk("<image>what?")}, FRONT, ["a.png"]),
    ({"images": ["a.png"], "conversations": talk("<ImageHere>what?")}, PLACED, ["a.png"]),
    ({"images": ["a.png", "b.png"], "conversations": talk("<image> and <image>")}, BOTH, ["a.png", "b.png"]),
    ({"images": [{"path": "a.png", "bytes": None}], "messages": chat("<image>what?")}, FRONT, ["a.png"]),
    ({"image": {"url": "a.png"}, "messages": chat("what?")}, FRONT, ["a.png"]),
    ({"video": "c.mp4", "conversations": talk("<video>\nwhat?")}, FRONT, ["c.mp4"]),
    ({"video": "c.mp4", "conversations": talk("<image>\nwhat?")}, FRONT, ["c.mp4"]),
    ({"videos": ["c.mp4", "d.mp4"], "messages": chat("<video> and <video>")}, BOTH, ["c.mp4", "d.mp4"]),
    ({"image": "a.png", "video": "c.mp4", "messages": chat("<video> and <image>")}, BOTH, ["c.mp4", "a.png"]),
    ({"messages": chat([{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}])}, PLACED, ["a.png"]),
    ({"messages": chat([{"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
                        {"type": "text", "text": "what?"}])}, PLACED, ["a.png"]),
    ({"images": ["a.png"], "messages": chat([{"type": "image"}, {"type": "text", "text": "what?"}],
                                            [{"type": "text", "text": "a cat"}])}, PLACED, ["a.png"]),
    ({"images": ["b.png"], "messages": chat([{"type": "video", "video": "c.mp4"}, {"type": "text", "text": " and "},
                                             {"type": "image"}])}, BOTH, ["c.mp4", "b.png"]),
    ({"messages": [{"role": "system", "content": "be brief"}, *chat("what?")]}, [("system", "be brief"), *FRONT], []),
    ({"system": "be brief", "conversations": talk("what?")}, [("system", "be brief"), *FRONT], []),
    ({"system": "", "query": "what?", "response": "a cat", "images": ["a.png"]}, FRONT, ["a.png"]),
    ({"query": "<image>what?", "response": "a cat", "images": ["a.png"], "history": [["say", "yes"]]},
     [("user", "say"), ("assistant", "yes"), *FRONT], ["a.png"]),
    ({"instruction": "what", "input": "is it?", "output": "a cat"}, [("user", "what\nis it?"), FRONT[1]], []),
    ({"instruction": "what?", "input": "", "output": "a cat", "history": []}, FRONT, []),
    ({"image": None, "images": [], "video": "", "tools": None, "audios": [], "conversations": talk("what?")}, FRONT,
     []),
    ({"image": "a.png", "image_id": 3, "source": "coco", "metadata": {"x": 1}, "messages": chat("what?")}, FRONT,
     ["a.png"]),
    ({"conversations": [{"from": "human", "value": "what?", "role": None}, {"from": "ChatGPT", "value": "a cat"}]},
     FRONT, []),
]


@pytest.mark.parametrize(("row", "turns", "names"), FORMS)
def test_the_forms_of_other_trainers_are_read(folder, row, turns, names):
    assert read(folder, row) == (turns, names)


def test_every_form_gives_the_row_of_the_public_one(folder):
    for number, name in enumerate(("a.png", "b.png")):
        Image.new("RGB", (60, 40 + 50 * number), (90 * number, 200, 0)).save(folder / name)
    processor = Processor(ImageProcessor(56), Tokenizer(str(Path(demo.__file__).parent / "tokenizer.model")))

    def rows(samples) -> list:
        read_image_sizes(samples)
        table = ConversationTable(processor, samples, 96, 6, 2)
        return [array for i in range(len(table)) for array in table[i]]       # a table has no end

    single = [{"image": "a.png", "conversations": talk("what?")}]
    several = [{"image": ["b.png", "a.png"], "conversations": talk("1 <ImageHere> 2 <ImageHere>")}]
    for public, same in [
            (single, [{"images": ["a.png"], "conversations": talk("what?")}]),
            (single, [{"images": ["a.png"], "conversations": talk("<image>what?")}]),
            (single, [{"images": [{"path": "a.png"}], "query": "what?", "response": "a cat"}]),
            (several, [{"images": ["b.png", "a.png"], "messages": chat("1 <image> 2 <image>")}]),
            (several, [{"images": ["a.png"], "messages": chat([
                {"type": "text", "text": "1 "}, {"type": "image_url", "image_url": {"url": "b.png"}},
                {"type": "text", "text": " 2 "}, {"type": "image"}])}])]:
        expected = rows(load_conversations(write(folder, public)))
        assert expected[2].any() and expected[6].any()     # pixels, and positions that take them
        lines = "\ufeff" + "\n".join(map(json.dumps, same))
        for found in (rows(load_conversations(write(folder, same))),
                      rows(load_conversations(write(folder, lines.encode(), "same.jsonl")))):
            assert len(found) == len(expected) == 7
            assert all(np.array_equal(one, other) for one, other in zip(found, expected))


@pytest.mark.parametrize("text", ["see <image>", "<ImageHere> and <video>", "<ImageHere>"])
def test_tags_in_answers_are_text(folder, text):
    row = {"image": ["a.png", "b.png"], "conversations": talk("<image> <image>", text, "more?", f"no {text}")}
    turns, names = read(folder, row)
    assert [answer for role, answer in turns if role == "assistant"] == [text, f"no {text}"]
    assert (turns[0][1], names) == ("<ImageHere> <ImageHere>", ["a.png", "b.png"])
    assert read(folder, {"conversations": talk("what?", text)})[0][1] == ("assistant", text)
    assert read(folder, {"image": "a.png", "caption": text})[0][1] == ("assistant", text)


def test_a_place_in_an_answer_is_no_picture_of_its_round(folder):
    rows = [{"image": "a.png", "conversations": talk("what?", "a <ImageHere>", "more?", "b")},
            {"image": ["a.png", "b.png"], "conversations": talk("<ImageHere>", "a <ImageHere>", "<ImageHere>?", "b")}]
    single, several = load_conversations(write(folder, rows))
    assert [len(first_pairs(sample, 1).images) for sample in (single, several)] == [1, 1]
    assert [len(question.images) for question in questions_of([single, several])] == [1, 1, 1, 2]


def test_a_place_that_only_an_answer_has_is_missing(folder):
    row = {"image": ["a.png", "b.png"], "conversations": talk("<ImageHere>", "First <ImageHere>.")}
    with pytest.raises(DataError, match="1 <ImageHere> for 2 pictures"):
        read(folder, row)


LONG = "data:image/jpeg;base64," + "/9j/4AAQSkZJRg" * 3000 + "!"
REFUSED = [
    ({"audios": ["x.wav"], "messages": chat("what?")}, ["field audios", "x.wav", "ignore_keys"]),
    ({"tools": "[]{}", "messages": chat("what?")}, ["field tools"]),
    ({"imagse": "a.png", "messages": chat("what?")}, ["field imagse", "did you mean image"]),
    ({"image_path": "a.png", "messages": chat("what?")}, ["field image_path"]),
    ({"image_id": 5, "conversations": None, "query": "q", "response": "a"}, ["field image_id"]),
    ({"image": "a.png", "images": ["b.png"], "messages": chat("<image><image>")}, ["field images", "image already"]),
    ({"image": "a.png", "video": "c.mp4", "messages": chat("what?")}, ["field messages", "0 <image> for 1 pictures"]),
    ({"image": "a.png", "video": "c.mp4", "messages": chat("<ImageHere><ImageHere>")}, ["can be either", "<video>"]),
    ({"image": "a.png", "messages": chat("<video>what?")}, ["<video> is the place of a.png, which is no video"]),
    ({"video": "a.png", "messages": chat("what?")}, ["field video: a.png is no video"]),
    ({"videos": [["a.png", "b.png"]], "messages": chat("what?")}, ["field videos[0]", "a path"]),
    ({"messages": chat("<image>what?")}, ["field messages", "1 <image> for 0 pictures"]),
    ({"messages": chat("what is <video> for?")}, ["1 <video> for 0 pictures", "meant as text"]),
    ({"images": ["a.png"], "messages": chat("<image><image>")}, ["2 <image> for 1 pictures"]),
    ({"images": ["a.png", "b.png"], "messages": chat("what?")}, ["0 <ImageHere> for 2 pictures"]),
    ({"images": ["a.png"], "messages": chat([{"type": "image", "image": "b.png"}])}, ["0 <ImageHere> for 1 pictures"]),
    ({"system": "<image> first", "images": ["a.png"], "messages": chat("what?")}, ["field system", "only questions"]),
    ({"system": "x", "messages": [{"role": "system", "content": "y"}, *chat("what?")]}, ["field system"]),
    ({"images": [None], "messages": chat("what?")}, ["field images[0]", "found None"]),
    ({"images": [{"bytes": "abc", "path": "a.png"}], "messages": chat("what?")}, ["field images[0]"]),
    ({"image": True, "messages": chat("what?")}, ["field image", "found True"]),
    ({"messages": chat("what?"), "conversations": talk("who?")}, ["field messages", "conversations already"]),
    ({"messages": chat("what?"), "history": [["a", "b"]]}, ["field history", "beside messages"]),
    ({"messages": chat("what?"), "rejected": "a dog"}, ["field rejected"]),
    ({"messages": [*chat("what?")[:1], {"role": "tool", "content": "x"}]}, ["messages[1].role", "'tool' is no role"]),
    ({"messages": chat("what?", None)}, ["messages[1]", "'content'"]),
    ({"messages": chat("what?", 5)}, ["messages[1].content", "found 5"]),
    ({"messages": chat(float("nan"))}, ["messages[0].content", "found nan"]),
    ({"messages": chat([{"type": "audio", "audio": "x.wav"}])}, ["messages[0].content[0]", "audio"]),
    ({"messages": chat([{"type": "text", "text": 5}])}, ["messages[0].content[0].text", "found 5"]),
    ({"messages": chat(["what?"])}, ["messages[0].content[0]", "a part has the type"]),
    ({"messages": chat("what?", [{"type": "image", "image": "a.png"}])},
     ["messages[1].content[0]: stands in a turn of the assistant"]),
    ({"messages": [{**chat("")[0], "tool_calls": [1]}, chat("")[1]]}, ["messages[0].tool_calls"]),
    ({"messages": [{**chat("what?")[0], "loss": False}, chat("")[1]]}, ["messages[0].loss", "False"]),
    ({"messages": chat(" \n")}, ["messages[0].content", "question is empty"]),
    ({"query": "what?"}, ["field response", "not empty"]),
    ({"query": "what?", "response": "x", "history": ["ab"]}, ["field history"]),
    ({"query": "what?", "response": "x", "history": [["a", None]]}, ["field history[0][1]", "found None"]),
    ({"image": "a.png", "caption": 5}, ["field caption", "found 5"]),
    ({"id": [1], "messages": chat("what?")}, ["field id"]),
    ({"image": LONG, "messages": chat("what?")}, ["field image", "base64 is damaged"]),
    ({"image": LONG[23:], "messages": chat("what?")}, ["field image", "base64 is damaged"]),
    ({"image": "x" * 42000, "messages": chat("what?")}, ["field image", "(42000 characters)", "is no path"]),
    ({"image": "a" * 300 + ".png", "messages": chat("what?")}, ["is no path"]),
    ({"image": "a\0.png", "messages": chat("what?")}, ["is no path"]),
    ({"image": "https://example.org/a.png", "messages": chat("what?")}, ["is an address", "download it"]),
    ({"messages": chat("x" * 50_000, "")}, ["the answer is empty"]),
    ({"audios": {"x" * 9000: ["y" * 9000] * 900}, "messages": chat("what?")}, ["field audios"]),
]


@pytest.mark.parametrize(("row", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_read_is_refused_by_file_sample_and_key(folder, row, words):
    path = write(folder, [{"id": "ok", "messages": chat("what?")}, {"id": "s1", **row}])
    with pytest.raises(DataError) as error:
        load_conversations(path)
    message = str(error.value)
    assert all(word in message for word in [f"{path}, sample 1 (id ", "field ", *words]), message
    assert len(message) < 700 + len(str(path)) * 3, message
    assert "\n" not in message


def test_keys_can_be_ignored_on_purpose(folder):
    row = {"audios": ["x.wav"], "caption": "c", "conversations": [{**ASKED, "loss": 1}, TOLD]}
    assert read(folder, row, ignore_keys=["audios", "caption", "loss"])[0] == FRONT
    assert read(folder, {**row, "video": "gone.mp4"}, ignore_keys=["audios", "caption", "loss", "video"])[1] == []


@pytest.mark.parametrize(("fields", "words"), [
    ({"image_root": "x", "ignore_keys": ["a"]}, None), ({"ignore_keys": "a"}, "ignore_keys is 'a'; .*a list of texts"),
    ({"ignore_keys": ["a", 1]}, "ignore_keys is .*a list of texts"), ({"image_root": 5}, "image_root is 5")])
def test_the_keys_of_a_data_loader(fields, words):
    if words is None:
        check_section(fields, LOADER_RULES, "data_loader", DataError)
    else:
        with pytest.raises(DataError, match=words):
            check_section(fields, LOADER_RULES, "data_loader", DataError)


def test_pairs_have_the_pictures_of_samples(folder):
    pair = {"prompt": "<image> and <image>", "chosen": "a", "rejected": "b"}
    for row in ({**pair, "images": ["a.png", "b.png"]}, {**pair, "image": ["a.png", {"path": "b.png"}]}):
        chosen, rejected = load_preferences(write(folder, [row]))[0].sides
        assert [path.name for path in chosen.images] == ["a.png", "b.png"] == [path.name for path in rejected.images]
        assert chosen.turns[0] == rejected.turns[0] == ("user", "<ImageHere> and <ImageHere>")
    video, = load_preferences(write(folder, [{**pair, "prompt": "what?", "video": "c.mp4"}]))
    assert [path.name for path in video.images] == ["c.mp4"]
    for changes, words in [({"images": ["a.png"]}, "field prompt: 2 <image> for 1 pictures"),
                           ({"imgs": ["a.png"]}, "field imgs"),
                           ({"images": ["a.png", "x.png"]}, r"field images\[1\]: the picture x.png does not exist"),
                           ({"images": ["a.png", "b.png"], "reference_logps": [10 ** 400, 1]}, "field reference_logps"),
                           ({"images": ["a.png", "b.png"], "reference_logps": [True, 1]}, "field reference_logps")]:
        with pytest.raises(DataError, match=rf"data\.json, sample 0 \(id None\), {words}"):
            load_preferences(write(folder, [{**pair, **changes}]))


SIDES = {"chosen": "a", "rejected": "b"}
PAIRS = [{"images": ["a.png"], "conversations": [{"from": "human", "value": "<image>what?"}],
          "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
         {"image": "a.png", "messages": [{"role": "user", "content": "what?"}], **SIDES},
         {"image": "a.png", "prompt": [{"role": "user", "content": "what?"}],
          **{side: [{"role": "assistant", "content": text}] for side, text in SIDES.items()}}]


@pytest.mark.parametrize("row", PAIRS)
def test_pairs_as_other_trainers_write_them(folder, row):
    chosen, rejected = load_preferences(write(folder, [row]))[0].sides
    assert chosen.turns == [("user", "what?"), ("assistant", "a")]
    assert rejected.turns == [("user", "what?"), ("assistant", "b")]
    assert [path.name for path in chosen.images] == ["a.png"] == [path.name for path in rejected.images]


@pytest.mark.parametrize(("changes", "words"), [
    ({"messages": [*chat("q"), {"role": "user", "content": "what?"}]}, "field messages: a pair has one question"),
    ({"messages": chat("q")[1:]}, r"field messages\[0\].role: expected a turn of the user"),
    ({"prompt": "q"}, "field messages: is not read beside prompt"),
    ({"chosen": ASKED}, "field chosen: must be an answer"), ({"chosen": {}}, r"field chosen\[0\]: needs 'from'"),
    ({"chosen": [TOLD, TOLD]}, "field chosen: must be a text"), ({"chosen": None}, "field chosen: must be a text"),
    ({"chosen": {**TOLD, "value": " b"}}, "chosen equals rejected")])
def test_pairs_that_cannot_be_represented(folder, changes, words):
    row = {"messages": [{"role": "user", "content": "what?"}], **SIDES, **changes}
    with pytest.raises(DataError, match=rf"data\.json, sample 0 \(id None\).*{words}"):
        load_preferences(write(folder, [row]))


def test_no_part_of_a_name_is_left_out(folder):
    (folder / "sub").mkdir()
    for name in ("b/a.png", "sub/a.png", "data/a.png"):
        with pytest.raises(DataError, match=rf"sample 0 .*field image: the picture {name} does not exist \(tried"):
            read(folder, {"image": name, "messages": chat("what?")})
    with pytest.raises(DataError, match=r"the picture a\.png does not exist"):
        read(folder, {"image": "a.png", "messages": chat("what?")}, image_folder=folder / "sub")
    assert read(folder, {"image": f"{folder.name}/a.png", "messages": chat("what?")})[1] == ["a.png"]
    assert read(folder, {"image": f"file://{folder}/a.png", "messages": chat("what?")})[1] == ["a.png"]
    write(folder, [{"messages": chat("what?")}], "x.json")
    (folder / "list.txt").write_text("b/x.json 1\n")
    with pytest.raises(DataError, match=r"line 1: the source b/x\.json does not exist"):
        read_list_file(folder / "list.txt")


def test_nothing_outside_image_root_is_read(folder):
    root = folder / "root"
    (root / "in").mkdir(parents=True)
    (root / "in" / "e.png").write_bytes(b"")
    os.symlink(folder / "a.png", root / "out.png")
    os.symlink(folder, root / "up")
    os.symlink(root / "in" / "e.png", root / "ok.png")
    for name in ("out.png", "up/a.png", "../a.png", "in/../../a.png", str(folder / "a.png"), f"file://{folder}/a.png"):
        with pytest.raises(DataError, match=r"sample 0 .*field image: the picture .* does not exist inside image_root"):
            read(folder, {"image": name, "messages": chat("what?")}, image_root=root, image_folder=root)
    for name in ("ok.png", "in/e.png", "../root/in/e.png"):
        sample, = load_conversations(write(folder, [{"image": name, "messages": chat("what?")}]), root, image_root=root)
        assert sample.images == [root / "in" / "e.png"]
    with pytest.raises(DataError, match=r"image_root .*gone is no folder"):
        read(folder, {"messages": chat("what?")}, image_root=folder / "gone")
    with pytest.raises(DataError, match="inside image_root"):
        load_preferences(write(folder, [{"prompt": "p", "chosen": "c", "rejected": "r", "image": "a.png"}]),
                         image_root=root)


ROWS = [{"id": i, "conversations": talk(f"what\u2028{i}?")} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(("name", "content"), [
    ("x.jsonl", LINES), ("x.json", LINES), ("x.json", "\ufeff" + LINES), ("x.jsonl", LINES.replace("\n", "\r\n\r\n")),
    ("x.jsonl", json.dumps(ROWS)), ("x.json", "\ufeff" + json.dumps(ROWS)), ("x.jsonl", "\n" + LINES[:-1])])
def test_lists_and_lines_with_or_without_a_mark(folder, name, content):
    samples = load_sources(str(write(folder, content.encode(), name)))
    assert [(sample.id, sample.turns[0][1]) for sample in samples] == [(i, f"what\u2028{i}?") for i in range(3)]


@pytest.mark.parametrize(("name", "content", "words"), [
    ("x.jsonl", LINES.encode() + b'{"id": \n', "line 4 is not valid JSON"),
    ("x.jsonl", LINES.encode() + b'{"id": "\\ud83d"}\n', r"line 4 has \\ud83d, half of a surrogate pair"),
    ("x.json", LINES.encode() + b"[" * 100_000, "line 4 is not usable JSON: .*nested too deeply"),
    ("x.json", b"[" * 100_000, "nested too deeply"),
    ("x.json", b'[{"a":' * 100_000, "nested too deeply"),
    ("x.json", json.dumps(ROWS, ensure_ascii=False).encode("utf-16"), "is UTF-16 text"),
    ("x.json", '[{"id": "中文"}]'.encode("gbk"), "byte 0xD6 at place 9"),
    ("x.jsonl", b"", "found no samples"), ("x.jsonl", b'"text"\n', "sample 0: a sample must be a mapping")])
def test_other_texts_are_refused_by_place(folder, name, content, words):
    with pytest.raises(DataError, match=rf"{name}.*{words}"):
        load_sources(str(write(folder, content, name)))


def test_list_files_in_any_editor_s_hand(folder):
    write(folder, ROWS, "x#1\u2028.json")
    text = "\ufeff# sources\r\nx#1\u2028.json\t0.002 # two\r\n"
    assert [count for _, count in read_list_file(write(folder, text.encode(), "list.txt"))] == [2]
    for line in ("x 1e999", "x nan", "x inf", "x 1e12", "x -1", "1"):
        with pytest.raises(DataError, match=r"list\.txt, line 1: expected"):
            read_list_file(write(folder, line.encode(), "list.txt"))
    with pytest.raises(DataError, match=r"list\.txt is not UTF-8 text: byte 0xD6 at place 0"):
        read_list_file(write(folder, "中文 1".encode("gbk"), "list.txt"))


@pytest.mark.parametrize("value", [5, [5], [None], True, [], [""]])
def test_sources_that_are_no_paths(value):
    with pytest.raises(DataError, match=r"dataset_dir (has the entry|is empty)"):
        load_sources(value)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
    ["<image>", "<video>", "<ImageHere>", "a.png", "c.mp4", "user", "assistant", "text", "image"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["from", "value", "role", "content", "type", "text", "image", "image_url", "url", "path", "x"]), inner,
        max_size=4), max_leaves=12)
TURN = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system", "x"]), "value": JSON},
                             optional={"role": JSON, "x": JSON})
SAMPLE = st.dictionaries(st.sampled_from([*SAMPLE_FORMS, "response", "history", "input", "output", "images", "image",
                                          "videos", "video", "system", "id", "image_id", "x"]),
                         JSON | st.lists(TURN, max_size=4), max_size=5) | JSON


@st.composite
def damaged(draw):
    """A sample of some form in which one value, at any depth, is another."""
    row = json.loads(json.dumps(draw(st.sampled_from([row for row, _, _ in FORMS]))))
    item = row
    while True:
        key = draw(st.sampled_from(sorted(item))) if isinstance(item, dict) else draw(st.integers(0, len(item) - 1))
        if not isinstance(item[key], (dict, list)) or not item[key] or draw(st.booleans()):
            item[key] = draw(JSON)
            return row
        item = item[key]


@settings(max_examples=200, deadline=None)
@given(SAMPLE | damaged())
def test_any_value_is_a_sample_or_a_data_error(row):
    try:
        form = read_form(row, "x.json, sample 0", ask=lambda: "What?")
    except DataError as error:
        assert str(error).startswith("x.json, sample 0")
        assert len(str(error)) < 1500
        return
    roles = [role for role, _ in form.turns if role != "system"]
    assert roles == ["user", "assistant"] * (len(roles) // 2) != []
    places = sum(text.count("<ImageHere>") for role, text in form.turns if role == "user")
    assert places == len(form.files) or (places, len(form.files)) == (0, 1)
    # nothing that the sample holds is missing from it
    held = {key for key, value in row.items() if value is not None and value not in ("", [], {})}
    assert held <= {*METADATA, "image_id", *SAMPLE_FORMS, "response", "history", "input", "output", "images", "image",
                    "videos", "video", "system"}
    assert len(form.files) >= sum(len(row[key]) if isinstance(row[key], list) else 1
                                  for key in held & {"image", "images", "video", "videos"})


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["prompt", "messages", "images", "id", "x", "chosen", "rejected",
                                        "reference_logps"]), JSON | st.lists(TURN, max_size=2), max_size=5))
def test_any_value_is_a_pair_or_a_data_error(row):
    row = {"prompt": "what?", "chosen": "a", "rejected": "b", **row}
    try:
        known, where = open_sample(row, "x.json, sample 0", (), "pair")
        chosen, rejected = read_pair(known, where)
        read_logps(known, where)
    except DataError as error:
        assert str(error).startswith("x.json, sample 0 (id ")
        return
    assert chosen.turns[:-1] == rejected.turns[:-1]
    assert [role for role, _ in chosen.turns][-2:] == ["user", "assistant"]
    assert chosen.files == rejected.files


@given(JSON)
def test_values_in_messages_are_short(value):
    assert len(shown(value)) < 200
    assert len(shown([[[[["x" * 5000] * 50] * 50]]])) < 200
