"""SHA-256 digests of what this package writes, kept in one file of the folder, and the check of what is read.

`digests.json` names every weight file below its folder with its size, the digest of each tensor, and that of the bytes
around the tensors (header, field prefixes); of a tokenizer or a strategy file the digest of the whole; of config.json
its values, so that a change by hand is said with key and values rather than refused. The file has a digest of itself.

Folders that `mindformers convert` wrote before there was such a file have the tensors' digests in their index.

Digests guard against damage, not against an attacker, who would write new ones.
"""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mindformers_ixc.checkpoint import ckpt_file, safetensors_file
from mindformers_ixc.checkpoint.tensors import Stretch
from mindformers_ixc.config import CONFIG_FILE
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.files import read_json, whole_file

logger = logging.getLogger(__name__)

DIGEST_FILE = "digests.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

# Bytes of a file that are in memory at once, of each thread.
BLOCK = 4 * 2**20
# Files changed less than this many seconds ago are not remembered: a second change might leave the same time behind.
SETTLED_S = 2.0
# Remembered checks that are older than this are let go of.
REMEMBERED_S = 90 * 86400

_COPY = "copy it again from where it came, or say --no_verify to read it as it is"

# Whether reading compares digests; `--no_verify` turns it off for a process.
_switch = {"verify": True}


def set_verification(on: bool) -> None:
    """Turns the comparison of digests on or off for this process (`--no_verify`)."""
    _switch["verify"] = on


def verification() -> bool:
    """Whether what has digests is compared with them when it is read."""
    return _switch["verify"]


@dataclass
class FileDigest:
    """What is known of a file.

    Attributes:
        size: in bytes; `None` if unknown.
        tensors: SHA-256 of each tensor's bytes, by name.
        frame: SHA-256 of everything else in a file of tensors.
        sha256: of the whole of another file.
    """

    size: int | None = None
    tensors: dict[str, str] | None = None
    frame: str | None = None
    sha256: str | None = None


@dataclass
class Digests:
    """What is known of the files of a folder.

    Attributes:
        source: the file that says so.
        files: by path below the folder of that file.
        metadata: of the folder, such as `rank` and `ranks`.
        config: values of `config.json`.
    """

    source: Path
    files: dict[str, FileDigest] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        """The folder the paths begin in."""
        return self.source.parent


def write_digests(folder: str | os.PathLike, files: Iterable[str] | Mapping[str, str | os.PathLike] | None = None,
                  known: Mapping[str, Mapping[str, str]] | None = None, **metadata: Any) -> Path:
    """Writes, or brings up to date, the digests of a folder's files.

    Entries of files that are no longer there are left out; those of files not named stay as they are.

    Args:
        folder: the folder; its digest file is replaced whole.
        files: paths below it; by default every weight file, tokenizer model and `config.json` in it. A mapping gives
            the place where a file is now, if it is to take its name later: its digests are then on the disk first.
        known: SHA-256 of the tensors of some files, computed while they were written; these are not read again.
        **metadata: of the folder, JSON values: `rank=3, ranks=8` for a rank's; entries not named stay.

    Returns:
        The digest file.

    Raises:
        CheckpointError: when a file to be listed is damaged.
        OSError: when a file cannot be read or the digests cannot be written.
    """
    folder = Path(folder)
    if files is None:
        files = sorted(path.name for path in folder.iterdir()
                       if path.is_file() and (path.suffix in (*WEIGHT_SUFFIXES, ".model") or path.name == CONFIG_FILE)
                       and not path.name.startswith((".", "unfinished_")))
    places = dict(files) if isinstance(files, Mapping) else {name: folder / name for name in files}
    target = folder / DIGEST_FILE
    digests = _read_own(target) if target.is_file() else Digests(target)
    digests.files = {name: entry for name, entry in digests.files.items() if (folder / name).is_file()}
    digests.metadata.update(metadata)
    for name, place in places.items():
        if name == CONFIG_FILE:
            digests.config = read_json(place, CheckpointError)
        else:
            digests.files[name] = _digest_of(Path(place), (known or {}).get(name))
    fields = _fields(digests)
    with whole_file(target, sync=True) as partial:
        partial.write_text(json.dumps({**fields, "sha256": _digest_of_fields(fields)}, indent=1) + "\n",
                           encoding="utf-8")
    return target


