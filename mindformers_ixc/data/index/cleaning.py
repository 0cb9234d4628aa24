"""The life of what is kept: what is outdated goes when something new is made, and on request; so does what is too much.

Nothing that a process uses is removed (`holding`), and nothing that has not a name and a content of this package: the
folder of indices may have other things in it.
"""
from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindformers_ixc.data.index.folders import PLANS, SAMPLES
from mindformers_ixc.data.index.holding import NOTE, UNFINISHED, USED, is_held, is_locked, remove, sweep, tried
from mindformers_ixc.data.index.keys import key_of
from mindformers_ixc.data.index.store import descriptions, read_description
from mindformers_ixc.data.paths import cut
from mindformers_ixc.data.records.base import Records, fingerprint
from mindformers_ixc.data.records.mindrecord import MindRecords, is_mindrecord
from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.files import read_json

# Environment variable for the gigabytes that samples and rows of epochs may take together, and its default. A million
# samples take 22 MB, the rows of one epoch of them 8 MB.
BOUND_VARIABLE, BOUND_GB = "MINDFORMERS_IXC_INDEX_GB", 20.0

# What folders say of themselves: a set of samples, a plan.
MADE_OF, FACTS = "made_of.json", "plan.json"

# Names of folders of this package: of a source; of an index, samples or a plan, finished or not.
_PLACE = re.compile(r".+-[0-9a-f]{24}")
_KEY = re.compile(r"[0-9a-f]{24}")
_UNFINISHED = re.compile(rf"([0-9a-f]{{24}})(\.[0-9a-f]{{12}})?{re.escape(UNFINISHED)}")


@dataclass(frozen=True)
class Entry:
    """Something that is kept.

    Attributes:
        folder: of it.
        kind: `index`, `unfinished`, `samples`, `rows` or `copy` (an unpacked file).
        source: what it is of.
        samples: their number, if it is known.
        size: bytes.
        used: when a process began to use it last, seconds since the epoch.
        outdated: why nobody will ask for it again; empty if somebody may.
        held: whether a process uses it now, or that cannot be known.
        how: see `store.Description`.
    """

    folder: Path
    kind: str
    source: str
    samples: int | None
    size: int
    used: float
    outdated: str
    held: bool
    how: str = ""


def place_of(root: Path, records: Records) -> Path:
    """The folder of the indices of a source."""
    return root / f"{cut(records.home.name)}-{key_of(str(records.home.resolve()))}"


def entries(root: Path, copies: Path | None = None) -> list[Entry]:
    """Everything that is kept.

    Args:
        root: the folder of indices.
        copies: that of unpacked files, if they are meant too.
    """
    found = [entry for place in _folders(root, _PLACE) for entry in _of_source(place)]
    outdated = {entry.folder for entry in found if entry.outdated}
    known = {made for folder, made in _made(root) if folder not in outdated}
    sets = [_of_samples(folder, known) for folder in _folders(root / SAMPLES, _KEY, _UNFINISHED)]
    made_of = {entry.folder.name: entry for entry in sets}
    return [*found, *sets, *(_of_plan(folder, made_of) for folder in _folders(root / PLANS, _KEY)), *_of_copies(copies)]


def _made(root: Path) -> Iterator[tuple[Path, tuple[str, str]]]:
    """Folder, key and content of every index that can be used."""
    for place in _folders(root, _PLACE):
        for folder, described in descriptions(place):
            yield folder, (described.key, described.content)


def _folders(parent: Path, *names: re.Pattern) -> list[Path]:
    """Folders in a folder, if there is one, that have such names."""
    with contextlib.suppress(OSError):
        return [path for path in sorted(parent.iterdir())
                if any(name.fullmatch(path.name) for name in names) and path.is_dir() and not path.is_symlink()]
    return []


def _of_source(place: Path) -> Iterator[Entry]:
    for folder in _folders(place, _KEY):
        size, used, held = _size(folder), _used(folder), is_held(folder)
        try:
            described = read_description(folder)
        except (DataError, OSError) as error:
            old = "of another version" if "of version" in str(error) else "damaged"
            yield Entry(folder, "index", place.name[:-25], None, size, used, old, held)
            continue
        outdated = _changed(described.path, described.fingerprint)
        yield Entry(folder, "index", described.path or described.source, described.samples, size, used, outdated, held,
                    described.how)
    for folder in _folders(place, _UNFINISHED):
        note = _read(folder / NOTE)
        path = note.get("path", "")
        yield Entry(folder, "unfinished", path or place.name[:-25], None, _size(folder), _used(folder),
                    _changed(path, note.get("fingerprint")), is_locked(_lock_of(folder)))


def _changed(path: str, state: object) -> str:
    """Why an index of a file in a state is outdated, if it is."""
    try:
        now = MindRecords(path).fingerprint() if is_mindrecord(path) else fingerprint(path)
    except (OSError, DataError):
        return "source is gone"
    return "" if list(now) == state else "source has changed"


