"""How much of a step is real, and how fast it was: positions, tiles, goodput, operations a second.

Model TFLOPS of a device are the operations that the step's real positions and tiles need (`mindformers_ixc.operations`)
over its seconds and its devices:

    TFLOPS = (position x positions + tile x tiles + pair x sum of squared lengths) / (seconds x devices x 10^12)

where a part that trains counts three times its forward pass and a frozen one once, nothing is counted twice for
recomputation, and attention counts each segment by its own length with the masked half. MFU is that over the peak of a
device (`device_tflops`).
"""
from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.data.columns import unmap
from mindformers_ixc.operations import goodput, training_costs

# Keys of a row of `metrics.jsonl` that depend on the clock: two runs that do the same differ in them.
TIMED = ("seconds", "samples_per_second", "positions_per_second", "tiles_per_second", "computed_positions_per_second",
         "computed_tiles_per_second", "tflops", "mfu", "data_wait", "seconds_left")

# Recent steps whose median says how long the rest of a run takes.
RECENT = 50


@dataclass(frozen=True)
class Work:
    """What a step is fed.

    Attributes:
        samples: numbers of its samples.
        lengths: positions of each of their sequences; of a preference pair both answers'.
        tiles: real ones, global views included.
        computed_positions: that the rows have, padding included.
        computed_tiles: the same of tiles.
    """

    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    tiles: int
    computed_positions: int
    computed_tiles: int

    @property
    def positions(self) -> int:
        """Real positions of text and pictures."""
        return sum(self.lengths)


def work_of(dataset: Any, step: int) -> Work:
    """What the global batch of a step holds, over all replicas.

    Args:
        dataset: as `mindformers_ixc.training.datasets.batched` made it: `plan_sampler` says which samples share which
            row, `conversations.needs` what each of them takes.
        step: counted from 0 over the whole run.
    """
    table, sampler = dataset.conversations, dataset.plan_sampler
    rows = sampler.rows(step)
    samples = tuple(chain.from_iterable(rows))
    needs = table.needs[list(samples)]                 # positions of each sequence of a sample, then its tiles
    unmap(table.needs)
    length, tiles = sampler.row_shape
    sequences = needs.shape[1] - 1
    return Work(samples, tuple(needs[:, :-1].reshape(-1).tolist()), int(needs[:, -1].sum()),
                len(rows) * sequences * length, len(rows) * tiles)


class Throughput:
    """Numbers of a row of the log from what its steps were fed and how long they took.

    Args:
        config: sizes of the model.
        trained: parts that train.
        devices: of the run.
        peak: 10^12 operations a second that a device reaches at most; 0 if unknown.
        reference: the task LoRA of preference pairs whose step computes the reference too.
    """

    def __init__(self, config: ModelConfig, trained: Collection[str], devices: int, peak: float = 0.0,
                 reference: str | None = None):
        self.costs, self.devices, self.peak = training_costs(config, trained, reference), devices, peak

    def of(self, works: Sequence[Work], seconds: float) -> dict[str, float]:
        """The numbers.

        Args:
            works: of the steps that the row stands for.
            seconds: they took together.

        Returns:
            `positions`, `tiles`, `goodput` (0 to 1), both numbers a second, real and computed, `tflops` of a device
            (10^12 operations a second) and, where the peak is known, `mfu` (0 to 1).
        """
        positions, tiles = sum(work.positions for work in works), sum(work.tiles for work in works)
        computed = sum(work.computed_positions for work in works), sum(work.computed_tiles for work in works)
        operations = self.costs.of(positions, tiles, [n for work in works for n in work.lengths])
        tflops = operations / (seconds * self.devices * 1e12)
        found = {"positions": positions, "tiles": tiles, "goodput": goodput(self.costs, positions, tiles, 1, *computed),
                 "positions_per_second": positions / seconds, "tiles_per_second": tiles / seconds,
                 "computed_positions_per_second": computed[0] / seconds,
                 "computed_tiles_per_second": computed[1] / seconds, "tflops": tflops}
        return {**found, "mfu": tflops / self.peak} if self.peak else found


class TimeLeft:
    """Seconds until a run's end, by the median of its recent steps: the first one compiles."""

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=RECENT)

    def after(self, seconds: float, steps_left: int) -> float:
        """Seconds left after a step that took some seconds."""
        self.recent.append(seconds)
        return statistics.median(self.recent) * max(0, steps_left)


def line(row: dict, total: int) -> str:
    """A row of the log as one line for a terminal.

    Args:
        row: of `metrics.jsonl`.
        total: steps of the run.
    """
    loss = "not finite" if row.get("loss") is None else f"{row['loss']:.4f}"
    words = [f"step {row['step']}/{total}: loss {loss}"]
    if "reward" in row:
        words += [f"reward {row['reward']:.3g}", f"exact match {row['exact_match']:.0%}", f"KL {row['kl']:.3g}"]
    if row.get("learning_rate") is not None:
        words.append(f"rate {row['learning_rate']:.3g}")
    words += [f"{row['seconds']:.3g} s", f"{short(row['samples_per_second'])} samples/s"]
    if "goodput" in row:
        words += [f"{short(row['positions_per_second'])} of {short(row['computed_positions_per_second'])} positions/s",
                  f"{short(row['tiles_per_second'])} of {short(row['computed_tiles_per_second'])} tiles/s",
                  f"goodput {row['goodput']:.0%}", operations(row)]
    if "data_wait" in row:
        words.append(f"waited {row['data_wait']:.0%} for data")
    return ", ".join([*words, f"{duration(row['seconds_left'])} left"])


def operations(row: dict) -> str:
    """Operations a second of a row as words."""
    value, unit = (row["tflops"], "TFLOPS") if row["tflops"] >= 0.1 else (1000 * row["tflops"], "GFLOPS")
    speed = f"{value:.3g} {unit} a device"
    return f"{speed} (MFU {row['mfu']:.1%})" if "mfu" in row else speed


def short(value: float) -> str:
    """A number with three digits and k, M or G behind it."""
    for unit in ("", "k", "M"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def duration(seconds: float) -> str:
    """Seconds in the two units that tell most: `2 d 3 h`, `3 h 20 min`, `5 min 10 s`, `40 s`."""
    whole = round(seconds)
    for large, size, small, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // part} {small}"
    return f"{whole} s"


def scalars(row: dict) -> Iterable[tuple[str, float]]:
    """What of a row can be drawn over the steps, by name; of sources each its loss and its tokens."""
    for key, value in row.items():
        if key == "sources":
            for source, numbers in value.items():
                yield from ((f"{name}/{source}", float(number)) for name, number in numbers.items())
        elif key != "step" and isinstance(value, (int, float)):
            yield key, float(value)
