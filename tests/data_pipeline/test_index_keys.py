"""What an index is named by: everything that its numbers follow from, and nothing else."""
from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mindformers_ixc.data.index import building
from mindformers_ixc.data.index.sources import measures_of, open_sources
from mindformers_ixc.data.index.store import VERSION
from mindformers_ixc.data.rows import SectionOptions, make_processor, own_tokenizer
from mindformers_ixc.resources import resolve_path

DEMO = "pkg:mindformers_ixc/demo/train.json"
VOCABULARY = "pkg:mindformers_ixc/demo/tokenizer.model"


@pytest.fixture
def built(tmp_path, monkeypatch):
    """Names of the sources that are measured, and the folder that everything lies in, which is the working one."""
    monkeypatch.chdir(tmp_path)
    seen, build = [], building._Builder.build
    monkeypatch.setattr(building._Builder, "build", lambda self, description, *more: (
        seen.append(os.path.basename(description.source)), build(self, description, *more))[1])
    return seen


def opened(section=(), loader=(), seed=0, decode=False):
    """What was measured (`Description.content`) of the sources of a run."""
    section = {"tokenizer": {"type": "InternLM2Tokenizer", "vocab_file": "tokenizer.model"}, "image_size": 112,
               "patch_size": 14, "hd_num": 6, **dict(section)}
    loader = {"dataset_dir": "plain.json", "image_folder": "pictures", **dict(loader)}
    processor = make_processor(SectionOptions(section), own_tokenizer(section))
    sources = open_sources(loader, seed, measures_of(section, processor, decode), "index")
    return [source.index.description.content for source in sources]


def write_data():
    """A source with pictures, and one of captions."""
    os.mkdir("pictures")
    turned = Image.Exif()
    turned[0x0112] = 6                      # to be turned by 90 degrees
    Image.new("RGB", (400, 90)).save("pictures/wide.jpg", exif=turned)
    Image.new("RGB", (160, 150)).save("pictures/plain.png")
    Image.new("RGB", (40, 190)).save("pictures/tall.png")       # of three tiles, of two without the scaling of training
    text = "the [UNUSED_TOKEN_145] cat </s> sat on the table"
    rows = [{"id": number, "image": name, "topic": "none", "conversations": [
        {"from": "human", "value": f"{text} {number}"}, {"from": "gpt", "value": "a cat"}]}
        for number, name in enumerate(["wide.jpg", "plain.png", "tall.png"] * 2)]
    with open("plain.json", "w") as file:
        json.dump(rows, file)
    with open("captions.json", "w") as file:
        json.dump([{"id": number, "image": "plain.png", "caption": f"number {number}"} for number in range(20)], file)
    with open("tokenizer.model", "wb") as file:
        file.write(resolve_path(VOCABULARY).read_bytes())


def another_vocabulary():
    """Changes the vocabulary without changing the file's size or time."""
    state = os.stat("tokenizer.model")
    content = Path("tokenizer.model").read_bytes()
    changed = content.replace("▁table".encode(), "▁tabel".encode()).replace("▁cat".encode(), "▁cta".encode())
    changed = changed.replace("▁the".encode(), "▁hte".encode())
    assert changed != content and len(changed) == len(content)
    with open("tokenizer.model", "wb") as file:
        file.write(changed)
    os.utime("tokenizer.model", ns=(state.st_atime_ns, state.st_mtime_ns))
    return {}


def another_picture():
    Image.new("RGB", (300, 700)).save("pictures/plain.png")
    return {}


def another_source():
    rows = json.loads(Path("plain.json").read_text())
    rows[0]["conversations"][0]["value"] += " and then some"
    with open("plain.json", "w") as file:
        json.dump(rows, file)
    return {}


@pytest.mark.parametrize("change", [
    {"section": {"hd_num": 2}}, {"section": {"image_size": 56}}, {"section": {"patch_size": 7}},
    {"section": {"image_transform": "inference"}}, {"section": {"control_tokens": True}},
    {"section": {"exif": "apply"}}, another_vocabulary, another_picture, another_source,
    {"loader": {"dataset_dir": "captions.json"}, "seed": 1},
    {"loader": {"dataset_dir": "captions.json", "caption_prompts": ["What is it, in a few words?", "And?"]}},
    {"loader": {"dataset_dir": "./captions.json"}},          # captions' questions are chosen by the name as written
], ids=lambda change: getattr(change, "__name__", None) or str(change))
def test_what_changes_the_numbers_builds_anew(built, change):
    write_data()
    source = {"dataset_dir": "captions.json"} if "captions" in str(change) else {}
    before = opened(loader=source)
    built.clear()
    options = change() if callable(change) else change
    after = opened(**options)
    assert built == [os.path.basename(dict(options.get("loader", {})).get("dataset_dir", "plain.json"))]
    assert after != before
    assert (opened(**options), len(built)) == (after, 1)


