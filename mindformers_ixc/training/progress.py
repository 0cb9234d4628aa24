"""What a training run shows of itself: a header, how far it is, and what was measured."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mindformers_ixc import terminal
from mindformers_ixc.device import group_size
from mindformers_ixc.operations import goodput
from mindformers_ixc.resources import shown
from mindformers_ixc.scores import as_text
from mindformers_ixc.tables import bar, broken
from mindformers_ixc.training.parts import part_counts
from mindformers_ixc.training.throughput import Throughput, duration, line, operations, short, work_of

# Lines that a run has at least, where there is no bar and it has that many steps.
FEWEST_LINES = 10

# Steps by which a header says how full rows are.
LOOK_AHEAD = 50

# Columns of a header's labels; of a bar at least, where one is drawn.
LABEL, NARROWEST_BAR = 9, 8

# Share of a step that it waits for data from which a line says so.
NOTABLE_WAIT = 0.05

# The file that the command runs, for the header.
recipe = ""


class Progress:
    """How far a run is: a bar on a terminal, elsewhere some lines. The log has the lines in any case.

    Args:
        total: steps of the run.
        start: steps that an earlier run has done.
        every: steps between two lines at most.
    """

    def __init__(self, total: int, start: int = 0, every: int = 1):
        self.total, self.printed = total, start
        self.every = max(1, min(every, (total - start) // FEWEST_LINES))

    def show(self, row: dict) -> None:
        """Shows the row of a step."""
        screen = terminal.current
        if screen.interactive:
            screen.live(bar_of(row, self.total, screen.columns - 1, screen.knows_unicode))
        last = row["step"] == self.total
        if row["step"] - self.printed < self.every and not last:
            return
        self.printed = row["step"]
        whole = line(row, self.total)
        if screen.interactive and not last:
            screen.log(whole)
        else:
            screen.note(line_of(row, self.total, screen.columns if screen.interactive else None), whole)


def line_of(row: dict, total: int, columns: int | None = None) -> str:
    """A step as a line that can be read at a glance; the log has the whole of it.

    Args:
        row: of `metrics.jsonl`.
        total: steps of the run.
        columns: of the terminal, where only so many numbers stand as fit; `None` for what is none.
    """
    loss = "not finite" if row.get("loss") is None else f"{row['loss']:.4f}"
    left = [f"{duration(row['seconds_left'])} left"] if row["step"] < total else []
    numbers = [*_speeds(row), *_wait(row)]
    while True:
        text = ", ".join([f"step {row['step']}/{total}: loss {loss}", *numbers, *left])
        if columns is None or len(text) <= columns or not numbers:
            return text
        numbers.pop()


def _wait(row: dict) -> list[str]:
    """What of a step went by before its batch was there, where that is much."""
    return [f"waited {row['data_wait']:.0%} for data"] if row.get("data_wait", 0) >= NOTABLE_WAIT else []


def _speeds(row: dict) -> list[str]:
    """Rate and speeds of a step, as far as they are known."""
    numbers = [f"rate {row['learning_rate']:.3g}"] if row.get("learning_rate") is not None else []
    if "reward" in row:
        numbers.insert(0, f"reward {row['reward']:.3g}")
    numbers.append(f"{short(row['samples_per_second'])} samples/s")
    if "positions_per_second" in row:
        numbers.append(f"{short(row['positions_per_second'])} tokens/s")
    return [*numbers, f"MFU {row['mfu']:.1%}"] if "mfu" in row else numbers


def bar_of(row: dict, total: int, columns: int, unicode: bool) -> str:
    """A step as a bar with numbers behind it, as many as fit."""
    loss = "not finite" if row.get("loss") is None else f"{row['loss']:.4f}"
    numbers = [f"{row['step']}/{total}", f"loss {loss}", f"{duration(row['seconds_left'])} left"]
    more = _speeds(row)
    if "tflops" in row and "mfu" not in row:
        more.append(operations(row))
    for word in [*_wait(row), *more]:      # what is left to do stays the last
        if len("  ".join([*numbers, word])) + 2 + NARROWEST_BAR <= columns:
            numbers.insert(-1, word)
    text = "  ".join(numbers)
    room = min(30, columns - len(text) - 2)
    drawn = bar(row["step"] / max(1, total), room, unicode) + "  " if room >= NARROWEST_BAR else ""
    return drawn + text


def measured(row: Mapping[str, float], total: int) -> str:
    """A measurement on held-out conversations as a line."""
    values = ", ".join(f"{name} {as_text(name, value)}" for name, value in row.items() if name != "step")
    return f"evaluation after step {row['step']}/{total}: {values}"


def header(trainer: Any) -> str:
    """What a run is about to do, in lines with a label each.

    Args:
        trainer: `IXC25Trainer` with everything built.
    """
    config, dataset = trainer.config, trainer.train_dataset
    rows: list[tuple[str, Iterable[str]]] = [
        ("recipe", [f"{recipe or config.trainer.type} ({config.run_mode})"]),
        ("data", _data(config, dataset)), ("steps", _steps(config, dataset)), ("model", _model(trainer)),
        ("trains", part_lines(part_counts(trainer.trained_model))), ("device", [_devices(config)])]
    if (config.train_dataset or {}).get("packing"):
        rows.append(("goodput", [f"{_goodput(trainer):.1%} of the operations are on real positions and tiles"]))
    rows.append(("output", _places(config)))
    return "\n".join(_labelled(label, lines) for label, lines in rows)


def _labelled(label: str, lines: Iterable[str]) -> str:
    first, *rest = list(lines) or [""]
    screen, indent = terminal.current, " " * LABEL
    painted = screen.paint(label, "bold") + " " * (LABEL - len(label))
    whole = [painted + first, *(indent + text for text in rest)]
    return "\n".join(part for text in whole
                     for part in (broken(text, screen.columns, indent) if screen.interactive else [text]))


def _data(config: Any, dataset: Any) -> list[str]:
    table, loader = dataset.conversations, config.train_dataset.data_loader or {}
    places = loader.get("dataset_dir") or ""
    places = list(places) if isinstance(places, (list, tuple)) else [places]
    pairs = "pairs" if table.needs.shape[1] > 2 else "samples"
    return [f"{len(table):,} {pairs} of {places[0]}", *map(str, places[1:])]


def _steps(config: Any, dataset: Any) -> list[str]:
    runner = config.runner_config
    epochs, size = getattr(runner, "origin_epochs", None) or runner.epochs, dataset.get_dataset_size()
    rows = len(dataset.plan_sampler.rows(0))
    what = "rows" if (config.train_dataset or {}).get("packing") else "samples"
    done = f", {runner.initial_step:,} of them done" if getattr(runner, "initial_step", None) else ""
    return [f"{epochs * size:,} ({epochs:,} epoch{'s' * (epochs != 1)}), {rows:,} {what} each{done}"]


def _model(trainer: Any) -> list[str]:
    total, _ = part_counts(trainer.trained_model)["all"]
    config = trainer.config
    start = trainer.start or config.load_checkpoint
    whence = "going on with its checkpoint" if config.resume_training else \
        f"from {shown(start)}" if start else "from nothing"
    return [f"{units(total)} parameters, {whence}"]


def part_lines(counts: Mapping[str, tuple[int, int]]) -> list[str]:
    """Parts with their parameters and how many of them train, as a narrow table."""
    width = max(map(len, counts), default=0) + 1
    lines = [f"{'part':<{width}}{'all':>8}{'trained':>9}"]
    return lines + [f"{part:<{width}}{units(total):>8}{units(trained) if trained else '-':>9}"
                    for part, (total, trained) in counts.items()]


def _devices(config: Any) -> str:
    name, size = (config.context or {}).get("device_target", "Ascend"), group_size()
    if size == 1:
        return name
    layout = config.parallel_config
    degrees = [f"{short_name} {value}" for short_name, key in (("dp", "data_parallel"), ("tp", "model_parallel"),
                                                               ("pp", "pipeline_stage"))
               if (value := getattr(layout, key, None))]
    return f"{size} x {name}" + (f": {' x '.join(degrees)}" if degrees else "")


def _goodput(trainer: Any) -> float:
    """Of the first steps: how much of what is computed is worth something."""
    dataset = trainer.train_dataset
    works = [work_of(dataset, step) for step in range(min(LOOK_AHEAD, dataset.get_dataset_size()))]
    throughput: Throughput = trainer.log.throughput
    return goodput(throughput.costs, sum(work.positions for work in works), sum(work.tiles for work in works), 1,
                   sum(work.computed_positions for work in works), sum(work.computed_tiles for work in works))


def _places(config: Any) -> list[str]:
    lines = [shown(config.output_dir)]
    log = terminal.current.log_path
    return [*lines, f"(what the libraries print: {shown(log)})"] if log else lines


def units(count: int) -> str:
    """A number of parameters with three digits and k, M or G, a blank between: `1.41 M`."""
    if count < 1000:
        return str(count)
    power = min(3, int(math.log10(count * 1.0005) / 3))
    return f"{count / 1000 ** power:.3g} {' kMG'[power]}"
