"""Folders that several processes use: one makes what all want, and nobody removes what another one uses.

Locks are `flock`'s. The system gives them back however a process ends, so none is ever left behind; a file that is
locked may be removed by its holder, and whoever gets a lock looks whether the file is still the one of that name.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from mindformers_ixc import terminal
from mindformers_ixc.files import sync_folder

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

# Of a folder that is kept: locked, shared, by every process that uses it; changed when one begins to.
USED = "used"

# What an unfinished index, or an unpacked file, says of itself.
NOTE = "note.json"

# Ending of a folder that is being filled.
UNFINISHED = ".building"

# Errors of file systems that have no locks, or whose server is not told of them; of a file that the server has lost.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_GONE = (errno.ESTALE, errno.ENOENT)

# Names of folders that were put aside to be removed, and of locks.
_REMOVED = re.compile(r"\.[0-9a-f]{12}\.removed\.[0-9a-f]{24}(\..+)?")
_LOCK = re.compile(r"[0-9a-f]{24}\.lock")


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[bool]:
    """Holds a lock, so that of all processes that want the same thing one makes it; its file is gone afterwards.

    Args:
        path: of the lock's file.
        waiting: what the terminal says as long as another process holds it; `{who}` stands for that one.

    Yields:
        Whether it is held; False where the file system has no locks.
    """
    while (handle := _locked_file(path, waiting)) is None:
        pass
    try:
        yield handle != _NONE
    finally:
        _let_go(handle, path)


def made(there: Callable[[], Item | None], make: Callable[[bool], Item], path: Path, waiting: str) -> Item:
    """What is there, or is made by one of all processes that want it; the others wait, and go on at the same time.

    Args:
        there: gives it, if it is there.
        make: makes it; told whether this process has the lock, which it has not where the file system has no locks.
        path: of the lock's file.
        waiting: see `locked`.
    """
    while True:
        if (found := there()) is not None:
            return found
        if (handle := _locked_file(path, waiting)) is not None:
            try:
                found = there()               # it was made between the two
                return make(handle != _NONE) if found is None else found
            finally:
                _let_go(handle, path)


def is_there(folder: Path) -> bool:
    """Whether a folder is there.

    It is looked for in a list of all, since a server's client may remember for a while that a name was not there.
    """
    try:
        return folder.name in os.listdir(folder.parent)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _let_go(handle: int, path: Path) -> None:
    if handle != _NONE:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


# In place of a file that is locked, where there are no locks.
_NONE = -1


def _locked_file(path: Path, waiting: str) -> int | None:
    """A file that is locked, `_NONE`, or nothing after another process's lock was waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in _GONE:    # the folder was empty and removed
            return None
        raise
    try:
        if _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return handle
        else:
            with terminal.current.doing(waiting.replace("{who}", _holder(handle))):
                fcntl.flock(handle, fcntl.LOCK_SH)         # so that all who wait go on together
    except OSError as error:
        if error.errno in _NO_LOCKS:
            os.close(handle)
            with contextlib.suppress(OSError):
                path.unlink()
            _tell_no_locks(path.parent)
            return _NONE
        if error.errno not in _GONE:
            os.close(handle)
            raise
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


