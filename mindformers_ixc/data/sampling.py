"""Which samples make up which batch of which epoch: pure functions of seed and epoch."""
from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from mindspore.dataset import Sampler


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


class EpochSampler(Sampler):
    """Gives MindSpore one epoch's indices of one data-parallel rank; each iteration is the next epoch.

    Args:
        kinds: sample indices of each kind.
        batch_size: samples of a rank's batch.
        seed: of the run.
        shuffle: whether to shuffle.
        drop_remainder: see `plan_epoch`.
        shard: (rank, ranks): a global batch holds `ranks` consecutive rank batches.
    """

    def __init__(self, kinds: Sequence[Sequence[int]], batch_size: int, seed: int, shuffle: bool,
                 drop_remainder: bool = True, shard: tuple[int, int] = (0, 1)):
        self.kinds, self.batch_size = [list(kind) for kind in kinds], batch_size
        self.seed, self.shuffle, self.drop_remainder = seed, shuffle, drop_remainder
        self.rank, self.ranks = shard
        self.epoch = 0
        super().__init__(num_samples=len(self.indices(0)))

    def indices(self, epoch: int) -> list[int]:
        """This rank's sample indices of an epoch."""
        batches = plan_epoch(self.kinds, self.batch_size * self.ranks, self.seed, epoch, self.shuffle,
                             self.drop_remainder)
        start = self.rank * self.batch_size
        return [index for batch in batches for index in batch[start:start + self.batch_size]]

    def __iter__(self) -> Iterator[int]:
        indices = self.indices(self.epoch)
        self.epoch += 1
        return iter(indices)
