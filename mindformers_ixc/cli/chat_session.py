"""What a chat session remembers, and what each line that is typed does to it; who answers is somebody else."""
from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mindformers_ixc import terminal
from mindformers_ixc.cli.chat_pictures import Picture, describe, read_paths, read_picture
from mindformers_ixc.cli.hints import picture_hint
from mindformers_ixc.cli.settings import Settings
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import ConfigError, PromptError
from mindformers_ixc.fields import MODE_ADAPTERS
from mindformers_ixc.files import check_target, write_whole
from mindformers_ixc.processing.processor import ImageProcessor
from mindformers_ixc.processing.prompt import IMAGE_PLACEHOLDER
from mindformers_ixc.sections import check_value, hint, one_of

# What `/stats` shows of a session without an answer.
NOTHING_YET = "There is no answer to measure yet."

HELP = """Type a question and press Enter. A line that ends in \\ goes on in the next one, and so does everything
between two lines of ```. Ctrl-C stops an answer or drops a line.
  /image PATH       add a picture to the next question; ~ and quotes are a shell's, several paths may be given
  /video PATH       add a video
  /undo             take back the last picture, or else the last question and its answer
  /retry            ask the last question again
  /new              forget the conversation
  /mode [MODE]      task LoRAs in use: MODES
  /set [NAME VALUE] show or change a setting, such as /set temperature 0.7
  /stats            what the last answer took: time to the first token, tokens a second
  /save FILE        write the conversation, as Markdown, or as a sample for training if FILE ends in .json
  /help             this text
  /quit             leave (so does Ctrl-D)""".replace("MODES", ", ".join(MODE_ADAPTERS))


@dataclass
class Measured:
    """What an answer took.

    Attributes:
        positions: of the prompt.
        tiles: of all its pictures, views of the whole included.
        prepared: seconds until the prompt was encoded, its pictures cut.
        first: seconds until the first token, `prepared` included.
        tokens: decoded, what ends the answer included.
        seconds: in all.
    """

    positions: int = 0
    tiles: int = 0
    prepared: float = 0.0
    first: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float | None:
        """Tokens a second after the first one; `None` where there is none."""
        return (self.tokens - 1) / (self.seconds - self.first) if self.tokens > 1 else None

    def __str__(self) -> str:
        rate = "" if self.rate is None else f", {self.rate:.1f} tokens a second after it"
        pictures = f" and {self.tiles} tiles" if self.tiles else ""
        return (f"{self.positions:,} positions{pictures} in, {self.tokens:,} tokens out; first token after "
                f"{self.first:.2f} s, {self.prepared:.2f} s of which the prompt took to prepare{rate}; "
                f"{self.seconds:.2f} s in all.")


class Reply(NamedTuple):
    """An answer as it was shown; `stopped`: by Ctrl-C."""

    text: str
    stopped: bool
    measured: Measured


@dataclass
class Round:
    """A question with its answer: `typed` by the user, `text` as the model reads it, with places of new pictures."""

    typed: str
    text: str
    pictures: list[Picture]
    reply: str


@dataclass
class Talk:
    """What was said, and the pictures that wait for the next question."""

    rounds: list[Round] = field(default_factory=list)
    waiting: list[Picture] = field(default_factory=list)

    @property
    def pictures(self) -> list[Picture]:
        """All, in the order of their places."""
        return [picture for one in self.rounds for picture in one.pictures] + self.waiting