def _fields(digests: Digests) -> dict[str, Any]:
    files = {name: {key: value for key, value in asdict(entry).items() if value is not None}
             for name, entry in sorted(digests.files.items())}
    return {"algorithm": "sha256", "metadata": digests.metadata, "config": digests.config, "files": files}


def _digest_of_fields(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _digest_of(path: Path, known: Mapping[str, str] | None) -> FileDigest:
    size = path.stat().st_size
    stretches = tensor_stretches(path)
    if stretches is None:
        return FileDigest(size, sha256=digest([Stretch(path, 0, size)]))
    tensors = {name: (known or {}).get(name) or digest(own) for name, own in stretches.items()}
    return FileDigest(size, tensors, digest(_frame(path, size, stretches)))


def tensor_stretches(path: Path) -> dict[str, list[Stretch]] | None:
    """Where the tensors of a weight file lie; `None` for a file that is none, or has no such places (.bin)."""
    if path.suffix == ".safetensors":
        return {name: tensor.stretches for name, tensor in safetensors_file.read_header(path).items()}
    if path.suffix == ".ckpt" and path.parent.name != "strategy":
        return {name: tensor.stretches for name, tensor in ckpt_file.read_tensors(path).items()}
    return None


def _frame(path: Path, size: int, stretches: dict[str, list[Stretch]]) -> list[Stretch]:
    """The bytes between a file's tensors, in order."""
    frame, position = [], 0
    for own in sorted((entry for group in stretches.values() for entry in group), key=lambda entry: entry.offset):
        if own.offset > position:
            frame.append(Stretch(path, position, own.offset - position))
        position = max(position, own.offset + own.nbytes)
    return [*frame, Stretch(path, position, size - position)] if size > position else frame


def digest(stretches: Iterable[Stretch]) -> str:
    """SHA-256 of bytes of files, one after the other, a block in memory at a time."""
    found = hashlib.sha256()
    block = memoryview(bytearray(BLOCK))
    for stretch in stretches:
        with open(stretch.path, "rb", buffering=0) as file:
            file.seek(stretch.offset)
            left = stretch.nbytes
            while left:
                count = file.readinto(block[:min(left, BLOCK)]) or 0
                if not count:
                    raise CheckpointError(f"{stretch.path} became shorter while it was read; {_COPY}.")
                found.update(block[:count])
                left -= count
    return found.hexdigest()


def read_digests(folder: str | os.PathLike) -> Digests | None:
    """The digests of a folder, from `digests.json` or the index of an older conversion; `None` if it has none.

    Raises:
        CheckpointError: when they are damaged.
    """
    folder = Path(folder)
    if (folder / DIGEST_FILE).is_file():
        return _read_own(folder / DIGEST_FILE)
    for name in ("model.safetensors.index.json", "param_name_map.json", "checkpoint.index.json"):
        if (folder / name).is_file():
            return _read_index(folder / name)
    return None


def _read_own(path: Path) -> Digests:
    fields = read_json(path, CheckpointError)
    if not isinstance(fields, dict) or _digest_of_fields(
            {name: value for name, value in fields.items() if name != "sha256"}) != fields.get("sha256"):
        raise CheckpointError(f"{path} does not have the digest it states of itself: it is damaged or was edited, so "
                              f"the files beside it cannot be compared; {_COPY}.")
    files = {name: FileDigest(**entry) for name, entry in fields["files"].items()}
    return Digests(path, files, fields["metadata"], fields["config"])


def _read_index(path: Path) -> Digests | None:
    """The tensors' digests in an index that `mindformers convert` wrote before there was a digest file."""
    fields = read_json(path, CheckpointError)
    sums = fields.get("checksums") if isinstance(fields, dict) else None
    if not sums:
        return None
    damaged = CheckpointError(f"{path} has `checksums` that are not in the form that mindformers convert writes; "
                              f"{_COPY}.")
    files: dict[str, FileDigest] = {}
    try:
        if path.name == "checkpoint.index.json":
            by_file = {file: dict(own) for file, own in sums.items()}
        else:
            by_file = {}
            for name, file in fields["weight_map"].items():
                by_file.setdefault(file, {})[name] = sums[name]
        if not all(isinstance(text, str) for own in by_file.values() for text in own.values()):
            raise damaged
        files = {file: FileDigest(tensors=own) for file, own in by_file.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged from error
    return Digests(path, files)


def find_digests(file: Path) -> Digests | None:
    """The digests of a file: in its folder; for `TARGET/checkpoint/rank_N` and `TARGET/strategy` also in TARGET."""
    parents = file.absolute().parents
    folders = [file.parent]
    if file.parent.name == "strategy":
        folders.append(parents[1])
    elif re.fullmatch(r"rank_\d+", file.parent.name) and parents[1].name == "checkpoint":
        folders.append(parents[2])
    found = (read_digests(folder) for folder in folders)
    return next((digests for digests in found if digests is not None), None)


def verify_folder(folder: str | os.PathLike, files: Iterable[str] | None = None, remember: bool = True) -> bool:
    """Compares the files of a folder with their digests.

    Args:
        folder: a folder with a digest file, or without.
        files: paths below it to compare; by default all that are listed, and then no weight file may be there that is
            not listed.
        remember: take what was compared before and has not changed since (size, times, inode) for right.

    Returns:
        Whether there were digests.

    Raises:
        CheckpointError: naming file and tensor, when something differs, is missing, or is not listed.
    """
    digests = read_digests(folder)
    if digests is None:
        return False
    if files is None:
        _refuse_unlisted(digests)
        _say_config(digests)
    verify_listed(digests, list(digests.files) if files is None else list(files), remember)
    return True


def verify_files(paths: Iterable[Path], remember: bool = True) -> bool:
    """Compares weight files of any folders with the digests that speak of them; see `verify_folder`.

    A strategy file is compared where it is listed; a run's is not.

    Returns:
        Whether all of them have digests.
    """
    groups, complete = group_by_digests(paths)
    for digests, names in groups:
        _say_config(digests)
        verify_listed(digests, names, remember)
    return complete


def group_by_digests(paths: Iterable[Path]) -> tuple[list[tuple[Digests, list[str]]], bool]:
    """The digests that speak of files, each with what to compare; and whether all files have some.

    A tokenizer that is listed with weights is compared with them: both are converted together.
    """
    groups: dict[Path, tuple[Digests, list[str]]] = {}
    complete = True
    for path in paths:
        digests = find_digests(path)
        if digests is None or (path.parent.name == "strategy" and not any(file.startswith("strategy/")
                                                                          for file in digests.files)):
            complete = False
            continue
        name = path.absolute().relative_to(digests.folder.absolute()).as_posix()
        groups.setdefault(digests.source, (digests, []))[1].append(name)
    for digests, names in groups.values():
        names += [name for name in digests.files if name.endswith(".model") and name not in names]
    return list(groups.values()), complete


def verify_listed(digests: Digests, names: list[str], remember: bool = True) -> None:
    """Compares files with the digests that were read; see `verify_folder`."""
    check_files(digests, names)
    with _memory(digests) as memory:
        keys = {name: memory.key(digests, name) for name in names}
        left = [name for name in names if not (remember and memory.knows(keys[name]))]
        for found in differences(digests, left):
            if found is not None:
                raise CheckpointError(f"{found.where} differs from its digest in {digests.source}: the file is damaged "
                                      f"or of another checkpoint; {_COPY}.")
        for name in left:
            if memory.key(digests, name) == keys[name]:      # not written to in the meantime
                memory.note(digests.folder / name, keys[name])


def check_files(digests: Digests, names: Iterable[str]) -> None:
    """Refuses what needs no digest to be seen: another rank's folder, files not listed, missing or of another size.

    Raises:
        CheckpointError: naming the file.
    """
    check_rank(digests)
    for name in names:
        path = digests.folder / name
        if name not in digests.files:
            raise CheckpointError(f"{path} is not listed in {digests.source}: it was added or renamed after the folder "
                                  "was written. Put the right file in its place, or say --no_verify.")
        size = digests.files[name].size
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {digests.source} lists it. Copy it too.")
        if size is not None and path.stat().st_size != size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, {digests.source} says {size}: it is cut "
                                  f"off, or of another checkpoint; {_COPY}.")


def check_rank(digests: Digests) -> None:
    """Refuses a rank's folder that stands in another rank's place.

    Raises:
        CheckpointError: naming both ranks.
    """
    match = re.fullmatch(r"rank_(\d+)", digests.folder.absolute().name)
    rank = digests.metadata.get("rank")
    if match and rank is not None and rank != int(match[1]):
        raise CheckpointError(f"{digests.folder} holds the files of rank {rank}, as {digests.source} says; the folders "
                              "of ranks were swapped or renamed.")


def _refuse_unlisted(digests: Digests) -> None:
    folders = {(digests.folder / name).parent for name in digests.files} | {digests.folder}
    for folder in sorted(folders):
        for path in sorted(folder.glob("*")):
            name = path.relative_to(digests.folder).as_posix()
            if path.suffix in WEIGHT_SUFFIXES and name not in digests.files and not name.startswith("."):
                raise CheckpointError(f"{path} is not listed in {digests.source}: it was added or renamed after the "
                                      "folder was written. Take it out, or say --no_verify.")


def _say_config(digests: Digests) -> None:
    """Says what was changed by hand in `config.json`, which is allowed."""
    if digests.config is None:
        return
    path = digests.folder / CONFIG_FILE
    now = read_json(path, CheckpointError) if path.is_file() else {}
    before = digests.config
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)] if isinstance(now, dict) else []
    if names:
        shown = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names[:5])
        logger.warning(f"{path} was changed after its weights were written: {shown}.")


