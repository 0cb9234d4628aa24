"""`mindformers chat --server URL`: the same session, answered by a server."""
from __future__ import annotations

import argparse
import time
from collections.abc import Generator
from typing import Any

from mindformers_ixc import terminal
from mindformers_ixc.cli.arguments import Usual
from mindformers_ixc.cli.benchmark_options import LOCAL
from mindformers_ixc.cli.chat import read_lines
from mindformers_ixc.cli.chat_input import Interrupts, line_history
from mindformers_ixc.cli.chat_session import Measured, Reply, Session
from mindformers_ixc.cli.hints import picture_hint
from mindformers_ixc.cli.loading import Loading
from mindformers_ixc.cli.settings import generation_options, image_options
from mindformers_ixc.decoding_options import GenerationOptions
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.processing.video import is_video
from mindformers_ixc.sections import is_whole
from mindformers_ixc.serving.client import Client, decoding_fields, images_of, messages_of


def chat(arguments: argparse.Namespace) -> int:
    """Answers `arguments.question`, or opens a session when there is none.

    Returns:
        Exit code.

    Raises:
        ConfigError: when there is no server, or options contradict one another.
        GenerationError: with the server's sentence, when it refuses.
    """
    for name, given in (("--control_tokens", arguments.control_tokens), ("--best_of", arguments.best_of),
                        *((f"--{name}", getattr(arguments, name) != usual) for name, usual in LOCAL.items()),
                        *((f"--{name}", True) for name in image_options(arguments))):
        if given:
            raise ConfigError(f"{name} is given with --server; it is for the server to say, leave it out here.")
    client = Client(arguments.server)
    answers = ServerAnswers(client, arguments)
    if arguments.question is None:
        return _talk(arguments, answers)
    query = {"query": arguments.question, "images": [_source(path) for path in arguments.image],
             "hd_num": arguments.hd_num, "meta_instruction": arguments.meta_instruction}
    with terminal.current.waiting("Answering"):
        # top_k is said, for a server's own is another one than that of a model in this process
        text = "".join(piece for piece, _ in answers.pieces(query, arguments.mode, {
            "max_new_tokens": arguments.max_new_tokens, "top_k": GenerationOptions.top_k,
            **generation_options(arguments)})).strip()
    print(text, file=arguments.answers)
    for line in picture_hint(arguments.question, bool(arguments.image), "--image FILE gives one"):
        terminal.current.say(line)
    return 0


def _source(path: str) -> bytes | str:
    """A picture's bytes, or a video's path."""
    if is_video(path):
        return path
    with open(path, "rb") as file:
        return file.read()


def _talk(arguments: argparse.Namespace, answers: ServerAnswers) -> int:
    """An interactive session."""
    session = Session(arguments, answers.answer, images_of(answers.models[0]),
                      modes=[model["mode"] for model in answers.models])
    answers.interrupts.start()
    loading: Loading[None] = Loading(lambda: None)
    terminal.current.say(f"{answers.models[0]['id']} at {arguments.server}, mode {arguments.mode}. Type a question and "
                         "press Enter; /image PATH adds a picture, /help lists everything.")
    with line_history([*session.commands, "/quit"]):
        read_lines(session, loading, answers.interrupts)
    return 0


class ServerAnswers:
    """Answers of a server on the terminal, as they come.

    Args:
        client: asks it.
        arguments: of `chat`.
    """

    def __init__(self, client: Client, arguments: argparse.Namespace):
        self.client, self.out, self.interrupts = client, arguments.answers, Interrupts()
        self.models = client.models()
        self.usage: dict = {}
        most: Any = self.models[0].get("max_new_tokens")
        if isinstance(arguments.max_new_tokens, Usual) and is_whole(most, 1):
            arguments.max_new_tokens = min(int(arguments.max_new_tokens), most)      # nobody has asked for more

    def pieces(self, query: dict, mode: str, options: dict) -> Generator[tuple[str, float], None, None]:
        """Texts of an answer as they come, each with its time; with beams one."""
        streams = options.get("num_beams", 1) == 1
        request = {"messages": messages_of(query), "mode": mode, "stream": streams, **decoding_fields(options)}
        if query.get("hd_num") is not None:
            request["hd_num"] = query["hd_num"]
        if streams:
            request["stream_options"] = {"include_usage": True}
        for event in self.client.chat(request):
            usage = event.get("usage") or self.usage
            self.usage = {name: count for name, count in usage.items() if count is not None}
            for choice in event.get("choices") or ():
                text = (choice.get("delta") or choice.get("message") or {}).get("content") or ""
                if text:
                    yield text, time.monotonic()

    def answer(self, query: dict, mode: str, options: dict) -> Reply:
        """Shows an answer as it comes; Ctrl-C ends it, here and at the server."""
        start, first, texts, stopped, self.usage = time.monotonic(), None, [], False, {}
        with terminal.current.waiting("Waiting for the server") as shown:
            source = self.pieces(query, mode, options)
            try:
                with self.interrupts.raising():
                    for text, when in source:
                        first = first or when
                        shown.close()
                        texts.append(text)
                        print(text, end="", file=self.out, flush=True)
            except KeyboardInterrupt:
                stopped = True
            except BaseException:
                if texts:       # what says why stands on a line of its own
                    print(file=self.out, flush=True)
                raise
            finally:
                source.close()
        if texts or not stopped:
            print(file=self.out, flush=True)
        if stopped:
            terminal.current.say("[stopped]")
        elif not "".join(texts).strip():
            terminal.current.say("hint: the answer is empty: the model ended it before the first word.")
        seconds = time.monotonic() - start
        tokens = self.usage.get("completion_tokens", len(texts))
        return Reply("".join(texts).strip(), stopped, Measured(
            self.usage.get("prompt_tokens", 0), 0, 0.0, (first or time.monotonic()) - start, tokens, seconds))

