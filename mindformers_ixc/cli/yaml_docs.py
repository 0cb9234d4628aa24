"""The tables of docs/yaml.md; as a program, those of `fields.FIELDS` and `fields.VISION_FIELDS` written into it.

    python -m mindformers_ixc.cli.yaml_docs docs/yaml.md

What stands between the two marker lines is replaced, everything else of the file stays.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mindformers_ixc.cli.yaml_keys import SECTIONS, Row, rows_of, shown_value
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.fields import (
    ALIASES,
    DTYPE_FIELDS,
    DTYPES,
    DYNAMIC_NTK,
    FIELDS,
    LOSS_FORMS,
    MODE_ADAPTERS,
    MOST,
    VISION_FIELDS,
    VISION_PARALLEL,
    Field,
    field_rule,
)
from mindformers_ixc.files import write_whole
from mindformers_ixc.sections import ANYTHING, one_of

# Texts of which only some are taken; the others are checked where they are used.
_CHOICES = {"adapter_mode": one_of(MODE_ADAPTERS), "dynamic_ntk": one_of(DYNAMIC_NTK),
            "vision_parallel": one_of(VISION_PARALLEL), "loss_form": one_of(LOSS_FORMS)}

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


def section_text(name: str) -> str:
    """The table of one section of `yaml_keys.SECTIONS`."""
    return key_table(rows_of(SECTIONS[name]))


def key_table(rows: Iterable[Row]) -> str:
    """Keys as a table."""
    lines = [f"| `{row.key}` | {_cell(row.wanted)} | {_cell(row.default)} | {_cell(row.meaning)} |" for row in rows]
    return "\n".join(["| key | must be | default | meaning |", "|---|---|---|---|", *lines]).replace("|  |", "| |")


def _table(fields: dict[str, Field]) -> str:
    return key_table(Row(name, _wanted(name, field),
                         shown_value(field.default) if field.shown is None else field.shown, field.help)
                     for name, field in fields.items())


def _wanted(name: str, field: Field) -> str:
    """What a field must be, where a type or choices say it."""
    if name in DTYPE_FIELDS:
        return ", ".join(DTYPES)
    rule = _CHOICES.get(name) or field_rule(name, field)
    return "" if rule is ANYTHING else rule.wanted.replace(f" from 1 to {MOST}", " of at least 1") \
        .replace(f" from 0 to {MOST}", " of at least 0")


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
