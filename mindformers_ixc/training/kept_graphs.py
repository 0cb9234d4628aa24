"""Compiled steps that later runs begin with: MindSpore's compile cache, under a name that no other step has.

MindSpore's cache knows a graph by its place in a folder and by the script that was started; whoever changes a package,
a number of the configuration or a shape would get the old graph. So each step has a folder of its own here, a file
named by all that its graph follows from (`fingerprint`), and MindSpore is shown its content only while it compiles that
step. Files come into place whole and are checked when they are read, so that runs may share them.
"""
from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mindspore import nn

from mindformers_ixc.files import whole_file
from mindformers_ixc.resources import usable_cache_folder
from mindformers_ixc.training.fingerprint import UnknownKind, fingerprint

logger = logging.getLogger(__name__)

# What MindSpore reads whenever it compiles.
SWITCH, PLACE = "MS_COMPILER_CACHE_ENABLE", "MS_COMPILER_CACHE_PATH"

# Steps and bytes that are kept at most; the ones that were not used for the longest time go.
MOST, MOST_BYTES = 32, 2 ** 30

# Where this process keeps compiled steps; `None` to keep none.
folder: Path | None = None

# The run's settings of MindSpore, which not all can be asked for; whether this process has kept a step, or taken one.
_settings = ""
_is_spent = False


def use(fields: dict) -> dict:
    """Takes over the keys of MindSpore's compile cache where this package keeps steps: on the CPU, in one process.

    Args:
        fields: of a run.

    Returns:
        The fields without those keys; elsewhere they are MindSpore's and stay.
    """
    global folder, _settings
    folder, context = None, dict(fields.get("context") or {})
    if fields.get("use_parallel") or context.get("device_target", "Ascend") != "CPU":
        return fields
    wanted, place = context.pop("enable_compile_cache", False), context.pop("compile_cache_path", None)
    _settings = repr(sorted(context.items()))
    if wanted:
        folder = Path(place).expanduser().absolute() if place else usable_cache_folder("graphs")
    return {**fields, "context": context}


def compile_kept(cell: nn.Cell, inputs: tuple[Any, ...], compile_now: Callable[[], None]) -> None:
    """Compiles a cell, or takes what an earlier run has compiled.

    It does so once in a process: MindSpore goes on looking in the folder that it was shown first.

    Args:
        cell: whose graph it is.
        inputs: what it is called with.
        compile_now: has MindSpore compile it.
    """
    global _is_spent
    if folder is None or _is_spent:           # MindSpore calls this at every step
        compile_now()
        return
    _is_spent = True
    try:
        file = folder / f"{fingerprint(cell, (*inputs, _settings))}.zip"
        place = Path(tempfile.mkdtemp(prefix="mindformers_ixc_graph_"))
    except (UnknownKind, OSError) as error:
        logger.warning(f"The compiled step is not kept: {error}.")
        compile_now()
        return
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    known = _unpacked(file, place)
    try:
        with _shown(place):
            compile_now()
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:       # all that MindSpore raises
        if not known:
            raise
        logger.warning(f"{file} could not be taken ({str(error).partition(chr(10))[0]}); the step is compiled anew.")
        _forget(file)
        _empty(place)
        compile_now()
        return
    if known and known == _files_in(place):
        logger.info(f"The compiled step was taken from {file}.")
        with contextlib.suppress(OSError):
            os.utime(file)
    else:
        _keep(place, file)
    _empty(place)


@contextlib.contextmanager
def _shown(place: Path) -> Iterator[None]:
    """Has MindSpore look for graphs in a folder for a while, and write them there."""
    before = {name: os.environ.get(name) for name in (SWITCH, PLACE)}
    os.environ.update({SWITCH: "1", PLACE: str(place)})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _files_in(place: Path) -> dict[str, tuple[int, int, int]]:
    """Files below a folder, and what tells whether they were written again."""
    found = {}
    for path in sorted(place.rglob("*")):
        if path.is_file():
            state = path.stat()
            found[str(path.relative_to(place))] = state.st_ino, state.st_mtime_ns, state.st_size
    return found


def _unpacked(file: Path, place: Path) -> dict[str, tuple[int, int, int]]:
    """Puts what is kept into a folder; its files, none where nothing is kept or it is damaged."""
    try:
        with zipfile.ZipFile(file) as kept:
            wrong = kept.testzip()
            if wrong is not None:
                raise zipfile.BadZipFile(f"{wrong} is not as it was written")
            try:
                kept.extractall(place)
            except OSError:                       # no room: nothing is there, and the step is compiled
                _empty(place)
        return _files_in(place)
    except FileNotFoundError:
        return {}
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        logger.warning(f"{file} is damaged ({error}); the step is compiled anew.")
        _forget(file)
        return {}


def _empty(place: Path) -> None:
    for path in place.iterdir():
        shutil.rmtree(path, ignore_errors=True)


def _forget(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()


def _keep(place: Path, file: Path) -> None:
    """Keeps what MindSpore wrote; without room for it the next run compiles as this one did."""
    names = _files_in(place)
    if not any(name.endswith(".mindir") for name in names):
        logger.info("MindSpore has written no graph; the compiled step is not kept.")
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as partial, zipfile.ZipFile(partial, "w") as kept:
            for name in names:
                kept.write(place / name, name)
        _tidy(file.parent)
    except OSError as error:
        logger.warning(f"The compiled step cannot be kept in {file.parent} ({error.strerror or error}).")


def _tidy(place: Path) -> None:
    """Lets go of what was not used for the longest time, where there is too much."""
    states = []
    for path in place.glob("*.zip"):
        with contextlib.suppress(OSError):
            states.append((path.stat().st_mtime, path.stat().st_size, path))
    total = 0
    for number, (_, size, path) in enumerate(sorted(states, reverse=True)):
        total += size
        if number and (number >= MOST or total > MOST_BYTES):
            _forget(path)
