"""The `mindformers` command: what must happen before MindFormers is imported.

MindFormers logs to standard output and decides its log folder while it is imported, which takes seconds. So this module
reads the arguments, sends standard output to standard error (answers get a stream of their own), looks whether the
files that were named are there and right, chooses the log folder, and only then imports the command's work. What the
libraries print meanwhile goes to a file of that folder; what `run` makes them print later, too.
"""
from __future__ import annotations

import signal
import sys
from os.path import basename

if basename(sys.argv[0]) in ("mindformers", "ixc25") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)      # Ctrl-C ends the process without a traceback, until `main` begins

import argparse
import contextlib
import importlib
import logging
import os
from pathlib import Path
from typing import Any

from mindformers_ixc import terminal
from mindformers_ixc.cli import ending
from mindformers_ixc.cli.arguments import Parser
from mindformers_ixc.cli.heavy import importing
from mindformers_ixc.cli.inputs import check_inputs
from mindformers_ixc.cli.parsers import build_parser
from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.interruption import JOB, die_with_launcher, listening
from mindformers_ixc.reading import watch_reads
from mindformers_ixc.resources import usable_log_folder, user_log_folder
from mindformers_ixc.terminal import claim_stdout, quiet_libraries

# Module of mindformers_ixc.cli and function behind each command.
COMMANDS = {
    "run": ("run", "run"), "launch": ("launch", "launch"), "chat": ("chat", "chat"), "eval": ("evaluate", "evaluate"),
    "score": ("score", "score"), "sample": ("sample", "sample"), "label": ("label", "label"),
    "convert": ("checkpoints", "run_convert"), "quantize": ("checkpoints", "run_quantize"),
    "merge": ("checkpoints", "run_merge"), "assemble": ("checkpoints", "run_assemble"),
    "inspect": ("checkpoints", "run_inspect"), "data": ("data", "data"), "reference": ("reference", "reference"),
    "report": ("report", "report"), "plan": ("plan", "plan"), "recipes": ("recipes", "show_recipes"),
    "doctor": ("doctor", "doctor"), "init": ("init", "init"), "serve": ("serve", "serve"),
}

# The same behind `launch ... serve`.
LAUNCH_SERVE = ("launch_serve", "launch_serve")

# What goes on in commands that say nothing until they have a result.
WORK = {"convert": "Converting", "quantize": "Quantising", "merge": "Merging", "assemble": "Assembling",
        "inspect": "Reading the checkpoint", "data": "Reading the data", "report": "Drawing", "plan": "Planning"}

# Commands that end when a file of their data does not answer; those with a YAML within the time that it says.
READING = ("run", "data", "init", "eval", "score", "sample", "label", "reference")

# Commands that import MindFormers at once.
HEAVY = ("run", "launch", "chat", "reference", "serve")


def log_folder(arguments: argparse.Namespace) -> Path:
    """Where logs go: inside a run's output, or in the user's cache for a mere question."""
    if arguments.command == "run":
        return Path(arguments.output_dir or _yaml_output_dir(arguments.config) or "output") / "log"
    return user_log_folder()


def choose_log_folder(arguments: argparse.Namespace) -> None:
    """Tells MindFormers where to log, before it is imported; somewhere else where the usual place cannot be written."""
    if "LOG_MF_PATH" in os.environ:
        return
    folder, error = usable_log_folder(log_folder(arguments) if arguments.command == "run" else None)
    if error is not None:
        terminal.current.say(f"The usual log folder cannot be written ({error}), so logs go to {folder}; LOG_MF_PATH "
                             "chooses another.")
    os.environ["LOG_MF_PATH"] = str(folder)


def _yaml_output_dir(path: str) -> str | None:
    """`output_dir` of a YAML file or of its bases."""
    try:
        found = read_yaml(path).get("output_dir")
        return found if isinstance(found, str) else None
    except (OSError, UnicodeDecodeError, ConfigError, TypeError):
        return None   # the run itself reports what is wrong with the file


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line.

    Args:
        argv: words without the program's name; by default the process's.

    Returns:
        `command` (`None` without one) and its arguments; `options`, what there are. `rest` has words that are none of
        them: overrides of `run`, `plan`, and `data` plan, preview, index and check; `words` are all words. Those of
        `launch` are `run_words`, parsed once more in `run`: as those of `run`, or of `serve` if that is the first.
    """
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:       # a shell asks how a word can go on
        importlib.import_module("argcomplete").autocomplete(parser)
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["launch"] and "serve" in words:
        return _parse_served(parser, words)
    arguments, rest = parser.parse_known_args(argv)
    command = parser.of(arguments.command)
    overrides = arguments.command in ("run", "launch", "plan") or getattr(arguments, "kind", None) in (
        "plan", "preview", "index", "check")
    if rest and not overrides:
        command.words = tuple(rest)
        command.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest, arguments.words = rest, words
    if arguments.command == "launch":
        if rest and rest[0] in COMMANDS and rest[0] != "run":
            command.error(f"{rest[0]} is no command of several devices; `mindformers launch` starts run, which is "
                          f"meant without the word, and serve. Leave `launch` out: mindformers {rest[0]} ...")
        arguments.run_words = rest[1:] if rest[:1] == ["run"] else rest
        arguments.run, arguments.run.rest = parser.parse_known_args(["run", *arguments.run_words])
        command = parser.of("run")
    arguments.options = command.options
    return arguments


def _parse_served(parser: Parser, words: list[str]) -> argparse.Namespace:
    """`parse` of `launch ... serve ...`: what is before `serve` is the launcher's, what is behind it serve's."""
    place = words.index("serve")
    arguments = parser.parse_args(words[:place])
    arguments.run = parser.parse_args(words[place:])
    arguments.rest, arguments.words, arguments.run_words = [], words, words[place:]
    arguments.options = parser.of("serve").options
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `mindformers` command.

    Args:
        argv: arguments without the program's name; by default the process's.

    Returns:
        Exit code: 0, or 1 after an error in the input, whose sentence is the last line on standard error; 130 after
        Ctrl-C.
    """
    if argv is None and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:     # as it was while this file was imported
        signal.signal(signal.SIGINT, signal.default_int_handler)
    ending.open_streams()
    try:
        return _begin(argv)
    except KeyboardInterrupt:
        terminal.current.leave_line()
        return 130


