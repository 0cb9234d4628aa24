"""`mindformers data index` and `data check`: what is known of every sample, built once, and what is wrong with some."""
from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ixc import terminal
from mindformers_ixc.cli.data_plan import bars
from mindformers_ixc.cli.data_preview import write_indexed
from mindformers_ixc.cli.data_section import RECIPE, read_section
from mindformers_ixc.data.advice import Needs, advise, needs_of, processor_of, unpacked_goodput
from mindformers_ixc.data.fitting import Shapes
from mindformers_ixc.data.index.folders import index_folder
from mindformers_ixc.data.index.kinds import KINDS
from mindformers_ixc.data.index.samples import IndexedSource, fitting_rounds
from mindformers_ixc.data.index.sources import measures_of, open_sources
from mindformers_ixc.data.rows import bad_share_of
from mindformers_ixc.data.sections import row_budget
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import check_target, write_whole
from mindformers_ixc.operations import training_costs
from mindformers_ixc.planning.workload import read_workload
from mindformers_ixc.processing.image import HD_NUM_TRAINING
from mindformers_ixc.tables import Column, columns_of, table, wrapped

# Sentences about bad samples of a kind that a source shows; the rest are counted.
SHOWN = 3

# Bars of a drawn histogram at most.
BARS = 60

COLUMNS = ("samples", "pictures", "rounds", "missing", "damaged", "wrong", "unusable", "twice", "cut", "left out")


def data_index(arguments: argparse.Namespace) -> int:
    """Runs `mindformers data index`: builds what is missing, and prints what each index holds.

    Args:
        arguments: `files`, the data; `config`; `output`, the folder of indices; `rest`, overrides of the YAML.

    Raises:
        ConfigError: for a wrong key or value of the YAML.
        DataError: for unusable data.
    """
    _, sources, _ = _open(arguments)
    for source in sources:
        index = source.index
        errors = index.description.left_out
        size = sum(file.stat().st_size for file in index.folder.iterdir() if file.is_file())
        print(f"{source.reader.name}: {len(index):,} samples, {len(index.sizes):,} pictures, "
              f"{index.needs[:, 0].mean() if len(index.needs) else 0:.0f} positions on average; "
              f"{f'{len(errors):,} left out; ' if errors else ''}"
              f"{size / 1e6:.1f} MB in {index.folder}", file=arguments.answers)
        for sentence in list(errors.values())[:SHOWN]:
            terminal.current.note(f"Left out: {sentence}")
    if arguments.output:
        terminal.current.note(f"Runs find it with train_dataset.data_loader.index_dir: {arguments.output}")
    return 0


def data_check(arguments: argparse.Namespace) -> int:
    """Runs `mindformers data check`: prints what is wrong with some data, source by source.

    Args:
        arguments: `files`, the data; `config`; `decode`, whether pixels are read; `png`, `bad` and `output`, files
            for histograms, for what cannot be used and for a page of samples; `rest`, overrides of the YAML.

    Returns:
        1 when more samples of a source cannot be used than `max_bad_share` allows, or a source cannot be read; else 0.

    Raises:
        ConfigError: for a wrong key or value of the YAML.
        DataError: for a file that is none of data.
    """
    failed = list[tuple[str, str]]()
    fields, sources, section = _open(arguments, failed)
    if not sources and len(failed) == 1:
        raise DataError(failed[0][1])
    shapes, share = _shapes(section), bad_share_of(section)
    found, room = [_look(source, shapes) for source in sources], columns_of(arguments.answers)
    lines = [*_table(found, _twice(sources), room), *_sentences(found, failed, room)]
    if sum(one.usable for one in found):
        lines += [*_budget(found, shapes, room), *_lengths(fields, section, sources, room)]
    print("\n".join(lines).lstrip("\n"), file=arguments.answers)
    if arguments.bad:
        _write_bad(Path(arguments.bad), found, failed)
    if arguments.png and sources:
        _draw(Path(arguments.png), needs_of(sources, None), shapes)
    if arguments.output and not failed:
        write_indexed(arguments, Path(arguments.output), sources, shapes)
    elif arguments.output:
        terminal.current.note(f"{arguments.output} is not written: a page has all sources.")
    return _tell(found, failed, share)


