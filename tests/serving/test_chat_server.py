"""`mindformers chat --server`: the session of the terminal, answered by a server."""
from __future__ import annotations

import io
import time

import pytest
from served import IMAGES, STARTER, served
from standin_decoder import StandInDecoder, alone
from standin_server import serving

import mindformers_ixc_cli
from mindformers_ixc.cli.chat_server import ServerAnswers, chat
from mindformers_ixc.cli.chat_session import Session
from mindformers_ixc.cli.inputs import check_inputs
from mindformers_ixc.cli.settings import SAMPLING, Settings, generation_options
from mindformers_ixc.decoding_options import GenerationOptions
from mindformers_ixc.errors import ConfigError, GenerationError
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.serving import client
from mindformers_ixc.serving.client import Client, data_url, decoding_fields, messages_of
from mindformers_ixc.serving.limits import Limits


@pytest.fixture(scope="module")
def processor():
    return Processor.from_directory(STARTER)


@pytest.fixture(scope="module")
def server(processor):
    with served(StandInDecoder(), processor=processor) as running:
        yield running
        assert running.faults == []


def arguments(server, *words: str):
    parsed = mindformers_ixc_cli.parse(["chat", "--server", server.url, "--max_new_tokens", "6", *words])
    parsed.answers = io.StringIO()
    return parsed


def expected(processor, count: int = 6, **prompt) -> str:
    sample = processor.encode_chat(**prompt)
    return processor.tokenizer.decode(alone(sample.input_ids.tolist(), count), skip_special_tokens=True).strip()


class TestOneQuestion:
    def test_the_answer_is_that_of_the_same_question_to_a_model(self, server, processor):
        asked = arguments(server, "--image", str(IMAGES / "cat.jpg"), "--hd_num", "2", "What is shown?")
        assert chat(asked) == 0
        assert asked.answers.getvalue() == expected(processor, query="<ImageHere>What is shown?", hd_num=2,
                                                    images=[str(IMAGES / "cat.jpg")]) + "\n"

    def test_an_answer_is_as_long_as_the_server_takes_unless_a_length_is_asked_for(self, processor):
        with served(limits=Limits(running=4, positions=1024, new_tokens=5), processor=processor) as short:
            usual, longer = (mindformers_ixc_cli.parse(["chat", "--server", short.url, *words, "Go"])
                             for words in ((), ("--max_new_tokens", "6")))
            usual.answers = longer.answers = io.StringIO()
            chat(usual)
            assert short.chats(1)[0]["completion_tokens"] == 5
            with pytest.raises(GenerationError, match="this server takes 5 at most"):
                chat(longer)

    def test_options_arrive(self, processor):
        with served(processor=processor) as server:
            chat(arguments(server, "--do_sample", "--temperature", "0.9", "--seed", "3", "--mode", "web", "Go"))
            chat(arguments(server, "--num_beams", "2", "--meta_instruction", "Short.", "Go"))
            sampled, beams = server.chats(2)
        assert (sampled["mode"], sampled["stream"]) == ("web", True) and beams["stream"] is False

    def test_what_is_sampled_from_is_what_chat_and_a_session_sample_from(self):
        with serving() as other:
            other.models[0]["images"], other.pieces = {}, [b"data: [DONE]\n\n"]
            asked = arguments(other, "--do_sample", "Go")
            chat(asked)
        session, (sent,) = Settings(asked).options, other.asked
        assert {name: sent[name] for name in SAMPLING} == {name: session[name] for name in SAMPLING}
        usual = GenerationOptions(**generation_options(asked))
        assert {name: sent[name] for name in SAMPLING} == {name: getattr(usual, name) for name in SAMPLING}

    @pytest.mark.parametrize("words", [
        ["--reuse_bytes", "5"], ["--control_tokens"], ["--exif", "apply"], ["--cache_dtype", "bfloat16"],
        ["--prompt_lookup", "4"], ["--device_target", "Ascend"], ["--no_verify"]], ids=str)
    def test_what_is_for_the_server_to_say_is_refused_by_name(self, server, words):
        with pytest.raises(ConfigError, match=f"{words[0]} is given with --server"):
            chat(arguments(server, *words, "Go"))

    def test_a_model_or_a_server_and_not_both_or_none(self, server):
        for words, sentence in ((["--model", "starter", "--server", "x"], "both given"), ([], "Neither --model nor")):
            parsed = mindformers_ixc_cli.parse(["chat", *words, "Go"])
            with pytest.raises(ConfigError, match=sentence):
                check_inputs(parsed, parsed.options)

    def test_no_server(self, server, tmp_path):
        with pytest.raises(ConfigError, match="does not answer"):
            Client("http://127.0.0.1:1").models()
        for address in ("ftp://x", "http://", "http://x:99999999", "http://x?y"):
            with pytest.raises(ConfigError, match="is no address"):
                Client(address)

    def test_a_refusal_is_the_servers_sentence(self, server):
        with pytest.raises(GenerationError, match="max_completion_tokens is 99999; this server takes 1024"):
            list(Client(server.url).chat({"messages": [{"role": "user", "content": "x"}],
                                          "max_completion_tokens": 99999}))

    def test_a_key(self, processor):
        with served(StandInDecoder(), processor=processor, api_key="key-of-enough") as server:
            with pytest.raises(GenerationError, match="key is missing or wrong"):
                Client(server.url).models()
            assert Client(f"{server.url}/v1/", "key-of-enough").models()[0]["id"] == "starter"


    def test_an_answer_that_comes_whole_may_take_longer_than_a_stream_may_be_silent(self, monkeypatch):
        def late(body):
            time.sleep(0.6)
            return "late"

        monkeypatch.setattr(client, "SILENCE", 0.2)
        with serving(late) as slow:
            (answer,) = Client(slow.url).chat({"messages": [{"role": "user", "content": "x"}], "num_beams": 2})
        assert answer["choices"][0]["message"]["content"] == "late"


