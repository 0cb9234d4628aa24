"""Published datasets in their exact form to conversation files, and captions as answers to a prompt."""
from __future__ import annotations

import io
import json

import pytest
from PIL import Image

import mindformers_ixc_cli
from mindformers_ixc.cli.data import data as data_command
from mindformers_ixc.data.conversations import CAPTION_PROMPTS, load_conversations
from mindformers_ixc.data.converters import CONVERTERS, convert_dataset
from mindformers_ixc.errors import DataError

# Small files with every field the published ones have.
COCO = {"info": {"year": 2017}, "licenses": [{"id": 1, "name": "x", "url": "y"}],
        "images": [{"license": 1, "file_name": "000000000009.jpg", "coco_url": "u", "height": 480, "width": 640,
                    "date_captured": "2013-11-19 20:40:11", "flickr_url": "f", "id": 9}],
        "annotations": [{"image_id": 9, "id": 661611, "caption": "Closeup of bins of food. "},
                        {"image_id": 9, "id": 661977, "caption": "A meal in plastic containers."}]}
QUESTIONS = {"info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": "train2014",
             "questions": [{"image_id": 458752, "question": "What is this photo taken looking through?",
                            "question_id": 458752000}]}
ANNOTATIONS = {"info": {}, "license": {}, "data_subtype": "train2014", "data_type": "mscoco",
               "annotations": [{"question_type": "what is this", "multiple_choice_answer": "net", "answers": [
                   {"answer": "net", "answer_confidence": "maybe", "answer_id": 1}], "image_id": 458752,
                   "answer_type": "other", "question_id": 458752000}]}
TEXT_VQA = {"dataset_type": "train", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": [
    {"question": "what is the brand of this camera?", "image_id": "003a8ae2ef43b901",
     "image_classes": ["Cassette deck"], "flickr_original_url": "f", "flickr_300k_url": "g", "image_width": 1024,
     "image_height": 664, "answers": ["nous les gosses", "dakota", "clos culombu", "dakota digital", "dakota",
                                      "dakota", "dakota digital", "dakota digital", "dakota", "dakota"],
     "question_tokens": ["what", "is"], "question_id": 34602, "set_name": "train"}]}
OCR_VQA = {"761183272": {"imageURL": "http://images.example/I/61Y5cOdHJbL.jpg", "questions": [
    "Who wrote this book?", "What is the title of this book?"], "answers": ["Sandra Boynton", "Mom's Family"],
    "title": "Mom's Family", "authorName": "Sandra Boynton", "genre": "Calendars", "split": 1},
    "140": {"imageURL": "http://x/a.gif", "questions": ["Q"], "answers": ["A"], "split": 3}}
SHARE_GPT = [{"id": "QWJhYvA_0", "conversations": [
    {"from": "gpt", "value": "a rest of an earlier part"}, {"from": "human", "value": "Hello"},
    {"from": "gpt", "value": "Hi."}, {"from": "gpt", "value": "How can I help?"}, {"from": "human", "value": " "},
    {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "Bye!"}, {"from": "human", "value": "one more"}]},
    {"id": "empty", "conversations": [{"from": "gpt", "value": "only an answer"}]}]
LLAVA = [{"id": "000000033471", "image": "coco/train2017/000000033471.jpg", "conversations": [
    {"from": "human", "value": "<image>\nWhat are the colors of the bus?"},
    {"from": "gpt", "value": "White and red."}]}]


def convert(tmp_path, kind, *contents, **options) -> list[dict]:
    files = []
    for i, content in enumerate(contents):
        files.append(tmp_path / f"{kind}_{i}.json")
        files[-1].write_text(json.dumps(content))
    count = convert_dataset(kind, files, tmp_path / "out.json", **options)
    samples = json.loads((tmp_path / "out.json").read_text())
    assert len(samples) == count
    return samples


