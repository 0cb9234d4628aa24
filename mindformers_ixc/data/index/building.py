"""Builds the index of a source, by all cores; what was measured before an interruption is kept."""
from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import selectors
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from mindformers_ixc import terminal
from mindformers_ixc.data.conversations import ConversationReader, ReadingOptions, raise_errors
from mindformers_ixc.data.index.kinds import open_reader
from mindformers_ixc.data.index.measuring import Measured, Measurer, file_state
from mindformers_ixc.data.index.store import (
    COLUMNS,
    VERSION,
    ColumnWriter,
    Description,
    SourceIndex,
    blocks,
    load_part,
    mapped,
    save_part,
    write_index,
)
from mindformers_ixc.data.paths import cut
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import whole_file, write_whole
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.resources import usable_cache_folder

logger = logging.getLogger(__name__)

# Environment variable that names the folder of indices.
FOLDER_VARIABLE = "MINDFORMERS_IXC_INDEX"

# Samples that are measured, and kept, together.
PART = 4096

# Of a folder that is being filled: places of all samples; what the workers are to do.
SCAN, JOB = "scan.npy", "job.json"

# Samples below which starting other processes takes longer than it saves.
FEW = 8192

# Pictures whose files are looked at again whenever an index is opened; of more, a change is found when one is read.
CHECKED_PICTURES = 20000


@dataclass(frozen=True)
class Measures:
    """What the needs of samples depend on.

    Attributes:
        section: keys of the YAML's `train_dataset` that say what a processor does, with its tokenizer.
        processor: made of them.
        hd_num: tiles of a picture at most.
        decode: whether pixels are read (see `Measurer`).
        own: whether the tokenizer is this package's, so that other processes can make it without MindFormers.
    """

    section: Mapping[str, Any]
    processor: Processor
    hd_num: int
    own: bool
    decode: bool = False


def open_index(path: str | os.PathLike, options: ReadingOptions, measures: Measures,
               folder: str | os.PathLike | None = None, all_errors: bool = False) -> SourceIndex:
    """The index of a source, built if it is not there, or the source has changed.

    Args:
        path: the source; `pkg:` paths work.
        options: how its records are read.
        measures: how its samples are measured.
        folder: where indices lie; by default in the user's cache.
        all_errors: whether an index is given even of a source with samples that cannot be read, which it lists; it is
            built anew the next time.

    Raises:
        DataError: for a source that cannot be used: listing what is wrong with which samples.
        FileNotFoundError: when it is missing.
        OSError: when the folder cannot be written.
    """
    reader = open_reader(path, options)
    state = reader.records.fingerprint()
    # relative names of pictures start in folders of which one may be the working directory
    folders = [os.path.abspath(one) for one in reader.folders]
    key = key_of(VERSION, asdict(options), folders, {**measures.section, "hd_num": measures.hd_num}, measures.decode,
                 state)
    place = index_folder(folder) / f"{cut(reader.records.path.name)}-{key_of(str(reader.records.path.resolve()))}"
    target = place / key
    place.mkdir(parents=True, exist_ok=True)
    with locked(place / f"{key}.lock", f"waiting for the index of {reader.name}, which another process builds"):
        if not _is_current(target):
            builder = _Builder(reader, measures, place / f"{key}.building")
            builder.build(Description(VERSION, reader.name, 0, key, "", list(state), [], [], []), all_errors)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(builder.folder, target)
            _remove_outdated(place, list(state))
    return SourceIndex(target)


def looking_through(path: Path) -> contextlib.AbstractContextManager[Any]:
    """A bar of the bytes of a source whose records are looked for, as `terminal.counting` gives it."""
    size = os.path.getsize(path)
    return terminal.current.counting(size, f"looking through {path.name}", "B", disable=size < 1 << 26 or None,
                                     unit_scale=True)


def index_folder(folder: str | os.PathLike | None = None) -> Path:
    """Where indices lie: the folder that is given, or that the environment names, or a place in the user's cache."""
    chosen = folder or os.environ.get(FOLDER_VARIABLE)
    return Path(chosen) if chosen else usable_cache_folder("index")


