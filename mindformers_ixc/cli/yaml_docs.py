"""Writes the tables of the configuration's fields in docs/yaml.md from `config.FIELDS` and `config.VISION_FIELDS`.

    python -m mindformers_ixc.cli.yaml_docs docs/yaml.md

What stands between the two marker lines is replaced, everything else of the file stays.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from mindformers_ixc.config import ALIASES, FIELDS, VISION_FIELDS, Field
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import write_whole

BEGIN, END = "<!-- fields: begin -->", "<!-- fields: end -->"


def fields_text() -> str:
    """What stands between the markers: a table of each kind of fields, and MindFormers' names for some of them."""
    public = {name: field for name, field in FIELDS.items() if field.public}
    run = {name: field for name, field in FIELDS.items() if not field.public}
    aliases = ",\n".join(f"`{alias}` for `{name}`" for alias, name in ALIASES.items())
    return "\n\n".join([
        "Fields that describe a run; they are in no `config.json`:", _table(run),
        "Fields that describe the weights, under the names of the public `config.json`:", _table(public),
        "`model.model_config.vision_config` (`type: IXC25VisionConfig`):", _table(VISION_FIELDS),
        f"MindFormers' names are taken too:\n{aliases}."])


def _table(fields: dict[str, Field]) -> str:
    rows = [f"| `{name}` | {_cell(field.help)} | {_cell(_default(field))}".rstrip() + " |"
            for name, field in fields.items()]
    return "\n".join(["| key | meaning | default |", "|---|---|---|", *rows])


def _default(field: Field) -> str:
    """The default as a YAML file would have it: 0.00001, since YAML 1.1 takes 1e-05 for text."""
    if field.shown is not None:
        return field.shown
    if isinstance(field.default, float):
        return format(Decimal(repr(field.default)), "f")
    return "none" if field.default is None else str(field.default)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def with_fields(text: str, name: str) -> str:
    """A document with the tables of today between its markers.

    Args:
        text: of the document.
        name: of it, for the message.

    Raises:
        ConfigError: when one of the marker lines is missing, is there twice, or they are in the wrong order.
    """
    lines = text.splitlines()
    places = [[number for number, line in enumerate(lines) if line == marker] for marker in (BEGIN, END)]
    if [len(found) for found in places] != [1, 1] or places[0] > places[1]:
        raise ConfigError(f"{name} must have the line {BEGIN} once and after it the line {END} once; the tables go "
                          "between them.")
    (begin,), (end,) = places
    return "\n".join([*lines[:begin + 1], fields_text(), *lines[end:]]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites a document.

    Args:
        argv: arguments without the program's name; by default the process's.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m mindformers_ixc.cli.yaml_docs",
                                     description="Writes the tables of the configuration's fields into a document.")
    parser.add_argument("file", type=Path, help="the document, docs/yaml.md")
    file = parser.parse_args(argv).file
    try:
        write_whole(file, with_fields(file.read_text(encoding="utf-8"), str(file)))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
