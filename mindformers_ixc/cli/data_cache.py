"""`mindformers data index --list` and `--clean`: what is kept of indices, samples and rows, and what of it goes."""
from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mindformers_ixc import terminal
from mindformers_ixc.cli.data_section import read_section
from mindformers_ixc.data.index.cleaning import Entry, bound, clean, entries
from mindformers_ixc.data.index.folders import index_folder
from mindformers_ixc.data.records.compressed import copies_folder
from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.resources import resolve_path
from mindformers_ixc.tables import Column, columns_of, table

# What entries are called.
KINDS = {"index": "index", "unfinished": "index, unfinished", "samples": "samples that fit", "rows": "rows of epochs",
         "copy": "unpacked file"}

COLUMNS = ("of", "what", "samples", "size", "last used", "state")


def data_cache(arguments: argparse.Namespace) -> int:
    """Runs `mindformers data index --list` or `--clean`.

    Args:
        arguments: `list`, `clean`, `all`; `files`, the sources to be listed (all where there is none); `output`, the
            folder of indices, or `config`, the YAML that names it.

    Raises:
        ConfigError: for options that contradict each other.
        DataError: for sources where everything is cleaned.
        OSError: when the folder cannot be used.
    """
    if arguments.list and arguments.clean:
        raise ConfigError("--list shows what is there, and --clean removes some of it; give one of them.")
    if arguments.all and not arguments.clean:
        raise ConfigError("--all belongs to --clean: it removes what is current, too.")
    if arguments.clean and arguments.files:
        raise DataError(f"--clean goes through the whole folder of indices, so {arguments.files[0]} cannot be named; "
                        "--list can show some of the data alone.")
    root = _folder(arguments)
    return _clean(arguments, root) if arguments.clean else _list(arguments, root)


def _folder(arguments: argparse.Namespace) -> Path:
    if arguments.output:
        return index_folder(arguments.output, "--output", arguments.clean)
    if not arguments.config:
        if arguments.rest:
            raise ConfigError(f"{arguments.rest[0]} is no option of `mindformers data index --list` and `--clean`.")
        return index_folder(to_write=arguments.clean)
    _, section, _ = read_section(arguments)
    return index_folder((section.get("data_loader") or {}).get("index_dir"), to_write=arguments.clean)


def _copies(arguments: argparse.Namespace) -> Path | None:
    """The folder of unpacked files, which lie in the user's cache wherever indices do."""
    return None if arguments.output else copies_folder()


def _list(arguments: argparse.Namespace, root: Path) -> int:
    found = entries(root, _copies(arguments))
    if arguments.files:
        wanted = {os.path.realpath(resolve_path(path)) for path in arguments.files}
        found = [entry for entry in found if wanted.intersection(map(os.path.realpath, entry.source.split(", ")))]
    if not found:
        print(f"Nothing is kept in {root}.", file=arguments.answers)
        return 0
    lines = [*_table(found, columns_of(arguments.answers)), "", _sum(found, root)]
    print("\n".join(lines), file=arguments.answers)
    if any(entry.outdated for entry in found):
        where = f" --output {arguments.output}" if arguments.output else ""
        terminal.current.note(f"`mindformers data index --clean{where}` removes what is outdated.")
    return 0


def _clean(arguments: argparse.Namespace, root: Path) -> int:
    removed, kept = clean(root, arguments.all, _copies(arguments))
    room = columns_of(arguments.answers)
    if removed:
        print("\n".join([*_table(removed, room), ""]), file=arguments.answers)
    said = f"Removed {_count(removed)}, {_bytes(removed)}, from {root}."
    none = f"Nothing in {root} is outdated." if not arguments.all else f"Nothing is kept in {root}."
    print(said if removed else "" if kept else none, end="\n" * bool(removed or not kept), file=arguments.answers)
    if kept:
        terminal.current.note(f"{_count(kept)}, {_bytes(kept)}, stay, since running processes use them or the file "
                              f"system cannot tell: {', '.join(str(entry.folder) for entry in kept)}.")
    return 0


def _table(found: Sequence[Entry], room: int | None) -> Iterator[str]:
    now = time.time()
    rows = [[_name(entry.source), KINDS[entry.kind] + (f": {entry.how}" if entry.how else ""),
             "" if entry.samples is None else f"{entry.samples:,}", _bytes([entry]),
             "in use" if entry.held else _ago(now - entry.used), _state(entry)] for entry in found]
    columns = [Column(name, left=name in ("of", "what", "last used", "state"), gap=2 * (place > 0))
               for place, name in enumerate(COLUMNS)]
    return table(columns, rows, room, heading=2)


def _name(source: str) -> str:
    """The files that something is of, as short as they are known here."""
    names = source.split(", ") if source else ["-"]
    here = os.path.join(os.getcwd(), "")
    return names[0].removeprefix(here) + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _state(entry: Entry) -> str:
    if entry.outdated:
        return f"outdated: {entry.outdated}"
    return "can be gone on with" if entry.kind == "unfinished" else "current"


def _ago(seconds: float) -> str:
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"


def _sum(found: Sequence[Entry], root: Path) -> str:
    kept = [entry for entry in found if entry.kind in ("samples", "rows")]
    outdated = [entry for entry in found if entry.outdated]
    text = f"{_count(found)}, {_bytes(found)}, in {root}"
    text += f"; {_bytes(outdated)} of them outdated" if outdated else ""
    return f"{text}. Samples and rows take {_bytes(kept)}; above {bound() / 1e9:g} GB the oldest are removed."


def _count(found: Sequence[Entry]) -> str:
    return f"{len(found)} {'entry' if len(found) == 1 else 'entries'}"


def _bytes(found: Sequence[Entry]) -> str:
    size = float(sum(entry.size for entry in found))
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"
