"""The command's arguments: version, help with examples, and what it refuses before anything is imported."""
from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
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
