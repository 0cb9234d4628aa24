"""The pipeline on a small untrained model: forms of a request, lists, generators, and a bad request among good ones."""
from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from mindformers import pipeline
from PIL import Image

from mindformers_ixc import InternLM2Tokenizer, IXC25Config, IXC25ForCausalLM, IXC25ImageProcessor, IXC25Processor
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import PromptError

PICTURE = Image.new("RGB", (56, 56), (9, 90, 200))


@pytest.fixture(scope="module")
def chat():
    config = IXC25Config(vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, plora_rank=2, task_lora_ranks={"web": 2},
                         vision_config={"image_size": 56, "hidden_size": 16, "num_hidden_layers": 1,
                                        "num_attention_heads": 1, "intermediate_size": 16})
    processor = IXC25Processor(IXC25ImageProcessor(56), InternLM2Tokenizer(str(demo_path("tokenizer.model"))))
    return pipeline("multimodal_chat", model=IXC25ForCausalLM(config), processor=processor,
                    tokenizer=processor.tokenizer, image_processor=processor.image_processor, max_new_tokens=4)


def test_all_forms_of_a_request_agree(chat):
    plain = chat({"query": "<ImageHere>What?", "images": [PICTURE]})
    messages = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What?"}]}]
    assert set(plain[0]) == {"text_generation_text"}
    assert chat(messages) == plain
    assert chat([messages, {"query": "<ImageHere>What?", "images": PICTURE}]) == plain * 2
    assert chat(request for request in [messages]) == plain


def test_options_of_a_call_win(chat):
    long = chat("Tell me", max_new_tokens=8)[0]["text_generation_text"]
    short = chat("Tell me")[0]["text_generation_text"]
    assert long.startswith(short)


def test_a_bad_request_is_reported_in_its_place(chat):
    answers = chat([{"query": "a", "images": ["gone.png"]}, "b", {"images": []}, 7, {"query": "c<ImageHere>"}])
    assert [sorted(answer) for answer in answers] == [["error"], ["text_generation_text"], ["error"], ["error"],
                                                      ["error"]]
    assert "gone.png" in answers[0]["error"]
    assert "'query'" in answers[2]["error"]


def test_a_single_bad_request_raises(chat):
    with pytest.raises(ValueError, match="task LoRAs"):
        chat("a", mode="write")
    with pytest.raises(ValueError, match="num_beams"):
        chat("a", num_beams=0)


def test_whatever_goes_wrong_with_a_request_is_its_own_error(chat, monkeypatch):
    encode = chat.assistant.encode
    monkeypatch.setattr(chat.assistant, "encode", lambda question: {}["tile"] if question["query"] == "odd" else
                        encode(question))
    answers = chat(["b", "odd", None, {"query": None}, {"messages": None}, [{"role": "user", "content": None}],
                    {"query": "a", "history": [None]}, {"query": "x\udc80"}, "b"])
    assert answers[0] == answers[8]
    assert set(answers[0]) == {"text_generation_text"}
    assert [answer["error"].split(":")[0] for answer in answers[1:8]] == [f"request {i}" for i in range(1, 8)]
    for answer, words in zip(answers[1:], ("KeyError", "found null", "query must be a text, found null",
                                           "messages must be a list", "messages[0].content must be a text or a list of "
                                           "parts, found null", "history[0]: must be a pair", "half of a surrogate")):
        assert words in answer["error"]
    with pytest.raises(PromptError, match="The request failed with KeyError: 'tile'"):
        chat("odd")


QUESTIONS = [{"query": "Tell me"}, {"query": "<ImageHere>What?", "images": [PICTURE]}, {"query": "word " * 100},
             {"query": "<ImageHere><ImageHere>Both?", "images": [PICTURE, PICTURE.rotate(90)]}]


def test_threads_share_a_pipeline(chat):
    alone = [chat(question) for question in QUESTIONS]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: chat(QUESTIONS[i % 4]), range(40)))
    assert found == alone * 10


def test_streams_that_are_read_in_turns_or_dropped_say_what_they_say_alone(chat):
    assistant, options = chat.assistant, {"max_new_tokens": 16, "stop_token_ids": (1,)}
    alone = [list(assistant.stream(question, **options)) for question in QUESTIONS]
    assert all(len(pieces) > 4 for pieces in alone)
    streams = [(i % 4, assistant.stream(QUESTIONS[i % 4], **options)) for i in range(20)]
    shown: list[list[str]] = [[] for _ in streams]
    order = random.Random(5)
    going = list(range(20))
    while going:
        number = order.choice(going)
        question, stream = streams[number]
        piece = next(stream, None)
        shown[number] += [] if piece is None else [piece]
        if piece is None or (number % 5 == 0 and len(shown[number]) == 3):     # a fifth is dropped without a word
            going.remove(number)
            streams[number] = (question, iter(()))
        if number == 7:
            assert chat(QUESTIONS[0], **options)[0]["text_generation_text"] == "".join(alone[0]).strip()
    for number, pieces in enumerate(shown):
        assert pieces == (alone[number % 4][:3] if number % 5 == 0 else alone[number % 4])