def _write_bad(path: Path, found: Sequence[_Found], failed: Sequence[tuple[str, str]]) -> None:
    """Writes everything that cannot be used, a JSON object a line; `sample` is none for a whole source."""
    rows: list[tuple[str, Any, str, str]] = [(name, None, "unreadable", sentence) for name, sentence in failed]
    rows += [(one.name, number, kind, sentence) for one in found for kind, problems in one.problems.items()
             for number, sentence in problems]
    lines = (json.dumps(dict(zip(("source", "sample", "kind", "problem"), row)), ensure_ascii=False) for row in rows)
    write_whole(path, "".join(f"{line}\n" for line in lines))
    terminal.current.note(f"{path} has all {len(rows):,} of them.")


def _tell(found: Sequence[_Found], failed: Sequence[tuple[str, str]], share: float) -> int:
    """Says why the exit code is 1, if it is."""
    if failed:
        terminal.current.note(f"{len(failed)} of {len(found) + len(failed)} sources cannot be read.")
    bad = [one for one in found if one.bad > share * one.numbers["samples"]]
    for one in bad:
        terminal.current.note(f"{one.bad:,} of {one.numbers['samples']:,} samples of {one.name} cannot be used, more "
                              f"than the share max_bad_share {share} allows.")
    return int(bool(bad or failed))


def _open(arguments: argparse.Namespace, failed: list[tuple[str, str]] | None = None) -> tuple[
        dict, list[IndexedSource], dict]:
    """The fields of the YAML, the sources and its section; `failed` as of `open_sources`, for sources of any state."""
    fields, section, pairs = read_section(arguments)
    if not arguments.config:
        terminal.current.note(f"Measured as the recipe {RECIPE} measures, since no --config was given.")
    loader = {**section["data_loader"], "dataset_dir": list(arguments.files)}
    for option in ("png", "bad"):
        if getattr(arguments, option):
            check_target(getattr(arguments, option), f"--{option}")
    if arguments.kind == "check" and arguments.output:
        check_target(arguments.output, "--output")
    named = arguments.kind == "index" and arguments.output
    folder = index_folder(arguments.output, "--output") if named else loader.get("index_dir")
    measures = measures_of(section, processor_of(section), bool(arguments.decode))
    sources = open_sources(loader, section.get("seed") or 0, measures, folder,
                           bad_share_of(section) if failed is None else 1.0, failed, "pair" if pairs else "sample")
    return fields, sources, {**section, "data_loader": loader}


def _shapes(section: dict) -> Shapes:
    budget = row_budget(section)
    return Shapes(section["seq_length"], section["max_tiles"], section.get("hd_num") or HD_NUM_TRAINING,
                  budget.max_images, budget.max_segments if section.get("packing") else None)


@dataclass(frozen=True)
class _Found:
    """What was found of a source.

    Attributes:
        name: of the source.
        numbers: by `COLUMNS`.
        problems: samples that cannot be used, by the names of columns: numbers, each with a sentence.
    """

    name: str
    numbers: dict[str, int]
    problems: dict[str, list[tuple[int, str]]]

    @property
    def bad(self) -> int:
        """Samples that cannot be used."""
        return sum(map(len, self.problems.values()))

    @property
    def usable(self) -> int:
        """Samples that can be used, whether they fit or not."""
        return self.numbers["samples"] - self.bad


def _look(source: IndexedSource, shapes: Shapes) -> _Found:
    index = source.index
    rounds, fitting = fitting_rounds(source, np.arange(len(index)), shapes)
    problems: dict[str, list[tuple[int, str]]] = {"missing": [], "damaged": [], "wrong": []}
    for number, sentence in index.description.errors:
        missing, damaged = "does not exist" in sentence, ", field image: " in sentence
        problems["missing" if missing else "damaged" if damaged else "wrong"].append((number, sentence))
    problems["unusable"] = [(number, sentence) for number, sentence in index.description.unusable]
    usable = rounds > 0
    numbers = dict(zip(COLUMNS, (
        len(index), len(index.sizes), len(index.needs) // source.kind.together, *map(len, problems.values()),
        _twice([source]), int(((fitting > 0) & (fitting < rounds)).sum()), int((usable & (fitting == 0)).sum()))))
    return _Found(source.reader.name, numbers, problems)