def _of_samples(folder: Path, known: set[tuple[str, str]]) -> Entry:
    note = _read(folder / MADE_OF)
    made_of = {tuple(pair) for pair in note.get("indices", [])}
    outdated = "" if made_of and made_of <= known else "no current index"
    unfinished = folder.suffix == UNFINISHED
    return Entry(folder, "samples", ", ".join(note.get("names", [])), note.get("samples"), _size(folder), _used(folder),
                 "interrupted" if unfinished else outdated,
                 is_locked(_lock_of(folder)) if unfinished else is_held(folder))


def _of_plan(folder: Path, made_of: dict[str, Entry]) -> Entry:
    samples = made_of.get(str(_read(folder / FACTS).get("samples")))
    outdated = "no current samples" if samples is None or samples.outdated else ""
    return Entry(folder, "rows", samples.source if samples else "", samples.samples if samples else None,
                 _size(folder), _used(folder), outdated, is_held(folder))


def _of_copies(copies: Path | None) -> Iterator[Entry]:
    for place in _folders(copies, _PLACE) if copies else ():
        for folder in _folders(place, _KEY, _UNFINISHED):
            note, unfinished = _read(folder / NOTE), folder.suffix == UNFINISHED
            outdated = "interrupted" if unfinished else _changed(note.get("path", ""), note.get("fingerprint"))
            held = is_locked(_lock_of(folder)) if unfinished else is_held(folder)
            source = note.get("path") or place.name[:-25]
            yield Entry(folder, "copy", source, None, _size(folder), _used(folder), outdated, held)


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, DataError):
        found = read_json(path)
        return found if isinstance(found, dict) else {}
    return {}


def _lock_of(folder: Path) -> Path:
    """The lock that is held by whoever fills an unfinished folder."""
    return folder.with_name(f"{folder.name[:24]}.lock")


def _used(folder: Path) -> float:
    for path in (folder / USED, folder):
        with contextlib.suppress(OSError):
            return path.stat().st_mtime
    return 0.0


def _size(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):          # it went away meanwhile
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def clean(root: Path, everything: bool = False, copies: Path | None = None) -> tuple[list[Entry], list[Entry]]:
    """Removes what is outdated, and what killed processes have left.

    Args:
        root: the folder of indices.
        everything: also what is current.
        copies: see `entries`.

    Returns:
        What was removed, and what would have been but is in use.
    """
    removed, kept = list[Entry](), list[Entry]()
    while True:                                # samples go when their index has, rows when their samples have
        left = {entry.folder for entry in kept}
        wanted = [entry for entry in entries(root, copies)
                  if (everything or entry.outdated) and entry.folder not in left]
        if not wanted:
            break
        for entry in wanted:
            (removed if _remove(entry.folder) else kept).append(entry)
    for place in (*_folders(root, _PLACE), *(_folders(copies, _PLACE) if copies else ())):
        sweep(place)
        with contextlib.suppress(OSError):     # there is still something in it
            place.rmdir()
    for name in (SAMPLES, PLANS):
        sweep(root / name)
        with contextlib.suppress(OSError):
            (root / name).rmdir()
    return removed, kept


def _remove(folder: Path) -> bool:
    if folder.suffix != UNFINISHED:
        return remove(folder)
    with tried(_lock_of(folder)) as alone:
        return alone and remove(folder)


def remove_outdated(root: Path, place: Path, state: list) -> None:
    """Removes what belongs to a source as it was before.

    Args:
        root: the folder of indices.
        place: the folder of the source in it.
        state: fingerprint of the source.
    """
    for folder in _folders(place, _KEY):
        with contextlib.suppress(DataError, OSError):
            if read_description(folder).fingerprint == state:
                continue
        remove(folder)
    for folder in _folders(place, _UNFINISHED):
        if _read(folder / NOTE).get("fingerprint") != state:
            _remove(folder)
    sweep(place)
    known = {made for _, made in _made(root)}
    sets = [_of_samples(folder, known) for folder in _folders(root / SAMPLES, _KEY, _UNFINISHED)]
    gone = {entry.folder.name for entry in sets if entry.outdated and _remove(entry.folder)}
    for folder in _folders(root / PLANS, _KEY):
        if _read(folder / FACTS).get("samples") in gone:
            remove(folder)


def bound() -> int:
    """Bytes that samples and rows of epochs may take together.

    Raises:
        ConfigError: when the environment gives no number.
    """
    given = os.environ.get(BOUND_VARIABLE)
    try:
        gigabytes = float(given) if given else BOUND_GB
        if gigabytes >= 0:
            return int(gigabytes * 1e9)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"{BOUND_VARIABLE} is {given!r}; it must be a number of gigabytes, 0 or more.")


def make_room(root: Path) -> None:
    """Removes the samples and rows that were not used for the longest time, as far as there are too many bytes."""
    limit = bound()
    found = [(folder, _used(folder), _size(folder)) for name in (SAMPLES, PLANS)
             for folder in _folders(root / name, _KEY)]
    total = sum(size for _, _, size in found)
    for folder, _, size in sorted(found, key=lambda entry: entry[1]):
        if total <= limit:
            return
        if remove(folder):
            total -= size
