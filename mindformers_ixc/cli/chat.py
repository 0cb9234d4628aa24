"""`mindformers chat`: one question, or an interactive session whose model loads while the question is typed."""
from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mindformers_ixc import terminal
from mindformers_ixc.cli.chat_input import Failed, Interrupts, line_history, read_message
from mindformers_ixc.cli.chat_session import Measured, Reply, Session
from mindformers_ixc.cli.hints import empty_hint, picture_hint
from mindformers_ixc.cli.loading import Idle, Loading
from mindformers_ixc.cli.settings import generation_options, image_options
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.processor import ImageProcessor
from mindformers_ixc.tables import PAINT

if TYPE_CHECKING:
    from mindformers_ixc.generation.assistant import Assistant
    from mindformers_ixc.generation.best_of import BestOf, Candidate


def chat(arguments: argparse.Namespace) -> int:
    """Answers `arguments.question`, or opens a session when there is none.

    Returns:
        Exit code.
    """
    if arguments.server is not None:
        return importlib.import_module("mindformers_ixc.cli.chat_server").chat(arguments)
    if arguments.question is None:
        return talk(arguments)
    with terminal.current.waiting(f"Loading {arguments.model}"):
        assistant = load(arguments)
    query = {"query": arguments.question, "images": arguments.image, "hd_num": arguments.hd_num,
             "meta_instruction": arguments.meta_instruction}
    best = load_best_of(arguments, assistant)
    with terminal.current.waiting("Answering"):
        if best is None:
            answer = assistant.answer([query], arguments.mode, **generation_options(arguments))[0]
        else:
            found = best.answer(query, arguments.mode, **generation_options(arguments))
            answer = found[0].text
    print(answer, file=arguments.answers)
    if best is not None:
        terminal.current.say(best_line(found))
    advice = picture_hint(arguments.question, bool(arguments.image), "--image FILE gives one")
    for line in advice if answer else [*advice, empty_hint(parameters(assistant))]:
        terminal.current.say(line)
    return 0


def load(arguments: argparse.Namespace) -> Assistant:
    """Imports MindFormers, which takes seconds, and loads the model."""
    return importlib.import_module("mindformers_ixc.cli.inference").load_assistant(arguments)


def load_best_of(arguments: argparse.Namespace, assistant: Assistant) -> BestOf | None:
    """What chooses among several answers; `None` where there is one only."""
    if getattr(arguments, "best_of", None) is None:
        return None
    return importlib.import_module("mindformers_ixc.cli.inference").load_best_of(arguments, assistant)


def best_line(found: list[Candidate]) -> str:
    """What is said of several answers."""
    return importlib.import_module("mindformers_ixc.generation.best_of").best_line(found)


def parameters(assistant: Assistant) -> int:
    """Of a model."""
    return sum(parameter.size for parameter in assistant.model.get_parameters())


