"""Which samples make up which batch of which epoch: pure functions of seed and epoch.

A sample's *place* is its number in the run, over all epochs and ranks. What a rank draws, and the noise of its dropout,
depend on places alone, so a run that is resumed at any step, or fed by other worker processes, sees the same.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# Steps of this size through [0, 1) leave gaps as even as they can be, for any number of steps (the golden ratio).
GOLDEN_STEP = (5 ** 0.5 - 1) / 2


def plan_epoch(kinds: Sequence[Sequence[int]], batch_size: int, seed: int, epoch: int, shuffle: bool,
               drop_remainder: bool = True) -> list[list[int]]:
    """Batches of one epoch, never mixing kinds.

    Batches of the kinds alternate while each still has some (the public scripts alternate multimodal and text-only
    batches, because the two take different time). A kind smaller than one batch fills it by repeating its samples;
    otherwise an incomplete last batch is dropped, or filled when `drop_remainder` is false. With shuffling, other
    samples are left over each epoch.

    Args:
        kinds: sample indices of each kind (multimodal, text-only).
        batch_size: samples of a global batch.
        seed: of the run.
        epoch: counted from 0; another epoch is another order.
        shuffle: whether to shuffle at all.
        drop_remainder: whether an incomplete last batch is dropped.

    Returns:
        Lists of `batch_size` indices.
    """
    queues = []
    for number, kind in enumerate(kinds):
        order = list(kind)
        if not order:
            continue
        if shuffle:
            random.Random(f"{seed} {epoch} {number}").shuffle(order)
        whole, rest = divmod(len(order), batch_size)
        if rest and (whole == 0 or not drop_remainder):
            order += [order[i % len(order)] for i in range(batch_size - rest)]
            whole += 1
        queues.append([order[i * batch_size:(i + 1) * batch_size] for i in range(whole)])
    batches = []
    while any(queues):
        for queue in queues:
            if queue:
                batches.append(queue.pop(0))
    return batches


def spread(weights: Sequence[float], start: int, stop: int) -> np.ndarray:
    """Which of several choices stands at places `start` to `stop` of an endless sequence.

    The sequence has each choice as often as its weight says, as evenly as possible, so any stretch of it has too.

    Returns:
        int64 `(stop - start,)`.
    """
    shares = np.cumsum(np.asarray(weights, np.float64))
    points = np.mod(np.arange(start, stop, dtype=np.float64) * GOLDEN_STEP, 1.0) * shares[-1]
    return np.minimum(np.searchsorted(shares, points, side="right"), len(shares) - 1)


@dataclass
class MixtureSource:
    """One source of a weighted mixture: sample indices that all are of one kind."""

    kind: int
    weight: float
    indices: list[int]


def plan_mixture(sources: Sequence[MixtureSource], batch_size: int, seed: int, epoch: int,
                 batches: int) -> list[list[int]]:
    """Batches of one epoch in which each source has its share.

    Every batch is of one kind; kinds and, within a kind, sources follow one another as `spread` says. A source is gone
    through pass after pass, each in an order of its own, so none of its samples waits longer than two passes.

    Args:
        sources: with weights above 0.
        batch_size: samples of a global batch.
        seed: of the run.
        epoch: counted from 0.
        batches: batches of an epoch.

    Returns:
        Lists of `batch_size` indices.
    """
    kinds = sorted({source.kind for source in sources})
    weights = [sum(source.weight for source in sources if source.kind == kind) for kind in kinds]
    chosen = spread(weights, 0, (epoch + 1) * batches)
    plan: list[list[int]] = [[] for _ in range(batches)]       # every batch has a kind, so each of them is filled
    for number, kind in enumerate(kinds):
        members = [source for source in sources if source.kind == kind]
        before = int(np.sum(chosen[:epoch * batches] == number)) * batch_size
        places = np.flatnonzero(chosen[epoch * batches:] == number)
        picks = spread([source.weight for source in members], 0, before + len(places) * batch_size)
        drawn = np.empty(len(places) * batch_size, np.int64)
        for i, source in enumerate(members):
            used = int(np.sum(picks[:before] == i))
            here = np.flatnonzero(picks[before:] == i)
            drawn[here] = _pass_after_pass(source.indices, f"{seed} {kind} {i}", used, len(here))
        for place, batch in zip(places, drawn.reshape(-1, batch_size)):
            plan[place] = batch.tolist()
    return plan


def _pass_after_pass(indices: Sequence[int], seed: str, start: int, count: int) -> list[int]:
    """Elements `start` to `start + count` of endlessly many shuffled passes over `indices`."""
    drawn: list[int] = []
    number = start // len(indices)
    skip = start % len(indices)
    while len(drawn) < skip + count:
        order = list(indices)
        random.Random(f"{seed} {number}").shuffle(order)
        drawn += order
        number += 1
    return drawn[skip:skip + count]


class PlanSampler:
    """Gives one epoch's samples of one data-parallel rank; each iteration is the next epoch.

    What it gives is `place * count + index`, so that whoever reads a sample also knows its place in the run.

    Args:
        plan: batches (of sample indices) of an epoch, for a global batch size and the epoch's number.
        count: number of samples that `plan` chooses from.
        batch_size: samples of a rank's batch.
        shard: (rank, ranks): a global batch holds `ranks` consecutive rank batches.
    """

    def __init__(self, plan: Callable[[int, int], list[list[int]]], count: int, batch_size: int,
                 shard: tuple[int, int] = (0, 1)):
        self.plan, self.count, self.batch_size = plan, count, batch_size
        self.rank, self.ranks = shard
        self.epoch = self.skip = 0
        self.epoch_size = len(plan(batch_size * self.ranks, 0)) * batch_size * self.ranks

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.epoch_size // self.ranks

    def indices(self, epoch: int) -> list[int]:
        """This rank's sample indices of an epoch."""
        return [code % self.count for code in self.codes(epoch)]

    def codes(self, epoch: int) -> list[int]:
        """This rank's samples of an epoch, each with its place."""
        size = self.batch_size * self.ranks
        start, codes = self.rank * self.batch_size, []
        for number, batch in enumerate(self.plan(size, epoch)):
            first = epoch * self.epoch_size + number * size
            codes += [(first + i) * self.count + batch[i] for i in range(start, start + self.batch_size)]
        return codes

    def batch(self, step: int) -> list[int]:
        """Sample indices of the global batch of a step, counted from 0 over the whole run."""
        size = self.batch_size * self.ranks
        epoch, number = divmod(step, self.epoch_size // size)
        return self.plan(size, epoch)[number]

    def start_at(self, step: int) -> None:
        """Makes the next iteration begin at a step, counted from 0 over the whole run.

        Iterations stay as long as an epoch (MindSpore insists), so each then ends inside one; the trainer stops at the
        last step of the run.
        """
        self.epoch, self.skip = divmod(step, self.epoch_size // (self.batch_size * self.ranks))

    def __iter__(self) -> Iterator[int]:
        codes = self.codes(self.epoch)
        if self.skip:
            rest = self.skip * self.batch_size
            codes = codes[rest:] + self.codes(self.epoch + 1)[:rest]
        self.epoch += 1
        return iter(codes)