class Difference(NamedTuple):
    """Bytes that do not have the digest they should have.

    Attributes:
        file: path below the folder.
        part: the tensor, `the header`, or nothing for a whole file.
        where: `file: part` with the place of the bytes, for messages.
    """

    file: str
    part: str
    where: str


def differences(digests: Digests, names: Iterable[str]) -> Iterator[Difference | None]:
    """Compares every byte of some files with their digests, several tensors at a time.

    Yields:
        For each digest, in the files' order, `None` if the bytes have it.

    Raises:
        CheckpointError: when a file does not hold the tensors that are listed.
    """
    tasks = [task for name in names for task in _tasks(digests, name)]
    with ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)))) as pool:
        try:
            for (what, _, expected), found in zip(tasks, pool.map(lambda task: digest(task[1]), tasks)):
                yield None if found == expected else what
        finally:
            pool.shutdown(cancel_futures=True)


def _tasks(digests: Digests, name: str) -> list[tuple[Difference, list[Stretch], str]]:
    """What to compare of a file: how it is called, its bytes and their digest."""
    path, entry = digests.folder / name, digests.files[name]
    size = path.stat().st_size
    if entry.tensors is None:
        return [(Difference(name, "", str(path)), [Stretch(path, 0, size)], str(entry.sha256))]
    stretches = tensor_stretches(path) or {}
    odd = sorted(set(stretches) ^ set(entry.tensors))
    if odd:
        where = "in the file only" if odd[0] in stretches else "missing in the file"
        raise CheckpointError(f"{path} does not hold the tensors that {digests.source} lists ({odd[0]} is {where}); "
                              f"{_COPY}.")
    tasks = [(Difference(name, tensor, f"{path}: {tensor} ({_bytes_of(own)})"), own, entry.tensors[tensor])
             for tensor, own in stretches.items()]
    if entry.frame is not None:
        tasks.insert(0, (Difference(name, "the header", f"{path}: the header"), _frame(path, size, stretches),
                         entry.frame))
    return tasks


