"""Single samples as the model sees them, encoded as a run encodes them: what is shown is what is learnt."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mindformers_ixc.data.conversations import Conversation
from mindformers_ixc.data.fitting import first_pairs
from mindformers_ixc.data.learning import ALL, with_loss_on
from mindformers_ixc.data.preferences import encode_side
from mindformers_ixc.data.preview_data import Entry, Reader
from mindformers_ixc.errors import DataError, ImageError, VideoError
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.image import Grid, Tiles, plan_partition
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.processing.prompt import IGNORE_INDEX, shift_labels
from mindformers_ixc.processing.stored import StoredFile
from mindformers_ixc.processing.video import BoardSize

# Bytes that the tiles of a sample may take; a sample that no row holds can have any number of pictures.
LARGEST = 1 << 29

# What a position is: of a picture, one that the model learns to predict, or any other.
PICTURE, LEARNT, GIVEN = "picture", "learnt", "given"


@dataclass(frozen=True)
class Board:
    """A picture as it is cut.

    Attributes:
        path: of its file.
        size: (width, height) of the picture, or of the board of a video's frames.
        resized: of the picture on the padded board; `None` of a video.
        grid: its local tiles.
        positions: it takes.
        first: number of its global view among the sample's tiles; its local tiles follow.
        pixels: uint8 `(rows * P, columns * P, 3)`, put together of the local tiles that the model gets.
    """

    path: Path | StoredFile
    size: tuple[int, int]
    resized: tuple[int, int] | None
    grid: Grid
    positions: int
    first: int
    pixels: np.ndarray

    @property
    def video(self) -> bool:
        """Whether it is the board of a video."""
        return isinstance(self.size, BoardSize)


@dataclass(frozen=True)
class Stretch:
    """Neighbouring positions of one kind.

    Attributes:
        kind: `PICTURE`, `LEARNT` or `GIVEN`.
        first: position.
        ids: of its tokens.
    """

    kind: str
    first: int
    ids: list[int]


@dataclass(frozen=True)
class Seen:
    """A conversation as the model sees it.

    Attributes:
        encoded: what a run encodes.
        stretches: its positions by kind, each a picture's or of one kind of text.
    """

    encoded: EncodedSample
    stretches: list[Stretch]

    @property
    def positions(self) -> int:
        """Of the sequence."""
        return len(self.encoded.input_ids)

    @property
    def supervised(self) -> int:
        """Positions whose target carries loss, as a row counts them."""
        return int((shift_labels(self.encoded.labels) != IGNORE_INDEX).sum())


@dataclass(frozen=True)
class Look:
    """A sample to be shown.

    Attributes:
        entry: the sample.
        seen: its conversation; of a pair both; empty if it cannot be encoded.
        boards: its pictures, one after the other.
        problem: why it cannot be encoded.
    """

    entry: Entry
    seen: list[Seen] = field(default_factory=list)
    boards: list[Board] = field(default_factory=list)
    problem: str = ""


def look(reader: Reader, entry: Entry) -> Look:
    """Encodes an entry as a run does; of what is too long for a row, all of it if no part of it fits."""
    sides = [first_pairs(side, entry.kept) if 0 < entry.kept < entry.rounds else side for side in entry.sides]
    images = reader.processor.image_processor
    views, tile = len(sides[0].images), 3 * images.image_size ** 2
    if not entry.kept and (entry.tiles + 4 * views) * tile > LARGEST:
        return Look(entry, problem=f"Its {views} pictures have {entry.tiles} tiles, too many to be shown.")
    try:
        cut = images.cut(list(sides[0].images), reader.hd_num, training=True, where=entry.where)
        if len(sides) > 1:
            encoded = [encode_side(side, reader.processor, reader.hd_num, cut) for side in sides]
        else:
            encoded = [_encode_alone(sides[0], reader, cut)]
    except (DataError, ImageError, VideoError) as error:
        return Look(entry, problem=str(error))
    return Look(entry, [Seen(one, list(_stretches(one, reader.processor))) for one in encoded],
                list(_boards(reader, sides[0], encoded[0])))


def _encode_alone(side: Conversation, reader: Reader, cut: tuple[Tiles, list[Grid]]) -> EncodedSample:
    """A conversation that is no side of a pair."""
    encoded = reader.processor.encode_conversation(side.turns, side.images, side.where, reader.hd_num, cut)
    return with_loss_on(encoded, reader.loader.get("loss_on") or ALL, side.weights, side.where)


def _stretches(encoded: EncodedSample, processor: Processor) -> Iterator[Stretch]:
    """Positions by kind; pictures that stand side by side are told apart by their lengths."""
    kinds = np.where(encoded.image_mask == 1, 2, (encoded.labels != IGNORE_INDEX).astype(int))
    counts = iter([processor.image_processor.token_count(grid) for grid in encoded.grids])
    ids, first = encoded.input_ids.tolist(), 0
    while first < len(ids):
        kind = int(kinds[first])
        end = first + next(counts) if kind == 2 else \
            first + int(np.argmax(np.append(kinds[first:] != kind, True)))
        yield Stretch((GIVEN, LEARNT, PICTURE)[kind], first, ids[first:end])
        first = end


def _boards(reader: Reader, sample: Conversation, encoded: EncodedSample) -> Iterator[Board]:
    """Pictures of a sample, put together again of the tiles that the model gets."""
    images, first = reader.processor.image_processor, 0
    for path, size, grid in zip(sample.images, sample.sizes, encoded.grids):
        side, local = images.image_size, encoded.pictures.local[first + 1:first + 1 + grid.tiles]
        shaped = local.reshape(grid.rows, grid.columns, 3, side, side).transpose(0, 3, 1, 4, 2)
        pixels = shaped.reshape(grid.rows * side, grid.columns * side, 3)
        resized = None if isinstance(size, BoardSize) else plan_partition(
            *size, reader.hd_num, side, images.training_transform == "training").resized
        yield Board(path, size, resized, grid, images.token_count(grid), first, pixels)
        first += grid.tiles + 1
