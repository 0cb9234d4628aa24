"""`mindformers data index` and `data check`: what is known of every sample, built once, and what is wrong with some."""
from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindformers_ixc import terminal
from mindformers_ixc.cli.data_plan import bars
from mindformers_ixc.cli.data_preview import write_indexed
from mindformers_ixc.cli.data_section import RECIPE, read_section
from mindformers_ixc.data.advice import Needs, advise, needs_of, processor_of, unpacked_goodput
from mindformers_ixc.data.fitting import Shapes
from mindformers_ixc.data.index.building import index_folder
from mindformers_ixc.data.index.kinds import KINDS
from mindformers_ixc.data.index.samples import IndexedSource, fitting_rounds
from mindformers_ixc.data.index.sources import measures_of, open_sources
from mindformers_ixc.data.rows import MAX_BAD_SHARE
from mindformers_ixc.data.sections import row_budget
from mindformers_ixc.files import check_target, write_whole
from mindformers_ixc.operations import training_costs
from mindformers_ixc.planning.workload import read_workload
from mindformers_ixc.processing.image import HD_NUM_TRAINING
from mindformers_ixc.tables import Column, columns_of, table

# Sentences about bad samples that a source shows; the rest are counted.
SHOWN = 5

COLUMNS = ("samples", "pictures", "rounds", "missing", "damaged", "wrong", "unusable", "twice", "cut", "left out")


def data_index(arguments: argparse.Namespace) -> int:
    """Runs `mindformers data index`: builds what is missing, and prints what each index holds.

    Args:
        arguments: `files`, the data; `config`; `output`, the folder of indices; `rest`, overrides of the YAML.

    Raises:
        ConfigError: for a wrong key or value of the YAML.
        DataError: for unusable data.
    """
    _, sources, _ = _open(arguments, all_errors=False)
    for source in sources:
        index = source.index
        size = sum(file.stat().st_size for file in index.folder.iterdir() if file.is_file())
        print(f"{source.reader.name}: {len(index):,} samples, {len(index.sizes):,} pictures, "
              f"{index.needs[:, 0].mean() if len(index.needs) else 0:.0f} positions on average; "
              f"{size / 1e6:.1f} MB in {index.folder}", file=arguments.answers)
    if arguments.output:
        terminal.current.note(f"Runs find it with train_dataset.data_loader.index_dir: {arguments.output}")
    return 0


def data_check(arguments: argparse.Namespace) -> int:
    """Runs `mindformers data check`: prints what is wrong with some data, source by source.

    Args:
        arguments: `files`, the data; `config`; `decode`, whether pixels are read; `png` and `output`, files for
            histograms and for a page of samples; `rest`, overrides of the YAML.

    Returns:
        1 when more samples cannot be used than `max_bad_share` allows, else 0.

    Raises:
        ConfigError: for a wrong key or value of the YAML.
        DataError: for a file that is none of data.
    """
    fields, sources, section = _open(arguments, all_errors=True)
    shapes, share = _shapes(section), section.get("max_bad_share")
    share = MAX_BAD_SHARE if share is None else share
    found = [_look(source, shapes) for source in sources]
    room = columns_of(arguments.answers)
    lines = [*_table(found, room), *_sentences(found), *_lengths(fields, section, sources, room)]
    print("\n".join(lines), file=arguments.answers)
    if arguments.png:
        _draw(Path(arguments.png), needs_of(sources, 1.0), shapes)
    if arguments.output:
        write_indexed(arguments, Path(arguments.output), sources, shapes)
    bad, total = sum(one.bad for one in found), sum(one.numbers["samples"] for one in found)
    if bad > share * total:
        terminal.current.note(f"{bad:,} of {total:,} samples cannot be used, more than the share max_bad_share {share} "
                              "allows.")
        return 1
    return 0


def _open(arguments: argparse.Namespace, all_errors: bool) -> tuple[dict, list[IndexedSource], dict]:
    fields, section, pairs = read_section(arguments)
    if not arguments.config:
        terminal.current.note(f"Measured as the recipe {RECIPE} measures, since no --config was given.")
    loader = {**section["data_loader"], "dataset_dir": list(arguments.files)}
    if arguments.png:
        check_target(arguments.png, "--png")
    if arguments.kind == "check" and arguments.output:
        check_target(arguments.output, "--output")
    folder = (arguments.output if arguments.kind == "index" else None) or loader.get("index_dir")
    measures = measures_of(section, processor_of(section), bool(arguments.decode))
    sources = open_sources(loader, section.get("seed") or 0, measures, index_folder(folder), all_errors,
                           "pair" if pairs else "sample")
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
        sentences: about samples that cannot be used.
    """

    name: str
    numbers: dict[str, int]
    sentences: list[str]

    @property
    def bad(self) -> int:
        """Samples that cannot be used."""
        return sum(self.numbers[name] for name in ("missing", "damaged", "wrong", "unusable"))


def _look(source: IndexedSource, shapes: Shapes) -> _Found:
    index = source.index
    rounds, fitting = fitting_rounds(source, np.arange(len(index)), shapes)
    errors = [sentence for _, sentence in index.description.errors]
    missing = sum("does not exist" in sentence for sentence in errors)
    damaged = sum(", field image: " in sentence and "does not exist" not in sentence for sentence in errors)
    usable = rounds > 0
    digests = index.digests[usable]
    numbers = dict(zip(COLUMNS, (
        len(index), len(index.sizes), len(index.needs) // source.kind.together, missing, damaged,
        len(errors) - missing - damaged, len(index.description.unusable), len(digests) - len(np.unique(digests)),
        int(((fitting > 0) & (fitting < rounds)).sum()), int((usable & (fitting == 0)).sum()))))
    return _Found(source.reader.name, numbers, [*errors, *(text for _, text in index.description.unusable)])


def _table(found: Sequence[_Found], room: int | None) -> Iterator[str]:
    """A line a source, and one for all of them."""
    rows = [[one.name, *(f"{one.numbers[name]:,}" for name in COLUMNS)] for one in found]
    if len(found) > 1:
        rows.append(["all", *(f"{sum(one.numbers[name] for one in found):,}" for name in COLUMNS)])
    columns = [Column("source", max(map(len, ("source", *(row[0] for row in rows)))), left=True)]
    columns += [Column(name, max(len(name), *(len(row[place]) for row in rows)), gap=2)
                for place, name in enumerate(COLUMNS, 1)]
    return table(columns, rows, room)


def _sentences(found: Sequence[_Found]) -> Iterator[str]:
    for one in found:
        if one.sentences:
            yield ""
            yield from one.sentences[:SHOWN]
            if len(one.sentences) > SHOWN:
                yield f"... and {len(one.sentences) - SHOWN:,} more of {one.name}"


def _lengths(fields: dict, section: dict, sources: Sequence[IndexedSource], room: int | None) -> Iterator[str]:
    """Histograms, and the goodput of the recipe's rows."""
    needs = needs_of(sources, 1.0)
    if not len(needs):
        return
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
        axes.hist(found, bins=min(60, int(np.ptp(found)) + 1) if len(found) else 1)
        axes.axvline(limit, color="tab:red", label=f"a row holds {limit:,}")
        axes.set(xlabel=f"{name} of a sample", ylabel="samples")
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())
