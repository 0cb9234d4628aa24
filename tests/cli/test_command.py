"""The command's arguments: version, help with examples, and what it refuses before anything is imported."""
from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import mindformers_ixc_cli

COMMAND = str(Path(sys.executable).parent / "mindformers")


def run(*words, cwd=None):
    return subprocess.run([COMMAND, *words], capture_output=True, text=True, cwd=cwd, timeout=300)


def test_version():
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("mindformers_ixc 0.")


@pytest.mark.parametrize("command", ["run", "chat", "eval"])
def test_help_shows_an_example(command):
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"examples:\n  mindformers {command} --" in done.stdout


def test_no_command_prints_the_help():
    done = run()
    assert done.returncode == 2
    assert "usage: mindformers" in done.stdout


def test_unknown_arguments_are_refused():
    done = run("chat", "--model", "x", "--colour", "red")
    assert done.returncode == 2
    assert "--colour" in done.stderr


@pytest.mark.parametrize(("words", "message"), [
    (("plann",), "'plann' is none of the choices; did you mean plan?"),
    (("chat", "--modl", "x"), "unrecognized arguments: --modl; --modl is no option, did you mean --model?"),
    (("inspect", "x", "--verfy"), "unrecognized arguments: --verfy; --verfy is no option, did you mean --verify?"),
    (("launch", "-n", "2", "sample", "--model", "starter"), "sample is no command of several devices; `mind"),
    (("chat", "--model", "x", "--mode", "writ", "q"), "'writ' is none of the choices; did you mean write?"),
])
def test_what_can_be_meant_is_said(words, message):
    done = run(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr.splitlines()[0]


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "mindformers_ixc", "--version"], capture_output=True, text=True,
                          check=True)
    assert done.stdout == run("--version").stdout


@pytest.mark.parametrize("command", mindformers_ixc_cli.COMMANDS)
def test_every_option_with_a_value_says_what_it_is_when_it_is_not_given(command):
    parser = mindformers_ixc_cli.build_parser().of(command)
    text = " ".join(parser.format_help().split())
    options = [action for action in parser._actions if action.option_strings and action.nargs != 0]
    silent = [action.dest for action in options if not action.required
              and "default" not in " ".join(parser._get_formatter()._expand_help(action).split())]
    assert not silent
    assert "--verbose" in text and "--quiet" in text


@pytest.mark.parametrize(("line", "expected"), [
    ("mindformers pl", ["plan"]), ("mindformers chat --mode ", ["base", "write", "web"]),
    ("mindformers run --conf", ["--config"])])
def test_a_shell_can_ask_how_words_go_on(tmp_path, line, expected):
    pytest.importorskip("argcomplete")
    variables = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line)),
                 "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words")}
    subprocess.run([COMMAND], env={**os.environ, **variables}, check=True, timeout=300)
    assert [word.strip() for word in (tmp_path / "words").read_text().split("\n")] == expected


@pytest.mark.parametrize(("words", "message"), [
    (("run", "--config", "gone.yaml"), "gone.yaml does not exist"),
    (("run", "--config", "x.yaml", "--register_path", "gone"), "--register_path gone"),
    (("chat", "--model", "gone", "q"), "gone does not exist; a model directory holds config.json"),
    (("eval", "--model", "gone", "--data", "gone.json"), "gone.json does not exist"),
])
def test_missing_files_end_in_one_sentence(tmp_path, words, message):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not list(tmp_path.iterdir())


def test_the_log_folder_is_in_the_output_that_the_yaml_or_its_base_names(tmp_path):
    from mindformers_ixc_cli import log_folder

    (tmp_path / "base.yaml").write_text("output_dir: there\n")
    (tmp_path / "own.yaml").write_text("base_config: base.yaml\nseed: 1\n")
    (tmp_path / "top.yaml").write_text("base_config: [circle.yaml, own.yaml]\n")
    (tmp_path / "circle.yaml").write_text("base_config: circle.yaml\n")
    (tmp_path / "other.yaml").write_text("base_config: own.yaml\noutput_dir: here\n")
    folders = {name: str(log_folder(Namespace(command="run", output_dir=None, config=tmp_path / f"{name}.yaml")))
               for name in ("base", "own", "top", "circle", "other", "gone")}
    assert folders == {"base": "there/log", "own": "there/log", "top": "output/log", "circle": "output/log",
                       "other": "here/log", "gone": "output/log"}


def test_a_reader_that_has_seen_enough_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([COMMAND, "recipes"], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
