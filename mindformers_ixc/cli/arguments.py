"""How the `mindformers` command reads its words: help with defaults, and what can be meant by a word that is wrong."""
from __future__ import annotations

import argparse
import difflib
import sys
import textwrap
from typing import Any, NoReturn


class Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples, and says what an option is when it is not given."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(text, width, indent) if "\n" in text else textwrap.fill(text, width)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        if not text or not action.option_strings or action.nargs == 0 or action.required or "default" in text:
            return text
        return f"{text} (default: {'none' if default in (None, '', []) else '%(default)s'})"


class Usual(int):
    """The default of an option that stands for what is usual elsewhere: a number that nobody has given."""


class Parser(argparse.ArgumentParser):
    """Says what can be meant by a word that is none of the choices, or by an option that there is not."""

    words: tuple[str, ...] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse`; keeps the words for the message of an error."""
        self.words = tuple(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    @property
    def options(self) -> list[str]:
        """Spellings of all options."""
        return list(self._option_string_actions)

    def of(self, command: str | None) -> Parser:
        """The parser of a command; this one without one."""
        found = next(action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return found.choices[command] if command else self

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            near = difflib.get_close_matches(str(value), list(map(str, action.choices)), n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentError(action, f"{value!r} is none of the choices{meant} (choose from "
                                                 f"{', '.join(map(str, action.choices))})")

    def error(self, message: str) -> NoReturn:
        """Prints a message, with the options that can be meant, and ends the process with code 2."""
        if "required" in message or "unrecognized" in message or "expected" in message:
            known = self.options
            words = [word.partition("=")[0] for word in self.words if word.startswith("--")]
            pairs = [(word, near[0]) for word in words
                     if word not in known and (near := difflib.get_close_matches(word, known, n=1))]
            message += "".join(f"; {word} is no option, did you mean {near}?" for word, near in pairs)
        self.exit(2, f"{self.prog}: error: {message}\n`{self.prog} --help` lists what there is.\n")


class WithoutFiles(argparse.Action):
    """An option with which the files of a command (`files`) may be left out."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any):
        super().__init__(option_strings, dest, nargs=0, default=False, **options)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        """See `argparse`."""
        setattr(namespace, self.dest, True)
        for action in parser._actions:
            if action.dest == "files":
                action.nargs, action.required, action.default = "*", False, []
        if getattr(namespace, "files", None) is None:
            namespace.files = []


def add_loudness(parser: argparse.ArgumentParser) -> None:
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("--verbose", action="store_true", help="show all that the libraries print, too")
    loudness.add_argument("--quiet", action="store_true", help="show no progress: results, warnings and errors only")


def add_writing(parser: argparse.ArgumentParser, config: str = "config.json, if SRC has none beside it",
                dtype: bool = True) -> None:
    """Adds what the commands that write a checkpoint share.

    Args:
        parser: of the command.
        config: help of the option that names a `config.json`.
        dtype: whether the format of the weights can be asked for.
    """
    if dtype:
        parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: as they are)")
    parser.add_argument("--config", metavar="PATH", help=config)
    parser.add_argument("--max_shard_size", metavar="SIZE", help="of a file at most, such as 5GB (the default)")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    add_no_verify(parser)


def add_no_verify(parser: argparse.ArgumentParser) -> None:
    """Adds the option that leaves weights unchecked."""
    parser.add_argument("--no_verify", action="store_true", help="do not compare weights with the digests that were "
                        "written with them")