def picture_file(folder, name: str, picture: Image.Image, **options) -> str:
    picture.save(folder / name, **options)
    return str(folder / name)


def test_unusual_pictures_are_answered(chat, tmp_path):
    frames = [Image.new("P", (40, 30), colour) for colour in (1, 2)]
    pictures = [picture_file(tmp_path, "two.gif", frames[0], save_all=True, append_images=frames[1:]),
                picture_file(tmp_path, "cmyk.jpg", Image.new("CMYK", (40, 30), (10, 20, 30, 40))),
                picture_file(tmp_path, "deep.png", Image.new("I;16", (40, 30), 40000)),
                picture_file(tmp_path, "strip.png", Image.new("RGB", (30000, 20), (1, 2, 3)))]
    answers = chat([{"query": "What?", "images": picture} for picture in pictures], hd_num=40)
    assert [sorted(answer) for answer in answers] == [["text_generation_text"]] * 4


def test_unreadable_pictures_and_videos_are_reported_in_their_places(chat, tmp_path, goldens):
    whole = (goldens / "video_land.mp4").read_bytes()
    for name, content in (("empty.mp4", b""), ("cut.mp4", whole[:len(whole) // 3]), ("noise.png", b"\x89PNG\r\n")):
        (tmp_path / name).write_bytes(content)
    bomb = picture_file(tmp_path, "bomb.png", Image.new("1", (20000, 10000)))
    files = [str(tmp_path / "empty.mp4"), str(tmp_path / "cut.mp4"), str(tmp_path / "noise.png"), bomb]
    requests = [{"query": "What?", "images": file} for file in files] + ["b", ""]
    answers = chat(requests)
    assert [sorted(answer) for answer in answers] == [["error"]] * 4 + [["text_generation_text"], ["error"]]
    for answer, words in zip(answers, ("empty.mp4 is empty (0 bytes)", "cut.mp4", "noise.png", "bomb.png")):
        assert words in answer["error"]
    assert "pixels" in answers[3]["error"]
    assert "query is empty" in answers[5]["error"]


@pytest.mark.parametrize(("option", "words"), [
    ({"num_beams": 0}, "num_beams is 0"), ({"top_p": 2}, "top_p is 2"), ({"mode": "paint"}, "mode is 'paint'"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"temperature": -1}, "temperature is -1")])
def test_bad_options_are_named(chat, option, words):
    with pytest.raises(ValueError, match=words):
        chat("a", **option)


def test_a_prompt_longer_than_the_model_is_an_error(chat):
    with pytest.raises(ValueError, match=r"positions; this model takes 24576"):
        chat("word " * 30000)


@pytest.mark.parametrize(("option", "words"), [
    ({"max_tokens": 3}, r"Unknown option max_tokens \(value 3\); did you mean max_new_tokens\?"),
    ({"colour": "red"}, r"Unknown option colour \(value 'red'\); the choices are .*hd_num, .*mode, .*top_p"),
    ({"streamer": None}, r"Unknown option streamer")])
def test_unknown_options_are_refused_in_a_call_and_when_it_is_made(chat, option, words):
    with pytest.raises(ValueError, match=words):
        chat("a", **option)
    with pytest.raises(ValueError, match=words):
        chat(["a", "b"], **option)
    with pytest.raises(ValueError, match=words):
        pipeline("multimodal_chat", model=chat.model, processor=chat.assistant.processor,
                 tokenizer=chat.tokenizer, image_processor=chat.image_processor, **option)


def test_every_known_option_and_mindformers_own_are_taken(chat):
    options = {"mode": "web", "hd_num": 4, "meta_instruction": "Be brief.", "history": [("a", "b")],
               "max_new_tokens": 2, "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "num_beams": 1,
               "repetition_penalty": 1.1, "length_penalty": 1.0, "early_stopping": False, "stop_strings": ["x"],
               "stop_token_ids": [2], "seed": 1}
    made = pipeline("multimodal_chat", model=chat.model, processor=chat.assistant.processor, tokenizer=chat.tokenizer,
                    image_processor=chat.image_processor, batch_size=1, **options)
    assert made.batch_size == 1
    assert made("Tell me") == made(["Tell me"], batch_size=1) == chat("Tell me", batch_size=1, **options)


def test_stop_strings_end_an_answer(chat):
    whole = chat("Tell me", max_new_tokens=8)[0]["text_generation_text"]
    assert len(whole) > 2
    stop = whole[2]
    assert chat("Tell me", max_new_tokens=8, stop_strings=[stop])[0]["text_generation_text"] == \
        whole[:whole.index(stop)].strip()
