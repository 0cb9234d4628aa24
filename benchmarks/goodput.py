"""Goodput of training rows on mixtures of samples, and what packing a million samples takes.

    python benchmarks/goodput.py [--samples 4000] [--seed 0] [--million]

Samples are drawn like those of real mixtures: the source by its share, the picture's size from its list, the text from
a log-normal. Positions and tiles follow from this package's own partition (hd_num 18, training transform). Goodput is
the multiply-adds of real positions and tiles over those of the rows (a tile 1.219 TFLOP, a position 14 GFLOP: the tower
and the language model of the 7B model): of rows of one sample, of rows packed from one source and kind, and of rows
that mix everything.
"""
from __future__ import annotations

import argparse
import resource
import time
import tracemalloc
from typing import NamedTuple

import numpy as np

from mindformers_ixc.data.advice import Needs, advise, unpacked_goodput
from mindformers_ixc.data.ordering import mix_rows
from mindformers_ixc.data.packer import Budget, pack
from mindformers_ixc.operations import Costs, goodput
from mindformers_ixc.processing.image import image_token_count, plan_partition

COSTS = Costs(tile=1.219e12, position=14e9, pair=0.0)

# Spread of the logarithm of text lengths, and tokens of the turns' marks.
SIGMA, MARKS = 0.6, 20

TILE, TOKENS_PER_SIDE, HD_NUM, HD_NUM_SEVERAL = 560, 20, 18, 6


class Source(NamedTuple):
    """Samples of one kind: share of the mixture, sizes of pictures, median of text tokens, pictures of a sample."""

    name: str
    share: float
    sizes: list[tuple[int, int]]
    tokens: int
    pictures: tuple[int, int] = (1, 1)


COCO = [(640, 480), (480, 640), (640, 427), (500, 375)]
PAGES = [(1700, 2200), (1654, 2339)]

MIXTURES = {
    "reference": [
        Source("COCO captions", 0.20, COCO, 180), Source("LLaVA conversations", 0.15, COCO[:3], 350),
        Source("TextVQA", 0.10, [(1024, 768), (768, 1024), (1024, 683)], 60), Source("DocVQA", 0.08, PAGES, 60),
        Source("ChartQA", 0.07, [(800, 557), (850, 600), (422, 359)], 60),
        Source("OCR-VQA", 0.08, [(331, 500), (340, 500)], 120),
        Source("VQA v2, GQA", 0.12, [(500, 375), (640, 480)], 60),
        Source("InfographicVQA", 0.05, [(600, 2500), (1000, 4000), (1200, 1600)], 70), Source("text", 0.15, [], 1100)],
    "documents only": [Source("documents", 0.7, PAGES, 60),
                       Source("infographics", 0.3, [(600, 2500), (1000, 4000), (1200, 1600)], 70)],
    "short captions only": [Source("captions", 1.0, COCO, 40)],
    "conversations about several pictures": [
        Source("several", 1.0, [(640, 480), (1024, 768), (336, 336)], 600, (2, 8))],
    "web pages": [Source("pages", 1.0, [(1280, 800), (1280, 1600), (1280, 3000), (1280, 720)], 2200)],
    "text only": [Source("long", 0.5, [], 1100), Source("short", 0.5, [], 300)],
}

BUDGETS = [Budget(8192, 19, 9, 32), Budget(9216, 20, 10, 32), Budget(16384, 36, 12, 32), Budget(24576, 56, 28, 64)]


def draw(mixture: list[Source], count: int, seed: int) -> Needs:
    """Samples of a mixture."""
    rng = np.random.default_rng(seed)
    shares = np.array([source.share for source in mixture])
    sources = rng.choice(len(mixture), count, p=shares / shares.sum())
    positions, tiles, images = (np.zeros(count, np.int64) for _ in range(3))
    for number, source in enumerate(mixture):
        here = np.flatnonzero(sources == number)
        text = np.exp(np.log(source.tokens) + SIGMA * rng.standard_normal(len(here)))
        positions[here] = text.astype(np.int64) + MARKS
        if source.sizes:
            images[here] = rng.integers(source.pictures[0], source.pictures[1] + 1, len(here))
            limit = HD_NUM if source.pictures[1] == 1 else HD_NUM_SEVERAL
            grids = [plan_partition(*size, limit, TILE, True).grid for size in source.sizes]
            owner = np.repeat(here, images[here])
            chosen = rng.integers(0, len(grids), len(owner))
            sizes = np.array([(image_token_count(grid, TOKENS_PER_SIDE), grid.tiles + 1) for grid in grids])
            np.add.at(positions, owner, sizes[chosen, 0])
            np.add.at(tiles, owner, sizes[chosen, 1])
    names = tuple(source.name for source in mixture)
    return Needs(*(values.astype(np.int32) for values in (positions, tiles, images, sources)), names)


def packed_by_source(needs: Needs, budget: Budget) -> float:
    """Goodput of rows whose samples are of one source and kind."""
    rows, groups = 0, needs.sources * 2 + (needs.images > 0)
    for group in np.unique(groups):
        part = needs.take(np.flatnonzero(groups == group))
        rows += len(pack(part.positions, part.tiles, part.images, 0, **budget._asdict()))
    return goodput(COSTS, int(needs.positions.sum()), int(needs.tiles.sum()), rows, budget.seq_length,
                   budget.max_tiles)


def compare(name: str, count: int, seed: int) -> None:
    """Prints the goodput of a mixture."""
    needs = draw(MIXTURES[name], count, seed)
    print(f"\n{name}: mean {needs.positions.mean():.0f} positions and {needs.tiles.mean():.1f} tiles")
    print("seq_length  max_tiles  unpacked  by source   mixed  samples a row  rows without pictures  that do not fit")
    for budget in BUDGETS:
        fits = needs.take(np.flatnonzero(needs.fits(budget)))
        for advice in advise(needs, [budget], COSTS):
            print(f"{budget.seq_length:10d}  {budget.max_tiles:9d}  {unpacked_goodput(fits, budget, COSTS):8.1%}  "
                  f"{packed_by_source(fits, budget):9.1%}  {advice.goodput:6.1%}  {advice.mean_samples:13.2f}  "
                  f"{advice.without_pictures:21.1%}  {advice.left_out:15.1%}")


def time_million(seed: int) -> None:
    """Prints what packing a million samples takes, seconds without and memory with tracing."""
    needs, budget = draw(MIXTURES["reference"], 1_000_000, seed), BUDGETS[2]
    needs = needs.take(np.flatnonzero(needs.fits(budget)))
    arrays = (needs.positions, needs.tiles, needs.images)
    for traced in (False, True):
        if traced:
            tracemalloc.start()
        before, began, busy = _peak(), time.perf_counter(), time.process_time()
        rows = pack(*arrays, 0, **budget._asdict())
        packed, worked = time.perf_counter() - began, time.process_time() - busy
        mix_rows(rows, needs.sources, 0)
        if not traced:
            print(f"\n{len(needs)} samples into {len(rows)} rows: {packed:.1f} s ({worked:.1f} s of the processor), "
                  f"{time.perf_counter() - began - packed:.1f} s more for their order, {_peak() - before:.0f} MB more "
                  "at the peak", end="")
    print(f" ({tracemalloc.get_traced_memory()[1] / 2 ** 20:.0f} MB traced)")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000, help="of a mixture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--million", action="store_true", help="only time packing a million samples")
    arguments = parser.parse_args()
    if not arguments.million:
        for name in MIXTURES:
            compare(name, arguments.samples, arguments.seed)
    time_million(arguments.seed)


if __name__ == "__main__":
    main()
