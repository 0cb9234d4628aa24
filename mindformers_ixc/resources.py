"""Paths of a configuration: of the file system, or `pkg:` for files inside an installed package."""
from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

PACKAGE_SCHEME = "pkg:"


def user_log_folder() -> Path:
    """Where logs go that belong to no run: a folder of the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mindformers_ixc" / "log"


def usable_log_folder(folder: Path | None = None) -> tuple[Path, Exception | None]:
    """A folder that logs can be written to.

    Args:
        folder: the one that is wanted; by default `user_log_folder`.

    Returns:
        It, or a temporary folder and why that has to do.
    """
    try:
        folder = (folder or user_log_folder()).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        return folder, None
    except (OSError, RuntimeError) as error:       # RuntimeError: there is no home directory at all
        return Path(tempfile.mkdtemp(prefix="mindformers_ixc_log_")), error


def resolve_path(path: str | os.PathLike) -> Path:
    """Resolves `pkg:package/folder/file`; other paths come back as they are (relative to the working directory).

    Raises:
        FileNotFoundError: when the package is not installed.
    """
    text = os.fspath(path)
    if not text.startswith(PACKAGE_SCHEME):
        return Path(text)
    package, _, inside = text[len(PACKAGE_SCHEME):].partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{text}: the package '{package}' is not installed.")
    return Path(spec.submodule_search_locations[0]) / inside
