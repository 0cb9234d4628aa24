"""The public methods: arguments and defaults as people know them, answers as through the other interfaces."""
from __future__ import annotations

import inspect

import numpy as np
import pytest
from mindformers import TextIteratorStreamer
from PIL import Image

from mindformers_ixc import InternLM2Tokenizer, IXC25Config, IXC25ForCausalLM, IXC25ImageProcessor, IXC25Processor
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import ConfigError, GenerationError, PromptError
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.causal_lm import META_INSTRUCTION
from mindformers_ixc.generation.webpage import html_of

RED, BLUE = (Image.new("RGB", (56, 56), colour) for colour in ((200, 10, 10), (9, 90, 200)))


@pytest.fixture(scope="module")
def tokenizer():
    return InternLM2Tokenizer(str(demo_path("tokenizer.model")))


@pytest.fixture(scope="module")
def model():
    config = IXC25Config(vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, plora_rank=2, max_position_embeddings=512,
                         task_lora_ranks={"sft": 2, "dpo": 2, "web": 2}, initializer_range=0.3,
                         vision_config={"image_size": 56, "hidden_size": 16, "num_hidden_layers": 1,
                                        "num_attention_heads": 1, "intermediate_size": 16})
    return IXC25ForCausalLM(config)


@pytest.fixture
def spied(model, tokenizer, monkeypatch):
    """What reaches the assistant, and an answer of a known text."""
    calls = []

    def reply(self, question, options, mode="base", streamer=None, total=None):
        calls.append({"question": question, "options": options, "mode": mode, "total": total})
        return "```html\n<p>page</p>\n```"

    monkeypatch.setattr(Assistant, "reply", reply)
    monkeypatch.setattr(model, "tokenizer", tokenizer, raising=False)
    return calls


def test_chat_has_the_public_arguments_in_their_order():
    parameters = inspect.signature(IXC25ForCausalLM.chat).parameters
    assert list(parameters) == ["self", "tokenizer", "query", "image", "hd_num", "history", "streamer",
                                "max_new_tokens", "do_sample", "num_beams", "temperature", "top_p",
                                "repetition_penalty", "infer_mode", "use_meta", "meta_instruction", "kwargs"]
    defaults = {name: parameters[name].default for name in ("max_new_tokens", "do_sample", "num_beams", "temperature",
                                                            "top_p", "repetition_penalty", "infer_mode", "use_meta")}
    assert defaults == {"max_new_tokens": 1024, "do_sample": True, "num_beams": 1, "temperature": 1.0, "top_p": 0.8,
                        "repetition_penalty": 1.005, "infer_mode": "base", "use_meta": False}


def test_the_public_call(model, tokenizer):
    options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 6}
    response, history = model.chat(tokenizer, "What?", RED, use_meta=True, **options)
    assert history == [("What?", response)]
    processor = IXC25Processor(IXC25ImageProcessor(56), tokenizer)
    question = {"query": "What?", "images": [RED], "meta_instruction": META_INSTRUCTION}
    assistant = Assistant(model, processor)
    assert [response] == assistant.answer([question], num_beams=3, max_new_tokens=6, repetition_penalty=1.005)


def test_rounds_with_pictures_of_every_kind(model, tokenizer, tmp_path):
    BLUE.save(tmp_path / "blue.png")
    pictures = [RED, tmp_path / "blue.png", (tmp_path / "blue.png").read_bytes(), np.asarray(BLUE)]
    answers = []
    for picture in pictures[1:]:
        history = [("<ImageHere>This?", "yes")]
        response, after = model.chat(tokenizer, "<ImageHere>And this?", [RED, picture], history=history,
                                     do_sample=False, max_new_tokens=6)
        assert history == [("<ImageHere>This?", "yes")]
        assert after == [*history, ("<ImageHere>And this?", response)]
        answers.append(response)
    assert len(set(answers)) == 1


def test_a_seed_fixes_sampling(model, tokenizer):
    ask = [model.chat(tokenizer, "Tell", max_new_tokens=12, seed=seed)[0] for seed in (1, 1, 2)]
    assert ask[0] == ask[1] != ask[2]


