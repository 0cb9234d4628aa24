"""Where indices lie, and what is said when they cannot lie there."""
from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from mindformers_ixc.files import check_folder
from mindformers_ixc.resources import usable_cache_folder, user_cache_folder

logger = logging.getLogger(__name__)

# Environment variable, and key of the YAML, that name the folder of indices.
FOLDER_VARIABLE, FOLDER_KEY = "MINDFORMERS_IXC_INDEX", "train_dataset.data_loader.index_dir"

# Folders beside those of the sources: samples that fit rows, and rows of epochs.
SAMPLES, PLANS = "samples", "plans"

# What a file system says that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def index_folder(folder: str | os.PathLike | None = None, name: str = FOLDER_KEY, to_write: bool = True) -> Path:
    """Where indices lie: the folder that is given, or that the environment names, or a place in the user's cache.

    Args:
        folder: that is given.
        name: of what gave it, for messages.
        to_write: whether something is to be written there.

    Raises:
        OSError: when nothing can be written there.
    """
    chosen, name = (folder, name) if folder else (os.environ.get(FOLDER_VARIABLE), FOLDER_VARIABLE)
    if not chosen:
        return _in_cache(os.environ.get("XDG_CACHE_HOME"))
    if to_write:
        check_folder(Path(chosen), name)
    return Path(chosen)


def folder_of_runs(folder: str | os.PathLike | None = None) -> Path:
    """Where samples and rows lie: with the indices, or in the user's cache where those can only be read.

    Raises:
        OSError: when there is no such folder either.
    """
    root = index_folder(folder, to_write=False)
    try:
        check_folder(root, FOLDER_KEY)
    except OSError:
        if not root.is_dir():
            return index_folder(folder)          # says what is wrong
        return _in_cache(os.environ.get("XDG_CACHE_HOME"))
    return root


@lru_cache
def _in_cache(cache: str | None) -> Path:
    """The place in the user's cache (the variable that names it, if it is set); elsewhere, told once, if need be."""
    folder = usable_cache_folder("index")
    wanted = None
    with contextlib.suppress(RuntimeError):          # there is no home directory at all
        wanted = user_cache_folder("index")
    if folder != wanted:
        logger.warning(f"Nothing can be written in the user's cache ({wanted or 'there is no home directory'}), so the "
                       f"index of the data lies in {folder}, which may not last; {FOLDER_KEY} or {FOLDER_VARIABLE} "
                       "chooses another place.")
    return folder


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """For a block that writes to a folder of indices: says what to do when no more can be written there.

    Raises:
        OSError: that sentence, in place of the system's.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise OSError(f"The index of the data cannot be written in {folder} ({error.strerror}). Free space there "
                          f"(`mindformers data index --clean`), or choose another place by {FOLDER_KEY} or "
                          f"{FOLDER_VARIABLE}; what was measured is kept, and gone on from.") from error
        raise
