"""Writes files of tensors piece by piece: killed at any moment it leaves nothing that looks whole, and can go on.

Everything is written below a hidden work folder beside the target. A journal there says which tensors are on the disk;
the target appears by one rename when all are.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.dtypes import convert_dtype, count_not_finite, item_size
from mindformers_ixc.checkpoint.tensor_file import TensorFile
from mindformers_ixc.checkpoint.tensors import LazyTensor
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.files import text_lines

logger = logging.getLogger(__name__)

# Bytes written between two entries of the journal; each waits for the disk.
SYNC_BYTES = 256 * 2**20
# Bytes that are read but not yet hashed and written, at most (each piece counts for both).
IN_FLIGHT = 512 * 2**20


@dataclass(frozen=True)
class Output:
    """Where a tensor, or a region of it, goes.

    Attributes:
        file: path below the target folder.
        region: slices of the whole tensor.
    """

    file: str
    region: tuple[slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the region the rank holds."""
        return tuple(part.stop - part.start for part in self.region)


@dataclass
class Item:
    """One tensor to be written.

    Attributes:
        name: in the files.
        tensor: where it comes from.
        dtype: format it is written in.
        outputs: where it goes.

    What has the same `tensor.group` is computed together, and written by one run.
    """

    name: str
    tensor: LazyTensor
    dtype: str
    outputs: list[Output] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes it takes in all files together."""
        return sum(math.prod(output.shape) for output in self.outputs) * item_size(self.dtype)


class WorkFolder:
    """The hidden folder beside a target in which it comes into being.

    Args:
        target: folder or file to be made.
        job: what is done, JSON-serialisable; an interrupted run goes on only if it did the same.
    """

    def __init__(self, target: Path, job: dict):
        self.target = target
        self.path = target.parent / f".{target.name}.partial"
        self.output = self.path / "output"
        self.journal = self.path / "journal.jsonl"
        self.digest = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()
        self.done: dict[str, list[str]] = {}

    @contextlib.contextmanager
    def open(self) -> Iterator[WorkFolder]:
        """Holds the folder for this process; removes what another job left in it.

        Raises:
            CheckpointError: when it cannot be made, or another process is at work in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"{self.target.parent} cannot be written ({error.strerror}); choose another target "
                                  "or change its permissions.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise CheckpointError(f"Another process is writing {self.target} (it holds {self.path}/lock).") from error
        try:
            self._read_journal()
            yield self
        except BaseException as error:
            if not self.done:       # nothing is worth keeping
                shutil.rmtree(self.path, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CheckpointError(f"The disk of {self.target.parent} is full; make room and run the same command "
                                      "again, it goes on where it stopped.") from error
            raise
        finally:
            os.close(lock)

    def _read_journal(self) -> None:
        lines = []
        if self.journal.is_file():
            for _, line in text_lines(self.journal.read_text(encoding="utf-8", errors="replace")):
                try:
                    lines.append(json.loads(line))
                except (ValueError, RecursionError):
                    break       # the run was killed while it wrote this line
        if lines and lines[0] == {"job": self.digest}:
            self.done = {line["name"]: line["sha256"] for line in lines[1:]}
            # written anew, so that a line cut off in the middle does not spoil what is appended
            self._write_journal("w", lines)
            return
        for entry in self.path.iterdir():
            if entry.name != "lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._write_journal("w", [{"job": self.digest}])

    def _write_journal(self, mode: str, lines: Iterable[dict]) -> None:
        path = self.journal if mode == "a" else self.journal.with_suffix(".new")
        with open(path, mode, encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        if mode != "a":
            path.replace(self.journal)

    def record(self, entries: dict[str, list[str]]) -> None:
        """Notes tensors that are on the disk, with the SHA-256 of each output."""
        self._write_journal("a", [{"name": name, "sha256": sums} for name, sums in entries.items()])
        self.done.update(entries)

    def publish(self) -> None:
        """Moves the finished output to the target and removes the folder; an older target is gone with it."""
        if self.target.exists():
            os.replace(self.target, self.path / "replaced")
        made = self.output / self.target.name
        os.replace(made if is_file_target(self.target) else self.output, self.target)
        self.clear()

    def clear(self) -> None:
        """Removes the folder, or what a run left of it that was killed when its target was there already."""
        shutil.rmtree(self.path, ignore_errors=True)


def is_file_target(target: Path) -> bool:
    """Whether a target is one file, by its suffix."""
    return target.suffix in (".safetensors", ".ckpt")


def write_items(work: WorkFolder, items: list[Item], title: str) -> dict[str, dict[str, str]]:
    """Writes every item that is not on the disk yet.

    Args:
        work: an opened work folder.
        items: what to write, in the order it is read.
        title: of the progress bar.

    Returns:
        SHA-256 of every tensor in every file: `{file: {name: digest}}`.

    Raises:
        CheckpointError: when the disk has too little room, or a number does not fit its format.
    """
    contents: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {}
    for item in items:
        for output in item.outputs:
            contents.setdefault(output.file, []).append((item.name, item.dtype, output.shape))
    files = {name: TensorFile(work.output / name, tensors, _rank_of(name)) for name, tensors in contents.items()}
    _check_room(work, files.values())
    try:
        for file in files.values():
            file.open()
        _stream(work, items, files, title)
    finally:
        for file in files.values():
            file.close()
    sums: dict[str, dict[str, str]] = {name: {} for name in files}
    for item in items:
        for output, digest in zip(item.outputs, work.done[item.name]):
            sums[output.file][item.name] = digest
    return sums


def _rank_of(file: str) -> dict[str, str] | None:
    """What goes into the header of a rank's file, so that it is known wherever it is."""
    match = re.search(r"(?:^|/)rank_(\d+)/", file)
    return {"rank": match[1]} if match else None


def _check_room(work: WorkFolder, files: Iterable[TensorFile]) -> None:
    needed = sum(file.size for file in files)
    present = sum(file.path.stat().st_blocks * 512 for file in files if file.path.exists())
    free = shutil.disk_usage(work.path).free
    if needed - present > free:
        raise CheckpointError(f"{work.target} needs {_amount(needed - present)}, the disk of {work.target.parent} has "
                              f"{_amount(free)} free; make room or choose another target.")


def _amount(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def _stream(work: WorkFolder, items: list[Item], files: dict[str, TensorFile], title: str) -> None:
    total = sum(item.nbytes for item in items)
    groups = {item.tensor.group for item in items if item.name not in work.done} - {""}
    left = [item for item in items if item.name not in work.done or item.tensor.group in groups]
    done = total - sum(item.nbytes for item in left)
    with terminal.current.counting(total, title, "B", initial=done, unit_scale=True, mininterval=0.5,
                                   disable=False) as bar, Lanes(work, files) as lanes:
        for item in left:
            lanes.send(item)
            bar.update(item.nbytes)


class Lanes:
    """Reads in the caller's thread; hashes, writes and waits for the disk in one thread each, in order.

    All three leave Python while they work on a piece, so two cores are busy and the disk never waits.

    Args:
        work: whose journal takes what is on the disk.
        files: to be written, by name.
    """

    def __init__(self, work: WorkFolder, files: dict[str, TensorFile]):
        self.work, self.files = work, files
        self.hasher, self.writer, self.settler = (ThreadPoolExecutor(max_workers=1) for _ in range(3))
        self.flying: deque[tuple[Future, int]] = deque()      # pieces that are in memory, with their bytes
        self.flying_bytes = 0
        self._new_batch()
        self.settled: list[Future] = []
        self.odd: dict[str, list[Future]] = {}      # counts of NaN and infinities by tensor

    def _new_batch(self) -> None:
        self.digests: dict[str, list] = {}
        self.tasks: list[Future] = []
        self.touched: set[str] = set()
        self.fresh = 0

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._settle()
                for future in self.settled:
                    future.result()
                say_not_finite({name: sum(count.result() for count in counts) for name, counts in self.odd.items()},
                               str(self.work.target))
        finally:
            for lane in (self.hasher, self.writer, self.settler):
                lane.shutdown(cancel_futures=True)

    def send(self, item: Item) -> None:
        """Sends one tensor on its way, a few rows at a time."""
        odd: list[Future] = []
        # copies of one region have one digest
        regions = {str(output.region): hashlib.sha256() for output in item.outputs}
        digests = [regions[str(output.region)] for output in item.outputs]
        for begin, piece in item.tensor.pieces():
            try:
                piece = convert_dtype(piece, item.tensor.dtype, item.dtype)
            except CheckpointError as error:
                raise CheckpointError(f"{item.name}: {error}") from error
            odd.append(self.hasher.submit(count_not_finite, piece, item.dtype))
            parts = {}
            for output, digest in zip(item.outputs, digests):
                key = str(output.region)
                if key not in parts:
                    parts[key] = part, first = _part_of(output, begin, piece)
                    if part is not None:
                        content = part.reshape(-1).view(np.uint8).data
                        self._launch(self.hasher.submit(digest.update, content), part.nbytes)
                part, first = parts[key]
                if part is not None:
                    self._launch(self.writer.submit(self.files[output.file].write, item.name, first, part), part.nbytes)
        self.odd[item.name] = odd
        self.digests[item.name] = digests
        self.touched.update(output.file for output in item.outputs)
        self.fresh += item.nbytes
        if self.fresh >= SYNC_BYTES:
            self._settle()

    def _launch(self, future: Future, nbytes: int) -> None:
        self.tasks.append(future)
        self.flying.append((future, nbytes))
        self.flying_bytes += nbytes
        while self.flying_bytes > IN_FLIGHT:
            oldest, size = self.flying.popleft()
            oldest.result()
            self.flying_bytes -= size

    def _settle(self) -> None:
        batch = (self.digests, self.tasks, [self.files[name] for name in self.touched])
        self.settled.append(self.settler.submit(self._record, *batch))
        self._new_batch()

    def _record(self, digests: dict[str, list], tasks: list[Future], files: list[TensorFile]) -> None:
        """Notes tensors in the journal once their bytes cannot be lost any more."""
        for task in tasks:
            task.result()
        for file in files:
            file.sync()
        self.work.record({name: [digest.hexdigest() for digest in found] for name, found in digests.items()})


def say_not_finite(counts: dict[str, int], where: str) -> None:
    """Says which tensors hold NaN or infinities, and how many.

    Args:
        counts: by tensor.
        where: the checkpoint.
    """
    found = {name: count for name, count in counts.items() if count}
    if found:
        shown = ", ".join(f"{name} ({count})" for name, count in list(found.items())[:5])
        logger.warning(f"{where}: {len(found)} tensors hold NaN or infinities: {shown}"
                       f"{' and more' if len(found) > 5 else ''}. A model with them computes nothing useful.")


def _part_of(output: Output, begin: int, piece: np.ndarray) -> tuple[np.ndarray | None, int]:
    """What of a piece that begins at a row of the whole goes to an output, and at which row there."""
    if not output.region:
        return np.ascontiguousarray(piece), 0
    rows = output.region[0]
    low, high = max(begin, rows.start), min(begin + len(piece), rows.stop)
    if low >= high:
        return None, 0
    part = piece[(slice(low - begin, high - begin), *output.region[1:])]
    return np.ascontiguousarray(part), low - rows.start
