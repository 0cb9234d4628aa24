"""The pipeline on a small untrained model: forms of a request, lists, generators, and a bad request among good ones."""
from __future__ import annotations

import pytest
from mindformers import pipeline
from PIL import Image

from mindformers_ixc import InternLM2Tokenizer, IXC25Config, IXC25ForCausalLM, IXC25ImageProcessor, IXC25Processor
from mindformers_ixc.demo import demo_path

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