@contextlib.contextmanager
def tried(path: Path) -> Iterator[bool]:
    """Holds a lock as `locked` does, if nobody else does.

    Yields:
        Whether it is held.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield False
        return
    held = False
    try:
        with contextlib.suppress(OSError):
            held = _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) and _is_at(handle, path)
        yield held
    finally:
        if held:
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(handle)


def _lock(handle: int, how: int) -> bool:
    """Locks a file; returns False where another process holds it, and `how` says not to wait."""
    try:
        fcntl.flock(handle, how)
        return True
    except BlockingIOError:
        return False


def _holder(handle: int) -> str:
    with contextlib.suppress(OSError):
        return os.pread(handle, 300, 0).decode(errors="replace") or "another process"
    return "another process"


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one that a path names."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError as error:
        if error.errno in _GONE:
            return False
        raise


def _tell_no_locks(folder: Path) -> None:
    if _told:
        return
    _told.append(folder)
    logger.warning(f"The file system of {folder} has no locks (flock), so each process makes what it needs of the "
                   "index by itself, and nothing is removed there; train_dataset.data_loader.index_dir chooses another "
                   "place.")


_told: list[Path] = []      # where there are no locks; it is said once


class Held:
    """A folder that this process uses: as long as this object lives, no process removes it.

    Args:
        folder: of what is kept; it may be one that cannot be written.

    Raises:
        FileNotFoundError: when it is not there.
    """

    def __init__(self, folder: Path):
        self.folder, self._handle = folder, _held_file(folder)

    def __reduce__(self) -> tuple:
        return Held, (self.folder,)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            os.close(self._handle)      # type: ignore[arg-type]


def _held_file(folder: Path) -> int | None:
    path, handle = folder / USED, None
    for how in (os.O_RDWR | os.O_CREAT, os.O_RDONLY):       # the second: what another user or machine keeps
        with contextlib.suppress(OSError):
            handle = os.open(path, how | os.O_CLOEXEC, 0o666)
            break
    if handle is None:
        if folder.is_dir():
            return None
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    try:
        with contextlib.suppress(OSError):
            os.utime(handle)
        fcntl.flock(handle, fcntl.LOCK_SH)
        if _is_at(handle, path):
            return handle
    except OSError as error:
        if error.errno in _NO_LOCKS:
            os.close(handle)
            return None
        if error.errno not in _GONE:
            os.close(handle)
            raise
    os.close(handle)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def is_held(folder: Path) -> bool:
    """Whether a process uses a folder, or that cannot be known."""
    with contextlib.suppress(FileNotFoundError), _unused(folder / USED) as unused:
        return not unused
    return False


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of a file, or that cannot be known."""
    with contextlib.suppress(FileNotFoundError), _unused(path) as unused:
        return not unused
    return False


@contextlib.contextmanager
def _unused(path: Path) -> Iterator[bool]:
    """Whether nobody holds a file; nobody gets it in the block then.

    Raises:
        FileNotFoundError: when there is none.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError:
        yield False
        return
    try:
        try:
            free = _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:                 # there are no locks
            free = False
        yield free
    finally:
        os.close(handle)


def remove(folder: Path) -> bool:
    """Removes a folder that nobody uses; it is gone in one step, whatever happens then.

    Returns:
        False where it is in use, where that cannot be known, or where it cannot be removed.
    """
    try:
        with _unused(folder / USED) as unused:
            return unused and _take_away(folder)
    except FileNotFoundError:           # nobody has used it yet
        return _take_away(folder)


def _take_away(folder: Path) -> bool:
    try:
        shutil.rmtree(put_aside(folder), ignore_errors=True)
    except FileNotFoundError:
        return True                     # another process was faster
    except OSError:
        return False
    return True


def unfinished(target: Path, alone: bool) -> Path:
    """The folder that is filled before it is given a target's name.

    Args:
        target: to be made.
        alone: whether this process has the lock of it; without it the folder is this process's own.
    """
    own = "" if alone else f".{secrets.token_hex(6)}"
    return target.with_name(f"{target.name}{own}{UNFINISHED}")


def put_in_place(folder: Path, target: Path) -> Held:
    """Gives a finished folder its name; what has the name is put aside, for those who use it.

    Returns:
        The folder, which is not removed as long as this is kept.
    """
    held = Held(folder)             # before anybody finds it
    if target.exists():
        put_aside(target)
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(folder, ignore_errors=True)       # without locks, another process has made the same
    held.folder = target
    sync_folder(target.parent)
    return held


def put_aside(folder: Path) -> Path:
    """Gives a folder a name under which nobody looks for it; `sweep` removes it when nobody uses it any more.

    Raises:
        OSError: when that cannot be done.
    """
    aside = folder.with_name(f".{secrets.token_hex(6)}.removed.{folder.name}")
    os.rename(folder, aside)
    return aside


def sweep(folder: Path) -> None:
    """Removes what was put aside in a folder and nobody uses, and files of locks that nobody holds."""
    for path in sorted(folder.glob(".*.removed.*")):
        if _REMOVED.fullmatch(path.name) and not is_held(path):
            shutil.rmtree(path, ignore_errors=True)
    for path in sorted(folder.glob("*.lock")):
        if _LOCK.fullmatch(path.name):
            with tried(path):           # which removes it
                pass
