"""The plan of a run whose rows hold several samples each, of any source and kind."""
from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Optional

import numpy as np

from mindformers_ixc.data.columns import unmap
from mindformers_ixc.data.ordering import mix_rows
from mindformers_ixc.data.packer import Budget, Rows, pack, split_rows
from mindformers_ixc.data.sampling import RunPlan
from mindformers_ixc.errors import DataError

# Epochs of a mixture draw other samples, so they take more rows or fewer. How many an epoch has is found by packing the
# first ones: this many samples in all, of so many epochs.
TRIED_SAMPLES = 2_000_000
TRIED_EPOCHS = (2, 32)

# Samples that are packed at most to see that later epochs will do with as many rows.
CHECKED_SAMPLES = 5_000_000

# Rows that are added to what the first epochs of a mixture took, as a share of them. Epochs of 10,000 samples and more
# differ by less than that.
MARGIN = 0.001

# Samples of an epoch, counted from 0, as indices; `None`: all of them, once.
Draw = Callable[[int], Optional[np.ndarray]]


@dataclass(frozen=True)
class Packing:
    """How samples share rows.

    Attributes:
        positions: of each sample, int `(n,)`.
        tiles: of each sample.
        images: pictures of each sample.
        sources: number of each sample's source.
        budget: of a row.
    """

    positions: np.ndarray
    tiles: np.ndarray
    images: np.ndarray
    sources: np.ndarray
    budget: Budget

    def rows(self, drawn: np.ndarray | None, seed: int) -> Rows:
        """Rows of drawn samples (`None`: of all), in no order."""
        return pack(self.positions, self.tiles, self.images, seed, **self.budget._asdict(), drawn=drawn)

    def without_pictures(self, rows: Rows) -> int:
        """Rows in which there is no picture, for which the tower computes nothing but padding."""
        count = sum(int((np.bincount(part.row_numbers(), self.images[part.order], len(part)) == 0).sum())
                    for part in rows.parts())
        unmap(self.images)
        return count


class _Epochs:
    """Rows of epochs, always as many: a multiple of the rows of a global batch.

    An epoch that needs fewer has rows of many samples split, for a sample is never in two rows. Only when there are
    more rows than samples, which a global batch of many rows may want, samples are repeated, as a small kind of
    unpacked samples is.

    Args:
        draw: see `Draw`.
        packing: how they share rows.
        seed: of the run.
        constant: whether every epoch has the same samples.
        shuffle: whether epochs differ.
        batch_rows: rows of a global batch.
    """

    def __init__(self, draw: Draw, packing: Packing, seed: int, constant: bool, shuffle: bool,
                 batch_rows: int):
        self.draw, self.packing, self.seed, self.shuffle = draw, packing, seed, shuffle
        first = self.pack(0)
        self.samples, self.text_rows = len(first.order), packing.without_pictures(first)
        needed = len(first)
        # where every epoch has the same samples, one says it for all
        self.tried = sys.maxsize if constant else min(TRIED_EPOCHS[1], max(TRIED_EPOCHS[0],
                                                                          TRIED_SAMPLES // max(1, self.samples)))
        if not constant:
            counts = [needed, *(len(self.pack(epoch)) for epoch in range(1, self.tried))]
            needed = max(counts) + max(int(np.ceil(MARGIN * max(counts))), max(counts) - min(counts))
        self._first: Rows | None = first      # mostly epoch 0 is asked for next
        self.packed_rows, self.needed = len(first), needed
        self.rows = -(-needed // batch_rows) * batch_rows

    def pack(self, epoch: int) -> Rows:
        """Rows of an epoch as they are packed."""
        return self.packing.rows(self.draw(epoch), _derived(self.seed, "rows", epoch if self.shuffle else 0))

    def __call__(self, epoch: int) -> Rows:
        """Rows of an epoch in their order.

        Raises:
            DataError: when the samples of an epoch need more rows than an epoch has.
        """
        first, self._first = self._first, None
        packed = first if epoch == 0 and first is not None else self.pack(epoch)
        self._check_count(epoch, len(packed))
        rows = split_rows(packed, self.rows)
        missing = self.rows - len(rows)
        if missing:          # every sample has a row of its own
            again = rows.order[np.arange(missing) % len(rows)]
            rows = Rows(np.concatenate([rows.order, again]), np.arange(self.rows + 1, dtype=np.int32))
        return mix_rows(rows, self.packing.sources, _derived(self.seed, "order", epoch if self.shuffle else 0))

    def check(self, epochs: int) -> None:
        """Checks that every epoch of a run will do with its rows, as far as packing them all takes seconds.

        Raises:
            DataError: when one does not.
        """
        for epoch in range(self.tried, min(epochs, CHECKED_SAMPLES // max(1, self.samples))):
            self._check_count(epoch, len(self.pack(epoch)))

    def _check_count(self, epoch: int, count: int) -> None:
        if count > self.rows:
            raise DataError(f"The samples of epoch {epoch + 1} need {count} rows, but the first epochs of this "
                            f"mixture needed {self.needed} at most, and every epoch has {self.rows}; choose another "
                            "samples_per_epoch or seed.")


def plan_packed(draw: Draw, packing: Packing, seed: int, constant: bool, shuffle: bool,
                batch_rows: int) -> RunPlan:
    """The plan of a run with packing.

    Every epoch has the same number of rows, which follows from the data, the seed and the rows of a global batch alone;
    so a run that is resumed, or has more epochs, has it too.

    Args:
        draw: see `Draw`; as many samples in every epoch.
        packing: how they share rows.
        seed: of the run.
        constant: whether every epoch has the same samples.
        shuffle: whether epochs differ in their order.
        batch_rows: rows of a global batch.

    Raises:
        DataError: when a sample fits no row.
    """
    if not len(packing.positions):
        return RunPlan(draw_nothing, 0, batch_rows)
    epochs = _Epochs(draw, packing, seed, constant, shuffle, batch_rows)
    samples = max(epochs.samples, epochs.rows)
    note = (f"{epochs.samples} samples of an epoch are packed into {epochs.packed_rows} rows, {epochs.text_rows} of "
            f"them without a picture; an epoch has {epochs.rows} rows of {samples / epochs.rows:.2f} samples on "
            "average.")
    return RunPlan(epochs, epochs.rows, batch_rows, samples / epochs.rows, epochs.check, note)


def draw_everything(epoch: int) -> None:
    """Draws every sample, once an epoch."""


def draw_nothing(epoch: int) -> Rows:
    """Rows of an epoch without samples."""
    return Rows(np.zeros(0, np.int32), np.zeros(1, np.int32))


def _derived(seed: int, purpose: str, epoch: int) -> int:
    return zlib.crc32(f"{seed} {purpose} {epoch}".encode())
