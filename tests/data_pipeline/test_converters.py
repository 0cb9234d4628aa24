"""Published datasets in their exact form to conversation files, and captions as answers to a prompt."""
from __future__ import annotations

import io
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mindformers_ixc_cli
from mindformers_ixc.cli.data import data as data_command
from mindformers_ixc.data.conversations import CAPTION_PROMPTS, load_conversations
from mindformers_ixc.data.converters import CONVERTERS, convert_dataset, drops_text
from mindformers_ixc.data.forms import ROLES
from mindformers_ixc.data.records import json_files, published
from mindformers_ixc.data.records.published import Published
from mindformers_ixc.data.shared_talks import share_gpt
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


def shared(*turns, **fields) -> dict:
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns], **fields}


# A shared conversation, what is made of it, and what is counted.
SHARED = [
    (shared(("human", "Q1"), ("chatgpt", "A1"), ("user", "Q2"), ("bing", "A2"), ("human", "Q3"), ("bard", "A3")),
     ["Q1", "A1", "Q2", "A2", "Q3", "A3"], {}),
    (shared(("human", "Q1"), ("human", "more"), ("gpt", "A1"), ("gpt", "more")), ["Q1\nmore", "A1\nmore"], {}),
    (shared(("human", "Q1"), ("gpt", " "), ("human", "Q2"), ("gpt", "A2")), ["Q2", "A2"],
     {"empty turns": 1, "questions without an answer": 1}),
    (shared(("human", "Q1"), ("gpt", "A1"), ("human", ""), ("gpt", "A2"), ("human", "Q3"), ("gpt", "A3")),
     ["Q1", "A1", "Q3", "A3"], {"empty turns": 1, "answers without a question": 1}),
    (shared(("human", "Q1"), ("system", "S"), ("human", "Q2"), ("gpt", "A2")), ["Q2", "A2"],
     {"questions without an answer": 1, "turns of the system after the first turn": 1}),
    (shared(("human", "Q1"), ("system", "S"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "A2"), ("human", "Q3")),
     ["Q2", "A2"], {"questions without an answer": 2, "turns of the system after the first turn": 1,
                    "answers without a question": 1}),
    (shared(("human", "Q1"), ("function", "F"), ("gpt", "A1")), None,
     {"conversations with the unknown role 'function'": 1}),
    (shared(("human", "Q1"), ("gpt", None)), None, {"conversations with a turn without speaker or text": 1}),
    (shared(("human", "Q1"), ("gpt", ["A1"])), None, {"conversations with a turn that is no text": 1}),
    (shared(("human", "Q1"), ("gpt", "A1"), audios=["x.wav"]), None, {"conversations with audios": 1}),
    (shared(("human", "Q1"), ("gpt", "A1"), stars=5, model="x", views=None), ["Q1", "A1"],
     {"values of the key stars": 1}),
    (shared(("human", "<image>Q1"), ("gpt", "")), None, {"empty turns": 1, "questions without an answer": 1,
                                                        "conversations without a question that is answered": 1}),
    (shared(("human", "<image>Q1"), ("gpt", ""), ("human", "Q2"), ("gpt", "A2"), images=["a.jpg"]), None,
     {"empty turns": 1, "conversations of which the turn with a picture's place is left out": 1}),
    (shared(("human", "<image>Q1"), ("gpt", "A1")), None,
     {"samples that could not be read again (field conversations: 1 <image> for 0 pictures)": 1}),
    ({"conversations": "text"}, None, {"conversations without a list of turns": 1}),
    ("text", None, {"entries that are no mapping": 1}),
    ({"id": 5, "messages": [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]}, ["Q1", "A1"],
     {}),
]


