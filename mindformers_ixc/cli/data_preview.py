"""`mindformers data preview`: samples as the model sees them, as a page. MindFormers is not imported."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mindformers_ixc import terminal
from mindformers_ixc.cli.data_section import RECIPE, read_section
from mindformers_ixc.cli.preview_page import headline, preview_page
from mindformers_ixc.cli.preview_text import sample_lines
from mindformers_ixc.data.fitting import Shapes
from mindformers_ixc.data.index.samples import IndexedSource
from mindformers_ixc.data.preview import Look, look
from mindformers_ixc.data.preview_data import Data, Entry, Reader, choose, indexed_data, named, read_data
from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.files import check_target, write_whole
from mindformers_ixc.pages.page import is_own
from mindformers_ixc.sections import check_value, whole

# Where the page goes unless --output says otherwise; samples on it unless --samples does, and at most.
PAGE, SAMPLES, MOST_SAMPLES = "preview.html", 12, 50

# Settings of `train_dataset` that the page tells.
TOLD = ("seq_length", "max_tiles", "hd_num", "max_images", "packing", "max_segments", "image_size", "patch_size",
        "image_transform", "transparency", "exif", "control_tokens", "seed")


def data_preview(arguments: argparse.Namespace) -> int:
    """Runs `mindformers data preview`: writes the page, and prints the samples that are named.

    Args:
        arguments: `files`, the data; `config`, `sample`, `samples`, `output`; `rest`, overrides of the YAML.

    Raises:
        ConfigError: for a wrong key or value of the YAML.
        DataError: for unusable data, and a sample that there is not.
        OSError: when the page cannot be written.
    """
    count, wanted = arguments.samples, arguments.sample or []
    check_value("--samples", SAMPLES if count is None else count, whole(1))
    asked = max(len(wanted), count or 0)
    if asked > MOST_SAMPLES:
        raise ConfigError(f"{asked} samples are asked for, and a page has {MOST_SAMPLES} at most; ask for fewer.")
    if wanted and count is not None:
        raise ConfigError("--sample says which samples are shown, --samples how many; give one of the two.")
    target = Path(arguments.output or PAGE)
    check_target(target, "--output" if arguments.output else "The page")
    if not arguments.output and target.exists() and not is_own(target):
        raise ConfigError(f"{target} is there and is no page of this command; say with --output where the page is to "
                          "be written.")
    reader, note, how = _reader(arguments)
    data = read_data(reader, list(arguments.files), not arguments.config, wanted)
    entries = named(data, wanted) if wanted else choose(data, count or SAMPLES)
    looks, note = _write(arguments, target, data, entries, how, note)
    terminal.current.note(note)
    terminal.current.note(_summary(data))
    for found in looks if wanted else ():
        print("\n".join(sample_lines(data, found)), file=arguments.answers)
    print(target, file=arguments.answers)
    return 0


def write_indexed(arguments: argparse.Namespace, target: Path, sources: Sequence[IndexedSource],
                  shapes: Shapes) -> None:
    """Writes a page of data that has an index; only the samples on it are read.

    Args:
        arguments: `files`, the data; `config`, `rest`.
        target: the page.
        sources: of the data.
        shapes: that samples must fit.

    Raises:
        DataError: when no sample can be used.
    """
    reader, note, how = _reader(arguments)
    data = indexed_data(reader, sources, shapes)
    entries = choose(data, SAMPLES) if len(data.known.numbers) else []
    if not entries:
        raise DataError(f"No sample can be used, so there is none for a page; {target} is not written.")
    _write(arguments, target, data, entries, how, note)


def _write(arguments: argparse.Namespace, target: Path, data: Data, entries: Sequence[Entry], how: dict[str, object],
           note: str) -> tuple[list[Look], str]:
    """Writes the page; gives what it shows of the samples, and the sentence about how they were read."""
    looks = [look(data.reader, entry) for entry in entries]
    if not arguments.config and (data.known.kept < data.known.rounds).any():
        note += " Longer samples are cut or left out; --config names the YAML file of a run with longer rows."
    write_whole(target, preview_page(data, looks, how, note))
    return looks, note


def _reader(arguments: argparse.Namespace) -> tuple[Reader, str, dict[str, object]]:
    """How data is read: the reader, a sentence about it, and its settings."""
    _, section, pairs = read_section(arguments)
    reader = Reader.of(section, pairs)
    note = f"Read as {arguments.config} reads it"
    if not arguments.config:
        note = f"Read as the recipe {RECIPE} reads it, since no --config was given: the starter's tokenizer and tiles"
    note += f" (seq_length {reader.budget.seq_length}, max_tiles {reader.budget.max_tiles}, hd_num {reader.hd_num})."
    how = {"recipe": arguments.config or RECIPE, "tokenizer": section["tokenizer"].get("vocab_file", ""),
           **{key: section[key] for key in TOLD if section.get(key) is not None}}
    return reader, note, how


def _summary(data: Data) -> str:
    numbers = headline(data)
    sources = f"{len(data.sources)} source{'s' * (len(data.sources) != 1)}"
    first, *others = numbers.items()
    return f"{first[1]} {first[0]} of {sources}: " + ", ".join(f"{value} {name}" for name, value in others) + "."