def turns(sample) -> list[str]:
    assert [turn["from"] for turn in sample["conversations"]] == ["human", "bot"] * (len(sample["conversations"]) // 2)
    return [turn["value"] for turn in sample["conversations"]]


def test_coco_captions(tmp_path):
    assert convert(tmp_path, "coco_captions", COCO, images="train2017") == [
        {"id": 661611, "image": "train2017/000000000009.jpg", "caption": "Closeup of bins of food."},
        {"id": 661977, "image": "train2017/000000000009.jpg", "caption": "A meal in plastic containers."}]


def test_vqa_v2(tmp_path):
    sample, = convert(tmp_path, "vqa_v2", QUESTIONS, ANNOTATIONS)
    assert (sample["id"], sample["image"]) == (458752000, "COCO_train2014_000000458752.jpg")
    assert turns(sample) == ["What is this photo taken looking through?", "net"]


def test_text_vqa_takes_the_most_frequent_answer(tmp_path):
    sample, = convert(tmp_path, "text_vqa", TEXT_VQA)
    assert sample["image"] == "003a8ae2ef43b901.jpg"
    assert turns(sample) == ["what is the brand of this camera?", "dakota"]


@pytest.mark.parametrize(("split", "image", "pairs"), [("train", "761183272.jpg", 2), ("test", "140.gif", 1)])
def test_ocr_vqa(tmp_path, split, image, pairs):
    sample, = convert(tmp_path, "ocr_vqa", OCR_VQA, split=split)
    assert sample["image"] == image and len(turns(sample)) == 2 * pairs


def test_share_gpt_is_made_to_alternate(tmp_path):
    sample, = convert(tmp_path, "share_gpt", SHARE_GPT)
    assert turns(sample) == ["Hello", "Hi.\nHow can I help?", "Bye", "Bye!"]


def test_llava_is_read_as_a_conversation(tmp_path):
    sample, = convert(tmp_path, "llava", LLAVA)
    assert sample["image"] == "coco/train2017/000000033471.jpg"
    assert turns(sample) == ["<image>\nWhat are the colors of the bus?", "White and red."]


@pytest.mark.parametrize(("kind", "contents", "words"), [
    ("coco", [COCO], "choices are coco_captions"), ("vqa_v2", [QUESTIONS], r"made from 2 files \(questions, annot"),
    ("coco_captions", [LLAVA], "not in the form coco_captions is published in"),
    ("text_vqa", [{"data": []}], "gives no samples"), ("share_gpt", [SHARE_GPT[1:]], "gives no samples")])
def test_wrong_files_write_nothing(tmp_path, kind, contents, words):
    with pytest.raises(DataError, match=words):
        convert(tmp_path, kind, *contents)
    assert not (tmp_path / "out.json").exists()


def test_every_converter_is_tested():
    assert set(CONVERTERS) == {"coco_captions", "vqa_v2", "text_vqa", "ocr_vqa", "share_gpt", "llava"}


def caption_file(tmp_path, count: int = 200):
    Image.new("RGB", (30, 20)).save(tmp_path / "x.png")
    rows = [{"id": i, "image": "x.png", "caption": f"caption {i}"} for i in range(count)]
    (tmp_path / "captions.json").write_text(json.dumps(rows))
    return tmp_path / "captions.json"


def test_captions_answer_a_prompt_chosen_at_random(tmp_path):
    path = caption_file(tmp_path)
    samples = load_conversations(path, seed=1)
    asked = [sample.turns[0][1] for sample in samples]
    assert set(asked) == set(CAPTION_PROMPTS)
    assert 60 < asked.count(CAPTION_PROMPTS[0]) < 140          # 200 fair throws
    assert [sample.turns[1] for sample in samples[:2]] == [("assistant", "caption 0"), ("assistant", "caption 1")]
    assert [sample.turns for sample in load_conversations(path, seed=1)] == [sample.turns for sample in samples]
    assert [sample.turns[0][1] for sample in load_conversations(path, seed=2)] != asked
    assert load_conversations(path, caption_prompts=["What?"])[0].turns[0] == ("user", "What?")


def test_the_command(tmp_path):
    (tmp_path / "in.json").write_text(json.dumps(COCO))
    words = ["data", "coco_captions", str(tmp_path / "in.json"), str(tmp_path / "out.json")]
    arguments = mindformers_ixc_cli.build_parser().parse_args(words)
    arguments.answers = io.StringIO()
    assert data_command(arguments) == 0
    assert arguments.answers.getvalue() == f"2 samples in {tmp_path / 'out.json'}\n"
    arguments.split = "test"
    with pytest.raises(DataError, match="--split belongs to ocr_vqa"):
        data_command(arguments)