class Session:
    """An interactive conversation.

    Whatever goes wrong with a line leaves it as it was before that line.

    Args:
        arguments: of `chat`.
        answer: shows and returns the answer to a question (arguments of `Processor.encode_chat`), given the mode and
            the decoding options.
        processor: of the model's pictures.
        say: shows what is no answer.
        modes: that the model has; by default its directory is asked.

    Raises:
        ImageError: for a picture of the command line that cannot be read.
    """

    def __init__(self, arguments: argparse.Namespace, answer: Callable[[dict, str, dict], Reply],
                 processor: ImageProcessor, say: Callable[[str], None] | None = None,
                 modes: Sequence[str] | None = None):
        self.arguments, self.answer, self.processor = arguments, answer, processor
        self.say, self.modes = say or terminal.current.say, modes
        self.settings, self.mode = Settings(arguments), arguments.mode
        self.talk = Talk()
        self.last: Measured | None = None
        self.saved: set[str] = set()
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self._image, "/video": self._image, "/undo": self._undo, "/retry": self._retry,
            "/new": self._new, "/mode": self._mode, "/set": self._set, "/stats": self._stats, "/save": self._save,
            "/help": lambda _: self.say(HELP)}
        for path in arguments.image:
            self._add(path)

    def line(self, text: str) -> bool:
        """Does what a message says.

        Returns:
            Whether the session goes on.

        Raises:
            ValueError: (and `OSError`) as a sentence, for what cannot be done.
        """
        command, _, rest = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            if text.strip():
                self._ask(text)
        elif command in ("/quit", "/exit"):
            return False
        elif command not in self.commands:
            raise PromptError(self._unknown(text, command))
        else:
            self.commands[command](rest.strip())
        return True

    def _unknown(self, text: str, command: str) -> str:
        path = os.path.expanduser(text)
        if os.path.isfile(path):
            return f"{text} is a file; /image {text} adds it to the next question."
        return f"{command} is no command; {hint(command, [*self.commands, '/quit'])} /help explains them."

    def _image(self, text: str) -> None:
        if not text:
            held = self.talk.pictures
            self.say("Pictures so far: " + ", ".join(one.name for one in held) + "." if held else
                     "No picture has been given; /image PATH adds one.")
            return
        before = list(self.talk.waiting)
        try:
            for path in read_paths(text):
                self._add(path)
        except BaseException:            # Ctrl-C too: a video may take long
            self.talk.waiting = before
            raise

    def _add(self, path: str) -> None:
        picture = read_picture(path, self.processor)
        self.say(describe(picture, self.talk.pictures, self.processor, self.settings.values["hd_num"]))
        self.talk.waiting.append(picture)

    def _undo(self, _: str) -> None:
        talk = self.talk
        if talk.waiting:
            self.say(f"{talk.waiting.pop().name} is taken back.")
        elif talk.rounds:
            taken = talk.rounds.pop()
            talk.waiting = list(taken.pictures)
            wait = f" Its pictures wait for the next question: {_names(taken.pictures)}." if taken.pictures else ""
            self.say(f"The question {_short(taken.typed)} and its answer are forgotten.{wait}")
        else:
            self.say("There is nothing to take back.")

    def _retry(self, _: str) -> None:
        if not self.talk.rounds:
            raise PromptError("There is no question to ask again.")
        before, options = self.talk, self.settings.options
        if not options["do_sample"]:
            self.say("(Nothing is sampled, so the same answer comes unless a setting has changed; /set temperature 1 "
                     "samples.)")
        elif "seed" in options:
            self.say("(The seed is fixed, so the same answer comes unless a setting has changed; /set seed none frees "
                     "it.)")
        again = before.rounds[-1]
        self.talk = Talk(before.rounds[:-1], list(again.pictures))
        try:
            self._ask(again.typed)
        finally:
            if len(self.talk.rounds) == len(before.rounds):
                self.talk.waiting = before.waiting
            else:                                       # it was not answered
                self.talk = before

    def _new(self, _: str) -> None:
        self.talk = Talk()
        self.say("The conversation is forgotten, its pictures too.")

    def _mode(self, text: str) -> None:
        if text:
            check_value("/mode", text, one_of(MODE_ADAPTERS))
            missing = self._missing(text)
            if missing:
                raise ConfigError(f"Mode {text} needs the task LoRAs {', '.join(missing)}, which this model does not "
                                  f"have; the mode stays {self.mode}.")
            self.mode = text
        self.say(f"The mode is {self.mode}.")

    def _missing(self, mode: str) -> list[str]:
        """Task LoRAs that the model lacks for a mode."""
        if self.modes is not None:
            return [] if mode in self.modes else list(MODE_ADAPTERS[mode])
        there = read_config(self.arguments.model).task_lora_ranks
        return [task for task in MODE_ADAPTERS[mode] if task not in there]

    def _set(self, text: str) -> None:
        self.say(self.settings.change(text) if text else self.settings.table())

    def _stats(self, _: str) -> None:
        self.say(NOTHING_YET if self.last is None else str(self.last))

    def _save(self, text: str) -> None:
        if not self.talk.rounds:
            raise PromptError("There is nothing to save yet; ask something first.")
        paths = read_paths(text)
        if len(paths) != 1:
            raise PromptError("/save takes the path of one file, such as /save talk.md or /save talk.json.")
        path = os.path.abspath(paths[0])
        check_target(path, "/save")
        if os.path.exists(path) and path not in self.saved:
            raise PromptError(f"{paths[0]} exists already; choose another name.")
        system = self.settings.values["meta_instruction"] or ""
        write_whole(path, as_sample(self.talk, system) if path.endswith(".json") else as_markdown(self.talk))
        self.saved.add(path)
        count = len(self.talk.rounds)
        self.say(f"{count} question{'s' if count > 1 else ''} and answers are in {paths[0]}.")

    def _ask(self, typed: str) -> None:
        talk = self.talk
        for advice in picture_hint(typed, bool(talk.pictures)):
            self.say(advice)
        text = typed
        if talk.waiting and IMAGE_PLACEHOLDER not in typed:
            # every image needs its place once there is a history; images go before the question they came with
            text = IMAGE_PLACEHOLDER * len(talk.waiting) + typed
        query = {"query": text, "images": [one.source for one in talk.pictures],
                 "history": [(one.text, one.reply) for one in talk.rounds], "hd_num": self.settings.values["hd_num"],
                 "meta_instruction": self.settings.values["meta_instruction"]}
        reply = self.answer(query, self.mode, self.settings.options)
        self.last = reply.measured
        if reply.stopped and not reply.text:
            return                                      # as if it had not been asked
        talk.rounds.append(Round(typed, text, talk.waiting, reply.text))
        talk.waiting = []


def _names(pictures: list[Picture]) -> str:
    return ", ".join(picture.name for picture in pictures)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return f"\"{line if len(line) <= 50 else line[:47] + '...'}\""


def as_markdown(talk: Talk) -> str:
    """A conversation to be read."""
    parts = []
    for one in talk.rounds:
        pictures = "".join(f"![{picture.name}](<{picture.path}>)\n\n" for picture in one.pictures)
        parts.append(f"## {one.typed}\n\n" if "\n" not in one.typed else f"## Question\n\n{one.typed}\n\n")
        parts.append(f"{pictures}{one.reply}\n\n")
    return "".join(parts).rstrip() + "\n"


def as_sample(talk: Talk, system: str = "") -> str:
    """A conversation as a file with one sample, as training and `eval` read it; pictures by their whole paths."""
    turns = [{"from": "system", "value": system}] if system else []
    turns += [{"from": role, "value": value} for one in talk.rounds
             for role, value in (("user", one.text), ("assistant", one.reply))]
    images = [str(Path(picture.path).resolve()) for picture in talk.pictures[:len(talk.pictures) - len(talk.waiting)]]
    sample = {"id": "chat", **({"image": images} if images else {}), "conversations": turns}
    return json.dumps([sample], ensure_ascii=False, indent=1) + "\n"