def key_of(*values: object) -> str:
    """A name that follows from values, of 24 hexadecimal signs."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:24]


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Holds a lock, so that of all processes that want the same thing one makes it.

    Args:
        path: of the lock's file.
        waiting: what the terminal says as long as another process holds it.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with terminal.current.doing(waiting):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_current(folder: Path) -> bool:
    """Whether an index is there and what it says of pictures, as far as it is checked, still holds."""
    if not folder.is_dir():
        return False
    try:
        index = SourceIndex(folder)
    except DataError as error:
        logger.warning(f"{error}")
        return False
    if index.description.errors:
        return False
    for path, *state in index.description.files:
        try:
            if list(file_state(path)) != state:
                return False
        except OSError:      # the sentence about it comes when the index is built anew
            return False
    return True


def _remove_outdated(place: Path, state: list) -> None:
    """Removes indices of the same source as it was before."""
    for folder in place.iterdir():
        if folder.is_dir() and folder.suffix != ".building":
            with contextlib.suppress(DataError):
                if SourceIndex(folder).description.fingerprint == state:
                    continue
            shutil.rmtree(folder, ignore_errors=True)


class _Builder:
    """Builds one index.

    Args:
        reader: of the source.
        measures: how samples are measured.
        folder: for what is not finished; left by an interrupted one, it is gone on from.
    """

    def __init__(self, reader: ConversationReader, measures: Measures, folder: Path):
        self.reader, self.measures, self.folder, self.parts = reader, measures, folder, folder / "parts"

    def build(self, description: Description, all_errors: bool) -> None:
        """Fills the folder.

        Args:
            description: of the index, without what is found now.
            all_errors: see `open_index`.

        Raises:
            DataError: see `open_index`.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        places = self._scan()
        if not len(places):
            next(iter(self.reader.records))             # says that there is none
        count = -(-len(places) // PART)
        missing = [number for number in range(count) if not self._part(number).exists()]
        with terminal.current.counting(len(places), f"indexing {self.reader.records.path.name}", "sample",
                                       disable=len(places) < FEW or None) as bar:
            bar.update(PART * (count - len(missing)))
            if len(missing) * PART > FEW and self.measures.own:
                self._measure_by_workers(missing, bar.update)
            else:
                measure_parts(self.reader, self.measures, places, missing, self.parts, bar.update)
        unusable, errors, files, digest = list[list](), list[list](), dict[str, list](), hashlib.sha256()
        lacking = 0
        for number, part in enumerate(self._measured(count)):
            for column in (part.digests, part.pictures, part.sizes, part.pairs, part.needs):
                digest.update(column.tobytes())
            unusable += [list(entry) for entry in part.unusable]
            errors += [list(entry) for entry in part.errors]
            lacking += part.lacking
            if part.errors and not all_errors:
                self._part(number).unlink()         # what is wrong may lie in other files than the source
            if len(files) <= CHECKED_PICTURES:
                files.update({path: [path, *state] for path, *state in part.files})
        if errors and not all_errors:
            raise_errors([sentence for _, sentence in errors])
        checked = list(files.values()) if len(files) <= CHECKED_PICTURES else []
        write_index(self.folder, replace(description, samples=len(places), content=digest.hexdigest(),
                                         unusable=unusable, errors=errors, files=checked, lacking=lacking),
                    blocks(places, PART), self._measured(count))
        shutil.rmtree(self.parts)
        (self.folder / SCAN).unlink()

    def _measured(self, count: int) -> Iterator[Measured]:
        return (load_part(self._part(number)) for number in range(count))

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.npz"

    def _scan(self) -> np.ndarray:
        """Places of all samples."""
        file = self.folder / SCAN
        if not file.exists():
            with looking_through(self.reader.records.path) as counted, whole_file(file) as target:
                column = ColumnWriter(target, *COLUMNS["places"])
                for block in self.reader.records.scan(counted.update):
                    column.add(block)
                column.close()
        return mapped(file, *COLUMNS["places"])

    def _measure_by_workers(self, missing: list[int], progress: Callable[[int], object]) -> None:
        """Lets as many processes as there are cores measure the parts that are missing."""
        job = {"source": self.reader.name, "options": asdict(self.reader.options),
               "section": dict(self.measures.section), "hd_num": self.measures.hd_num, "missing": missing,
               "decode": self.measures.decode, "parent": os.getpid()}
        write_whole(self.folder / JOB, json.dumps(job, default=str))
        count = min(len(missing), len(os.sched_getaffinity(0)))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        # what they say goes to files: decoders may warn of every picture, and a pipe that nobody reads would stop them
        logs = [self.folder / f"worker{number}.log" for number in range(count)]
        workers = list[subprocess.Popen]()
        try:
            for number, log in enumerate(logs):
                with open(log, "w", encoding="utf-8") as said:
                    workers.append(subprocess.Popen(
                        [sys.executable, "-m", "mindformers_ixc.data.index.worker", str(self.folder), str(number),
                         str(count)], stdout=subprocess.PIPE, stderr=said, text=True, env=environment))
            _follow(workers, logs, progress)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        for file in (*logs, self.folder / JOB):
            file.unlink()


def _follow(workers: list[subprocess.Popen], logs: list[Path], progress: Callable[[int], object]) -> None:
    """Passes on how many samples the workers have measured, until all have ended well.

    Raises:
        DataError: when one has not, with its last line.
    """
    with selectors.DefaultSelector() as waiting:
        for worker, log in zip(workers, logs):
            waiting.register(_output(worker), selectors.EVENT_READ, (worker, log))
        while waiting.get_map():
            for entry, _ in waiting.select():
                worker, log = entry.data
                line = _output(worker).readline()
                if line:
                    progress(int(line))
                    continue
                waiting.unregister(_output(worker))
                if worker.wait():
                    said = log.read_text(encoding="utf-8", errors="replace")
                    last = (said.strip().splitlines() or ["it was killed"])[-1]
                    raise DataError(f"A process that measures samples has ended: {last}. Start again; what was "
                                    "measured is kept.")


def _output(worker: subprocess.Popen) -> IO[str]:
    assert worker.stdout is not None      # it was started with a pipe
    return worker.stdout


def measure_parts(reader: ConversationReader, measures: Measures, places: np.ndarray, numbers: list[int],
                  folder: Path, progress: Callable[[int], object]) -> None:
    """Measures parts of a source, and writes each when it is done.

    Args:
        reader: of the source.
        measures: how.
        places: of all samples.
        numbers: of the parts.
        folder: for them.
        progress: told of the samples that were measured.
    """
    measurer = Measurer(reader, measures.processor, measures.hd_num, measures.decode)
    for number in numbers:
        part = places[number * PART:(number + 1) * PART]
        save_part(folder / f"{number:06d}.npz", measurer.measure(part, number * PART))
        progress(len(part))
