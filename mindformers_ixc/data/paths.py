"""Files that data names: where they are looked for, and the folder they must not leave."""
from __future__ import annotations

import os
import re
import reprlib
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mindformers_ixc.errors import DataError
from mindformers_ixc.reading import reading

# Characters of a value of the data that a message shows.
SHOWN = 80

# What ends a scheme such as `https:`; one letter alone would be a drive.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = SHOWN
_REPR.maxlevel = 3


def shown(value: object) -> str:
    """A value of the data as messages show it: of any depth and length, cut to `SHOWN` characters."""
    return cut(_REPR.repr(value))


def cut(text: str) -> str:
    """A text in one line of at most about `SHOWN` characters; of a longer one the beginning and the length."""
    start = text if len(text) <= SHOWN else text[:SHOWN - 20]
    start = start if start.isprintable() else repr(start)
    return start if len(text) <= SHOWN else f"{start}... ({len(text)} characters)"


def check_root(image_root: str | os.PathLike | None) -> Path | None:
    """The folder that no picture may leave, with its links followed.

    Raises:
        DataError: when there is no such folder.
    """
    if image_root is None:
        return None
    if not os.path.isdir(image_root):
        raise DataError(f"image_root {image_root} is no folder; name the one that all pictures lie in.")
    return Path(os.path.realpath(image_root))


def search_folders(file: Path, image_folder: str | os.PathLike | None) -> list[Path]:
    """Where the relative paths in a file start: in `image_folder` alone if one is given, else beside it, else here."""
    return [Path(image_folder)] if image_folder else [file.parent, Path()]


def find_file(name: str, folders: Sequence[Path], root: Path | None = None) -> Path:
    """Finds a file that data names.

    The public example files name everything from the folder above their own (`data/images/x.jpg` inside `data/`), so a
    name that begins with a folder's own name is looked for from the folder above it too. No other part of a name is
    ever left out.

    Args:
        name: a path or a `file://` address.
        folders: where relative paths start; the first that has the file wins.
        root: a folder of `check_root`, which the file must lie in when all links are followed.

    Raises:
        FileNotFoundError: saying what the name is, if no path or no regular file, or every place that was tried.
    """
    name, odd = _local(name), ""
    for path in (path for folder in folders for path in _candidates(Path(name), folder)):
        found = path if root is None else Path(os.path.realpath(path))
        if root is None or found.is_relative_to(root):
            with reading(found):
                if _is_file(found):
                    return found
                odd = odd or _named(found)
    if odd:
        raise FileNotFoundError(f"{odd} and {_NOT_REGULAR}")
    inside = "" if root is None else f" inside image_root {root}, links followed"
    places = [cut(name)] if Path(name).is_absolute() else [str(folder / cut(name)) for folder in folders]
    raise FileNotFoundError(f"{cut(name)} does not exist{inside} (tried {', '.join(dict.fromkeys(places))})")


def _local(name: str) -> str:
    """The path that a name stands for."""
    if name.startswith("data:"):
        raise FileNotFoundError(f"{cut(name)} is the content of a file and not its path; write it to a file and name "
                                "that")
    if _ADDRESS.match(name):
        if not name.startswith("file://"):
            fetch = " (or let data_loader.fetch: True do that)" if name.lower().startswith("http") else ""
            raise FileNotFoundError(f"{cut(name)} is an address; download it and name the file{fetch}")
        name = unquote(urlsplit(name).path)
    # the limits are those of Linux; a control character is in no name that was meant
    if len(name.encode()) > 4095 or max(len(part.encode()) for part in name.split("/")) > 255 or min(name) < " ":
        raise FileNotFoundError(f"{cut(name)} is no path; content such as base64 is not read, write it to a file and "
                                "name that")
    return name


def _candidates(name: Path, folder: Path) -> Iterator[Path]:
    yield folder / name
    if len(name.parts) > 1 and name.parts[0] == folder.absolute().name:
        yield folder / Path(*name.parts[1:])


# What is opened as a file and may never answer, and what is said of it.
_ODD = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_NOT_REGULAR = "no regular file; write what it holds to one, and name that"


def missing_file(what: str, path: Path) -> Exception:
    """The error of a name that should be a file's, and is none's.

    Args:
        what: it is, with its name.
        path: of it.
    """
    if path.is_dir():
        return DataError(f"{what} is a folder; name a file with samples in it.")
    kind = _odd_kind(path)
    return DataError(f"{what} is {kind} and {_NOT_REGULAR}.") if kind else FileNotFoundError(f"{what} does not exist.")


def _odd_kind(path: Path) -> str:
    """What a name stands for that can be opened, and is neither a regular file nor a folder; else nothing."""
    try:
        return _ODD.get(stat.S_IFMT(path.stat().st_mode), "")
    except OSError:
        return ""


def _named(path: Path) -> str:
    kind = _odd_kind(path)
    return f"{cut(str(path))} is {kind}" if kind else ""


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:     # a folder that may not be read
        return False
