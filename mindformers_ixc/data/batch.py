"""What crosses from host to device: the columns of a batch, documented here and nowhere else.

With B samples, L = `seq_length` positions, T = `max_tiles` tiles of P x P pixels and k x k tokens a tile, and
I = `max_images` pictures (letters as in `mindformers_ixc.models`):

| column | type | shape | holds |
|---|---|---|---|
| input_ids | int32 | (B, L) | token ids; the padding id at image positions and in the padding on the right |
| labels | int32 | (B, L) | already shifted: the target of each position, -100 where there is no loss |
| pixel_values | uint8 | (B, T, 3, P, P) | pixels of the local tiles, zeros in all other slots |
| global_views | float32 | (B, I, 3, P, P) | normalised global views of the pictures in their order, then zeros |
| view_index | int32 | (B, T) | 0: the slot is a local tile, i > 0: it is global view i - 1 of the sample |
| vision_index | int32 | (B, L) | row of the vision table each image position takes; 0 elsewhere |
| image_mask | int32 | (B, L) | 1 on image positions |

Of each image the global view comes first, then its tiles row by row. A local tile travels as bytes, and the network
normalises it (`mindformers_ixc.models.pixels`); a global view is a bicubic resize of the normalised picture and fits no
byte. `Tiles` of `mindformers_ixc.processing.image` holds the three columns of one sample.

The vision table of a sample has T * k * k + 2 rows: those of its tiles in order, then sub_GN, then glb_GN.

A row of n packed conversations has S - n positions of padding at least (`mindformers_ixc.data.packing.segment_ends`):
no segment is empty, their ends rise strictly and the last one is L.

Columns that a run asks for in `input_columns`:

| column | type | shape | holds |
|---|---|---|---|
| position_ids | int32 | (B, L) | position within its conversation; starts again at 0 where samples are packed |
| segment_ends | int32 | (B, S) | where the row's S = `max_segments` segments end: packed conversations, then padding |
| noise_seed | int32 | (B,) | seed of the dropout noise, from the run's seed and the row's place in the run |
| loss_weights | float32 | (B, L) | how much each position's loss counts; 0 where there is no label |
| lengths | int32 | (B, L) | positions of the conversation that a position is of; 0 in the padding |
| source | int32 | (B, L) | number of each position's source, for losses by source; any in the padding |

Preference pairs (`IXC25PreferenceDataset`) have input_ids, labels, vision_index and image_mask as (B, 2, L), the chosen
answer first, one set of images for both, and where they were computed before

| column | type | shape | holds |
|---|---|---|---|
| reference_logps | float32 | (B, 2) | log-probability of either answer under the reference model |

or, for a reward model, whose sequences end with the reward token,

| column | type | shape | holds |
|---|---|---|---|
| score_positions | int32 | (B, 2, L) | 2 at the reward token, 1 at all positions before it, 0 in the padding |

Groups of N sampled answers to a prompt (`IXC25GroupDataset`) have the same four columns as (B, N, L), and

| column | type | shape | holds |
|---|---|---|---|
| rewards | float32 | (B, N) | reward of each answer |
| matches | float32 | (B, N) | 1 where it is exactly what was expected, else 0 |
| sampled_logps | float32 | (B, N, L) | log-probability of each position's target when it was sampled; 0 without one |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from mindformers_ixc.config import ModelConfig

PIXEL_COLUMNS = ("pixel_values", "global_views", "view_index")
BATCH_COLUMNS = ("input_ids", "labels", *PIXEL_COLUMNS, "vision_index", "image_mask")
PACKING_COLUMNS = ("position_ids", "segment_ends")
WEIGHTS_COLUMN = "loss_weights"
# What the noise on embeddings is made of.
NOISE_COLUMNS = ("noise_seed", "lengths")
EXTRA_COLUMNS = (*PACKING_COLUMNS, *NOISE_COLUMNS, "source", WEIGHTS_COLUMN)

# Columns of preference pairs and groups that have the answers as a second axis.
ANSWER_COLUMNS = ("input_ids", "labels", "vision_index", "image_mask")
# One more of theirs, where the reference's log-probabilities were computed before.
REFERENCE_COLUMN = "reference_logps"
# One more where scores are learnt.
SCORE_COLUMN = "score_positions"
PAIR_COLUMNS = (REFERENCE_COLUMN, SCORE_COLUMN)
# Those of groups of sampled answers.
REWARDS_COLUMN, MATCH_COLUMN, LOGPS_COLUMN = GROUP_COLUMNS = ("rewards", "matches", "sampled_logps")


def column_ranks(columns: Iterable[str], pairs: bool = False) -> list[int]:
    """Axes of some columns.

    Args:
        columns: their names.
        pairs: whether they are those of preference pairs.
    """
    return [len(shape) + 1 for _, shape in column_shapes(ModelConfig(), columns, 2 if pairs else 1).values()]


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


def column_shapes(config: ModelConfig, columns: Iterable[str],
                  answers: int = 1) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of a row in some columns, in their order.

    Args:
        config: lengths and sizes.
        columns: names; without `global_views` the views are among the `pixel_values`, which are float32 then.
        answers: of a row; 2 for preference pairs, N for groups, whose texts have one axis more.
    """
    columns, vision, length = tuple(columns), config.vision_config, config.seq_length
    texts = (length,) if answers == 1 else (answers, length)
    picture = (3, vision.image_size, vision.image_size)
    table: dict[str, tuple[str, tuple[int, ...]]] = {
        **dict.fromkeys(ANSWER_COLUMNS, ("int32", texts)),
        "pixel_values": ("uint8" if "global_views" in columns else "float32", (config.max_tiles, *picture)),
        "global_views": ("float32", (config.max_images, *picture)), "view_index": ("int32", (config.max_tiles,)),
        "position_ids": ("int32", (length,)), "segment_ends": ("int32", (config.max_segments,)),
        "noise_seed": ("int32", ()), "source": ("int32", (length,)), "lengths": ("int32", (length,)),
        WEIGHTS_COLUMN: ("float32", (length,)), REFERENCE_COLUMN: ("float32", (answers,)),
        SCORE_COLUMN: ("int32", texts), **dict.fromkeys((REWARDS_COLUMN, MATCH_COLUMN), ("float32", (answers,))),
        LOGPS_COLUMN: ("float32", texts)}
    return {name: table[name] for name in columns}
