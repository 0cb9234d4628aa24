"""The recipes that ship with the package: where they are, what each is for, and which file a name means."""
from __future__ import annotations

import difflib
from pathlib import Path

from mindformers_ixc.errors import ConfigError

# The folder of a checkout; a wheel has it as `recipes` inside the package (setup.py).
FOLDER = "yaml_configs"

# Files that recipes change, and no recipes: they lack data.
BASE = "base_"


def recipe_folder() -> Path:
    """Where the shipped files are."""
    package = Path(__file__).parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / FOLDER


def recipes() -> dict[str, Path]:
    """Every recipe by its name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.yaml")) if not path.name.startswith(BASE)}


def header(text: str) -> list[str]:
    """The comment that a YAML file begins with, line by line, without the marks."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" "))
    return lines


def summary(path: Path) -> str:
    """The first sentence of a recipe's header."""
    paragraph = []
    for line in header(path.read_text(encoding="utf-8")):
        if not line.strip():
            break
        paragraph.append(line.strip())
    return " ".join(paragraph).partition(". ")[0].rstrip(".")


def find_config(written: str | Path, named_by: Path | None = None) -> Path:
    """The file that a name stands for: a file of that name, or else a shipped one.

    Args:
        written: a path, the name of a recipe with or without `.yaml`, or its path in a checkout (`yaml_configs/...`).
        named_by: the file that names it as `base_config`; the path is relative to it then.

    Raises:
        ConfigError: when there is neither, with recipes that may be meant.
    """
    path = Path(written) if named_by is None else named_by.parent / written
    if path.is_file():
        return path
    shipped = recipes() if named_by is None else {file.stem: file for file in recipe_folder().glob("*.yaml")}
    name = _recipe_name(Path(written))
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        raise ConfigError(f"The configuration file {path} is a folder; give the path of a YAML file or the name of a "
                          "recipe (`mindformers recipes` lists them).")
    named = f" that {named_by} names as base_config" if named_by else ""
    raise ConfigError(f"The configuration file {path}{named} does not exist, and no recipe has that name; "
                      f"{did_you_mean(Path(written).stem, shipped)}")


def _recipe_name(written: Path) -> str | None:
    """The recipe's name in what was written; none in a path that leads somewhere else."""
    if str(written.parent) not in (".", FOLDER):
        return None
    return written.stem if written.suffix in (".yaml", ".yml") else written.name


def did_you_mean(name: str, names: dict[str, Path]) -> str:
    """The end of a sentence about a name that no recipe has."""
    lower = name.lower()
    close = difflib.get_close_matches(lower, names, n=3) or [known for known in names if lower and lower in known][:3]
    return f"did you mean {' or '.join(close)}? `mindformers recipes` lists all." if close else \
        "`mindformers recipes` lists the recipes."
