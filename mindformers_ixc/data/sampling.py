"""Which samples make up which row and batch of which epoch: pure functions of seed and epoch.

A row's *place* is its number in the run, over all epochs and ranks. What a rank draws, and the noise of its dropout,
depend on places alone, so a run that is resumed at any step, or fed by other worker processes, sees the same.
"""
from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mindformers_ixc.data.columns import blocks
from mindformers_ixc.data.packer import Rows

# Steps of this size through [0, 1) leave gaps as even as they can be, for any number of steps (the golden ratio).
GOLDEN_STEP = (5 ** 0.5 - 1) / 2

# Places of such a sequence that are counted at a time, which bounds the memory.
COUNTED = 1 << 20

# Epochs whose rows are kept: a resumed iteration goes over two.
KEPT_EPOCHS = 2


def plan_epoch(kinds: Sequence[Sequence[int] | np.ndarray], batch_size: int, seed: int, epoch: int, shuffle: bool,
               drop_remainder: bool = True) -> np.ndarray:
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
        int32 `(batches, batch_size)`.
    """
    queues, turns = list[np.ndarray](), list[np.ndarray]()
    for number, kind in enumerate(kinds):
        if not len(kind):
            continue
        order = _shuffled(kind, f"{seed} {epoch} {number}") if shuffle else np.asarray(kind, np.int32)
        whole, rest = divmod(len(order), batch_size)
        if rest and (whole == 0 or not drop_remainder):
            whole += 1
            order = np.resize(order, whole * batch_size)         # from its beginning again
        queues.append(order[:whole * batch_size].reshape(whole, batch_size))
        turns.append(np.arange(whole))
    if not queues:
        return np.zeros((0, batch_size), np.int32)
    taken = np.argsort(np.concatenate(turns), kind="stable")
    places = np.empty(len(taken), np.int32)
    places[taken] = np.arange(len(taken), dtype=np.int32)
    plan = np.empty((len(taken), batch_size), np.int32)
    for queue, turn in zip(queues, np.split(places, np.cumsum([len(queue) for queue in queues])[:-1])):
        plan[turn] = queue
    return plan


def _shuffled(indices: Sequence[int] | np.ndarray, seed: str) -> np.ndarray:
    """The indices in another order, int32."""
    order = array("i")
    order.frombytes(np.ascontiguousarray(indices, np.int32).view(np.uint8))        # type: ignore[arg-type]
    random.Random(seed).shuffle(order)
    return np.frombuffer(order, np.int32)


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
    indices: Sequence[int] | np.ndarray


def plan_mixture(sources: Sequence[MixtureSource], batch_size: int, seed: int, epoch: int,
                 batches: int) -> np.ndarray:
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
        int32 `(batches, batch_size)`.
    """
    kinds = sorted({source.kind for source in sources})
    weights = [sum(source.weight for source in sources if source.kind == kind) for kind in kinds]
    batches_before, chosen = _counted(weights, epoch * batches), _spread_small(weights, epoch * batches, batches)
    plan = np.empty((batches, batch_size), np.int32)           # every batch has a kind, so each of them is filled
    for number, kind in enumerate(kinds):
        members = [source for source in sources if source.kind == kind]
        before, here = int(batches_before[number]) * batch_size, chosen == number
        drawn = _draw([source.indices for source in members], [source.weight for source in members],
                      [f"{seed} {kind} {i}" for i in range(len(members))], before,
                      int(np.count_nonzero(here)) * batch_size)
        plan[here] = drawn.reshape(-1, batch_size)
    return plan


def _counted(weights: Sequence[float], stop: int) -> np.ndarray:
    """How often each of several choices stands at the first `stop` places of `spread`, int64."""
    counts = np.zeros(len(weights), np.int64)
    for part in blocks(stop, COUNTED):
        counts += np.bincount(spread(weights, part.start, part.stop), minlength=len(weights))
    return counts


def _spread_small(weights: Sequence[float], start: int, count: int) -> np.ndarray:
    """`spread` of so many places, as numbers that are as small as they can be."""
    found = np.empty(count, np.min_scalar_type(len(weights)))
    for part in blocks(count, COUNTED):
        found[part] = spread(weights, start + part.start, start + part.stop)
    return found


def _draw(sources: Sequence[Sequence[int] | np.ndarray], weights: Sequence[float], seeds: Sequence[str], start: int,
          count: int) -> np.ndarray:
    """Places `start` to `start + count` of a mixture that goes through each source pass after pass, int32."""
    before, picks = _counted(weights, start), _spread_small(weights, start, count)
    drawn = np.empty(count, np.int32)
    for number, (indices, seed) in enumerate(zip(sources, seeds)):
        here = picks == number
        drawn[here] = _pass_after_pass(indices, seed, int(before[number]), int(np.count_nonzero(here)))
    return drawn


