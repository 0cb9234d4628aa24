"""The arrays of a sample, and their padding to the fixed shapes of a batch."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mindformers_ixc.errors import PromptError
from mindformers_ixc.processing.image import Grid, Tiles, image_token_rows
from mindformers_ixc.processing.prompt import IGNORE_INDEX, shift_labels


@dataclass
class EncodedSample:
    """A sample before it is padded to fixed shapes.

    Attributes:
        input_ids: int32 `(n,)`; image positions hold the padding id.
        labels: int32 `(n,)`, not shifted, -100 where there is no loss.
        image_mask: int32 `(n,)`, 1 on image positions.
        grids: tiles of each image.
        pictures: t tiles: for each image its global view, then its tiles. Given as float32 `(t, 3, P, P)`, normalised,
            they are all kept like global views.
        tokens_per_side: tokens along a side of a tile.
        table_index: int32 `(n,)`, row of a vision table of t tiles for each image position, where that is given and not
            worked out from the grids.
        weights: float32 `(n,)`, how much each label counts; `None` where all count 1.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    image_mask: np.ndarray
    grids: list[Grid]
    pictures: Tiles
    tokens_per_side: int
    table_index: np.ndarray | None = None
    weights: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pictures, Tiles):
            self.pictures = Tiles.of_normalised(np.asarray(self.pictures, np.float32))

    @property
    def tiles(self) -> int:
        """Tiles of all images, global views included."""
        return len(self.pictures)

    @property
    def pixel_values(self) -> np.ndarray:
        """The tiles normalised, float32 `(t, 3, P, P)`, as inference takes them; computed anew each time."""
        return self.pictures.normalised()

    def vision_index(self, max_tiles: int) -> np.ndarray:
        """Row of the vision table for each position, int32 `(n,)`; 0 at text positions."""
        if self.table_index is not None:     # the separators' rows move with the table's end
            tokens = self.tokens_per_side ** 2
            end = self.tiles * tokens
            moved = self.table_index - end + max_tiles * tokens
            return np.where(self.table_index >= end, moved, self.table_index).astype(np.int32)
        index, first, rows = np.zeros(len(self.input_ids), np.int32), 0, []
        for grid in self.grids:
            rows.append(image_token_rows(grid, first, self.tokens_per_side, max_tiles))
            first += grid.tiles + 1
        if rows:
            index[self.image_mask == 1] = np.concatenate(rows)
        return index

    def pad(self, seq_length: int, max_tiles: int, max_images: int, pad_token_id: int) -> dict[str, np.ndarray]:
        """Pads to the fixed shapes of a batch.

        Args:
            seq_length: positions L.
            max_tiles: tiles T.
            max_images: global views I.
            pad_token_id: id of padded positions.

        Returns:
            The columns of `mindformers_ixc.data.batch`; `loss_weights` only if there are weights.

        Raises:
            PromptError: when the sample is larger than the shapes, in positions, tiles or pictures.
        """
        n, tiles, views = len(self.input_ids), self.tiles, len(self.pictures.views)
        if n > seq_length or tiles > max_tiles:
            raise PromptError(f"A sample of {n} positions and {tiles} tiles does not fit seq_length {seq_length} and "
                              f"max_tiles {max_tiles}.")
        if views > max_images:
            raise PromptError(f"A sample of {views} pictures does not fit max_images {max_images}; raise "
                              "train_dataset.max_images and model.model_config.max_images.")
        rest = seq_length - n
        index = self.vision_index(max_tiles)
        columns = {} if self.weights is None else {
            "loss_weights": np.pad(self.weights[1:], (0, rest + 1)).astype(np.float32)}      # shifted as the labels are
        return {
            **columns,
            "input_ids": np.pad(self.input_ids, (0, rest), constant_values=pad_token_id).astype(np.int32),
            "labels": np.pad(shift_labels(self.labels), (0, rest), constant_values=IGNORE_INDEX).astype(np.int32),
            "pixel_values": _lengthened(self.pictures.local, max_tiles),
            "global_views": _lengthened(self.pictures.views, max_images),
            "view_index": _lengthened(self.pictures.view_index, max_tiles),
            "vision_index": np.pad(index, (0, rest)).astype(np.int32),
            "image_mask": np.pad(self.image_mask, (0, rest)).astype(np.int32),
        }


def _lengthened(rows: np.ndarray, count: int) -> np.ndarray:
    """`rows` with zeros behind them, `count` in all."""
    if len(rows) == count:
        return rows
    result = np.zeros((count, *rows.shape[1:]), rows.dtype)
    result[:len(rows)] = rows
    return result