def test_mindformers_streamer_gets_the_answer(model, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    response, _ = model.chat(tokenizer, "Tell me", streamer=streamer, do_sample=False, max_new_tokens=12)
    # MindFormers' iterator says None at the end, for ever
    assert "".join(iter(streamer.__next__, None)).strip() == response
    with pytest.raises(GenerationError, match="num_beams is 2; a streamer"):
        model.chat(tokenizer, "Tell me", streamer=streamer, num_beams=2)


@pytest.mark.parametrize(("arguments", "word"), [
    ({"query": " "}, "query is empty"), ({"infer_mode": "art"}, "infer_mode is 'art'; the choices are base, write"),
    ({"num_beams": 0}, "num_beams is 0"), ({"top_p": 2}, "top_p is 2"), ({"colour": 1}, "colour"),
    ({"query": "x " * 3000}, "positions; this model takes 512"), ({"image": [RED, BLUE]}, "<ImageHere>"),
    ({"image": [3]}, "int"), ({"temperature": 0.0}, "temperature")])
def test_bad_arguments_are_named(model, tokenizer, arguments, word):
    with pytest.raises(ValueError, match=word.replace("(", r"\(")):
        model.chat(tokenizer, **{"query": "a", **arguments})


def test_methods_without_a_tokenizer_say_so(model):
    with pytest.raises(PromptError, match=r"model\.tokenizer = tokenizer"):
        model.write_article("Cats")


def test_articles(model, spied):
    assert model.write_artical("Cats", seed=7).startswith("```")       # an article is left as it is
    call = spied[0]
    options = call["options"]
    assert call["mode"] == "write"
    assert (options.top_p, options.top_k, options.do_sample, options.seed) == (0.8, 40, True, 7)
    assert call["total"] == 8192
    model.write_article("Cats", max_new_tokens=9)
    assert (spied[1]["options"].max_new_tokens, spied[1]["total"], spied[1]["options"].seed) == (9, None, None)
    with pytest.raises(PromptError, match="history has 1 round"):
        model.write_article("Cats", history=[("a", "b")])


def test_an_article_is_bounded_with_its_prompt(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "tokenizer", tokenizer, raising=False)
    with pytest.raises(GenerationError, match="max_length, which counts prompt and answer, is 4"):
        model.write_article("Cats", max_length=4)


def test_webpages(model, spied, tmp_path):
    resume, target = tmp_path / "resume.md", tmp_path / "page.html"
    resume.write_text("# Ada\n")
    assert model.write_webpage("A page", seed=202, task="Instruction-aware Webpage Generation") == "<p>page</p>"
    assert model.resume_2_webpage(str(resume), seed=202, repetition_penalty=2.0, save_to=target) == "<p>page</p>"
    assert model.screen_2_webpage("Code it", [RED], save_to=target, overwrite=True) == "<p>page</p>"
    assert target.read_text() == "<p>page</p>"
    first, second, third = spied
    assert first["mode"] == second["mode"] == third["mode"] == "web"
    options = first["options"]
    assert (options.num_beams, options.do_sample, options.repetition_penalty, options.max_new_tokens) == \
        (2, True, 3.0, 4800)
    assert second["options"].repetition_penalty == 2.0
    assert second["question"]["query"].endswith("# Ada\n")
    assert third["question"]["images"] == [RED]


def test_webpages_refuse_before_anything_is_computed(model, spied, tmp_path):
    target = tmp_path / "page.html"
    target.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        model.write_webpage("A page", save_to=target)
    with pytest.raises(FileNotFoundError, match="none is no folder; make it first"):
        model.write_webpage("A page", save_to=tmp_path / "none" / "page.html")
    with pytest.raises(PromptError, match="needs a screenshot"):
        model.screen_2_webpage()
    with pytest.raises(PromptError, match=r"none\.md cannot be read"):
        model.resume_2_webpage(tmp_path / "none.md")
    (tmp_path / "empty.md").write_text(" ")
    with pytest.raises(PromptError, match="is empty"):
        model.resume_2_webpage(tmp_path / "empty.md")
    assert target.read_text() == "mine"
    assert not spied


def test_html_of_an_answer():
    assert html_of("Here:\n```html\n<p>\n</p>\n```\nBye") == "<p>\n</p>"
    assert html_of("<p>```</p>") == "<p>```</p>"
    assert html_of('<img src="https://source.unsplash.com/random/300x200/?cat,dog">') == \
        '<img src="https://picsum.photos/300/200">'


class TestGenerate:
    """Hugging Face's generate()."""

    def test_what_the_processor_returns_goes_in(self, model, tokenizer):
        processor = IXC25Processor(IXC25ImageProcessor(56), tokenizer)
        encoded = processor("<ImageHere>What?", BLUE)
        found = model.generate(**encoded, max_new_tokens=6, eos_token_id=[2])
        length = encoded["input_ids"].shape[1]
        assert (found[:, :length] == encoded["input_ids"]).all()
        sample = processor.encode_chat("<ImageHere>What?", [BLUE])
        from mindformers_ixc.generation.options import GenerationOptions

        options = GenerationOptions(max_new_tokens=6, stop_token_ids=(2,))
        assert found[0, length:].tolist() == Assistant(model, None).generate([sample], options)[0]

    def test_padded_prompts_give_what_each_gives_alone(self, model):
        ids = np.array([[1, 5, 6, 7, 8], [2, 2, 1, 9, 9]])
        mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
        both = model.generate(ids, attention_mask=mask, max_new_tokens=5, eos_token_id=999)
        assert both.shape == (2, 10)
        assert (both[0] == model.generate(ids[0], max_new_tokens=5, eos_token_id=999)[0]).all()
        assert (both[1, 5:] == model.generate(ids[1, 2:], max_new_tokens=5, eos_token_id=999)[0, 3:]).all()

    def test_max_length_counts_the_prompt(self, model):
        assert model.generate([1, 5, 6], max_length=7, eos_token_id=999).shape == (1, 7)
        with pytest.raises(GenerationError, match="max_length is 3"):
            model.generate([1, 5, 6], max_length=3)
        assert model.generate([1, 5], generation_config={"max_new_tokens": 2, "bos_token_id": 1},
                              eos_token_id=999).shape == (1, 4)

    def test_bad_arguments(self, model):
        with pytest.raises(GenerationError, match="Unknown option"):
            model.generate([1, 5], colour=3)
        with pytest.raises(ConfigError, match="infer_mode"):
            model.generate([1, 5], infer_mode="x")
        with pytest.raises(PromptError, match="Prompt 0 is empty"):
            model.generate(np.zeros((1, 0)))
        with pytest.raises(PromptError, match="belong together"):
            model.generate([1, 5], image_mask=np.zeros((1, 2)))
        with pytest.raises(GenerationError, match="stop_strings need the tokenizer"):
            IXC25ForCausalLM(model.config).generate([1, 5], stop_strings=["x"])