class TestSession:
    def test_rounds_pictures_and_settings_are_those_of_a_chat_with_a_model(self, server, processor):
        asked, said = arguments(server), []
        answers = ServerAnswers(Client(server.url), asked)
        session = Session(asked, answers.answer, ImageProcessor(**answers.models[0]["images"]), said.append,
                          [model["mode"] for model in answers.models])
        cat = IMAGES / "cat.jpg"
        assert session.line(f"/image {cat}") and session.line("What is it?") and session.line("And now?")
        first, second = session.talk.rounds
        assert first.reply == expected(processor, query="<ImageHere>What is it?", images=[str(cat)])
        assert second.reply == expected(processor, query="And now?", images=[str(cat)],
                                        history=[("<ImageHere>What is it?", first.reply)])
        assert asked.answers.getvalue().strip().splitlines()[-1].strip() == second.reply.splitlines()[-1]
        positions = processor.image_processor.token_count
        assert f"{positions(session.talk.pictures[0].grid(processor.image_processor, 1, None)):,} positions" in said[0]
        assert session.line("/mode write") and session.mode == "write"
        session.line("/stats")
        assert "6 tokens out" in said[-1]

    def test_a_mode_that_the_server_has_not(self, processor):
        with served(StandInDecoder(), processor=processor, modes=("base",)) as server:
            asked = arguments(server)
            answers = ServerAnswers(Client(server.url), asked)
            session = Session(asked, answers.answer, ImageProcessor(**answers.models[0]["images"]), print, ["base"])
            with pytest.raises(ConfigError, match="the mode stays base"):
                session.line("/mode web")


class TestForms:
    def test_a_single_picture_may_go_without_a_place(self):
        (message,) = messages_of({"query": "What?", "images": [b"png"]})
        assert [part["type"] for part in message["content"]] == ["image_url", "text"]

    def test_pictures_without_places_are_refused(self):
        with pytest.raises(GenerationError, match="0 <ImageHere> for 2 pictures"):
            messages_of({"query": "What?", "images": [b"a", b"b"]})

    def test_answers_keep_what_looks_like_a_place(self):
        messages = messages_of({"query": "So?", "history": [("Say it", "<ImageHere>")]})
        assert messages[1] == {"role": "assistant", "content": "<ImageHere>"}

    def test_videos_by_their_ending(self, tmp_path):
        clip = tmp_path / "clip.MOV"
        clip.write_bytes(b"film")
        assert data_url(str(clip)).startswith("data:video/quicktime;base64,")

    def test_what_a_server_does_not_do(self):
        with pytest.raises(GenerationError, match="prompt_lookup"):
            decoding_fields({"prompt_lookup": 4, "max_new_tokens": 5})
        assert decoding_fields({"max_new_tokens": 5, "do_sample": True, "top_p": 0.8, "seed": None}) == {
            "max_completion_tokens": 5, "temperature": 1.0, "top_p": 0.8}
