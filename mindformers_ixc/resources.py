"""Paths of a configuration: of the file system, `pkg:` for files inside an installed package, or `starter`."""
from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from pathlib import Path

from mindformers_ixc.errors import ConfigError

PACKAGE_SCHEME = "pkg:"

# The small trained model that ships with the package: what it is called where a model directory is named, and where it
# lies.
STARTER, STARTER_PLACE = "starter", "pkg:mindformers_ixc/starter"


def home_folder() -> Path:
    """The user's home directory.

    Raises:
        RuntimeError: there is none; an empty HOME is none, which Python would take for the root of all files.
    """
    if os.environ.get("HOME") == "":
        raise RuntimeError("HOME is empty")
    return Path.home()


def user_cache_folder(*parts: str) -> Path:
    """This package's folder in the user's cache, or a place inside it; errors as of `home_folder`."""
    cache = os.environ.get("XDG_CACHE_HOME") or home_folder() / ".cache"
    return Path(cache, "mindformers_ixc", *parts)


def user_log_folder() -> Path:
    """Where logs go that belong to no run."""
    return user_cache_folder("log")


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


def usable_cache_folder(*parts: str) -> Path:
    """A place in the user's cache that can be written to, else in the temporary folder that all runs share."""
    shared = Path(tempfile.gettempdir(), f"mindformers_ixc_{os.getuid()}")
    for place in (user_cache_folder, shared.joinpath):
        try:
            folder = place(*parts)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except (OSError, RuntimeError):            # RuntimeError: there is no home directory at all
            continue
    return Path(tempfile.mkdtemp(prefix="mindformers_ixc_cache_"))


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


def resolve_model(path: str | os.PathLike) -> Path:
    """Resolves the name of a model directory or checkpoint: as `resolve_path`, and `starter` is the shipped model.

    Raises:
        ConfigError: when something called `starter` lies in the working directory, too.
        FileNotFoundError: see `resolve_path`.
    """
    if os.fspath(path) != STARTER:
        return resolve_path(path)
    if Path(STARTER).exists():
        raise ConfigError(f"{STARTER} is the model that ships with this package, and there is {STARTER} in "
                          f"{Path.cwd()} as well; write ./{STARTER} for that, or {STARTER_PLACE} for the shipped one.")
    return resolve_path(STARTER_PLACE)


def model_name(path: str | os.PathLike) -> str:
    """What a model directory is called where its path is not known: by its folder, or by the run that wrote it."""
    folder = Path(os.path.abspath(resolve_model(path)))
    # every run calls it "model"
    return (folder.parent if folder.name == "model" else folder).name or "model"


def is_starter(path: str | os.PathLike) -> bool:
    """Whether a path, resolved or not, is the shipped model's."""
    return os.path.realpath(resolve_model(path)) == os.path.realpath(resolve_path(STARTER_PLACE))


def shown(path: str | os.PathLike) -> str:
    """A path as it is shown: `starter` for the shipped model, and what lies in the working directory relative to it."""
    # it lies elsewhere; the working directory is gone; the working directory has a starter of its own
    with contextlib.suppress(ValueError, OSError):
        if is_starter(path):
            return STARTER
        inside = str(Path(path).relative_to(Path.cwd()))
        return f"./{STARTER}" if inside == STARTER else inside
    return str(path)
