"""Readers of other people's files raise nothing but this package's errors: the corpus, and some seconds of fuzzing."""
from __future__ import annotations

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz.py"
FUZZED = ("header", "index", "ckpt", "messages", "requests", "conversations", "prompts", "yaml")


@pytest.fixture(scope="module")
def fuzz():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("fuzz_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [*FUZZED, "file", "config"])
def test_the_corpus_gives_only_errors_of_the_package(fuzz, name, tmp_path):
    assert fuzz.replay(name, tmp_path) > 0


def test_a_foreign_error_comes_out(fuzz):
    def broken(data):
        raise KeyError(data)

    with pytest.raises(KeyError):
        fuzz.run_input(fuzz.Target((), broken), b"x")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.version_info < (3, 11), reason="atheris has no wheel here")
@pytest.mark.parametrize("name", FUZZED)
def test_fuzzing_finds_only_errors_of_the_package(name, tmp_path):
    result = subprocess.run([sys.executable, str(SCRIPT), name, "--seconds", "5"], cwd=tmp_path, capture_output=True,
                            text=True, check=False)
    assert result.returncode == 0, result.stdout