@pytest.mark.parametrize(("row", "texts", "counted"), SHARED, ids=range(len(SHARED)))
def test_every_shared_turn_is_kept_or_counted(tmp_path, row, texts, counted):
    lines = [json.dumps(row), json.dumps(shared(("human", "Q"), ("gpt", "A")))]
    (tmp_path / "in.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    dropped = Counter()
    count = convert_dataset("share_gpt", [tmp_path / "in.jsonl"], tmp_path / "out.json", dropped=dropped)
    samples = json.loads((tmp_path / "out.json").read_text())
    assert len(samples) == count == 1 + (texts is not None)
    assert dropped == counted
    if texts is not None:
        assert turns(samples[0]) == texts
    assert len(load_conversations(tmp_path / "out.json")) == count


def test_a_leading_system_turn_is_kept(tmp_path):
    pair = (("human", "Q"), ("gpt", "A"))
    for row in (shared(("system", "S"), *pair), shared(*pair, system="S")):
        convert(tmp_path, "share_gpt", [row])
        assert load_conversations(tmp_path / "out.json")[0].turns == [("system", "S"), ("user", "Q"),
                                                                      ("assistant", "A")]


TALK = st.lists(st.tuples(st.sampled_from(["human", "user", "gpt", "bing", "system"]), st.sampled_from(["", " ", "x"])),
                max_size=9)


@settings(deadline=None)
@given(TALK)
def test_no_question_gets_the_answer_of_another(talk):
    # every text has its number, so that it can be told which turns were joined and which were paired
    texts = [(role, text and f"{text}{i}".strip()) for i, (role, text) in enumerate(talk)]
    texts = [(role, text if "x" in text else "") for role, text in texts]
    dropped = Counter()
    samples = list(share_gpt([shared(*texts)], dropped))
    rest = [(i, ROLES[role]) for i, (role, text) in enumerate(texts)]
    kept = []
    for sample in samples:
        spoken = [turn for turn in sample["conversations"] if turn["from"] != "system"]
        for asked, told in zip(spoken[::2], spoken[1::2]):
            numbers = [int(text[1:]) for turn in (asked, told) for text in turn["value"].split("\n")]
            between = rest[numbers[0]:numbers[-1] + 1]
            assert [role for _, role in between] == sorted((role for _, role in between), reverse=True)   # u..., a...
            assert {role for _, role in between} == {"user", "assistant"}
            kept += numbers
    said = [i for i, (role, text) in enumerate(texts) if text and ROLES[role] != "system"]
    lost = len(set(said) - set(kept))
    if samples:
        assert lost == 0 or dropped["questions without an answer"] + dropped["answers without a question"] > 0
    else:
        assert sum(dropped.values()) > 0


@pytest.mark.parametrize("media", [{"image": ["a.jpg", "b.jpg"]}, {"images": ["a.jpg", "b.jpg"]},
                                   {"images": [{"path": "a.jpg"}, {"path": "b.jpg"}]}])
def test_llava_with_several_pictures(tmp_path, media):
    row = shared(("human", "<image><image>Q"), ("gpt", "A"), **media)
    convert(tmp_path, "llava", [row], images=tmp_path)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"")
    sample, = load_conversations(tmp_path / "out.json")
    assert sample.images == [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    assert sample.turns == [("user", "<ImageHere><ImageHere>Q"), ("assistant", "A")]


@pytest.mark.parametrize("media", [{"video": "c.mp4"}, {"videos": ["c.mp4"], "image": None}])
def test_llava_with_a_video(tmp_path, media):
    sample, = convert(tmp_path, "llava", [shared(("human", "<image>Q"), ("gpt", "A"), **media)], images="clips")
    assert {key: sample[key] for key in ("video", "videos", "image") if key in sample} in (
        {"video": "clips/c.mp4"}, {"videos": ["clips/c.mp4"]})


def changed(content: dict, **fields) -> dict:
    return {**content, **fields}


COVER = OCR_VQA["761183272"]
DAMAGED = [
    ("coco_captions", [changed(COCO, annotations=[*COCO["annotations"], {"image_id": 8, "id": 1, "caption": "c"},
                                                  {"image_id": 9, "id": 2, "caption": " "}, {"image_id": 9, "id": 3}])],
     2, {"captions of pictures that the file does not have": 1, "captions that are empty or no text": 2}),
    ("vqa_v2", [changed(QUESTIONS, questions=[
        *QUESTIONS["questions"], {"image_id": 1, "question": "q", "question_id": 1},
        {"image_id": "x", "question": "q", "question_id": "458752000"},
        {"image_id": 1, "question": None, "question_id": 458752000}]), ANNOTATIONS],
     1, {"questions without an answer": 1, "questions without the number of a picture": 1,
         "questions that are empty or no text": 1}),
    ("text_vqa", [{"data": [*TEXT_VQA["data"], *({**TEXT_VQA["data"][0], **fields} for fields in (
        {"answers": []}, {"answers": "dakota"}, {"answers": None}, {"image_id": None}, {"question": ""}))]}],
     1, {"questions without an answer": 3, "questions without a picture": 1, "questions that are empty or no text": 1}),
    ("ocr_vqa", [{"1": COVER, "2": changed(COVER, answers=["one"]), "3": changed(COVER, answers="ab"),
                  "4": changed(COVER, split=7), "5": changed(COVER, imageURL=None),
                  "6": changed(COVER, answers=["", "a"]), "7": changed(COVER, split="1")}],
     3, {"covers without as many answers as questions": 2, "covers of an unknown split": 1,
         "covers without a picture": 1, "questions or answers that are empty or no text": 1}),
]


@pytest.mark.parametrize(("kind", "contents", "kept", "counted"), DAMAGED, ids=[kind for kind, *_ in DAMAGED])
def test_rows_that_lack_something_are_counted(tmp_path, kind, contents, kept, counted):
    dropped = Counter()
    assert len(convert(tmp_path, kind, *contents, dropped=dropped)) == kept
    assert dropped == counted


def test_a_cover_s_suffix_is_that_of_its_file(tmp_path):
    sample, = convert(tmp_path, "ocr_vqa", {"9": changed(COVER, imageURL="http://x/a.png?size=.5")})
    assert sample["image"] == "9.png"


def test_the_summary_of_what_is_left_out_is_short():
    assert drops_text(Counter()) == ""
    assert drops_text(Counter(b=1, a=2)) == "; left out: 2 a, 1 b"
    text = drops_text(Counter({f"reason {i}": 1 for i in range(50)}))
    assert text.endswith(", 40 for other reasons")


def test_sources_and_targets_that_cannot_be_used(tmp_path):
    source = tmp_path / "in.json"
    with pytest.raises(FileNotFoundError, match=r"The data file .*in\.json does not exist"):
        convert_dataset("llava", [source], tmp_path / "out.json")
    with pytest.raises(DataError, match=r"The data file .* is a folder; name a file"):
        convert_dataset("llava", [tmp_path], tmp_path / "out.json")
    source.write_bytes(json.dumps(LLAVA).encode("utf-16"))
    with pytest.raises(DataError, match=r"in\.json is UTF-16 text"):
        convert_dataset("llava", [source], tmp_path / "out.json")
    source.write_bytes(b"\xef\xbb\xbf" + json.dumps(COCO).encode())
    assert convert_dataset("coco_captions", [source], tmp_path / "out.json") == 2
    with pytest.raises(DataError, match="which it would replace"):
        convert_dataset("coco_captions", [source], source)
    with pytest.raises(FileNotFoundError, match=r"The folder of the target .*gone/out\.json does not exist"):
        convert_dataset("coco_captions", [source], tmp_path / "gone" / "out.json")


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
    changed_rows = [*COCO["annotations"], {"image_id": 8, "id": 1, "caption": "c"}]
    (tmp_path / "in.json").write_text(json.dumps(changed(COCO, annotations=changed_rows)))
    arguments.answers = io.StringIO()
    assert data_command(arguments) == 0
    assert arguments.answers.getvalue() == (f"2 samples in {tmp_path / 'out.json'}; left out: 1 captions of pictures "
                                            "that the file does not have\n")
    arguments.split = "test"
    with pytest.raises(DataError, match="--split belongs to ocr_vqa"):
        data_command(arguments)


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(), inner, max_size=3), max_leaves=5)


