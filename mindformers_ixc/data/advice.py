"""Which budgets of a row suit some data: what the samples need, and the goodput of packing them."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mindformers_ixc.data.fitting import check_bad_pictures
from mindformers_ixc.data.index.samples import IndexedSource, needs_of_rounds
from mindformers_ixc.data.index.sources import measures_of, open_sources
from mindformers_ixc.data.mixture import check_shares, mixture_weights
from mindformers_ixc.data.packer import Budget, pack
from mindformers_ixc.data.rows import SectionOptions, bad_share_of, make_processor, own_tokenizer
from mindformers_ixc.data.sampling import draw_samples
from mindformers_ixc.errors import ImageError
from mindformers_ixc.operations import Costs, goodput
from mindformers_ixc.processing.processor import Processor

# Samples that budgets are compared on; of more, so many are drawn.
COMPARED = 8000

# A smaller budget is as good as a larger one whose goodput is higher by this much only.
AS_GOOD = 0.02

# Lengths of rows that are tried, as multiples of the longest sample, and of one that nine of ten do not exceed (where
# samples are much alike, rows must hold a whole number of them); and what they are rounded up to.
OF_LONGEST = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
OF_MOST = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14)
MOST = 0.9
ROUNDED = ((4096, 256), (512, 64), (0, 8))


@dataclass(frozen=True)
class Needs:
    """What the samples of a data set need; all arrays are int32 `(n,)`.

    Attributes:
        positions: of each sample.
        tiles: of each sample, global views included.
        images: pictures of each sample.
        sources: number of the source of each sample.
        names: of the sources.
    """

    positions: np.ndarray
    tiles: np.ndarray
    images: np.ndarray
    sources: np.ndarray
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.positions)

    def take(self, samples: np.ndarray) -> Needs:
        """Those of some samples."""
        return Needs(self.positions[samples], self.tiles[samples], self.images[samples], self.sources[samples],
                     self.names)

    def fits(self, budget: Budget, packed: bool = True) -> np.ndarray:
        """Whether each sample fits a row of its own."""
        longest = budget.longest if packed else budget.seq_length
        return ((self.positions <= longest) & (self.tiles <= budget.max_tiles) & (self.images <= budget.max_images))


@dataclass(frozen=True)
class Advice:
    """What rows of a budget would be like.

    Attributes:
        budget: of a row.
        goodput: share of the operations of the rows that real positions and tiles need.
        mean_samples: samples of a row on average.
        without_pictures: share of rows without a picture.
        left_out: share of samples that do not fit and would be cut or left out.
        full_of_segments: share of rows that end because they have as many samples as there are segments.
    """

    budget: Budget
    goodput: float
    mean_samples: float
    without_pictures: float
    left_out: float
    full_of_segments: float


def measure(section: Mapping) -> Needs:
    """What the samples of a `train_dataset` section need, uncut; pictures are not decoded.

    Args:
        section: checked (`mindformers_ixc.data.sections.check_dataset_section`), its tokenizer an InternLM2Tokenizer.

    Raises:
        DataError: for unusable data or a tokenizer of another kind.
    """
    loader, share = section["data_loader"], bad_share_of(section)
    sources = open_sources(loader, section.get("seed") or 0, measures_of(section, processor_of(section)),
                           loader.get("index_dir"), share)
    return needs_of(sources, share)


def needs_of(sources: Sequence[IndexedSource], max_bad_share: float | None) -> Needs:
    """What the samples of sources need, uncut.

    Args:
        sources: of a run.
        max_bad_share: share of samples that cannot be used and may be left out; `None`: any, and nothing is said.

    Raises:
        DataError: when there are more.
    """
    names = list(dict.fromkeys(source.reader.name for source in sources))
    rows, numbers, bad, total = list[np.ndarray](), list[np.ndarray](), list[ImageError](), 0
    for source in sources:
        entries, index = source.entries(), source.index
        total += len(entries)
        unusable = index.description.left_out
        bad += [ImageError(unusable[int(number)]) for number in entries[np.isin(entries, list(unusable))]]
        rounds = (index.pair_starts[entries + 1] - index.pair_starts[entries]) // source.kind.together
        usable = rounds > 0
        rows.append(needs_of_rounds(source, entries[usable], rounds[usable]).max(1))
        numbers.append(np.full(int(usable.sum()), names.index(source.reader.name), np.int32))
    if max_bad_share is not None:
        check_bad_pictures(bad, total, max_bad_share)
    needs = np.concatenate(rows)
    return Needs(needs[:, 0], needs[:, 1], needs[:, 2], np.concatenate(numbers), tuple(names))


def processor_of(section: Mapping) -> Processor:
    """The processor of a `train_dataset` section, without MindFormers.

    Args:
        section: checked, its tokenizer an InternLM2Tokenizer.

    Raises:
        DataError: for a tokenizer of another kind.
    """
    return make_processor(SectionOptions(section), own_tokenizer(section))


def drawn(needs: Needs, mixture: Mapping | None, seed: int = 0, samples: int = COMPARED) -> Needs:
    """The samples that an epoch draws, or as many of them as budgets are compared on.

    Args:
        needs: of all samples.
        mixture: section `mixture` of the data loader; without, every sample is as likely.
        seed: of the draw.
        samples: at most.

    Raises:
        DataError: see `mixture_weights` and `check_shares`.
    """
    if mixture:
        members = [np.flatnonzero(needs.sources == number) for number in range(len(needs.names))]
        weights = mixture_weights({name: len(part) for name, part in zip(needs.names, members)}, dict(mixture))
        count = mixture.get("samples_per_epoch") or len(needs)
        check_shares(weights, count)
        return needs.take(draw_samples(members, list(weights.values()), seed, 0, min(samples, count)))
    if len(needs) <= samples:
        return needs
    return needs.take(np.sort(np.random.default_rng(seed).choice(len(needs), samples, replace=False)))


def unpacked_goodput(needs: Needs, budget: Budget, costs: Costs) -> float:
    """Goodput of rows of one sample each, of those that fit."""
    fits = needs.take(np.flatnonzero(needs.fits(budget, packed=False)))
    return goodput(costs, int(fits.positions.sum()), int(fits.tiles.sum()), len(fits), budget.seq_length,
                   budget.max_tiles)


def advise(needs: Needs, budgets: Iterable[Budget], costs: Costs) -> list[Advice]:
    """What rows of several budgets would be like.

    Args:
        needs: of the samples that an epoch draws.
        budgets: to be tried; those that no sample fits are left out.
        costs: of a step.
    """
    found = []
    for budget in budgets:
        fits = needs.take(np.flatnonzero(needs.fits(budget)))
        if not len(fits):
            continue
        rows = pack(fits.positions, fits.tiles, fits.images, 0, **budget._asdict())
        images = np.bincount(rows.row_numbers(), fits.images[rows.order], len(rows))
        share = goodput(costs, int(fits.positions.sum()), int(fits.tiles.sum()), len(rows), budget.seq_length,
                        budget.max_tiles)
        full = float((np.diff(rows.starts) == budget.max_segments - 1).mean())
        found.append(Advice(budget, share, len(fits) / len(rows), float((images == 0).mean()),
                            1 - len(fits) / len(needs), full))
    return found


def candidates(needs: Needs, max_segments: int) -> list[Budget]:
    """Budgets worth trying: rows as long as the longest sample and longer, with the tiles that then come with them.

    Args:
        needs: of the samples.
        max_segments: of every budget.
    """
    least = Budget(int(needs.positions.max()) + max_segments - 1, max(1, int(needs.tiles.max())),
                   max(1, int(needs.images.max())), max_segments)
    most = np.quantile(needs.positions, MOST) + 1, np.quantile(needs.tiles, MOST)
    tiles_a_position = needs.tiles.sum() / needs.positions.sum()
    budgets = set()
    wanted = [(math.ceil(factor * least.seq_length), 0) for factor in OF_LONGEST]
    wanted += [(math.ceil(factor * most[0]) + max_segments, math.ceil(factor * most[1])) for factor in OF_MOST]
    for length, tiles in wanted:
        if not least.seq_length <= length <= OF_LONGEST[-1] * least.seq_length:
            continue
        step = next(step for above, step in ROUNDED if length > above)
        length = -(-length // step) * step
        mean = math.ceil((length - max_segments) * tiles_a_position)
        for number in {max(least.max_tiles, choice) for choice in (mean, mean + 1, mean + 2, tiles)}:
            budgets.add(Budget(length, number, max(least.max_images, number // 2), max_segments))
    return sorted(budgets)


def best_of_lengths(advices: Iterable[Advice]) -> list[Advice]:
    """Of budgets of one length each that of the highest goodput."""
    found: dict[int, Advice] = {}
    for advice in advices:
        length = advice.budget.seq_length
        found[length] = max(found.get(length, advice), advice, key=lambda one: (-one.left_out, one.goodput))
    return list(found.values())


def best(advices: Iterable[Advice]) -> Advice | None:
    """The smallest budget that loses no sample and whose goodput is about the highest, if there is any."""
    whole = [advice for advice in advices if not advice.left_out]
    if not whole:
        return None
    highest = max(advice.goodput for advice in whole)
    return min((advice for advice in whole if advice.goodput >= highest - AS_GOOD),
               key=lambda advice: (advice.budget.seq_length, advice.budget.max_tiles))


def histogram(values: np.ndarray, bins: int = 12) -> list[tuple[int, int, int]]:
    """(first, last, number) of values in ranges of one width.

    Args:
        values: whole numbers.
        bins: ranges at most.
    """
    low, high = int(values.min()), int(values.max())
    width = max(1, math.ceil((high - low + 1) / bins))
    counts = np.bincount((values - low) // width)
    return [(low + i * width, low + (i + 1) * width - 1, int(count)) for i, count in enumerate(counts)]