def _pass_after_pass(indices: Sequence[int] | np.ndarray, seed: str, start: int, count: int) -> np.ndarray:
    """Elements `start` to `start + count` of endlessly many shuffled passes over `indices`, int32."""
    number, skip = divmod(start, len(indices))
    passes = range(number, number + -(-(skip + count) // len(indices)))
    drawn = [_shuffled(indices, f"{seed} {one}") for one in passes]
    return np.concatenate(drawn)[skip:skip + count] if drawn else np.zeros(0, np.int32)


def draw_samples(sources: Sequence[Sequence[int] | np.ndarray], weights: Sequence[float], seed: int, epoch: int,
                 samples: int) -> np.ndarray:
    """The samples of one epoch of a mixture, exactly as many as are asked for.

    Sources follow one another as `spread` says, over all epochs as if they were one; each is gone through pass after
    pass.

    Args:
        sources: sample indices of each source.
        weights: of each source.
        seed: of the run.
        epoch: counted from 0.
        samples: of an epoch.

    Returns:
        int32 `(samples,)`.
    """
    return _draw(sources, weights, [f"{seed} source {number}" for number in range(len(sources))], epoch * samples,
                 samples)


class RunPlan:
    """The rows of every epoch of a run.

    Every process that reads rows has one and works out the same.

    Args:
        make: rows of an epoch, counted from 0; always as many.
        epoch_rows: so many.
        batch_rows: rows of a global batch; `epoch_rows` is a multiple of them.
        mean_samples: samples of a row on average.
        check: checks that so many epochs can be made; by default all can.
        note: what there is to say about it.
    """

    def __init__(self, make: Callable[[int], Rows], epoch_rows: int, batch_rows: int, mean_samples: float = 1.0,
                 check: Callable[[int], None] = lambda epochs: None, note: str = ""):
        self._make, self.epoch_rows, self.batch_rows, self.mean_samples = make, epoch_rows, batch_rows, mean_samples
        self.check, self.note = check, note
        self._known: dict[int, Rows] = {}

    def __deepcopy__(self, memo: dict) -> RunPlan:
        # MindSpore copies a data source for its workers; plans do not change, and millions of indices take time
        return self

    def epoch(self, number: int) -> Rows:
        """Rows of an epoch, counted from 0."""
        rows = self._known.get(number)
        if rows is None:
            rows = self.made(number)
            self._known = {**dict(list(self._known.items())[1 - KEPT_EPOCHS:]), number: rows}
        return rows

    def made(self, number: int) -> Rows:
        """Rows of an epoch for whoever keeps them: they are not remembered here."""
        return self._make(number)

    def row(self, place: int) -> list[int]:
        """Sample indices of the row at a place of the run."""
        epoch, number = divmod(place, self.epoch_rows)
        return self.epoch(epoch).row(number)

    def batch(self, step: int) -> list[list[int]]:
        """Rows of the global batch of a step, counted from 0 over the whole run."""
        return [self.row(step * self.batch_rows + i) for i in range(self.batch_rows)]


def plan_batches(batches: Callable[[int, int], np.ndarray], batch_rows: int) -> RunPlan:
    """The plan of a run whose rows hold a sample each.

    Args:
        batches: of sample indices, of (global batch size, epoch); in every epoch as many.
        batch_rows: the global batch size.
    """
    first = [np.asarray(batches(batch_rows, 0), np.int32).reshape(-1)]        # mostly it is asked for next

    def make(epoch: int) -> Rows:
        known = first.pop() if first else None
        order = known if epoch == 0 and known is not None else np.asarray(batches(batch_rows, epoch), np.int32)
        return Rows(order.reshape(-1), np.arange(order.size + 1, dtype=np.int32))

    return RunPlan(make, len(first[0]), batch_rows)


class PlanSampler:
    """Gives one epoch's places of one data-parallel rank; each iteration is the next epoch.

    Args:
        plan: rows of the run.
        batch_size: rows of a rank's batch.
        shard: (rank, ranks): a global batch holds `ranks` consecutive rank batches.
        row_shape: positions and tiles that a row computes, for reports.
    """

    def __init__(self, plan: RunPlan, batch_size: int, shard: tuple[int, int] = (0, 1),
                 row_shape: tuple[int, int] = (0, 0)):
        self.plan, self.batch_size, self.row_shape = plan, batch_size, row_shape
        self.rank, self.ranks = shard
        self.epoch = self.skip = 0

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self.plan.epoch_rows // self.ranks

    @property
    def mean_samples(self) -> float:
        """Samples of a row on average."""
        return self.plan.mean_samples

    def places(self, epoch: int) -> np.ndarray:
        """Places of this rank's rows of an epoch, int64."""
        steps = self.plan.epoch_rows // (self.batch_size * self.ranks)
        return self._places(epoch * steps, steps)

    def _places(self, step: int, steps: int) -> np.ndarray:
        """Places of this rank's rows of so many steps, of which the first is counted from 0 over the whole run."""
        size = self.batch_size * self.ranks                   # epochs are whole global batches, one after the other
        first = np.arange(step * size, (step + steps) * size, size)[:, None] + self.rank * self.batch_size
        return (first + np.arange(self.batch_size)).reshape(-1)

    def rows(self, step: int) -> list[list[int]]:
        """Rows, as sample indices, of the global batch of a step, counted from 0 over the whole run."""
        return self.plan.batch(step)

    def batch(self, step: int) -> list[int]:
        """Sample indices of the global batch of a step."""
        return [index for row in self.rows(step) for index in row]

    def start_at(self, step: int) -> None:
        """Makes the next iteration begin at a step, counted from 0 over the whole run.

        Iterations stay as long as an epoch (MindSpore insists), so each then ends inside one; the trainer stops at the
        last step of the run.
        """
        self.epoch, self.skip = divmod(step, self.plan.epoch_rows // self.plan.batch_rows)

    def take(self) -> np.ndarray:
        """Places of the next iteration, int64."""
        steps = self.plan.epoch_rows // (self.batch_size * self.ranks)
        self.epoch += 1
        return self._places((self.epoch - 1) * steps + self.skip, steps)

    def __iter__(self) -> Iterator[int]:
        return map(int, self.take())
