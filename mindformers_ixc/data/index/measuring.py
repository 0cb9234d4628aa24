"""What single samples need: sizes of their pictures, and positions and tiles of their parts."""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindformers_ixc.data.conversations import Conversation, ConversationReader
from mindformers_ixc.data.index.kinds import KINDS
from mindformers_ixc.data.preferences import Pair
from mindformers_ixc.data.records.base import Place
from mindformers_ixc.errors import DataError, ImageError, PromptError, VideoError
from mindformers_ixc.processing.pictures import image_size, load_image
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.processing.stored import StoredFile
from mindformers_ixc.processing.video import BoardSize, board_size, is_video
from mindformers_ixc.reading import reading

# Pictures whose sizes are remembered: many samples may ask about one, mostly in a row.
REMEMBERED = 65536

# A size as it is kept: width, height, and whether it is a video's board.
Size = tuple[int, int, int]


class Measured(NamedTuple):
    """What was found of some samples, one after the other.

    Attributes:
        digests: of what each sample says and of the names of its files, int64 `(n,)`; equal ones are the same sample.
        pictures: number of each sample's pictures and videos, int32 `(n,)`.
        sizes: of the pictures, int32 `(p, 3)`: width, height, and 1 for a video's board.
        pairs: number of each sample's parts (`kinds.Kind`), int32 `(n,)`; 0 of one that cannot be used.
        needs: of the parts of each sample, int32 `(r, 3)`: positions, tiles and pictures of the first round, of the
            first two, and so on; of a preference pair those of either side.
        unusable: samples with a picture that cannot be partitioned: (number, sentence).
        errors: what is wrong with samples that cannot be read: (number, sentence).
        files: path, bytes and time of the last change in ns of the pictures that are files, each once.
        captions: whether some are captions, whose questions are chosen by the seed.
        lacking: number of preference pairs without reference log-probabilities.
    """

    digests: np.ndarray
    pictures: np.ndarray
    sizes: np.ndarray
    pairs: np.ndarray
    needs: np.ndarray
    unusable: list[tuple[int, str]]
    errors: list[tuple[int, str]]
    files: list[tuple[str, int, int]]
    captions: bool = False
    lacking: int = 0


class Measurer:
    """Measures samples of a source.

    Args:
        reader: of the source.
        processor: counts positions and tiles.
        hd_num: tiles of a picture at most.
        decode: whether the pixels of pictures are read too, which finds damage that headers do not show.
    """

    def __init__(self, reader: ConversationReader, processor: Processor, hd_num: int, decode: bool = False):
        self.reader, self.processor, self.hd_num = reader, processor, hd_num
        self._look = partial(_size, exif=processor.image_processor.exif, decode=decode)
        # no method is remembered: it would keep the reader, and the file that it reads, until garbage is collected
        self._size_of_file = lru_cache(REMEMBERED)(partial(_size_and_state, self._look))

    def measure(self, places: np.ndarray, first: int) -> Measured:
        """Measures samples.

        Args:
            places: of the samples, int64 `(n, 3)`.
            first: number of the first one in its source.
        """
        pictures, pairs = np.zeros(len(places), np.int32), np.zeros(len(places), np.int32)
        digests = np.zeros(len(places), np.int64)
        sizes, needs = list[Size](), list[tuple[int, int, int]]()
        unusable, errors, lacking = list[tuple[int, str]](), list[tuple[int, str]](), 0
        files, before = dict[Path, tuple[int, int]](), self.reader.asked
        for number, place in enumerate(map(Place._make, places.tolist())):
            try:
                sample = self.read(first + number, place, files)
            except DataError as error:
                errors.append((first + number, str(error)))
                continue
            try:
                parts = self.parts(sample)
            except ImageError as error:
                unusable.append((first + number, str(error)))
                parts = []
            except PromptError as error:         # by the public rule, <ImageHere> in an answer is a place
                errors.append((first + number, str(error)))
                continue
            digests[number] = _digest(sample)
            lacking += isinstance(sample, Pair) and sample.logps is None
            pictures[number], pairs[number] = len(sample.sizes), len(parts)
            sizes += [(*size, int(isinstance(size, BoardSize))) for size in sample.sizes]
            needs += parts
        return Measured(digests, pictures, np.array(sizes, np.int32).reshape(-1, 3), pairs,
                        np.array(needs, np.int32).reshape(-1, 3), unusable, errors,
                        [(str(path), *state) for path, state in files.items()], self.reader.asked > before, lacking)

    def read(self, index: int, place: Place, files: dict[Path, tuple[int, int]] | None = None) -> Conversation:
        """A sample with the sizes of its pictures.

        Args:
            index: its number in the source.
            place: where it lies.
            files: gets the state of the pictures that are files.

        Raises:
            DataError: for what is wrong with it, or with a picture by its header.
        """
        sample = self.reader.read(index, place)
        self._fill_in_sizes(sample, {} if files is None else files)
        return sample

    def parts(self, sample: Conversation) -> list[tuple[int, int, int]]:
        """(positions, tiles, pictures) of each part of a sample (`kinds.Kind`).

        Raises:
            ImageError: for a picture that cannot be partitioned.
        """
        found, known = [], dict[Any, int]()
        for part in KINDS[self.reader.options.kind].parts(sample):
            needed = self.processor.conversation_length(part.turns, part.sizes, self.hd_num, sample.where, part.images,
                                                        known)
            found.append((*needed, len(part.images)))
        return found

    def _fill_in_sizes(self, sample: Conversation, files: dict[Path, tuple[int, int]]) -> None:
        """Looks at the pictures of a sample.

        Raises:
            DataError: for one that cannot be opened, or whose header shows that it cannot be used.
        """
        try:
            for source in sample.images:
                if isinstance(source, StoredFile):
                    sample.sizes.append(self._look(source))
                else:
                    size, files[source] = self._size_of_file(source)
                    sample.sizes.append(size)
        except (ImageError, VideoError, OSError) as error:
            raise DataError(f"{sample.where}, field image: {error}") from error


def _size(source: Path | StoredFile, exif: str, decode: bool) -> tuple[int, int]:
    if is_video(source):
        return board_size(source)
    return load_image(source, exif=exif).size if decode else image_size(source, exif)


def _size_and_state(look: Callable[[Path], tuple[int, int]], path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    return look(path), file_state(path)


def _digest(sample: Conversation) -> int:
    # of files inside the source, the name that they have there, however the source itself is named
    names = [image.name.removeprefix(sample.source) for image in sample.images]
    said = [sample.turns, sample.rejected, sample.logps] if isinstance(sample, Pair) else \
        [sample.turns, sample.weights] if sample.weights else sample.turns
    text = json.dumps([said, names], ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def is_the_same(sample: Conversation, digest: int) -> bool:
    """Whether a sample says what it said, and names the files that it named, when it was measured."""
    return _digest(sample) == digest


def file_state(path: str | os.PathLike) -> tuple[int, int]:
    """Bytes of a file and the time of its last change in ns."""
    with reading(path):
        state = os.stat(path)
    return state.st_size, state.st_mtime_ns


def as_sizes(rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Sizes as `Conversation` has them, of `Measured.sizes`."""
    return [BoardSize(width, height) if board else (width, height) for width, height, board in rows]
