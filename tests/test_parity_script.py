"""scripts/parity.py as a user runs it: PyNative mode, and that a wrong reference fails it."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "parity.py"


def run(*words):
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout.strip().splitlines()


@pytest.mark.slow
def test_every_check_passes_in_pynative_mode(goldens):
    code, lines = run(goldens, "--mode", "pynative")
    assert code == 0, "\n".join(line for line in lines if "FAIL" in line)
    passed, failed = re.fullmatch(r"(\d+) passed, (\d+) failed", lines[-1]).groups()
    assert (int(passed) >= 40, failed) == (True, "0")


def test_a_wrong_and_a_broken_reference_fail(goldens, tmp_path):
    labels = json.loads((goldens / "labels.json").read_text())
    labels["cases"][1]["labels"][12] = -100
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    (tmp_path / "video.json").write_text('[{"video": "gone.mp4"}]')
    code, lines = run(tmp_path)
    assert code == 1
    assert lines[-1] == "0 passed, 2 failed"


def test_a_folder_without_references_does_not_pass(tmp_path):
    code, lines = run(tmp_path)
    assert code == 1
    assert lines[-1] == "0 passed, 0 failed"
