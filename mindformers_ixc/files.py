"""Files and folders that are whole or not there, however a process ends, and JSON read with good messages."""
from __future__ import annotations

import codecs
import ctypes
import errno
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.resources import resolve_path

# What a training run writes about itself, one JSON object a line: every step, every measurement on held-out data, some
# of the answers that were measured; and which run it is.
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
ANSWERS_FILE = "answers.jsonl"
RUN_RECORD = "run_config.json"

# Held by a run as long as it uses its folder.
LOCK_FILE = "run.lock"

# Model directories that a run leaves.
RESULTS = ("model", "trained_parts", "model_ema", "best")


def traces_of_run(folder: Path) -> list[str]:
    """What a training run has left in its folder that another one would mix with its own, by name."""
    found = [name for name in (*RESULTS, METRICS_FILE) if (folder / name).exists()]
    return found + (["checkpoint"] if any(folder.glob("checkpoint/rank_[0-9]*/*-*_*.*")) else [])


def refuse_used(folder: Path) -> None:
    """Refuses a run's folder that an earlier run has used.

    Raises:
        ConfigError: saying what is there, and what to do.
    """
    used = traces_of_run(folder)
    if used:
        raise ConfigError(f"{folder} already has {', '.join(used)} of an earlier run. Go on with that one "
                          "(--resume_training True), move it aside (--overwrite), or give another --output_dir.")


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
    partial.touch(exist_ok=False)       # made here, by no link that somebody else put there
    try:
        yield partial
        if target.exists():
            shutil.copymode(target, partial)
        if sync:
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, target)
        if sync:
            sync_folder(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(target: str | os.PathLike, content: str | bytes, sync: bool = False) -> None:
    """Writes a file so that it is whole or not there; text as UTF-8; `sync` as of `whole_file`."""
    with whole_file(target, sync) as partial:
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


def check_folder(folder: Path, name: str) -> None:
    """Refuses a folder that could not be made or written to, without making it.

    Args:
        folder: to be used; its parents may be missing.
        name: the option or key that says where, for the message.

    Raises:
        OSError: when a file stands in its place or in that of a parent, or nothing can be written there.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(f"{name} {folder} cannot be used: {there} is no folder; choose another place.")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise type(error)(f"{name} {folder} cannot be used: nothing can be written in {there} ({error.strerror}); "
                          "choose another place.") from error


@contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A folder beside a target to fill; it takes the target's name when the block ends well, else it is removed.

    Its content is on the disk before it takes the name. An older folder is exchanged for it in one step where the file
    system can do that (`renameat2`), so that one of the two is there at every moment. Where it cannot (NFS, for one)
    the older one is put aside first; if the process ends between the two renames, `tidy` brings it back.

    Args:
        target: the folder to be made, its parents too; an older one is replaced.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    temporary.mkdir()
    try:
        yield temporary
        _sync_tree(temporary)
        _put_in_place(temporary, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(folder: Path, target: Path) -> None:
    """Gives a folder the target's name; an older target is removed, or left under the folder's own name."""
    if not target.exists():
        os.replace(folder, target)
    elif not exchange(folder, target):
        aside = _beside(target, _ASIDE)
        os.rename(target, aside)
        try:
            os.rename(folder, target)
        except BaseException:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def exchange(one: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Lets two files or folders swap their names in one step.

    Returns:
        False, with nothing changed, where the system or the file system has no such step.

    Raises:
        OSError: when it has, and it failed.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)      # glibc 2.28 or later, Linux
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))


# Numbers of renameat2(2): relative names start at the working folder; swap both names.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def sync_folder(folder: str | os.PathLike) -> None:
    """Waits until the names in a folder are on the disk; file systems that cannot do it are let off."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(handle)


def _sync_tree(folder: Path) -> None:
    for path, _, names in os.walk(folder):
        for name in names:
            file = os.path.join(path, name)
            if not os.path.islink(file):
                with open(file, "rb") as content:
                    os.fsync(content.fileno())
        sync_folder(path)


# Between the random part and the name of a folder that is put aside while another one takes its place.
_ASIDE = "before."
_LEFTOVER = re.compile(r"\.[0-9a-f]{12}\.(before\.)?(?P<name>.+)")


def _beside(target: Path, mark: str = "") -> Path:
    """A name of its own, also among processes on other servers; the suffix stays, since some writers go by it."""
    return target.with_name(f".{secrets.token_hex(6)}.{mark}{target.name}")


def tidy(folder: str | os.PathLike) -> list[str]:
    """Removes what `whole_file` and `whole_folder` of killed processes left directly in a folder.

    A folder that was put aside, and whose place nothing has taken, gets its name back. Nobody may be writing there.

    Returns:
        The names that were removed or renamed.
    """
    found = []
    for path in sorted(Path(folder).glob(".*")):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        found.append(path.name)
        if match[1] and not path.with_name(match["name"]).exists():
            os.rename(path, path.with_name(match["name"]))
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return found


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


def decode_text(content: bytes, name: str, error: type[ValueError] = DataError,
                before: tuple[int, int] = (0, 0)) -> str:
    """As `read_text`, of bytes that were read.

    Args:
        content: the bytes.
        name: what messages call the file.
        error: the class of what is raised.
        before: bytes and lines of the file that stand before these.
    """
    start = check_encoding(content, name, error) if before == (0, 0) else 0
    try:
        return content[start:].decode("utf-8")
    except UnicodeDecodeError as bad:
        place = start + bad.start
        line = before[1] + content.count(b"\n", 0, place) + 1
        raise error(f"{name} is not UTF-8 text: byte 0x{content[place]:02X} at place {before[0] + place} (counted from "
                    f"0), in line {line}. Save it as UTF-8; GBK and Latin-1 text looks like this.") from bad


def check_encoding(content: bytes, name: str, error: type[ValueError] = DataError) -> int:
    """The place where a text begins, behind UTF-8's byte order mark.

    Raises:
        ValueError: of class `error`, when the first bytes are the mark of another encoding.
    """
    for mark, encoding in _OTHER_MARKS:
        if content.startswith(mark):
            raise error(f"{name} is {encoding} text, by its first bytes; save it as UTF-8.")
    return len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0


# The longer mark first, since UTF-32's begins with UTF-16's.
_OTHER_MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
                (codecs.BOM_UTF16_BE, "UTF-16"))


