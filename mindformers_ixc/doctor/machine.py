"""Memory, cores, compilers, folders and disks of this machine."""
from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil

from mindformers_ixc.doctor.findings import NOTE, OK, PROBLEM, Finding
from mindformers_ixc.doctor.libraries import libraries_finding
from mindformers_ixc.errors import BuildError
from mindformers_ixc.native import SWITCH, lacking_instructions
from mindformers_ixc.native.building import build, compilers, is_whole, place

GIB = 2 ** 30

# What the tiny recipes take: MindSpore's and MindFormers' imports 0.6 GB (docs/inference.md), graphs and data.
LEAST_MEMORY = 2 * GIB
# What the public model takes on a CPU: its 11.1 B numbers in float32, 1.2 times (docs/inference.md, docs/weights.md).
CHAT_MEMORY = int(11_095_734_272 * 4 * 1.2)
LEAST_DISK = GIB
# The public repository, and once more for what `convert` or a run writes.
WEIGHTS_DISK = 45 * 10 ** 9
LEAST_SHARED = 64 * 2 ** 20

_CGROUP = Path("/sys/fs/cgroup")


def machine_findings(environment: Mapping[str, str], build_now: bool = False) -> list[Finding]:
    """All findings about the machine.

    Args:
        environment: variables of the process.
        build_now: build the kernels for the CPU if they have not been, a matter of seconds.
    """
    return [memory_finding(psutil.virtual_memory().total, psutil.virtual_memory().available, memory_limit()),
            cores_finding(len(os.sched_getaffinity(0)), cpu_quota(), environment.get("OMP_NUM_THREADS")),
            libraries_finding(), *compiler_findings(environment, build_now), *folder_findings(environment),
            disk_finding(Path.cwd()), shared_memory_finding(Path("/dev/shm"))]


