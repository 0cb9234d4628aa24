"""`mindformers data plan`: which budgets of a packed row suit some data. MindFormers is not imported."""
from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mindformers_ixc.cli.yaml_file import apply_overrides, parse_overrides, read_yaml
from mindformers_ixc.data.advice import (
    Advice,
    Needs,
    advise,
    best,
    best_of_lengths,
    candidates,
    drawn,
    histogram,
    measure,
    unpacked_goodput,
)
from mindformers_ixc.data.packer import Budget
from mindformers_ixc.data.sections import check_dataset_section, row_budget
from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.operations import training_costs
from mindformers_ixc.planning.workload import Workload, read_workload
from mindformers_ixc.reading import watch_reads
from mindformers_ixc.resources import resolve_path
from mindformers_ixc.sections import check_value, whole
from mindformers_ixc.tables import Column, columns_of, table, wrapped

# Width of a histogram's longest bar, in signs.
BAR = 40

# Of the table of budgets.
COLUMNS = (Column("seq_length", 10), Column("max_tiles", 11), Column("max_images", 12), Column("goodput", 9),
           Column("samples a row", 15), Column("rows without pictures", 23), Column("samples that do not fit", 25),
           Column("", left=True, gap=2))


@dataclass(frozen=True)
class DataPlan:
    """What is known of some data and of the rows that suit them.

    Attributes:
        needs: of all samples.
        compared: samples that an epoch draws, or some of them.
        recipe: budget of the recipe.
        unpacked: goodput of rows of a sample each, at the recipe's budget.
        now: rows of the recipe's budget, packed; `None` if no sample fits.
        tried: rows of other budgets.
        best: of all of them, `None` if each would lose samples.
        samples: of a step that are asked for.
        micro_batch: rows of a micro batch, over all replicas.
        key: of the YAML that counts micro batches.
    """

    needs: Needs
    compared: Needs
    recipe: Budget
    unpacked: float
    now: Advice | None
    tried: list[Advice]
    best: Advice | None
    samples: float
    micro_batch: int
    key: str

    def micro_batches(self, advice: Advice) -> int:
        """Micro batches of rows like these that come closest to the samples of a step."""
        return max(1, round(self.samples / advice.mean_samples / self.micro_batch))


def data_plan(arguments: argparse.Namespace) -> int:
    """Runs `mindformers data plan` and prints what it finds, as text or as JSON.

    Args:
        arguments: `files`, the data; `config`, `global_batch`, `json`; `rest`, overrides of the YAML.

    Raises:
        ConfigError: for a wrong key or value of the YAML.
        DataError: for unusable data.
        FileNotFoundError: for a data file that is not there.
    """
    if not arguments.config:
        raise ConfigError("mindformers data plan needs --config, the YAML file whose rows are to hold the data.")
    for path in arguments.files:
        if not resolve_path(path).exists():
            raise FileNotFoundError(f"The data file {path} does not exist.")
    fields = read_yaml(arguments.config)
    apply_overrides(fields, parse_overrides(arguments.rest))
    plan = make_data_plan(fields, list(arguments.files), arguments.global_batch)
    text = json.dumps(as_json(plan), indent=2) if arguments.json else \
        "\n".join(as_text(plan, columns_of(arguments.answers)))
    print(text, file=arguments.answers)
    return 0


def make_data_plan(fields: dict, files: list[str], global_batch: int | None = None) -> DataPlan:
    """Measures data and tries budgets.

    Args:
        fields: of the YAML.
        files: the data, in place of those that the YAML names.
        global_batch: samples of a step; by default those of the YAML.

    Raises:
        ConfigError: for a wrong key or value.
        DataError: for unusable data.
    """
    if global_batch is not None:
        check_value("--global_batch", global_batch, whole(1))
    workload, section = read_workload(fields), fields.get("train_dataset") or {}
    if workload.preference:
        raise DataError("mindformers data plan is about packed rows, and preference pairs are not packed.")
    loader = {**(section.get("data_loader") or {}), "dataset_dir": files if len(files) > 1 else files[0]}
    section = {**section, "data_loader": loader}
    check_dataset_section(section)
    watch_reads(section["data_loader"].get("read_timeout"))
    needs = measure(section)
    return _compare(needs, drawn(needs, loader.get("mixture"), section.get("seed") or 0), section, workload,
                    global_batch)


