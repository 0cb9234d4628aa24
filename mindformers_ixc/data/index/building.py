"""Builds the index of a source, by all cores; what was measured before an interruption is kept."""
from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import selectors
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from mindformers_ixc import terminal
from mindformers_ixc.data.conversations import ConversationReader, ReadingOptions, refuse_errors
from mindformers_ixc.data.index.cleaning import place_of, remove_outdated
from mindformers_ixc.data.index.faulty import still_wrong
from mindformers_ixc.data.index.folders import FULL, index_folder, writing
from mindformers_ixc.data.index.growing import grown_from, measured_part, pictures_are_unchanged, start_of
from mindformers_ixc.data.index.holding import NOTE, is_there, made, put_in_place, unfinished
from mindformers_ixc.data.index.keys import Keys, Measures, keys_of
from mindformers_ixc.data.index.kinds import open_reader
from mindformers_ixc.data.index.measuring import Measured, Measurer, file_state
from mindformers_ixc.data.index.seals import check_seal
from mindformers_ixc.data.index.store import (
    COLUMN_FILES,
    COLUMNS,
    DESCRIPTION,
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
from mindformers_ixc.data.index.telling import measuring
from mindformers_ixc.data.records.base import Fingerprint, Records
from mindformers_ixc.data.records.json_files import JsonRecords
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import read_json, tidy, whole_file, write_whole
from mindformers_ixc.reading import current as reads
from mindformers_ixc.reading import read_on

logger = logging.getLogger(__name__)

# Samples that are measured, and kept, together.
PART = 4096

# Of a folder that is being filled: places of all samples; what the workers are to do.
SCAN, JOB = "scan.npy", "job.json"

# What a worker's lines begin with that are no numbers: sentences to be shown, and the one with which it ends.
SAYS, ENDS = "says ", "ends "

# Seconds that a worker which was killed may take to end.
GRACE = 5

# Samples below which starting other processes takes longer than it saves.
FEW = 8192

# Pictures whose files are looked at again whenever an index is opened; of more, a change is found when one is read.
CHECKED_PICTURES = 20000


def open_index(path: str | os.PathLike, options: ReadingOptions, measures: Measures,
               folder: str | os.PathLike | None = None, bad_share: float = 0.0) -> SourceIndex:
    """The index of a source, built if it is not there, or the source has changed.

    Args:
        path: the source; `pkg:` paths work.
        options: how its records are read.
        measures: how its samples are measured.
        folder: where indices lie; by default in the user's cache.
        bad_share: share of samples that may be unreadable; the index lists them. (What cannot be read the next time
            either is not measured again.)

    Raises:
        DataError: for a source that cannot be used: listing what is wrong with which samples, if there are more.
        FileNotFoundError: when it is missing.
        OSError: when the folder cannot be written.
    """
    reader = open_reader(path, options)
    state = reader.records.fingerprint()
    reader.records.expect(state.size, state.time, compared=False)
    keys, root = keys_of(reader, measures, state), index_folder(folder, to_write=False)
    place = place_of(root, reader.records)
    current = partial(_current, place, keys, reader, measures)
    if (found := current()) is not None:    # perhaps where nothing can be written
        return _checked(found, bad_share)
    index_folder(folder)

    def build(alone: bool) -> SourceIndex:
        part = unfinished(place / keys.plain, alone)
        described = Description(VERSION, reader.name, 0, "", "", list(state), [], [], [],
                                os.path.abspath(reader.records.home), keys.base,
                                how=f"hd_num {measures.hd_num}, {measures.processor.image_processor.image_size} pixels")
        builder = _Builder(reader, measures, part, keys, state)
        builder.build(described, bad_share)
        held = put_in_place(part, place / builder.name)
        index = SourceIndex(place / builder.name)
        remove_outdated(root, place, list(state))
        del held
        return index

    with writing(root):
        return _checked(made(current, build, place / f"{keys.plain}.lock",
                             f"waiting for the index of {reader.name}, which {{who}} builds"), bad_share)


def _checked(index: SourceIndex, bad_share: float) -> SourceIndex:
    """The index, unless too many of its samples cannot be read."""
    refuse_errors([sentence for _, sentence in index.description.errors], len(index), bad_share)
    return index


def looking_through(records: Records) -> contextlib.AbstractContextManager[Any]:
    """A bar of the bytes of a source whose records are looked for, as `terminal.counting` gives it."""
    size = os.path.getsize(records.path)
    return terminal.current.counting(size, f"looking through {records.home.name}", "B", disable=size < 1 << 26 or None,
                                     unit_scale=True)


def _current(place: Path, keys: Keys, reader: ConversationReader, measures: Measures) -> SourceIndex | None:
    """The index that is there, if what it says of pictures, as far as it is checked, still holds."""
    for name, captions in ((keys.plain, False), (keys.seeded, True)):
        if not is_there(place / name):
            continue
        try:
            check_seal(place / name, COLUMN_FILES)
            index = SourceIndex(place / name)
        except DataError as error:
            if not isinstance(error.__cause__, FileNotFoundError):       # removed just now
                logger.warning(f"{error}")
            continue
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            logger.warning(f"The index {place / name} is damaged ({error}), and is built anew.")
            continue
        described = index.description
        if (described.key == name and described.captions == captions and still_wrong(index, reader, measures)
                and pictures_are_unchanged(index)):
            return index
    return None


class _Builder:
    """Builds one index.

    Args:
        reader: of the source.
        measures: how samples are measured.
        folder: for what is not finished; left by an interrupted one, it is gone on from.
        keys: of the index.
        state: of the source's file.

    Attributes:
        name: that the folder is to have, when it is filled.
    """

    def __init__(self, reader: ConversationReader, measures: Measures, folder: Path, keys: Keys, state: Fingerprint):
        self.reader, self.measures, self.folder, self.keys, self.state = reader, measures, folder, keys, state
        self.parts, self.name = folder / "parts", ""

    def build(self, description: Description, bad_share: float) -> None:
        """Fills the folder.

        Args:
            description: of the index, without what is found now.
            bad_share: see `open_index`.

        Raises:
            DataError: see `open_index`.
        """
        self.name = self._finished()
        if self.name:
            return
        self.parts.mkdir(parents=True, exist_ok=True)
        for folder in (self.folder, self.parts):
            tidy(folder)
        write_whole(self.folder / NOTE, json.dumps({"source": description.source, "path": description.path,
                                                    "fingerprint": description.fingerprint, "asked": self.keys.asked}))
        try:
            places = self._scan()
            if not len(places):
                next(iter(self.reader.records))             # says that there is none
            count = -(-len(places) // PART)
            self._measure(places, [number for number in range(count) if not self._part(number).exists()])
        except KeyboardInterrupt:
            terminal.current.note(f"The index of {self.reader.name} is not finished; what was measured is kept, and "
                                  "gone on from the next time.")
            raise
        self._put_together(description, places, count, bad_share)

    def _measure(self, places: np.ndarray, missing: list[int]) -> None:
        """Measures the parts that are missing."""
        measured = len(places) - sum(len(places[number * PART:(number + 1) * PART]) for number in missing)
        with contextlib.ExitStack() as stack:
            progress: Callable[[int], object] = int
            if missing and len(places) >= FEW:
                progress = stack.enter_context(measuring(self.reader.records.home.name, len(places), measured))
            if len(missing) * PART > FEW and self.measures.own:
                self._measure_by_workers(missing, progress)
            else:
                measure_parts(self.reader, self.measures, places, missing, self.parts, progress)

    def _put_together(self, description: Description, places: np.ndarray, count: int, bad_share: float) -> None:
        """Writes the index of its parts; arguments as of `build`."""
        unusable, errors, files, digest = list[list](), list[list](), dict[str, list](), hashlib.sha256()
        captions, lacking = False, 0
        for part in self._measured(count):
            for column in (part.digests, part.pictures, part.sizes, part.pairs, part.needs):
                digest.update(column.tobytes())
            unusable += [list(entry) for entry in part.unusable]
            errors += [list(entry) for entry in part.errors]
            captions |= part.captions
            lacking += part.lacking
            if len(files) <= CHECKED_PICTURES:
                files.update({path: [path, *state] for path, *state in part.files})
        if len(errors) > bad_share * len(places):
            for number in {sample // PART for sample, _ in errors}:
                self._part(number).unlink()         # what is wrong may lie in other files than the source
        refuse_errors([sentence for _, sentence in errors], len(places), bad_share)
        checked = list(files.values()) if len(files) <= CHECKED_PICTURES else []
        self.name = self.keys.seeded if captions else self.keys.plain
        write_index(self.folder, replace(description, samples=len(places), key=self.name, content=digest.hexdigest(),
                                         unusable=unusable, errors=errors, files=checked, captions=captions,
                                         asked=self.keys.asked if captions else "", lacking=lacking,
                                         start=start_of(self.reader.records, description.fingerprint[0])),
                    blocks(places, PART), self._measured(count))
        self._leave_the_index()

    def _leave_the_index(self) -> None:
        """Removes what the index was made of."""
        shutil.rmtree(self.parts, ignore_errors=True)
        for file in (*(self.folder / name for name in (SCAN, JOB, NOTE)), *self.folder.glob("worker*.log")):
            file.unlink(missing_ok=True)

    def _finished(self) -> str:
        """The name of the index if the folder has one, left by a process that ended before it was given its name."""
        if not (self.folder / DESCRIPTION).exists():
            self._drop_stale_parts()
            return ""
        with contextlib.suppress(DataError):
            index = SourceIndex(self.folder)
            described = index.description
            asked = not described.captions or described.asked == self.keys.asked
            if asked and not described.errors and pictures_are_unchanged(index):
                self._leave_the_index()
                return described.key
        shutil.rmtree(self.folder)
        return ""

    def _drop_stale_parts(self) -> None:
        """Removes parts that an interrupted process left and that would come out otherwise now."""
        asked = None
        with contextlib.suppress(DataError, OSError, AttributeError):
            asked = read_json(self.folder / NOTE).get("asked")
        for path in sorted(self.parts.glob("*.npz")):
            try:
                part = load_part(path)
                # what was wrong may be there now: a picture, say
                good = not part.errors and (asked == self.keys.asked or not part.captions) and all(
                    file_state(picture) == tuple(state) for picture, *state in part.files)
            except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):      # OSError: a picture is gone
                good = False
            if not good:
                path.unlink()

    def _measured(self, count: int) -> Iterator[Measured]:
        return (load_part(self._part(number)) for number in range(count))

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.npz"

    def _scan(self) -> np.ndarray:
        """Places of all samples."""
        file = self.folder / SCAN
        if not file.exists():
            records = self.reader.records
            known = grown_from(self.folder.parent, self.keys, records, os.path.getsize(records.path))
            with looking_through(records) as counted, whole_file(file) as target:
                column = ColumnWriter(target, *COLUMNS["places"])
                for block in read_on(records.name, self._places(known, counted.update)):
                    column.add(block)
                column.close()
        return mapped(file, *COLUMNS["places"])

    def _places(self, known: SourceIndex | None, progress: Callable[[int], object]) -> Iterator[np.ndarray]:
        """Places of all samples; what is known of the first ones is taken over.

        Args:
            known: the index of the source before something was appended.
            progress: see `Records.scan`.
        """
        records = self.reader.records
        if known is None or not isinstance(records, JsonRecords):
            yield from records.scan(progress)
            return
        for number in range(len(known) // PART):
            if not self._part(number).exists():
                save_part(self._part(number), measured_part(known, number * PART, (number + 1) * PART))
        yield from blocks(known.places, PART)
        at, _, line = known.description.start
        yield from records.scan_rest(at, line, progress)

    def _measure_by_workers(self, missing: list[int], progress: Callable[[int], object]) -> None:
        """Lets as many processes as there are cores measure the parts that are missing."""
        job = {"source": self.reader.name, "options": asdict(self.reader.options),
               "section": dict(self.measures.section), "hd_num": self.measures.hd_num, "missing": missing,
               "decode": self.measures.decode, "parent": os.getpid(), "state": self.state[:2],
               "read_timeout": reads.limit}
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
                # one that a dead file system holds ends when that lets it go
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(GRACE)


def _follow(workers: list[subprocess.Popen], logs: list[Path], progress: Callable[[int], object]) -> None:
    """Passes on how many samples the workers have measured, until all have ended well.

    Raises:
        DataError: when one has not, with its last line.
        OSError: when the disk is full.
    """
    with selectors.DefaultSelector() as waiting:
        for worker, log in zip(workers, logs):
            waiting.register(_output(worker), selectors.EVENT_READ, (worker, log))
        while waiting.get_map():
            for entry, _ in waiting.select():
                worker, log = entry.data
                line = _output(worker).readline()
                if line.startswith((SAYS, ENDS)):
                    _pass_on(line)
                elif line:
                    progress(int(line))
                if line:
                    continue
                waiting.unregister(_output(worker))
                if worker.wait():
                    if worker.returncode in FULL:
                        raise OSError(worker.returncode, os.strerror(worker.returncode))
                    said = log.read_text(encoding="utf-8", errors="replace")
                    last = (said.strip().splitlines() or ["it was killed"])[-1]
                    raise DataError(f"A process that measures samples has ended: {last}. Start again; what was "
                                    "measured is kept.")


def _pass_on(line: str) -> None:
    """Shows what a worker says.

    Raises:
        DataError: when it is the last.
    """
    if line.startswith(ENDS):
        raise DataError(f"{line[len(ENDS):].strip()} What was measured is kept.")
    terminal.current.say(line[len(SAYS):].strip())


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