def memory_limit(root: Path = _CGROUP) -> int | None:
    """Bytes that the control group of a container allows, `None` without a limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(root / name)
        if text.isdigit() and int(text) < 2 ** 60:      # version 1 writes a huge number for none
            return int(text)
    return None


def cpu_quota(root: Path = _CGROUP) -> float | None:
    """Cores that the control group of a container allows, `None` without a limit."""
    words = _read(root / "cpu.max").split()
    if len(words) != 2:
        words = [_read(root / "cpu" / "cpu.cfs_quota_us"), _read(root / "cpu" / "cpu.cfs_period_us")]
    quota, period = words
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def memory_finding(total: int, available: int, limit: int | None) -> Finding:
    """Whether there is memory for the tiny recipes; what the public model would take.

    Args:
        total: bytes of the machine.
        available: bytes of it that programs can have now.
        limit: bytes that a container allows, if it does.
    """
    usable = min(available, limit) if limit else available
    text = f"{usable / GIB:.1f} GiB to be had of {total / GIB:.1f}"
    if limit and limit < total:
        text += f", {limit / GIB:.1f} allowed to this container"
    if usable < LEAST_MEMORY:
        return Finding("memory", PROBLEM, f"{text}; even a tiny model takes {LEAST_MEMORY / GIB:.0f}",
                       "end other programs, or raise the container's limit")
    if usable < CHAT_MEMORY:
        return Finding("memory", OK, f"{text}; enough for the tiny recipes (the public 7B model takes about "
                       f"{CHAT_MEMORY / GIB:.0f} GiB to chat on a CPU: docs/weights.md)")
    return Finding("memory", OK, f"{text}; enough to chat with the public 7B model on the CPU")


def cores_finding(cores: int, quota: float | None, threads: str | None) -> Finding:
    """How many threads are used.

    Args:
        cores: that this process may use.
        quota: cores' worth of time that a container allows, if it does.
        threads: the variable OMP_NUM_THREADS.
    """
    text = f"{cores} core{'' if cores == 1 else 's'}" + (f", {quota:g} allowed to this container" if quota else "")
    most = min(cores, quota) if quota else cores
    if threads is None:
        if quota and quota < cores:
            return Finding("cores", NOTE, f"{text}; OMP_NUM_THREADS is not set, so {cores} threads share {quota:g}",
                           f"export OMP_NUM_THREADS={max(1, int(quota))}")
        return Finding("cores", OK, text)
    if not threads.isdigit() or int(threads) < 1:
        return Finding("cores", NOTE, f"{text}; OMP_NUM_THREADS is {threads!r}, which is no number",
                       f"export OMP_NUM_THREADS={max(1, int(most))}")
    if int(threads) > most:
        return Finding("cores", NOTE, f"{text}; OMP_NUM_THREADS is {threads}, more threads than cores, which slows all",
                       f"export OMP_NUM_THREADS={max(1, int(most))}")
    return Finding("cores", OK, f"{text}, OMP_NUM_THREADS {threads}")


def compiler_findings(environment: Mapping[str, str], build_now: bool = False) -> list[Finding]:
    """Whether there are the kernels for the CPU or a C compiler that makes them, and whether there is a C++ compiler.

    Args:
        environment: variables of the process.
        build_now: build the kernels if they have not been; otherwise a compiler will do.
    """
    second = shutil.which("g++", path=environment.get("PATH", os.defpath))
    return [_kernels(environment, build_now), Finding("C++ compiler", OK, second) if second else Finding(
        "C++ compiler", NOTE, "g++ is not found; `plan` without --no_compile, `convert --check_layout` and parallel "
        "runs on CPU processes need it", "install your system's g++")]


def _kernels(environment: Mapping[str, str], build_now: bool) -> Finding:
    topic, slower = "CPU kernels", "answers on the CPU are the same without them, and slower"
    if environment.get(SWITCH) == "0":
        return Finding(topic, NOTE, f"switched off ({SWITCH}=0)", f"unset {SWITCH}")
    try:
        found = compilers(environment)
        if found and build_now:
            build()
        if is_whole(place(environment)):
            lacking = lacking_instructions()
            plain = f"; this processor lacks {', '.join(lacking)}, so quantised weights take longer" if lacking else ""
            return Finding(topic, OK, f"built, {place(environment)}{plain}")
    except BuildError as error:
        return Finding(topic, NOTE, f"{error} Till then {slower}", "then python -m mindformers_ixc.native builds them")
    if not found:
        return Finding(topic, NOTE, f"not built, for no C compiler (cc, gcc, clang, or CC) is found; {slower}",
                       "install your system's gcc")
    return Finding(topic, OK, f"{found[0][0]} builds them when they are first needed")


def folder_findings(environment: Mapping[str, str]) -> list[Finding]:
    """Whether what is kept between runs can be written: the cache, the folder for temporary files, this folder."""
    home = environment.get("XDG_CACHE_HOME") or environment.get("HOME")
    cache = Path(environment["XDG_CACHE_HOME"]) if environment.get("XDG_CACHE_HOME") else (
        Path(home) / ".cache" if home else None)
    findings = []
    if cache is None:
        findings.append(Finding("cache", NOTE, "there is no home folder, so logs of questions go to temporary folders "
                                "and libraries for layouts are built anew", "set HOME or XDG_CACHE_HOME"))
    else:
        findings.append(_writable("cache", cache / "mindformers_ixc", NOTE, "set XDG_CACHE_HOME to another folder"))
    wanted = Path(environment.get("TMPDIR") or tempfile.gettempdir())
    if wanted.is_dir():
        findings.append(_writable("temporary", wanted, PROBLEM, "set TMPDIR to another folder"))
    else:
        findings.append(Finding("temporary", PROBLEM, f"TMPDIR is {wanted}, which is no folder",
                                f"mkdir -p {shlex.quote(str(wanted))}, or set TMPDIR to another folder"))
    findings.append(_writable("this folder", Path.cwd(), NOTE, "give runs an --output_dir that can be written"))
    return findings


def _writable(topic: str, folder: Path, bad: str, advice: str) -> Finding:
    """Whether a file can be made in a folder, or in the nearest one above that is there; nothing is left behind."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        return Finding(topic, bad, f"{folder} cannot be written: {error.strerror or error}", advice)
    return Finding(topic, OK, f"{folder} can be written")


def disk_finding(folder: Path) -> Finding:
    """Whether the disk of a folder has room for a run, and for the public weights."""
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.1f} GB free in {folder}"
    if free < LEAST_DISK:
        return Finding("disk", PROBLEM, f"{text}; a run stops when it is full", "make room, or work on another disk")
    if free < WEIGHTS_DISK:
        return Finding("disk", OK, f"{text} (the public 7B weights take 22 GB, and as much again converted)")
    return Finding("disk", OK, text)


def shared_memory_finding(folder: Path) -> Finding:
    """Whether there is room for what data workers and parallel runs on the CPU share."""
    if not folder.is_dir():
        return Finding("shared memory", NOTE, f"{folder} is not there; parallel runs on CPU processes need it",
                       "mount a tmpfs there")
    writable = _writable("shared memory", folder, PROBLEM, f"chmod 1777 {folder}, as root")
    if writable.state != OK:
        return writable
    free = shutil.disk_usage(folder).free
    if free < LEAST_SHARED:
        return Finding("shared memory", NOTE, f"{free / 2 ** 20:.0f} MiB in {folder}; data workers and parallel runs "
                       "on CPU processes may fail", "start the container with --shm-size 2g")
    return Finding("shared memory", OK, f"{free / GIB:.1f} GiB in {folder}")
