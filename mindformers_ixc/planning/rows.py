"""What the rows of a data set hold, and what a step is worth for it: the part of a plan that depends on the data."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.data.advice import drawn, measure
from mindformers_ixc.data.packer import Budget, pack
from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.operations import goodput, training_costs

SECONDS_A_DAY = 86400


@dataclass(frozen=True)
class RowMeans:
    """Means over the rows of a data set.

    Attributes:
        samples: real samples of a row.
        positions: real positions of a row, `None` where only the number of samples is known.
        tiles: real tiles of a row, global views included.
        squares: sum of the squared lengths of a packed row's segments, that of its padding included.
        rows: of an epoch.
        total: samples of an epoch that fit.
        left_out: samples of an epoch that fit no row.
    """

    samples: float
    positions: float | None = None
    tiles: float | None = None
    squares: float | None = None
    rows: int | None = None
    total: int | None = None
    left_out: int = 0


@dataclass(frozen=True)
class Usage:
    """What a step is worth.

    Attributes:
        samples: of a step, `None` if it is not known how many share a row.
        samples_per_second: of them.
        goodput: share of the operations that real positions and tiles need; `None` without data.
        steps: of the run, `None` if unknown.
        days: they take.
    """

    samples: float | None
    samples_per_second: float | None
    goodput: float | None
    steps: int | None
    days: float | None


def usage(config: ModelConfig, trained: Iterable[str] | None, means: RowMeans | None, global_batch: int,
          seconds: float, steps: int | None) -> Usage:
    """What a step is worth.

    Args:
        config: sizes.
        trained: parts that train; `None` for all.
        means: of the rows, if they are known.
        global_batch: rows of a step.
        seconds: it takes.
        steps: of the run.
    """
    samples, share = None if config.packing else float(global_batch), None
    if means is not None:
        samples = global_batch * means.samples
        if means.positions is not None and means.tiles is not None:
            costs = training_costs(config, None if trained is None else tuple(trained))
            share = goodput(costs, means.positions, means.tiles, 1, config.seq_length, config.max_tiles)
    return Usage(samples, None if samples is None else samples / seconds, share, steps,
                 None if steps is None else steps * seconds / SECONDS_A_DAY)


def describe_rows(positions: np.ndarray, tiles: np.ndarray, rows: Iterable[Iterable[int]], seq_length: int,
                  epoch: int | None = None) -> RowMeans:
    """Means over rows.

    Args:
        positions: of each sample.
        tiles: of each sample.
        rows: numbers of the samples of each row.
        seq_length: positions of a row.
        epoch: samples of an epoch, of which these are some; by default all.
    """
    scale = 1.0 if epoch is None else epoch / len(positions)
    members = [np.asarray(row, np.int64) for row in rows]
    number = np.repeat(np.arange(len(members)), [len(row) for row in members])
    order = np.concatenate(members)
    lengths = positions[order].astype(np.float64)
    used = np.bincount(number, lengths, len(members))
    squares = np.bincount(number, lengths ** 2, len(members)) + (seq_length - used) ** 2
    return RowMeans(len(order) / len(members), float(used.mean()), float(tiles[order].sum() / len(members)),
                    float(squares.mean()), round(scale * len(members)), round(scale * len(order)),
                    round(scale * (len(positions) - len(order))))


def read_rows(section: Mapping, config: ModelConfig) -> RowMeans:
    """Means over the rows that a run makes of its data.

    Args:
        section: `train_dataset`.
        config: budgets of a row, and whether samples are packed.

    Raises:
        DataError: for unusable data, or when no sample fits.
    """
    needs, seed = measure(section), section.get("seed") or 0
    mixture = (section.get("data_loader") or {}).get("mixture")
    epoch = (mixture or {}).get("samples_per_epoch") or len(needs)
    needs = drawn(needs, mixture, seed)
    budget = Budget(config.seq_length, config.max_tiles, config.max_images, config.max_segments)
    fits = np.flatnonzero(needs.fits(budget, config.packing))
    if not len(fits):
        raise DataError(f"None of the {len(needs)} samples fits a row of seq_length {config.seq_length}, max_tiles "
                        f"{config.max_tiles} and max_images {config.max_images}; the shortest needs "
                        f"{needs.positions.min()} positions, and the one with the fewest tiles {needs.tiles.min()}. "
                        "Raise them.")
    rows: Iterable[Iterable[int]] = ([index] for index in fits)
    if config.packing:
        own = needs.take(fits)
        rows = (fits[row] for row in pack(own.positions, own.tiles, own.images, seed, **budget._asdict()).lists())
    return describe_rows(needs.positions, needs.tiles, rows, config.seq_length, epoch)


def steps_of_run(fields: Mapping, means: RowMeans, global_batch: int) -> int:
    """Steps of a recipe's epochs over data, an incomplete last batch left out.

    Args:
        fields: of the YAML.
        means: of the data's rows.
        global_batch: rows of a step.

    Raises:
        ConfigError: when an epoch is less than a step.
    """
    of_epoch = (means.rows or 0) // global_batch
    if not of_epoch:
        raise ConfigError(f"An epoch of the data has {means.total} samples, fewer than a step of "
                          f"{global_batch * means.samples:.0f}; say with --steps how many steps the run has.")
    return of_epoch * ((fields.get("runner_config") or {}).get("epochs") or 1)
