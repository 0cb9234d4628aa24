"""Builds the shared library of C kernels once, when it is first needed, and keeps it in the user's cache.

The package itself has no compiled part, so that one wheel serves every Linux that MindSpore has wheels for. What is
built belongs to the sources, the kind of processor and the C library it was built with, for a home folder may be that
of several machines. It is tried before it is kept: a library that does not load, or gives other numbers than NumPy and
Pillow, is an error here and not a wrong answer later.

`python -m mindformers_ixc.native` builds it now, into an image for instance, and says where it is or why not.
"""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from mindformers_ixc import terminal
from mindformers_ixc.errors import BuildError
from mindformers_ixc.files import whole_file

_HERE = Path(__file__).resolve().parent
_SOURCES = ("kernels.c", "decode.c", "prompts.c", "team.c", "quantised.c", "widened.c", "products.c", "attention.c",
            "steps.c", "update.c", "images.c")
_HEADERS = ("operation.h", "vectorised.h", "cache.h", "heads.h", "team.h", "stored.h", "products.h")

# -ffast-math is for vectorised exp and sums; it is not passed to the linker, where it would change the floating-point
# mode of the whole process.
_COMPILE = ("-O3", "-ffast-math", "-fopenmp", "-fPIC", "-c")
# MindSpore lets go of the library when a graph ends, and threads of team.c may be in it.
_LINK = ("-shared", "-fopenmp", "-Wl,-z,nodelete")

# Seconds after which a compiler that hangs is given up; it takes two.
_PATIENCE_S = 120


def place(environment: Mapping[str, str] = os.environ) -> Path:
    """Where the library of this machine is kept, built or not.

    Raises:
        BuildError: when there is neither a home folder nor XDG_CACHE_HOME.
    """
    key = hashlib.sha256(repr((_COMPILE, _LINK, platform.machine(), platform.libc_ver())).encode())
    for source in (*_SOURCES, *_HEADERS, "building.py", "check.py"):
        key.update((_HERE / source).read_bytes())
    home = environment["HOME"] if "HOME" in environment else os.path.expanduser("~")      # empty: there is none
    if not environment.get("XDG_CACHE_HOME") and not os.path.isabs(home):
        raise BuildError("The kernels for the CPU are kept in the user's cache, and there is no home folder; set HOME "
                         "or XDG_CACHE_HOME.")
    cache = Path(environment.get("XDG_CACHE_HOME") or Path(home) / ".cache").absolute()
    return cache / "mindformers_ixc" / "kernels" / f"{key.hexdigest()[:16]}.so"


def compilers(environment: Mapping[str, str] = os.environ) -> list[list[str]]:
    """Commands of the C compilers that are here, the preferred one first; CC, where it is set, is the only one.

    Raises:
        BuildError: when CC is no command.
    """
    try:
        wanted = [shlex.split(environment["CC"])] if environment.get("CC") else [["cc"], ["gcc"], ["clang"]]
    except ValueError as error:
        raise BuildError(f"CC is {environment['CC']!r}, which is no command ({error}); unset it, or name a C "
                         "compiler.") from error
    found = ((shutil.which(name, path=environment.get("PATH", os.defpath)), options)
             for name, *options in filter(None, wanted))
    return [[path, *options] for path, options in found if path]


def build(again: bool = False) -> Path:
    """Path of the library, which is built if it is missing.

    Args:
        again: build it even if it is there.

    Raises:
        BuildError: when there is no C compiler, none makes a library that works, or the cache cannot be written.
    """
    library = place()
    if not again and is_whole(library):
        return library
    commands = compilers()
    if not commands:
        raise BuildError("Building the kernels for the CPU needs a C compiler, and no cc, gcc or clang is found (nor "
                         "what CC names, if it is set); install your system's gcc.")
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _alone(library), terminal.current.doing("Building the kernels for the CPU, once"):
            if again or not is_whole(library):         # another process may have built it meanwhile
                _build_by_any(commands, library)
    except BuildError:
        raise
    except OSError as error:
        raise BuildError(f"The kernels for the CPU cannot be kept in {library.parent} ({error.strerror or error}); set "
                         "XDG_CACHE_HOME to a folder that can be written.") from error
    return library


def is_whole(library: Path) -> bool:
    """Whether a library is there with all that its header promises; a disk that was full or lost power leaves less."""
    try:
        with open(library, "rb") as file:
            header = file.read(64)
            size = file.seek(0, os.SEEK_END)
    except OSError:
        return False
    # ELF of 64 bits: the table of sections is the last thing in the file; its place, entries' bytes and their number
    end = int.from_bytes(header[40:48], "little")
    end += int.from_bytes(header[58:60], "little") * int.from_bytes(header[60:62], "little")
    return header[:4] == b"\x7fELF" and size >= end


@contextlib.contextmanager
def _alone(library: Path) -> Iterator[None]:
    """Lets one process build at a time, where the file system has locks; elsewhere the last one's library stays."""
    with open(library.with_suffix(".lock"), "w", encoding="utf-8") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build_by_any(commands: list[list[str]], library: Path) -> None:
    first: BuildError | None = None
    for command in commands:
        try:
            with whole_file(library, sync=True) as partial:
                _compile(command, partial)
            return
        except BuildError as error:
            first = first or error
    assert first is not None       # `commands` is not empty
    raise first


def _compile(compiler: list[str], library: Path) -> None:
    """Compiles, links and tries; compiling and linking at once would hand -ffast-math to the linker."""
    objects = [library.with_suffix(f".{number}.o") for number in range(len(_SOURCES))]
    try:
        for source, target in zip(_SOURCES, objects):
            _run([*compiler, *_COMPILE, str(_HERE / source), "-o", str(target)], "could not compile")
        _run([*compiler, *_LINK, *map(str, objects), "-lm", "-o", str(library)], "could not link")
    finally:
        for target in objects:
            target.unlink(missing_ok=True)
    # in a process of its own, which may crash, and whose threads no later fork of this one is to inherit
    _run([sys.executable, str(_HERE / "check.py"), str(library)], f"has tried what {compiler[0]} made of")


def _run(command: list[str], what: str) -> None:
    """Runs one step.

    Raises:
        BuildError: with the first error that it printed.
    """
    # what a run preloads into its ranks is not for the compiler; in English, errors can be told from warnings
    environment = {**{name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              errors="replace", timeout=_PATIENCE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} {what} the kernels for the CPU: it did not end in {_PATIENCE_S} "
                         "seconds.") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        first = next((line for line in lines if "rror" in line), (lines or ["it printed nothing"])[-1])
        raise BuildError(f"{command[0]} {what} the kernels for the CPU (exit code {done.returncode}): {first}")
