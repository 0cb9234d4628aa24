"""Files and folders that are whole or not there, however a process ends, and JSON lists read with good messages."""
from __future__ import annotations

import codecs
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def check_target(target: str | os.PathLike, name: str, make_folder: bool = False) -> None:
    """Refuses a file that could not be written in the end, before the work is done.

    Args:
        target: the file to be made, whole (`whole_file`); an older one may be there.
        name: the option that says where, for the messages.
        make_folder: make the folder that the file goes to, its parents too.

    Raises:
        OSError: when a folder stands in its place, its own folder is missing, or nothing can be written there.
    """
    if "\0" in str(target):
        raise OSError(f"{name} {str(target)!r} has a null character, which no path may have.")
    path = Path(os.path.realpath(target))
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{name} {target} is a folder; give the path of a file.")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{name} {target} cannot be written: {path.parent} is no folder; make it first.")
        probe = _beside(path)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        if error.errno is None:                     # a sentence of the above
            raise
        raise type(error)(f"{name} {target} cannot be written ({error.strerror}); choose another place.") from error


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


def read_text(path: str | os.PathLike, error: type[ValueError] = DataError) -> str:
    """A UTF-8 text file's content, without the byte order mark that some editors put first.

    Line ends stay as they are.

    Args:
        path: the file; `pkg:` paths work.
        error: the class of what is raised.

    Raises:
        FileNotFoundError: when the file is missing.
        OSError: when it cannot be read.
        ValueError: of class `error`, with the byte's place, when the file has another encoding.
    """
    return decode_text(resolve_path(path).read_bytes(), str(path), error)


def decode_text(content: bytes, name: str, error: type[ValueError] = DataError) -> str:
    """As `read_text`, of bytes that were read; `name` is what the messages call them."""
    for mark, encoding in _OTHER_MARKS:
        if content.startswith(mark):
            raise error(f"{name} is {encoding} text, by its first bytes; save it as UTF-8.")
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        return content[start:].decode("utf-8")
    except UnicodeDecodeError as bad:
        place = start + bad.start
        line = content.count(b"\n", 0, place) + 1
        raise error(f"{name} is not UTF-8 text: byte 0x{content[place]:02X} at place {place} (counted from 0), in line "
                    f"{line}. Save it as UTF-8; GBK and Latin-1 text looks like this.") from bad


# The longer mark first, since UTF-32's begins with UTF-16's.
_OTHER_MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
                (codecs.BOM_UTF16_BE, "UTF-16"))


def parse_json(text: str | bytes, name: str, error: type[ValueError] = DataError) -> Any:
    """The value of a JSON text.

    Args:
        text: the text, or its bytes.
        name: what is read, for the messages: a file, or a file and its line.
        error: the class of what is raised.

    Raises:
        ValueError: of class `error`, when the text is no JSON, is nested too deeply to be read, or has half of a
            surrogate pair, which is no character and cannot be written again.
    """
    if isinstance(text, bytes):
        text = decode_text(text, name, error)
    try:
        value = json.loads(text)
    except RecursionError as bad:
        raise error(f"{name} is not usable JSON: lists or objects are nested too deeply.") from bad
    except ValueError as bad:   # also numbers of thousands of digits, which Python does not take
        raise error(f"{name} is not valid JSON ({bad}).") from bad
    if "\\u" in text and (half := _half_pair(value)):
        raise error(f"{name} has \\u{ord(half):04x}, half of a surrogate pair, which is no character; write the whole "
                    "pair or take it out.")
    return value


def _half_pair(value: Any) -> str:
    """The first surrogate in any text of a JSON value, else nothing; depth is bounded by the parser's."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if not item.isascii() and (found := _SURROGATE.search(item)):
                return found.group()
        elif isinstance(item, dict):
            waiting += item.values()
            waiting += item
        elif isinstance(item, list):
            waiting += item
    return ""


_SURROGATE = re.compile("[\ud800-\udfff]")


def read_json(path: str | os.PathLike, error: type[ValueError] = DataError) -> Any:
    """The value in a JSON file; see `read_text` and `parse_json` for what is refused."""
    return parse_json(read_text(path, error), str(path), error)


def text_lines(text: str) -> list[tuple[int, str]]:
    r"""The lines of a file of JSON lines that hold something, each with its number, which begins at 1.

    Lines end at \n only: other line ends, such as U+2028, may stand inside a JSON text.
    """
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_json_list(path: str | os.PathLike, item: str) -> list:
    """Content of a JSON file that must hold a list with at least one item.

    Args:
        path: the file; `pkg:` paths work.
        item: what the list holds, for the messages (`sample`).

    Raises:
        FileNotFoundError: when the file is missing.
        DataError: when it is no JSON, no list or empty.
    """
    if not resolve_path(path).is_file():
        raise FileNotFoundError(f"The data file {path} does not exist.")
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        found = f"no {item}s" if rows == [] else type(rows).__name__
        raise DataError(f"{path} must hold a JSON list with at least one {item}, found {found}.")
    return rows


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """Rows of a `metrics.jsonl` or `evaluations.jsonl`.

    A line that is no JSON object, such as one cut short by a crash, is left out by itself.
    """
    path, rows = Path(path), list[dict]()
    if not path.is_file():
        return rows
    for _, line in text_lines(path.read_text(encoding="utf-8", errors="replace")):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