def _compare(needs: Needs, compared: Needs, section: dict, workload: Workload, global_batch: int | None) -> DataPlan:
    recipe, costs = row_budget(section), training_costs(workload.config, workload.trained_parts)
    now = next(iter(advise(compared, [recipe], costs)), None)
    tried = best_of_lengths(advise(compared, candidates(needs, recipe.max_segments), costs))
    packed = now.mean_samples if section.get("packing") and now else 1.0
    samples = global_batch or workload.global_batch * packed
    key = "parallel_config.micro_batch_num" if workload.layout.pipeline_stage > 1 else \
        "runner_config.gradient_accumulation_steps"
    return DataPlan(needs, compared, recipe, unpacked_goodput(compared, recipe, costs), now, tried,
                    best([*([now] if now else []), *tried]), samples, workload.samples * workload.layout.data_parallel,
                    key)


def as_json(plan: DataPlan) -> dict[str, Any]:
    """A plan as plain values."""
    def row(advice: Advice | None) -> dict | None:
        return None if advice is None else {**asdict(advice), "budget": advice.budget._asdict(),
                                            "micro_batches": plan.micro_batches(advice)}

    return {"samples": len(plan.needs), "positions": histogram(plan.needs.positions),
            "tiles": histogram(plan.needs.tiles), "sources": list(plan.needs.names),
            "unpacked_goodput": plan.unpacked, "recipe": row(plan.now), "tried": [row(one) for one in plan.tried],
            "best": row(plan.best), "samples_per_step": plan.samples, "micro_batches_key": plan.key}


def as_text(plan: DataPlan, room: int | None = None) -> Iterator[str]:
    """Lines of a plan.

    Args:
        plan: what is known.
        room: columns of the terminal, `None` for what is none.
    """
    needs = plan.needs
    text_only = int((needs.images == 0).sum())
    yield from wrapped(f"{len(needs)} samples of {len(needs.names)} source{'s' * (len(needs.names) != 1)}, {text_only} "
                       f"of them without a picture; mean {needs.positions.mean():.0f} positions and "
                       f"{needs.tiles.mean():.1f} tiles.", room)
    for name, values in (("positions", needs.positions), ("tiles", needs.tiles)):
        yield ""
        yield name
        yield from bars(values, room)
    yield ""
    yield from wrapped(f"At the recipe's budget, seq_length {plan.recipe.seq_length} and max_tiles "
                       f"{plan.recipe.max_tiles}: goodput {plan.unpacked:.1%} unpacked"
                       + (f", {plan.now.goodput:.1%} packed." if plan.now else "; no sample fits a packed row."), room)
    yield ""
    yield from table(COLUMNS, (_row(plan, one) for one in [*([plan.now] if plan.now else []), *plan.tried]), room,
                     heading=3)
    yield ""
    for sentence in _conclusion(plan):
        yield from wrapped(sentence, room)


def _row(plan: DataPlan, one: Advice) -> list[str]:
    mark = "best" if one is plan.best else "the recipe's" if one is plan.now else ""
    return [str(one.budget.seq_length), str(one.budget.max_tiles), str(one.budget.max_images), f"{one.goodput:.1%}",
            f"{one.mean_samples:.2f}", f"{one.without_pictures:.1%}", f"{one.left_out:.1%}", mark]


def bars(values: np.ndarray, room: int | None) -> Iterator[str]:
    """A histogram of whole numbers, a line a range.

    Args:
        values: the numbers.
        room: columns of the terminal; `None` where it is none.
    """
    rows = histogram(values)
    most, width = max(count for _, _, count in rows), len(str(rows[-1][1]))
    longest = BAR if room is None else max(5, min(BAR, room - 2 * width - 6 - len(str(most))))
    for first, last, count in rows:
        yield f"{first:{width}d} to {last:{width}d} {'#' * round(longest * count / most):{longest}} {count}"


def _conclusion(plan: DataPlan) -> Iterator[str]:
    chosen = plan.best
    if chosen is None:
        yield "Every budget that was tried loses samples; raise max_segments or cut the longest samples."
        return
    budget, count = chosen.budget, plan.micro_batches(chosen)
    yield (f"The best is seq_length {budget.seq_length}, max_tiles {budget.max_tiles}, max_images {budget.max_images}, "
           f"max_segments {budget.max_segments}: goodput {chosen.goodput:.1%}. `mindformers plan` says what it needs.")
    yield (f"With {plan.key} {count} a step has {count * plan.micro_batch} rows, "
           f"{count * plan.micro_batch * chosen.mean_samples:.0f} samples on average ({plan.samples:.0f} are asked "
           "for).")
    if chosen.full_of_segments > 0.05:
        yield (f"{chosen.full_of_segments:.0%} of the rows end because they have {budget.max_segments - 1} samples; a "
               "larger max_segments (1024 at most) fills them.")