@settings(deadline=None)
@given(content=st.dictionaries(st.text(), VALUES, max_size=6), window=st.integers(1, 60),
       indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_a_published_file_is_gone_through_as_if_it_were_read(tmp_path_factory, content, window, indent, ascii_only):
    path = tmp_path_factory.mktemp("published") / "data.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(published, "WINDOW", window)
        patched.setattr(json_files, "WINDOW", window)
        file = Published(path)
        assert dict(file.items()) == content
        for key, value in content.items():
            found = file[key]
            assert (list(found) if isinstance(value, list) else found) == value
        with pytest.raises(KeyError):
            file["no such key, it is longer than any text that is drawn here, or at least that is very likely"]


def test_a_published_file_that_is_cut_short_is_refused_and_leaves_nothing(tmp_path):
    whole = json.dumps(COCO)
    for kept in (len(whole) - 1, len(whole) // 2, len(whole) // 4, 20):
        (tmp_path / "cut.json").write_text(whole[:kept])
        with pytest.raises(DataError, match=r"cut\.json.* is not valid JSON"):
            convert_dataset("coco_captions", [tmp_path / "cut.json"], tmp_path / "out.json")
        assert [path.name for path in tmp_path.iterdir()] == ["cut.json"]


def test_the_target_may_be_json_lines(tmp_path):
    (tmp_path / "coco.json").write_text(json.dumps(COCO))
    for name in ("out.json", "out.jsonl"):
        words = ["data", "coco_captions", str(tmp_path / "coco.json"), str(tmp_path / name)]
        assert mindformers_ixc_cli.main(words) == 0
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads((tmp_path / "out.json").read_text())
