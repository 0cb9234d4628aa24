"""Files that grow at their end: what was measured of their beginning is taken over from the index that they had."""
from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mindformers_ixc.data.index.keys import Keys
from mindformers_ixc.data.index.measuring import Measured, file_state
from mindformers_ixc.data.index.store import SourceIndex, descriptions
from mindformers_ixc.data.records import Records
from mindformers_ixc.data.records.json_files import JsonRecords
from mindformers_ixc.errors import DataError

# Bytes that are read at a time.
CHUNK = 1 << 23


def start_of(records: Records, size: int) -> list:
    """What a longer file is compared with later (`Description.start`); nothing of a source that cannot grow.

    Only JSON lines can: of everything else, what is written behind the last record changes what stands before.

    Args:
        records: of the source.
        size: bytes that are measured.
    """
    if not (isinstance(records, JsonRecords) and records.lines and records.path == records.home):
        return []
    return next(_digests(records.path, [size]))


def _digests(path: Path, sizes: Sequence[int]) -> Iterator[list]:
    """Bytes, their SHA-256 and the lines that end in them, of the beginnings of a file; it is read once.

    Args:
        path: of the file.
        sizes: of the beginnings, ascending.
    """
    digest, lines, done = hashlib.sha256(), 0, 0
    with open(path, "rb") as file:
        for size in sizes:
            while done < size and (content := file.read(min(CHUNK, size - done))):
                digest.update(content)
                lines += content.count(b"\n")
                done += len(content)
            yield [done, digest.hexdigest(), lines]


def grown_from(place: Path, keys: Keys, records: Records, size: int) -> SourceIndex | None:
    """The index of a source as it was before something was appended, if there is one; the longest, if there are some.

    Every byte of it is compared, so what it says of the samples holds; pictures are looked at as of any index.

    Args:
        place: of the indices of the source.
        keys: of the one that is wanted.
        records: of the source.
        size: bytes of it now.
    """
    if not start_of(records, 0):
        return None
    known = [(entry.start, folder) for folder, entry in descriptions(place)
             if entry.base == keys.base and entry.start and 0 < entry.start[0] < size
             and not entry.errors and not entry.lacking       # of which the index does not keep which parts they are in
             and (not entry.captions or entry.asked == keys.asked)]
    known.sort(key=lambda entry: entry[0][0])
    now = _digests(records.path, [start[0] for start, _ in known])
    same = [(start, folder) for (start, folder), found in zip(known, now) if start == found]
    for start, folder in reversed(same):
        try:
            index = SourceIndex(folder)
            if _ends_a_line(records.path, start[0]) and pictures_are_unchanged(index):
                return index
        except DataError:        # it is damaged, or was removed
            continue
    return None


def _ends_a_line(path: Path, size: int) -> bool:
    with open(path, "rb") as file:
        file.seek(size - 1)
        return b"\n" in file.read(2)


def pictures_are_unchanged(index: SourceIndex) -> bool:
    """Whether the pictures are as they were when they were measured, as far as that is kept."""
    for path, *state in index.description.files:
        try:
            if list(file_state(path)) != state:
                return False
        except OSError:      # the sentence about it comes when the index is built anew
            return False
    return True


def measured_part(index: SourceIndex, first: int, end: int) -> Measured:
    """What an index says of some of its samples, as it was measured.

    What is not kept sample by sample (files, captions) stands in the part that begins with sample 0.
    """
    description = index.description
    samples = slice(first, end)
    starts, rounds = index.picture_starts[first:end + 1], index.pair_starts[first:end + 1]
    unusable = [(number, sentence) for number, sentence in description.unusable if first <= number < end]
    files = [(path, size, time) for path, size, time in description.files] if first == 0 else []
    return Measured(index.digests[samples], np.diff(starts).astype(np.int32), index.sizes[starts[0]:starts[-1]],
                    np.diff(rounds).astype(np.int32), index.needs[rounds[0]:rounds[-1]], unusable, [], files,
                    description.captions and first == 0)
