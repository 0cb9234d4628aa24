"""`mindformers chat --server` before what another release, or another program, answers."""
from __future__ import annotations

import io
import json

import pytest
from standin_server import serving

import mindformers_ixc_cli
from mindformers_ixc.chat_client import ChatClient
from mindformers_ixc.cli.chat_server import ServerAnswers
from mindformers_ixc.errors import ConfigError, GenerationError, ServerError
from mindformers_ixc.serving.client import Client, images_of

IMAGES = {"image_size": 112, "patch_size": 14, "hd_num": 4, "hd_num_several": 4, "transparency": "white",
          "exif": "ignore"}
DONE = b"data: [DONE]\n\n"


def event(**fields) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(content: object) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": content}}])


def answers(other) -> ServerAnswers:
    asked = mindformers_ixc_cli.parse(["chat", "--server", other.url])
    asked.answers = io.StringIO()
    return ServerAnswers(Client(other.url), asked)


class TestModels:
    def test_what_a_newer_server_says_beside_is_left_out(self):
        assert images_of({"images": {**IMAGES, "gamma": 2}}).image_size == 112

    @pytest.mark.parametrize("images", [None, 5, {**IMAGES, "image_size": "x"}, {**IMAGES, "patch_size": 0},
                                        {**IMAGES, "exif": "turn"}, {**IMAGES, "image_size": 111}], ids=str)
    def test_what_cannot_be_understood_is_said(self, images):
        with pytest.raises(ConfigError, match="another release of this package"):
            images_of({"images": images})

    def test_a_model_without_a_mode(self):
        with serving() as other:
            other.models[0]["images"] = IMAGES
            del other.models[1]["mode"]
            with pytest.raises(ConfigError, match="does not say the mode of each of its models"):
                Client(other.url).models()


class TestAnswers:
    @pytest.mark.parametrize("piece", [
        event(choices="a"), event(choices=["a"]), text(["a"]), event(choices=[{"delta": "a"}]),
        event(choices=[], usage="a"), event(choices=[], usage={"prompt_tokens": "3"})], ids=repr)
    def test_events_of_another_form_are_named(self, piece):
        with serving() as other:
            other.models[0]["images"], other.pieces = IMAGES, [piece, DONE]
            with pytest.raises(ConfigError, match="has answered in another form than OpenAI's"):
                answers(other).answer({"query": "x"}, "base", {"max_new_tokens": 4})

    def test_events_without_choices_or_counts_are_passed_over(self):
        with serving() as other:
            other.models[0]["images"] = IMAGES
            other.pieces = [event(choices=None), event(note="x"), text("fine"),
                            event(choices=[], usage={"prompt_tokens": None, "completion_tokens": 1}), DONE]
            reply = answers(other).answer({"query": "x"}, "base", {"max_new_tokens": 4})
        assert reply.text == "fine"

    def test_an_answer_that_comes_whole_is_looked_at_as_well(self):
        with serving(lambda body: ["a"]) as other, pytest.raises(ServerError, match="in another form than OpenAI's"):
            ChatClient(other.url).complete([{"role": "user", "content": "x"}], "stand-in")

    def test_what_came_before_a_server_went_away_ends_its_line(self):
        with serving() as other:
            other.models[0]["images"], other.pieces = IMAGES, [text("half")]
            mine = answers(other)
            with pytest.raises((ConfigError, GenerationError), match="before it was whole"):
                mine.answer({"query": "x"}, "base", {"max_new_tokens": 4})
        assert mine.out.getvalue() == "half\n"
