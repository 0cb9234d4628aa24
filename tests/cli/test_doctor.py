"""`mindformers doctor`: what it prints, its exit code, and that the quick answer imports no framework."""
from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import mindformers_ixc_cli
from mindformers_ixc.cli import doctor as command
from mindformers_ixc.doctor.findings import NOTE, OK, PROBLEM, Finding


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mindformers_ixc_cli", "doctor", *words], capture_output=True,
                          text=True, env={**os.environ, **environment})


def test_the_quick_answer():
    done = run("--quick")
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("ok       this package") and "self test" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith("Nothing here stops a run")


def test_a_device_that_is_not_there_is_a_problem():
    done = run("--quick", "--device_target", "Ascend", "--json", PATH="", ASCEND_HOME_PATH="")
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["problems"] == 1
    problem, = (finding for finding in found["findings"] if finding["state"] == PROBLEM)
    assert problem["topic"] == "Ascend" and problem["advice"]


def test_plain_letters_and_narrow_terminals():
    done = run("--quick", LC_ALL="C", PYTHONUTF8="0", COLUMNS="40")
    assert done.returncode == 0 and done.stdout.isascii()


def test_no_framework_is_imported():
    code = ("import sys; sys.argv = ['mindformers', 'doctor', '--quick']; import mindformers_ixc_cli; "
            "mindformers_ixc_cli.main(); print({'mindspore', 'mindformers'} & set(sys.modules), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "set()"


@pytest.mark.parametrize("state,code,tested", [(OK, 0, True), (NOTE, 0, True), (PROBLEM, 1, False)])
def test_the_self_test_is_left_out_where_it_cannot_run(state, code, tested, monkeypatch, capfd):
    found = [Finding("MindSpore", state, "found", "do this")]
    monkeypatch.setattr(command, "quick_findings", lambda target, build_now: [*found])
    monkeypatch.setattr(command, "self_test", lambda target: Finding("self test", OK, f"answered on {target}"))
    assert mindformers_ixc_cli.main(["doctor"]) == code
    said = capfd.readouterr().out
    assert ("answered on CPU" in said) == tested and ("left out" in said) != tested


@pytest.mark.slow
def test_the_whole_answer():
    done = run()
    assert done.returncode == 0, done.stdout
    assert "a tiny model learnt a picture and answered right" in " ".join(done.stdout.split())
