"""Several short conversations in one sequence.

Each keeps its own positions, counted from 0, and sees only itself; its labels stay inside it. So a packed batch has the
loss of its conversations unpacked, and only the padding is gone.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mindformers_ixc.processing.processor import EncodedSample


def join_samples(samples: Sequence[EncodedSample], seq_length: int, max_tiles: int,
                 pad_token_id: int) -> dict[str, np.ndarray]:
    """Columns of a batch (`mindformers_ixc.data.batch`) for encoded samples in one sequence.

    Args:
        samples: in the order they take.
        seq_length: positions L.
        max_tiles: tiles T.
        pad_token_id: id of padded positions.

    Returns:
        The ordinary columns and `position_ids`, `segment_ids`.

    Raises:
        PromptError: when they do not fit together.
    """
    merged = samples[0] if len(samples) == 1 else EncodedSample(
        np.concatenate([sample.input_ids for sample in samples]),
        np.concatenate([_own_labels(sample) for sample in samples]),
        np.concatenate([sample.image_mask for sample in samples]),
        [grid for sample in samples for grid in sample.grids],
        np.concatenate([sample.pixel_values for sample in samples]), samples[0].tokens_per_side)
    columns = merged.pad(seq_length, max_tiles, pad_token_id)
    lengths = [len(sample.input_ids) for sample in samples]
    positions, segments = np.zeros(seq_length, np.int32), np.zeros(seq_length, np.int32)
    positions[:sum(lengths)] = np.concatenate([np.arange(length) for length in lengths])
    segments[:sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    rest = seq_length - sum(lengths)
    positions[sum(lengths):] = np.arange(rest)
    return {**columns, "position_ids": positions, "segment_ids": segments}


def _own_labels(sample: EncodedSample) -> np.ndarray:
    """Labels whose first has none: once shifted, no sample would have the next one's first token to predict."""
    labels = sample.labels.copy()
    labels[0] = -100
    return labels
