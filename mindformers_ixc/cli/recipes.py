"""`mindformers recipes`: the YAML files that ship with the package, listed and copied."""
from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import textwrap
from pathlib import Path

from mindformers_ixc import terminal
from mindformers_ixc.cli.recipe_files import did_you_mean, recipes, summary
from mindformers_ixc.cli.recipe_text import merged_text
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import check_target, write_whole

# Ends the names of the recipes for a laptop's CPU.
TINY = "_tiny"

# Title of a group of them, and whether it is of those.
TITLES = (("Small, for a laptop's CPU:", True), ("7B, for Ascend devices, and answering files:", False))

HINT = "--config NAME takes one as it is; `mindformers recipes copy NAME [FILE]` writes it down to be changed."


def show_recipes(arguments: argparse.Namespace) -> int:
    """Lists the recipes, or copies one.

    Args:
        arguments: `action` (`None`, `list` or `copy`), `name`, `target`; `answers`, where the list goes.

    Returns:
        Exit code 0.

    Raises:
        ConfigError: for a name that no recipe has, or a file that is there.
        OSError: when the file cannot be written.
    """
    if arguments.action in (None, "list"):
        print(listing(shutil.get_terminal_size().columns if arguments.answers.isatty() else None),
              file=arguments.answers)
        terminal.current.say(f"\n{HINT}")
        return 0
    if arguments.name is None:
        raise ConfigError("mindformers recipes copy needs the name of a recipe; `mindformers recipes` lists them.")
    written = copy(arguments.name, arguments.target)
    terminal.current.say(f"{written} is written. Change it, then take it with --config {shlex.quote(str(written))}.")
    return 0


def listing(width: int | None = None) -> str:
    """All recipes, one line each, in the order of the stages.

    Args:
        width: of the terminal, at which lines are broken.
    """
    files = dict(sorted(recipes().items(), key=lambda item: (re.split("[,:]", summary(item[1]))[0], item[0])))
    column = max(map(len, files)) + 2
    lines: list[str] = []
    for title, is_tiny in TITLES:
        lines += [""] if lines else []
        lines += [title] if width is None else _wrap(title, max(width, 20))
        for name, path in files.items():
            if name.endswith(TINY) == is_tiny:
                lines += _line(name, summary(path), column, width)
    return "\n".join(lines)


def _line(name: str, text: str, column: int, width: int | None) -> list[str]:
    """A recipe's line; in a narrow terminal what it is stands below its name."""
    if width is None or column + 2 + len(text) <= width:
        return [f"  {name:<{column}}{text}"]
    if width < 2 * column:
        return [f"  {name}", *_wrap(text, max(width, 20), "    ", "    ")]
    return _wrap(text, width, f"  {name:<{column}}", " " * (column + 2))


def _wrap(text: str, width: int, first: str = "", others: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def copy(name: str, target: str | None = None) -> Path:
    """Writes a recipe with its bases merged in, comments included.

    Args:
        name: of the recipe, with or without `.yaml`.
        target: the file, or a folder for it; by default `NAME.yaml` in the working folder.

    Returns:
        The file.

    Raises:
        ConfigError: for a name that no recipe has, or a file that is there.
        OSError: when the file cannot be written.
    """
    files, name = recipes(), name.removesuffix(".yaml")
    if name not in files:
        raise ConfigError(f"{name} is no recipe; {did_you_mean(name, files)}")
    path = Path(target or ".")
    if path.is_dir() or str(target or "").endswith(os.sep):
        path = path / f"{name}.yaml"
    if os.path.lexists(path):
        raise ConfigError(f"{path} is there already; give another name: mindformers recipes copy {name} FILE.")
    check_target(path, "FILE")
    write_whole(path, merged_text(files[name], str(path)))
    return path