def _twice(sources: Sequence[IndexedSource]) -> int:
    """Samples that say the same as another one, of the same pictures, beyond the first."""
    digests = [source.index.digests[np.diff(source.index.pair_starts) > 0] for source in sources]
    return sum(map(len, digests)) - len(np.unique(np.concatenate(digests))) if digests else 0


def _table(found: Sequence[_Found], twice: int, room: int | None) -> Iterator[str]:
    """A line a source, and one for all of them, whose samples may be there twice in two sources."""
    rows = [[one.name, *(f"{one.numbers[name]:,}" for name in COLUMNS)] for one in found]
    if len(found) > 1:
        sums = {name: sum(one.numbers[name] for one in found) for name in COLUMNS}
        rows.append(["all", *(f"{number:,}" for number in {**sums, "twice": twice}.values())])
    if not rows:
        return iter(())
    columns = [Column("source", max(map(len, ("source", *(row[0] for row in rows)))), left=True)]
    columns += [Column(name, max(len(name), *(len(row[place]) for row in rows)), gap=2)
                for place, name in enumerate(COLUMNS, 1)]
    return table(columns, rows, room)


def _sentences(found: Sequence[_Found], failed: Sequence[tuple[str, str]], room: int | None) -> Iterator[str]:
    """What is wrong: with whole sources, then with samples, some of each kind."""
    for name, sentence in failed:
        yield ""
        yield f"{name} cannot be read:"
        for line in sentence.splitlines():
            yield from wrapped(line, room, "  ", "  ")
    for one in found:
        for kind, problems in one.problems.items():
            if problems:
                yield ""
                yield f"{one.name}, {kind}: {len(problems):,}"
                for _, sentence in problems[:SHOWN]:
                    yield from wrapped(sentence, room, "    ", "  ")
                if len(problems) > SHOWN:
                    yield f"  ... and {len(problems) - SHOWN:,} more"


def _budget(found: Sequence[_Found], shapes: Shapes, room: int | None) -> Iterator[str]:
    """The share of the samples that the recipe's rows cut or leave out."""
    usable = sum(one.usable for one in found)
    cut, left = (sum(one.numbers[name] for one in found) for name in ("cut", "left out"))
    yield ""
    yield from wrapped(f"Of {usable:,} samples that can be used, {cut:,} ({cut / usable:.1%}) are cut between whole "
                       f"rounds and {left:,} ({left / usable:.1%}) are left out, to fit {shapes}.", room)


def _lengths(fields: dict, section: dict, sources: Sequence[IndexedSource], room: int | None) -> Iterator[str]:
    """Histograms, and the goodput of the recipe's rows."""
    needs = needs_of(sources, None)
    for name, values in (("positions", needs.positions), ("tiles", needs.tiles)):
        yield ""
        yield f"{name} of a sample"
        yield from bars(values, room)
    if sources[0].kind is KINDS["pair"]:
        return          # what a row of two answers costs is another sum
    workload = read_workload({**fields, "train_dataset": section})
    budget, costs = row_budget(section), training_costs(workload.config, workload.trained_parts)
    packed = next(iter(advise(needs, [budget], costs)), None) if section.get("packing") else None
    share = packed.goodput if packed else unpacked_goodput(needs, budget, costs)
    yield ""
    yield (f"Rows of seq_length {budget.seq_length} and max_tiles {budget.max_tiles}"
           f"{', packed' if packed else ''}: goodput {share:.1%}.")


def _draw(path: Path, needs: Needs, shapes: Shapes) -> None:
    """Histograms of positions and tiles, with what a row holds, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - optional, and slow to import
    from matplotlib.figure import Figure  # noqa: PLC0415 - optional, and slow to import

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name, found, limit in zip(figure.subplots(1, 2), ("positions", "tiles"), (needs.positions, needs.tiles),
                                        shapes.limits):
        few = len(found) and int(np.ptp(found)) < BARS          # then each number has a bar of its own
        axes.hist(found, bins=np.arange(found.min(), found.max() + 2) - 0.5 if few else BARS)
        axes.axvline(limit, color="tab:red", label=f"a row holds {limit:,}")
        axes.set(xlabel=f"{name} of a sample", ylabel="samples")
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())
