"""What crosses from host to device: the columns of a batch, documented here and nowhere else.

With B samples, L = `seq_length` positions, T = `max_tiles` tiles of P x P pixels and k x k tokens a tile (letters as in
`mindformers_ixc.models`):

| column | type | shape | holds |
|---|---|---|---|
| input_ids | int32 | (B, L) | token ids; the padding id at image positions and in the padding on the right |
| labels | int32 | (B, L) | already shifted: the target of each position, -100 where there is no loss |
| pixel_values | float32 | (B, T, 3, P, P) | normalised tiles, zeros after them |
| vision_index | int32 | (B, L) | row of the vision table each image position takes; 0 elsewhere |
| image_mask | int32 | (B, L) | 1 on image positions |

Of each image the global view comes first, then its tiles row by row. The vision table of a sample has T * k * k + 2
rows: those of its tiles in order, then sub_GN, then glb_GN.

Columns that a run asks for in `input_columns`:

| column | type | shape | holds |
|---|---|---|---|
| position_ids | int32 | (B, L) | position within its conversation; starts again at 0 where samples are packed |
| segment_ids | int32 | (B, L) | number of the packed conversation, from 1; 0 in the padding |
| noise_seed | int32 | (B,) | seed of the dropout noise, from the run's seed and the row's place in the run |
| source | int32 | (B, L) | number of each position's source, for losses by source; any in the padding |

Preference pairs (`IXC25PreferenceDataset`) have input_ids, labels, vision_index and image_mask as (B, 2, L), the chosen
answer first, one set of images for both, and where they were computed before

| column | type | shape | holds |
|---|---|---|---|
| reference_logps | float32 | (B, 2) | log-probability of either answer under the reference model |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

BATCH_COLUMNS = ("input_ids", "labels", "pixel_values", "vision_index", "image_mask")
PACKING_COLUMNS = ("position_ids", "segment_ids")
EXTRA_COLUMNS = (*PACKING_COLUMNS, "noise_seed", "source")


def full_batches(items: Iterable, size: int,
                 pad: Callable[[Any], Any] = lambda last: last) -> Iterator[tuple[list, int]]:
    """Batches of one size, so that one graph computes all of them.

    Args:
        items: taken one batch after another.
        size: items of a batch.
        pad: makes what the last batch is filled up with from its last item; by default that item.

    Yields:
        A batch, and how many of its items are real; the others stand behind them.
    """
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch + [pad(batch[-1])] * (size - len(batch)), len(batch)