def _begin(argv: list[str] | None) -> int:
    """Reads the words and runs the command; arguments and value as of `main`."""
    odd = next((word for word in (sys.argv[1:] if argv is None else argv) if not word.isprintable()
                and any("\ud800" <= letter <= "\udfff" for letter in word)), None)
    if odd is not None:
        print(f"error: the argument {odd!a} has a byte that is not UTF-8; rename the file, or write the word in "
              "UTF-8.", file=sys.stderr)
        return 1
    with ending.reading_help():
        arguments = parse(argv)
        if arguments.command is None:
            build_parser().print_help()
            return 2
    terminal.configure(arguments.verbose, arguments.quiet)
    arguments.answers, arguments.own_process = claim_stdout(), argv is None
    with contextlib.ExitStack() as stack:
        if arguments.command in ("run", "serve") and JOB in os.environ:
            die_with_launcher()
        if arguments.command == "run":
            stack.enter_context(listening())
        if arguments.command == "serve" and arguments.own_process:
            importlib.import_module("mindformers_ixc.serving.signals").current.listen()
        return _execute(arguments)


def _execute(arguments: argparse.Namespace) -> int:
    """Runs the command; errors of the input become a sentence."""
    terminal.show_warnings(logging.WARNING if arguments.command in ("run", "launch") else logging.INFO)
    if arguments.command not in ("run", "launch") and not arguments.verbose:
        quiet_libraries()
    if arguments.command in READING:
        watch_reads(None)
    try:
        with contextlib.ExitStack() as whole:
            function = _prepare(arguments, whole)
            if arguments.command in WORK:
                working = whole.enter_context(contextlib.ExitStack())
                working.enter_context(terminal.current.doing(WORK[arguments.command]))
                arguments.answers = terminal.Answers(arguments.answers, working.close)
            return function(arguments) or 0
    except KeyboardInterrupt:
        terminal.current.leave_line()
        if not terminal.current.interactive:        # in a log, an end without a word is a riddle
            terminal.current.say("SIGINT ended this command.")
        if arguments.own_process and "mindspore" in sys.modules:
            os._exit(130)       # its threads crash an interpreter that ends before they have begun
        return 130
    except BrokenPipeError as error:
        streams = arguments.answers, sys.stderr
        if not ending.is_unread(*streams):
            return _refuse(error)
        ending.let_go(*streams)
        return ending.NOBODY_READS
    except (ValueError, OSError) as error:
        return _refuse(error)
    except Exception as error:
        # a fault of a library, or of this package; where its traceback is in a log, a sentence leads there
        log = terminal.current.last_log
        if log is None or "MINDFORMERS_IXC_TRACEBACK" in os.environ:
            raise
        return _say_error(ending.fault_of(error, log))


def _refuse(error: Exception) -> int:
    """Says what is wrong with the input; the sentences are this package's or the system's."""
    if os.environ.get("MINDFORMERS_IXC_TRACEBACK"):
        raise error
    return _say_error(ending.sentence_of(error))


def _say_error(sentence: str) -> int:
    terminal.current.say(f"{terminal.current.paint('error:', 'red', 'bold')} {sentence}")
    return 1


def _prepare(arguments: argparse.Namespace, whole: contextlib.ExitStack) -> Any:
    """Looks at the input and imports the function behind a command, with the libraries that it needs.

    Args:
        arguments: of the command.
        whole: ended after the command.
    """
    is_served = arguments.command == "launch" and arguments.run.command == "serve"
    module, name = LAUNCH_SERVE if is_served else COMMANDS[arguments.command]
    module = f"mindformers_ixc.cli.{module}"
    session = arguments.command == "chat" and arguments.question is None
    if session:      # its model is loaded meanwhile; threads inherit that SIGINT is blocked, the session waits for it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    check_inputs(arguments, arguments.options)
    if getattr(arguments, "no_verify", False):
        importlib.import_module("mindformers_ixc.checkpoint.digests").set_verification(False)
    choose_log_folder(arguments)
    if arguments.command in HEAVY and not session and getattr(arguments, "server", None) is None:
        with importing(arguments, whole if arguments.command == "run" else None):
            if arguments.command == "chat":       # whose module leaves it for later, for the sake of sessions
                importlib.import_module("mindformers_ixc.cli.inference")
            return getattr(importlib.import_module(module), name)
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    sys.exit(main())