@pytest.mark.parametrize("change", [
    {"decode": True}, {"loader": {"image_root": "pictures"}}, {"loader": {"ignore_keys": ["topic"]}},
    {"loader": {"fetch": True}}, {"loader": {"image_folder": None}}], ids=str)
def test_what_decides_which_samples_are_good_builds_anew(built, change):
    write_data()
    for name in os.listdir("pictures"):
        os.link(f"pictures/{name}", name)       # where they are looked for without an image_folder
    opened()
    opened(**change)
    assert built == ["plain.json"] * 2


@pytest.mark.parametrize("change", [
    *({"section": {key: value}} for key, value in (
        ("seq_length", 99), ("max_tiles", 3), ("max_images", 1), ("max_segments", 5), ("packing", True),
        ("batch_size", 7), ("num_parallel_workers", 3), ("python_multiprocessing", True), ("transparency", "public"),
        ("max_bad_share", 0.5), ("drop_remainder", False), ("repeat", 2), ("input_columns", ["input_ids"]),
        ("seed", 8), ("image_transform", "training"), ("exif", "ignore"), ("control_tokens", False))),
    {"section": {"tokenizer": {"vocab_file": VOCABULARY}}},                  # the same one elsewhere
    {"section": {"tokenizer": {"vocab_file": "tokenizer.model", "add_bos_token": False}}},
    {"seed": 5}, {"loader": {"caption_prompts": ["What?"]}},                 # there are no captions
    {"loader": {"mixture": {"weights": [2]}}}, {"loader": {"shuffle": False}},
    {"loader": {"dataset_dir": "./plain.json"}}, {"loader": {"image_folder": "./pictures"}},
    {"loader": {"dataset_dir": ["plain.json", "plain.json"]}},
], ids=str)
def test_what_changes_nothing_builds_nothing(built, change):
    write_data()
    before = opened()
    assert set(opened(**change)) == set(before)
    assert built == ["plain.json"]


def test_defaults_may_be_written_out(built):
    write_data()
    opened({"image_size": None, "patch_size": None, "hd_num": None})
    opened({"image_size": 560, "patch_size": 14, "hd_num": 18})
    assert built == ["plain.json"]


def test_seeds_of_captions_have_an_index_each(built):
    write_data()
    found = [opened(loader={"dataset_dir": "captions.json"}, seed=seed) for seed in (0, 1, 0, 1)]
    assert built == ["captions.json"] * 2
    assert found[:2] == found[2:]


def test_a_compressed_source_is_known_by_its_own_file(built, tmp_path, monkeypatch):
    """Its pictures lie beside it, and a copy that is unpacked anew is the same source."""
    write_data()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    row = json.loads(Path("plain.json").read_text())[0]
    with gzip.open("pictures/one.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n")
    source = {"dataset_dir": "pictures/one.jsonl.gz", "image_folder": None}
    opened(loader=source)
    shutil.rmtree("cache/mindformers_ixc/unpacked")
    opened(loader=source)
    assert built == ["one.jsonl.gz"]
    with gzip.open("pictures/one.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    opened(loader=source)
    assert built == ["one.jsonl.gz"] * 2
    assert len(list(tmp_path.glob("index/one.jsonl.gz-*/*/index.json"))) == 1
    assert len(list(tmp_path.glob("cache/mindformers_ixc/unpacked/*/*/*.jsonl"))) == 1


def test_a_line_more_in_a_list_measures_what_it_names_alone(built):
    write_data()
    with open("list.txt", "w") as file:
        file.write("plain.json 0.1\n")
    opened(loader={"dataset_dir": "list.txt"})
    with open("list.txt", "w") as file:
        file.write("plain.json 0.2\ncaptions.json 0.1\n")
    opened(loader={"dataset_dir": "list.txt"})
    assert built == ["plain.json", "captions.json"]


def test_numbers_are_those_of_the_version(tmp_path, monkeypatch):
    """When this fails because samples are measured otherwise now, raise `store.VERSION`, and write both here."""
    monkeypatch.chdir(tmp_path)
    write_data()
    found = [*opened(loader={"dataset_dir": DEMO, "image_folder": None}),
             *opened(loader={"dataset_dir": ["plain.json", "captions.json"]})]
    assert (VERSION, found) == (3, ["53d388e53b034868d4824ba943acd8dd0bf006b52c905f2e9b1dd45d5ff21f9f",
                                    "17df413dda314acf5cfc8a4009ce9588c0679fe995a550bb082bc63b2e6c73c1",
                                    "9b896621f0238e6e898db003acf043f78612ba1fe3bb2e6613966c585de6ea88"])
