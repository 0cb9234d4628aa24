"""Files and folders that are whole or not there, however a process ends, and JSON lists read with good messages."""
from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mindformers_ixc.errors import DataError
from mindformers_ixc.resources import resolve_path

# What a training run writes about itself, one JSON object a line: every step, every measurement on held-out data.
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"


@contextmanager
def whole_file(target: str | os.PathLike, sync: bool = False) -> Iterator[Path]:
    """A path beside a target to write to; it takes the target's name when the block ends well, else it is removed.

    As with an ordinary `open`, an older file's permissions stay, a new one gets the process's usual ones, and through a
    link its target is written.

    Args:
        target: the file to be made; an older one is replaced.
        sync: wait until the content is on the disk before the rename.
    """
    target = Path(os.path.realpath(target))
    partial = _beside(target)
    try:
        yield partial
        if target.exists():
            shutil.copymode(target, partial)
        if sync:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(target: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file so that it is whole or not there; text as UTF-8."""
    with whole_file(target) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def _beside(target: Path) -> Path:
    """A name of its own, also among processes on other servers; the suffix stays, since some writers go by it."""
    return target.with_name(f".{secrets.token_hex(6)}.{target.name}")


@contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A folder beside a target to fill; it takes the target's name when the block ends well, else it is removed.

    Args:
        target: the folder to be made, its parents too; an older one is replaced.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json_list(path: str | os.PathLike, item: str) -> list:
    """Content of a JSON file that must hold a list with at least one item.

    Args:
        path: the file; `pkg:` paths work.
        item: what the list holds, for the messages (`sample`).

    Raises:
        FileNotFoundError: when the file is missing.
        DataError: when it is no JSON, no list or empty.
    """
    file = resolve_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"The data file {path} does not exist.")
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(rows, list) or not rows:
        found = f"no {item}s" if rows == [] else type(rows).__name__
        raise DataError(f"{path} must hold a JSON list with at least one {item}, found {found}.")
    return rows


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """Rows of a `metrics.jsonl` or `evaluations.jsonl`; a last line cut short by a crash is left out."""
    path, rows = Path(path), list[dict]()
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
