"""Memory, cores, compilers, folders and disks, and the self test's process."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from mindformers_ixc.doctor import machine
from mindformers_ixc.doctor.findings import NOTE, OK, PROBLEM, Finding, findings_text
from mindformers_ixc.doctor.libraries import how_to_install, libraries_finding
from mindformers_ixc.doctor.machine import (
    GIB,
    compiler_findings,
    cores_finding,
    cpu_quota,
    disk_finding,
    folder_findings,
    memory_finding,
    memory_limit,
    shared_memory_finding,
)
from mindformers_ixc.doctor.self_test import judge, self_test
from mindformers_ixc.errors import BuildError
from mindformers_ixc.native.building import place


@pytest.mark.parametrize("available,limit,state,words", [
    (64 * GIB, None, OK, "enough to chat with the public 7B model"), (16 * GIB, None, OK, "enough for the tiny"),
    (1 * GIB, None, PROBLEM, "even a tiny model takes 2"), (64 * GIB, GIB, PROBLEM, "1.0 allowed to this container")])
def test_memory(available, limit, state, words):
    finding = memory_finding(128 * GIB, available, limit)
    assert finding.state == state and words in finding.text
    assert bool(finding.advice) == (state == PROBLEM)


@pytest.mark.parametrize("quota,threads,state,advice", [
    (None, None, OK, ""), (None, "8", OK, ""), (None, "9", NOTE, "OMP_NUM_THREADS=8"), (2.5, None, NOTE, "=2"),
    (2.5, "2", OK, ""), (None, "many", NOTE, "=8"), (None, "0", NOTE, "=8")])
def test_cores(quota, threads, state, advice):
    finding = cores_finding(8, quota, threads)
    assert finding.state == state and advice in finding.advice


@pytest.mark.parametrize("files,memory,cores", [
    ({"memory.max": "4294967296\n", "cpu.max": "150000 100000\n"}, 4 * GIB, 1.5),
    ({"memory.max": "max\n", "cpu.max": "max 100000\n"}, None, None),
    ({"memory/memory.limit_in_bytes": "9223372036854771712\n", "cpu/cpu.cfs_quota_us": "-1\n",
      "cpu/cpu.cfs_period_us": "100000\n"}, None, None),
    ({"memory/memory.limit_in_bytes": "1073741824\n", "cpu/cpu.cfs_quota_us": "200000\n",
      "cpu/cpu.cfs_period_us": "100000\n"}, GIB, 2.0), ({}, None, None)])
def test_limits_of_containers(files, memory, cores, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_limit(tmp_path) == memory
    assert cpu_quota(tmp_path) == cores


def test_libraries_of_the_system():
    assert libraries_finding().state == OK
    finding = libraries_finding({"libgomp.so.1": "libgomp1", "libnowhere.so.7": "nowhere"})
    assert finding.state == PROBLEM and "libnowhere.so.7 not found" in finding.text
    assert finding.advice == "install libnowhere.so.7, a library of the system"
    message = "libgomp.so.1: cannot open shared object file: No such file or directory"
    assert how_to_install(message).endswith("apt-get install libgomp1 on Debian and Ubuntu")
    assert how_to_install("No module named 'mindspore'") == ""


def test_compilers_and_kernels(tmp_path, monkeypatch):
    for name in ("cc", "g++"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    paths = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    here, second = compiler_findings(paths)
    assert (here.state, second.state) == (OK, OK) and f"{tmp_path}/cc builds them" in here.text
    assert "switched off" in compiler_findings({**paths, machine.SWITCH: "0"})[0].text
    nowhere, second = compiler_findings({**paths, "PATH": str(tmp_path / "none")})
    assert nowhere.state == second.state == NOTE and "gcc" in nowhere.advice and "g++" in second.advice
    library = place(paths)
    library.parent.mkdir(parents=True)
    library.write_bytes(b"\x7fELF" + bytes(60))
    assert str(library) in compiler_findings({**paths, "PATH": ""})[0].text

    def fails():
        raise BuildError("gcc could not compile the kernels.")

    monkeypatch.setattr(machine, "build", fails)
    failed, _ = compiler_findings(paths, build_now=True)
    assert failed.state == NOTE and failed.text.startswith("gcc could not compile the kernels. Till then answers")
    assert "python -m mindformers_ixc.native" in failed.advice


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_folders_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    cache, temporary, _ = folder_findings({"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)})
    assert (cache.state, temporary.state) == (NOTE, PROBLEM)


def test_folders(tmp_path):
    cache, temporary, here = folder_findings({"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": "/proc/nowhere"})
    assert (cache.state, temporary.state, here.state) == (OK, PROBLEM, OK)
    assert "TMPDIR" in temporary.advice and list(tmp_path.iterdir()) == []
    missing = folder_findings({"TMPDIR": str(tmp_path / "my tmp")})[1]
    assert missing.state == PROBLEM and missing.advice.startswith(f"mkdir -p '{tmp_path}/my tmp'")
    assert folder_findings({"TMPDIR": str(tmp_path)})[0].state == NOTE     # no home folder


def test_shared_memory_that_cannot_be_written_stops_runs():
    finding = shared_memory_finding(Path("/proc/self"))
    assert finding.state == PROBLEM and "cannot be written" in finding.text and "chmod 1777" in finding.advice


def test_disks(tmp_path, monkeypatch):
    usage = machine.shutil.disk_usage(tmp_path)
    for free, state in ((10 ** 8, PROBLEM), (3 * 10 ** 9, OK), (10 ** 11, OK)):
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder, free=free: usage._replace(free=free))
        assert disk_finding(tmp_path).state == state
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage._replace(free=2 ** 20))
    assert "--shm-size" in shared_memory_finding(tmp_path).advice
    assert shared_memory_finding(tmp_path / "none").state == NOTE


@pytest.mark.parametrize("width", [100, 40])
def test_text_keeps_to_the_terminal(width):
    findings = [Finding("memory", OK, "word " * 40), Finding("CANN", PROBLEM, "older " * 30, "do this " * 20)]
    lines = findings_text(findings, width).splitlines()
    assert max(map(len, lines[:-1])) <= width
    assert lines[0].startswith("ok       memory") and any("-> do this" in line for line in lines)
    assert lines[-1] == "1 problem would stop a run (0 notes); each says what to do."


class TestSelfTest:
    def run(self, tmp_path, text: str, seconds: float = 300):
        program = tmp_path / "program.py"
        program.write_text("import json, os, sys, time\nout = os.fdopen(int(sys.argv[-1]), 'w')\n"
                           "def done(name):\n"
                           "    print(json.dumps({'step': name, 'seconds': 1}), file=out, flush=True)\n"
                           "print('a log of MindFormers')\n" + text)
        return self_test("CPU", seconds, (str(program),))

    def test_all_steps(self, tmp_path):
        finding = self.run(tmp_path, "done('import'); done('train'); done('answer')")
        assert finding.state == OK and not finding.advice

    def test_an_error_names_the_step(self, tmp_path):
        finding = self.run(tmp_path, "done('import'); raise ValueError('the loss rises')")
        assert finding.state == PROBLEM
        assert finding.text == "failed while training a tiny model: ValueError: the loss rises"

    def test_a_crash_while_importing(self, tmp_path):
        finding = self.run(tmp_path, "os.abort()")
        assert "while importing MindSpore" in finding.text and "signal 6" in finding.text
        assert "fresh environment" in finding.advice

    def test_a_test_that_never_ends(self, tmp_path):
        finding = self.run(tmp_path, "done('import'); time.sleep(600)", 1)
        assert finding.state == PROBLEM and "not done after 1 seconds" in finding.text

    def test_leaving_early_is_no_success(self):
        assert judge([{"step": "import", "seconds": 3}], 0, "").state == PROBLEM