def parse_json(text: str | bytes, name: str, error: type[ValueError] = DataError, once: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: the text, or its bytes.
        name: what is read, for the messages: a file, or a file and its line.
        error: the class of what is raised.
        once: whether a key may come once only in an object; otherwise its last value is taken, as usual with JSON.

    Raises:
        ValueError: of class `error`, when the text is no JSON, is nested too deeply to be read, or has half of a
            surrogate pair, which is no character and cannot be written again.
    """
    if isinstance(text, bytes):
        text = decode_text(text, name, error)
    try:
        value = json.loads(text, object_pairs_hook=_once if once else None)
    except RecursionError as bad:
        raise error(f"{name} is not usable JSON: lists or objects are nested too deeply.") from bad
    except _ComesTwice as bad:
        raise error(f"{name}: {bad.args[0]!r:.60} stands twice in an object; leave one.") from bad
    except ValueError as bad:   # also numbers of thousands of digits, which Python does not take
        raise error(f"{name} is not valid JSON ({bad}).") from bad
    if "\\u" in text and (half := _half_pair(value)):
        raise error(f"{name} has \\u{ord(half):04x}, half of a surrogate pair, which is no character; write the whole "
                    "pair or take it out.")
    return value


class _ComesTwice(Exception):
    """A key that an object has twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys may come once only."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _ComesTwice(next(name for name in names if names.count(name) > 1))
    return found


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


def is_json_lines(text: str, name: str) -> bool:
    """Whether a file is JSON lines and no list, by its beginning and its name."""
    first, _, rest = text.lstrip().partition("\n")
    if name.endswith((".jsonl", ".ndjson")):
        return not first.startswith("[")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


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
