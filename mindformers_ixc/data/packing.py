"""Several short conversations in one sequence.

Each keeps its own positions, counted from 0, and sees only itself; its labels stay inside it. So a packed batch has the
loss of its conversations unpacked, and only the padding is gone.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mindformers_ixc.config import default_max_images
from mindformers_ixc.errors import PromptError
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.image import Tiles


def join_samples(samples: Sequence[EncodedSample], seq_length: int, max_tiles: int, pad_token_id: int,
                 max_images: int | None = None, max_segments: int | None = None) -> dict[str, np.ndarray]:
    """Columns of a batch (`mindformers_ixc.data.batch`) for encoded samples in one sequence.

    Args:
        samples: in the order they take.
        seq_length: positions L.
        max_tiles: tiles T.
        pad_token_id: id of padded positions.
        max_images: global views I; by default half the tiles.
        max_segments: segments S that the sequence is cut into, see `segment_ends`; without it a sequence is a single
            sample and has none.

    Returns:
        The ordinary columns, and with `max_segments` also `position_ids` and `segment_ends`.

    Raises:
        PromptError: when they do not fit together; see `segment_ends`.
    """
    images = max_images or default_max_images(max_tiles)
    if max_segments is None:
        if len(samples) != 1:
            raise PromptError(f"A sequence of {len(samples)} samples needs max_segments, the segments it is cut into; "
                              "without packing it holds a single sample.")
        return samples[0].pad(seq_length, max_tiles, images, pad_token_id)
    ends = segment_ends([len(sample.input_ids) for sample in samples], seq_length, max_segments)
    merged = samples[0] if len(samples) == 1 else EncodedSample(
        np.concatenate([sample.input_ids for sample in samples]),
        np.concatenate([_own_labels(sample) for sample in samples]),
        np.concatenate([sample.image_mask for sample in samples]),
        [grid for sample in samples for grid in sample.grids],
        Tiles.joined([sample.pictures for sample in samples]), samples[0].tokens_per_side,
        weights=_joined_weights(samples))
    columns = merged.pad(seq_length, max_tiles, images, pad_token_id)
    lengths = np.diff(ends, prepend=0)
    positions = np.arange(seq_length) - np.repeat(ends - lengths, lengths)
    return {**columns, "position_ids": positions.astype(np.int32), "segment_ends": ends}


def segment_ends(lengths: Sequence[int], seq_length: int, max_segments: int) -> np.ndarray:
    """Where the segments of a packed sequence end: always as many, none of them empty, the last at the very end.

    Ascend's fused attention takes the ends as a tensor of fixed shape and no segment of length 0, so the padding behind
    the samples is cut into what is left of the S segments: one position each, the last one all the rest.

    Args:
        lengths: positions of each sample.
        seq_length: positions L.
        max_segments: segments S.

    Returns:
        int32 `(S,)`, strictly increasing, the last one L.

    Raises:
        PromptError: for no sample or an empty one, for samples longer than the sequence together, for more samples than
            segments (one segment is the padding's, if there is any), and for too little padding to fill the segments
            that are left.
    """
    used, rest = sum(lengths), max_segments - len(lengths)
    if not len(lengths) or min(lengths) < 1:
        raise PromptError(f"A packed sequence has samples of {list(lengths)} positions; it needs one sample at least, "
                          "and none may be empty.")
    if used > seq_length:
        raise PromptError(f"Samples of {list(lengths)} positions are {used} together and do not fit seq_length "
                          f"{seq_length}.")
    padding = seq_length - used
    if rest < (padding > 0):
        raise PromptError(f"A packed sequence has {len(lengths)} samples and {padding} positions of padding, but "
                          f"max_segments is {max_segments}, one of which is the padding's if there is any; raise "
                          "max_segments or pack fewer samples together.")
    if padding < rest:
        raise PromptError(f"A packed sequence has {len(lengths)} samples and {padding} positions of padding, too few "
                          f"for the {rest} segments that are left of max_segments {max_segments}, each of which needs "
                          "one; lower max_segments or leave more padding.")
    fill = [*range(used + 1, used + rest), seq_length] if rest else []
    return np.array([*np.cumsum(lengths), *fill], np.int32)


def _joined_weights(samples: Sequence[EncodedSample]) -> np.ndarray | None:
    """Weights of samples side by side, if they have some; where the first label of one goes, its weight goes too."""
    weights = [np.append(np.float32(0), sample.weights[1:]) for sample in samples if sample.weights is not None]
    return np.concatenate(weights) if weights else None


def _own_labels(sample: EncodedSample) -> np.ndarray:
    """Labels whose first has none: once shifted, no sample would have the next one's first token to predict."""
    labels = sample.labels.copy()
    labels[0] = -100
    return labels
