"""Tests of the shipped demo data: whole, true to its format, not answerable without the pictures."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

from mindformers_ixc.demo import demo_path

MAX_FOLDER_BYTES = 700_000
MAX_TOKENIZER_BYTES = 60_000
MAX_MAJORITY = 0.3
MAX_ANSWER_TOKENS = 10
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_demo.py"


def _samples(name):
    return json.loads(demo_path(name).read_text(encoding="utf-8"))


def _images(sample):
    image = sample.get("image", [])
    return [image] if isinstance(image, str) else image


@pytest.fixture(scope="module")
def tokenizer():
    return sentencepiece.SentencePieceProcessor(model_file=str(demo_path("tokenizer.model")))


@pytest.fixture(scope="module")
def make_demo():
    spec = importlib.util.spec_from_file_location("make_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rebuilt(make_demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    make_demo.main(["--out", str(folder)])
    return folder


@pytest.mark.parametrize(("name", "at_least"), [("train.json", 36), ("multi.json", 4)])
def test_conversations_alternate_and_have_unique_ids(name, at_least):
    samples = _samples(name)
    assert len(samples) >= at_least
    assert len({sample["id"] for sample in samples}) == len(samples)
    for sample in samples:
        roles = [turn["from"] for turn in sample["conversations"]]
        assert roles == ["human", "bot"] * (len(roles) // 2)
        assert roles
        assert all(turn["value"].strip() == turn["value"] != "" for turn in sample["conversations"])


def test_training_samples_are_one_question_about_one_picture():
    for sample in _samples("train.json"):
        assert len(sample["conversations"]) == 2
        assert isinstance(sample["image"], str)


def test_training_questions_have_one_answer_per_picture():
    pairs = Counter((s["image"], s["conversations"][0]["value"]) for s in _samples("train.json"))
    assert set(pairs.values()) == {1}


def test_multi_covers_turns_pairs_and_text_only():
    samples = _samples("multi.json")
    assert {len(_images(sample)) for sample in samples} == {0, 1, 2}
    assert {len(sample["conversations"]) // 2 for sample in samples} == {1, 2, 3}
    pair = next(sample for sample in samples if len(_images(sample)) == 2)
    assert pair["conversations"][0]["value"].startswith("Image1 <ImageHere>; Image2 <ImageHere>; ")


def test_placeholders_match_pictures():
    for sample in _samples("train.json") + _samples("multi.json"):
        found = sum(turn["value"].count("<ImageHere>") for turn in sample["conversations"])
        # one picture needs no placeholder in the public format
        assert found == (len(_images(sample)) if len(_images(sample)) > 1 else 0)


def test_multi_agrees_with_train():
    answers = {
        (s["image"], s["conversations"][0]["value"]): s["conversations"][1]["value"]
        for s in _samples("train.json")
    }
    compared = 0
    for sample in _samples("multi.json"):
        turns = [turn["value"] for turn in sample["conversations"]]
        for question, answer in zip(turns[::2], turns[1::2]):
            key = (sample.get("image") if isinstance(sample.get("image"), str) else None, question)
            if key in answers:
                assert answer == answers[key]
                compared += 1
    assert compared >= 5


def test_a_blind_model_fails():
    answers = defaultdict(list)
    for sample in _samples("train.json"):
        question, answer = (turn["value"] for turn in sample["conversations"])
        answers[question].append(answer)
    for question, given in answers.items():
        most = Counter(given).most_common(1)[0][1]
        assert most / len(given) <= MAX_MAJORITY, question
    blind = sum(Counter(given).most_common(1)[0][1] for given in answers.values())
    assert blind / sum(map(len, answers.values())) <= 0.2
    pictures = {sample["image"] for sample in _samples("train.json")}
    assert sum(len(given) == len(pictures) for given in answers.values()) >= 4


def test_pictures_open_and_are_all_used():
    used = {image for name in ("train.json", "multi.json") for s in _samples(name) for image in _images(s)}
    files = {f"images/{path.name}" for path in demo_path("images").iterdir()}
    assert used == files
    ratios = []
    for name in files:
        with Image.open(demo_path(name)) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert max(pixels.shape[:2]) <= 448
        assert pixels.std() > 10
        ratios.append(pixels.shape[1] / pixels.shape[0])
    assert min(ratios) < 0.6
    assert max(ratios) > 2


def test_every_picture_has_origin_and_licence():
    rows = [
        line
        for line in demo_path("README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    ]
    table = {}
    for row in rows:
        name, origin, licence = (cell.strip() for cell in row.split("|")[1:4])
        table[name.strip("`")] = (origin, licence)
    assert set(table) == {path.name for path in demo_path("images").iterdir()}
    for origin, licence in table.values():
        assert origin
        assert licence.startswith(("CC0", "public domain", "no known copyright", "Apache-2.0"))


def test_list_file_names_real_files_and_sizes():
    for line in demo_path("data.txt").read_text(encoding="utf-8").splitlines():
        name, thousands = line.split()
        assert round(float(thousands) * 1000) == len(_samples(name))


def test_sizes():
    files = [path for path in demo_path().rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert sum(path.stat().st_size for path in files) < MAX_FOLDER_BYTES
    assert demo_path("tokenizer.model").stat().st_size < MAX_TOKENIZER_BYTES


def test_tokenizer_special_ids(tokenizer):
    size = tokenizer.vocab_size()
    assert size == 1024
    assert [tokenizer.id_to_piece(k) for k in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert [tokenizer.is_control(k) for k in (1, 2)] == [True, True]
    for k in range(147):
        piece = f"[UNUSED_TOKEN_{k}]"
        assert tokenizer.piece_to_id(piece) == size - 147 + k
        assert tokenizer.encode(piece) == [size - 147 + k]
    assert tokenizer.piece_to_id("[UNUSED_TOKEN_147]") == tokenizer.unk_id()


def test_turn_delimiters_stay_whole(tokenizer):
    opening = tokenizer.encode("[UNUSED_TOKEN_146]user\nred[UNUSED_TOKEN_145]\n", out_type=str)
    assert opening[:3] == ["[UNUSED_TOKEN_146]", "user", "\n"]
    assert opening[-2:] == ["[UNUSED_TOKEN_145]", "\n"]


@pytest.mark.parametrize("text", [" leading", "two  spaces", "a\n\nb\tc", "日本 é 🙂", "1234", "<p>x</p>\n"])
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.unk_id() not in ids
    assert tokenizer.decode(ids) == text


def test_answers_round_trip_and_are_short(tokenizer):
    for sample in _samples("train.json") + _samples("multi.json"):
        for turn in sample["conversations"]:
            ids = tokenizer.encode(turn["value"])
            assert tokenizer.decode(ids) == turn["value"]
            if turn["from"] == "bot":
                assert len(ids) <= MAX_ANSWER_TOKENS
                assert 1 <= len(turn["value"].split()) <= 6


def test_script_writes_the_shipped_conversations(rebuilt):
    for name in ("train.json", "multi.json", "data.txt"):
        assert (rebuilt / name).read_text(encoding="utf-8") == demo_path(name).read_text(encoding="utf-8")


def test_script_writes_the_shipped_pictures(rebuilt):
    assert {p.name for p in (rebuilt / "images").iterdir()} == {p.name for p in demo_path("images").iterdir()}
    for path in (rebuilt / "images").iterdir():
        with Image.open(path) as new, Image.open(demo_path(f"images/{path.name}")) as old:
            assert new.size == old.size
            difference = np.abs(np.asarray(new.convert("RGB"), float) - np.asarray(old.convert("RGB"), float))
        # other Pillow versions may round or hint text a little differently
        assert difference.mean() < 2.0, path.name


def test_tokenizer_training_is_deterministic(make_demo, rebuilt):
    lines = make_demo.corpus([*make_demo.train_samples(), *make_demo.multi_samples()])
    assert make_demo.train_tokenizer(lines) == (rebuilt / "tokenizer.model").read_bytes()


def test_script_names_a_photograph_the_wheel_lacks(make_demo, monkeypatch):
    monkeypatch.setitem(make_demo.PHOTOGRAPHS, "gone.jpg", ("no_such_file.png", None))
    with pytest.raises(FileNotFoundError, match=r"no data/no_such_file\.png.*gone\.jpg"):
        make_demo.photograph("gone.jpg")


def test_demo_path_lists_the_files_when_one_is_missing():
    with pytest.raises(FileNotFoundError, match=r"no file 'trian\.json'.*images/cat\.jpg.*train\.json"):
        demo_path("trian.json")
