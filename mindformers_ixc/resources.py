"""Paths of a configuration: of the file system, or `pkg:` for files inside an installed package."""
from __future__ import annotations

import importlib.util
import os
from pathlib import Path

PACKAGE_SCHEME = "pkg:"


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