def talk(arguments: argparse.Namespace) -> int:
    """An interactive session.

    Returns:
        Exit code.
    """
    interrupts = Interrupts()
    loading = Loading(lambda: load(arguments), interrupts.fail, arguments.verbose)
    processor = ImageProcessor.from_directory(arguments.model, **image_options(arguments))
    answers = Answers(loading, interrupts, arguments)
    session = Session(arguments, answers.answer, processor)
    interrupts.start()
    loading.start()
    if not sys.stdin.isatty():
        loading.result()
    terminal.current.say(f"{arguments.model}, mode {arguments.mode}. Type a question and press Enter; /image PATH adds "
                         "a picture, /help lists everything.")
    with line_history([*session.commands, "/quit"]):
        read_lines(session, loading, interrupts)
    if not loading.done.is_set() or answers.idle.busy:
        # a library that is being imported, or compiles, cannot be stopped, and the interpreter would wait for it
        for stream in (arguments.answers, sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(0)
    return 0


def read_lines(session: Session, loading: Loading[Any], interrupts: Interrupts) -> None:
    """Reads messages until the end of input or of the session."""
    while True:
        try:
            with interrupts.raising():
                message = read_message(_typed)
        except EOFError:
            return
        except KeyboardInterrupt:                # as in a shell: leaves the line, not the program
            print(file=sys.stderr)
            continue
        except Failed:
            print(file=sys.stderr)
            loading.result()                     # raises what loading has raised
            return
        try:
            if not session.line(message):
                return
        except KeyboardInterrupt:
            terminal.current.say("[stopped]")
        except (ValueError, OSError) as error:   # a bad picture must not end the conversation
            if error is loading.error:
                raise
            terminal.current.fault(str(error))


def _typed(prompt: str) -> str:
    """A line that is typed behind a prompt, which is in colour where there are any."""
    if "readline" not in sys.modules:
        return input(prompt)
    # readline counts columns, so it must be told what takes none
    return input(PAINT.sub("\001\\g<0>\002", terminal.current.paint(prompt, "cyan", "bold")))


class Answers:
    """Answers on the terminal, as they come.

    Args:
        loading: of the model.
        interrupts: of the session; Ctrl-C ends the answer.
        arguments: of `chat`.
    """

    def __init__(self, loading: Loading[Assistant], interrupts: Interrupts, arguments: argparse.Namespace):
        self.loading, self.interrupts, self.out = loading, interrupts, arguments.answers
        self.arguments = arguments
        self.best: BestOf | None = None
        self.first: float | None = None
        self.idle = Idle()

    def _step(self) -> None:
        """What the decoder does before every pass."""
        if self.first is None:
            self.first = time.monotonic()
        self.interrupts.check()

    def answer(self, query: dict, mode: str, options: dict) -> Reply:
        """Shows an answer as it comes (with beams, when it is there); Ctrl-C ends it.

        Raises:
            KeyboardInterrupt: when it comes before the model is there and the pictures are cut.
        """
        assistant = self._assistant()
        self.first, decoded = None, assistant.engine.decoded
        pieces: list[str] = []
        start, stopped = time.monotonic(), False
        with terminal.current.waiting("Reading the question") as shown:
            with self.interrupts.raising():
                sample = assistant.encode(query)
            prepared = time.monotonic() - start
            try:
                for piece in self._pieces(assistant, query, sample, mode, options):
                    self.first = self.first or time.monotonic()
                    shown.close()
                    pieces.append(piece)
                    print(piece, end="", file=self.out, flush=True)
            except KeyboardInterrupt:
                stopped = True
        seconds = time.monotonic() - start
        if pieces or not stopped:
            print(file=self.out, flush=True)
        text = "".join(pieces).strip()
        if stopped:
            terminal.current.say("[stopped]")
        elif not text:
            terminal.current.say(empty_hint(parameters(assistant)))
        first = seconds if self.first is None else self.first - start
        tokens = assistant.engine.decoded - decoded + 1
        if sys.stdin.isatty() and options.get("num_beams", 1) == 1:
            more = options["max_new_tokens"]
            self.idle.start(lambda: assistant.prepare(len(sample.input_ids) + tokens, more, mode))
        return Reply(text, stopped, Measured(len(sample.input_ids), sample.tiles, prepared, first, tokens, seconds))

    def _pieces(self, assistant: Assistant, query: dict, sample: EncodedSample, mode: str,
                options: dict) -> Iterable[str]:
        """The answer in the pieces in which it comes: in one with beams, and of several samples."""
        self.best = self.best or load_best_of(self.arguments, assistant)
        if self.best is not None:
            found = self.best.answer(query, mode, **options)
            terminal.current.say(best_line(found))
            return [found[0].text]
        if options.get("num_beams", 1) > 1:
            return assistant.answer_samples([sample], mode, **options)
        return assistant.stream(sample, mode, **options)

    def _assistant(self) -> Assistant:
        try:
            with terminal.current.waiting("The model is loading"), self.interrupts.raising():
                assistant = self.loading.result()
        except Failed:
            assistant = self.loading.result()       # raises what loading has raised
        assistant.engine.between_steps = self._step
        return assistant
