"""scripts/parity.py as a user runs it: PyNative mode, and that a wrong reference fails it."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import parity
import parity_wide_host
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "parity.py"


def run(*words):
    done = subprocess.run([sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True, timeout=1800)
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


def test_the_layout_is_told_by_the_files(goldens, goldens_more):
    names = [name for name, _ in parity.collect(goldens_more, None)]
    assert names == ["labels.json", "image_sizes.json", "webpage.json", "t1: check_logits", "t1: check_cached",
                     "t1: check_training", "t1: check_generation", "t1: check_sampling"]
    names = [name for name, _ in parity.collect(goldens, None)]
    assert names[:3] == ["labels.json", "image_transforms.json", "video.json"]
    assert sum(name == "t2: check_vision" for name in names) == 1


def test_the_host_references_of_the_wide_layout(goldens_more):
    rows = [row for file, check, needs_tokenizer in parity_wide_host.CHECKS
            if (goldens_more / file).is_file() and not needs_tokenizer for row in check(goldens_more)]
    assert [row for row in rows if not row.passed] == []
    assert {row.check: row.cases for row in rows} == {"labels": 26, "labels: rows of a batch": 2, "image sizes": 188,
                                                      "web pages": 5}


def test_a_wrong_reference_of_the_wide_layout_fails(goldens_more, tmp_path):
    sizes = json.loads((goldens_more / "image_sizes.json").read_text())
    sizes[0]["training"]["tokens"] += 1
    (tmp_path / "image_sizes.json").write_text(json.dumps(sizes))
    ((_, check),) = parity.collect(tmp_path, None)
    assert [row.passed for row in check()] == [False]
