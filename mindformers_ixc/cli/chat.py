"""`mindformers chat`: one question, or an interactive session."""
from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from mindformers_ixc import interruption
from mindformers_ixc.cli.inference import generation_options, load_assistant
from mindformers_ixc.generation.assistant import Assistant

HELP = """Type a question and press Enter.
  /image PATH   add a picture to the next question
  /video PATH   add a video
  /new          forget the conversation
  /help         this text
  /quit         leave (so does Ctrl-D)"""

# Questions kept for later sessions.
HISTORY_LINES = 1000


def chat(arguments: argparse.Namespace) -> int:
    """Answers `arguments.question`, or opens a session when there is none.

    Returns:
        Exit code.
    """
    assistant = load_assistant(arguments)
    if arguments.question is not None:
        query = {"query": arguments.question, "images": arguments.image, "hd_num": arguments.hd_num,
                 "meta_instruction": arguments.meta_instruction}
        print(assistant.answer([query], arguments.mode, **generation_options(arguments))[0], file=arguments.answers)
        return 0
    return Session(assistant, arguments).run()


@contextlib.contextmanager
def line_history() -> Iterator[None]:
    """Line editing with the questions of earlier sessions, where there is a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import readline  # noqa: PLC0415 - importing it gives input() its editing

    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    path = Path(state) / "mindformers_ixc" / "chat_history"
    with contextlib.suppress(OSError):                   # no earlier session
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):               # a read-only home is no reason to fail at the end
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)


class Interrupts:
    """Ctrl-C while a graph may be running.

    MindSpore takes the signal over when it runs a graph, keeps it, and ends the process. So it is blocked meanwhile, in
    all threads (they inherit the mask the program started with, see `mindformers_ixc_cli`), looked for between two
    tokens, and given back to Python afterwards.
    """

    def __enter__(self) -> Interrupts:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        return self

    def __exit__(self, *_: object) -> None:
        signal.sigtimedwait({signal.SIGINT}, 0)         # one that came too late to stop anything
        self.allow()

    @staticmethod
    def allow() -> None:
        """Lets Ctrl-C raise `KeyboardInterrupt` again."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    @staticmethod
    def check() -> None:
        """Raises `KeyboardInterrupt` if Ctrl-C has been pressed."""
        if signal.sigtimedwait({signal.SIGINT}, 0) is not None:
            raise KeyboardInterrupt


class Session:
    """An interactive conversation: keeps history and the images of all rounds."""

    def __init__(self, assistant: Assistant, arguments: argparse.Namespace):
        self.assistant, self.arguments = assistant, arguments
        self.history: list[tuple[str, str]] = []
        self.images: list[str] = []
        self.waiting = list(arguments.image)
        assistant.engine.between_steps = Interrupts.check
        interruption.stay()
        Interrupts.allow()

    def run(self) -> int:
        """Reads lines until the end of input."""
        print(HELP, file=sys.stderr)
        with line_history():
            while True:
                try:
                    line = input("> ").strip()
                except EOFError:
                    return 0
                except KeyboardInterrupt:                # as in a shell: leaves the line, not the program
                    print(file=sys.stderr)
                    continue
                if line == "/quit":
                    return 0
                try:
                    self._line(line)
                except (ValueError, OSError) as error:   # a bad image must not end the conversation
                    print(f"error: {error}", file=sys.stderr)

    def _line(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if not line:
            return
        if command in ("/image", "/video"):
            with open(rest.strip(), "rb"):   # a missing file is said now, not with the next question
                self.waiting.append(rest.strip())
        elif command == "/new":
            self.history, self.images, self.waiting = [], [], []
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command.startswith("/"):
            raise ValueError(f"{command} is no command; /help lists them.")
        else:
            self._ask(line)

    def _ask(self, text: str) -> None:
        images = self.images + self.waiting
        markers = text.count("<ImageHere>")
        if self.waiting and markers == 0:
            # every image needs its place once there is a history; images go before the question they came with
            text = "<ImageHere>" * len(self.waiting) + text
        query = {"query": text, "images": images, "history": self.history, "hd_num": self.arguments.hd_num,
                 "meta_instruction": self.arguments.meta_instruction}
        reply = self._reply(query)
        self.history.append((text, reply))
        self.images, self.waiting = images, []

    def _reply(self, query: dict) -> str:
        """Shows the answer as it comes (with beams, when it is there); Ctrl-C ends the answer, not the session."""
        options, answers = generation_options(self.arguments), self.arguments.answers
        pieces = []
        with Interrupts():
            try:
                if options.get("num_beams", 1) > 1:
                    pieces = self.assistant.answer([query], self.arguments.mode, **options)
                    print(pieces[0], end="", file=answers)
                else:
                    for piece in self.assistant.stream(query, self.arguments.mode, **options):
                        pieces.append(piece)
                        print(piece, end="", file=answers, flush=True)
            except KeyboardInterrupt:
                print(" [stopped]", end="", file=sys.stderr, flush=True)
        print(file=answers)
        return "".join(pieces).strip()
