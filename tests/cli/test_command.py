"""The command's arguments: version, help with examples, and what it refuses before anything is imported."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = str(Path(sys.executable).parent / "mindformers")


def run(*words, cwd=None):
    return subprocess.run([COMMAND, *words], capture_output=True, text=True, cwd=cwd, timeout=120)


def test_version():
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("mindformers_ixc 0.")


@pytest.mark.parametrize("command", ["run", "chat", "eval"])
def test_help_shows_an_example(command):
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"example{'' if command == 'eval' else 's'}:\n  mindformers {command} --" in done.stdout


def test_no_command_prints_the_help():
    done = run()
    assert done.returncode == 2
    assert "usage: mindformers" in done.stdout


def test_unknown_arguments_are_refused():
    done = run("chat", "--model", "x", "--colour", "red")
    assert done.returncode == 2
    assert "--colour" in done.stderr


@pytest.mark.parametrize(("words", "message"), [
    (("run", "--config", "gone.yaml"), "gone.yaml does not exist"),
    (("run", "--config", "x.yaml", "--register_path", "gone"), "--register_path gone"),
    (("chat", "--model", "gone", "q"), "config.json does not exist"),
    (("eval", "--model", "gone", "--data", "gone.json"), "gone.json does not exist"),
])
def test_missing_files_end_in_one_sentence(tmp_path, words, message):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "output"])