def _bytes_of(stretches: list[Stretch]) -> str:
    if not stretches:
        return "no bytes"
    return f"bytes {stretches[0].offset} to {stretches[-1].offset + stretches[-1].nbytes}"


class _Memory:
    """What was compared before, by size, times and inode: one empty file each in the user's cache folder."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def knows(self, key: str) -> bool:
        return self.folder is not None and (self.folder / key).is_file()

    def note(self, path: Path, key: str) -> None:
        status = path.stat()
        if self.folder is None or time.time() - max(status.st_mtime, status.st_ctime) < SETTLED_S:
            return
        with contextlib.suppress(OSError):      # then it is compared again next time
            (self.folder / key).touch()

    def key(self, digests: Digests, name: str) -> str:
        path = (digests.folder / name).resolve()
        status = path.stat()
        state = [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino,
                 asdict(digests.files[name])]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _memory(digests: Digests) -> Iterator[_Memory]:
    """The remembered checks; processes that compare the same folder come one after the other, so one does the work."""
    name = hashlib.sha256(str(digests.source.resolve()).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mindformers_ixc" / "verified"
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except (OSError, RuntimeError):      # also a user without a home
        yield _Memory(None)
        return
    try:
        with contextlib.suppress(OSError):      # some network folders have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        _forget(folder)
        yield _Memory(folder)
    finally:
        os.close(lock)


def _forget(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.suffix != ".lock" and time.time() - path.stat().st_mtime > REMEMBERED_S:
                path.unlink(missing_ok=True)
