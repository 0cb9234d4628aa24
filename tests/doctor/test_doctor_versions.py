"""Versions are held against the table of pairs, and requirements against what is installed."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

from mindformers_ixc.doctor.findings import NOTE, OK, PROBLEM
from mindformers_ixc.doctor.versions import (
    FAILING,
    PAIRS,
    find_pair,
    pair_finding,
    python_finding,
    requirement_findings,
    version_key,
)

ROOT = Path(__file__).parents[2]


def test_release_candidates_come_before_their_release():
    ordered = ["8.0.RC3", "8.0.0", "8.2.RC1", "8.3.RC1", "8.3.RC2", "8.5.0", "9.0.0", "25.3.rc1", "25.3.0", "26.0.RC1"]
    backwards = ordered[::-1]
    assert sorted(backwards, key=version_key) == ordered


def test_tested_pairs_are_those_of_the_matrix():
    text = (ROOT / "scripts" / "check_matrix.sh").read_text(encoding="utf-8")
    matrix = re.findall(r"mindspore==([\d.]+) mindformers==([\d.]+)", text)
    tried = [(pair.mindspore, pair.mindformers) for pair in (*PAIRS, *FAILING)]
    assert sorted(matrix) == sorted(tried) and all(pair.tested for pair in PAIRS)


def test_the_installation_page_has_every_pair():
    rows = [re.sub(r"\s", "", row) for row in
            (ROOT / "docs" / "install.md").read_text(encoding="utf-8").splitlines() if row.startswith("|")]
    for pair in PAIRS:
        wanted = f"|{pair.mindspore}|{pair.mindformers}|{pair.cann}|{pair.driver}|"
        assert any(row.startswith(wanted) for row in rows), wanted


@pytest.mark.parametrize("mindspore,mindformers,state", [
    ("2.9.0", "1.9.0", OK), ("2.7.2", "1.8.0", OK), ("2.9.0", "1.8.0", NOTE), ("2.8.0", "1.9.0", NOTE),
    ("2.10.0", "2.0.0", PROBLEM), (None, "1.9.0", PROBLEM), (None, None, PROBLEM)])
def test_pairs(mindspore, mindformers, state):
    finding = pair_finding(mindspore, mindformers)
    assert finding.state == state
    assert bool(finding.advice) == (state != OK)


def test_missing_ones_are_named():
    assert "MindSpore is not installed" in pair_finding(None, "1.9.0").text
    assert "MindSpore and MindFormers are not installed" in pair_finding(None, None).text


@pytest.mark.parametrize("version,state", [((3, 9), OK), ((3, 12), OK), ((3, 8), PROBLEM), ((3, 13), PROBLEM)])
def test_python(version, state):
    finding = python_finding(version, "x", find_pair("2.9.0", "1.9.0"))
    assert finding.state == state
    assert ("3.11" in finding.advice) == (state == PROBLEM)


class TestRequirements:
    LINES = ["mindspore<2.10,>=2.7.2", "numpy>=1.20,<2.0", "decord2>=2.0; platform_machine == 'aarch64'",
             "torch>=2.6; extra == 'torch'", "rapidfuzz>=3; extra == 'eval'", "pycocoevalcap>=1.2; extra == 'eval'",
             "mindformers_ixc[eval]; extra == 'tests'", "not a requirement at all !"]

    def look(self, installed: dict, environment=None):
        return requirement_findings(self.LINES, installed.get, environment or {"platform_machine": "x86_64"})

    def test_all_is_there(self):
        first, extras, absent = self.look({"mindspore": "2.9.0", "numpy": "1.26.4", "torch": "2.13.0+cpu"})
        assert (first.state, extras.state, absent.state) == (OK, OK, OK)
        assert "torch" in extras.text and "eval" in absent.text and "torch" not in absent.text

    def test_a_version_outside_the_limits(self):
        first = self.look({"mindspore": "2.10.0", "numpy": "1.26.4"})[0]
        assert first.state == PROBLEM
        assert "mindspore 2.10.0 is installed, <2.10,>=2.7.2 is needed" in first.text
        assert first.advice == 'pip install "mindspore<2.10,>=2.7.2"'

    def test_markers_of_the_machine(self):
        first = self.look({"mindspore": "2.9.0", "numpy": "1.26.4"}, {"platform_machine": "aarch64"})[0]
        assert first.state == PROBLEM and "decord2 is not installed" in first.text

    def test_half_an_extra(self):
        found = self.look({"mindspore": "2.9.0", "numpy": "1.26.4", "rapidfuzz": "3.0"})
        half, = (finding for finding in found if finding.state == NOTE)
        assert "eval is not complete: pycocoevalcap is not installed" in half.text
        assert "[eval]" in half.advice

    def test_a_package_that_came_with_the_environment_is_no_half_of_an_extra(self):
        lines = ["setuptools>=77; extra == 'tests'", "pytest>=8; extra == 'tests'", "mypy>=1; extra == 'tests'"]
        found = requirement_findings(lines, {"setuptools": "66.1.1"}.get, {})
        assert [finding.state for finding in found] == [OK, OK] and "not installed: tests" in found[1].text
