"""What a request may take over from earlier ones, by what it is made of: its pictures, and how its prompt begins.

The rows that a picture takes in a sequence depend on its tiles only, so they are kept by a hash of these, in which the
partition shows. Keys and values of a position depend on everything up to it, so they are kept in blocks of `BLOCK`
positions under a chain of hashes, each made of the one before it and of the block's token ids and pictures. In front of
the chain stands whatever else makes a difference: the model, the dtype, the mode (its task LoRAs act on every position)
and the base of the rotary embedding. Beyond the trained length that base changes with the length of the prompt, so the
keys of a shorter prompt are not found there, and must not be.
"""
from __future__ import annotations

import hashlib
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mindformers_ixc.generation.store import Store
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.rotary import rotary_base
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.image import Tiles, image_token_count

# Positions of a block. What is taken over ends with a whole one, so at most 15 positions too many are computed anew.
BLOCK = 16

# Bytes of a model up to which every number is looked at to see whether its weights have changed, once a request: 22 ms
# at most, on one core of an EPYC. Of a larger one it is so many numbers of each parameter.
WHOLE_BYTES, SAMPLED = 64 << 20, 16


class Picture(NamedTuple):
    """A picture of a sample.

    Attributes:
        digest: of its tiles and how they are laid out.
        tiles: its first tile and the one behind its last, counted over all tiles.
        rows: its first image position and the one behind its last, counted over all image positions.
    """

    digest: bytes
    tiles: tuple[int, int]
    rows: tuple[int, int]


class Prompt(NamedTuple):
    """A prompt whose pictures have been hashed, which takes a millisecond a tile of 560 pixels, once."""

    sample: EncodedSample
    pictures: list[Picture]

    @classmethod
    def of(cls, sample: EncodedSample) -> Prompt:
        """A sample as a prompt."""
        return cls(sample, pictures_of(sample))

    def __len__(self) -> int:
        return len(self.sample.input_ids)

    def without_pixels(self) -> Prompt:
        """The same once it has been computed: nobody needs its tiles any more, which are most of it."""
        return Prompt(replace(self.sample, pictures=Tiles.none(self.sample.pictures.side)), self.pictures)


def pictures_of(sample: EncodedSample) -> list[Picture]:
    """The pictures of a sample, in order; those of one whose table was given count as one."""
    count = int(sample.image_mask.sum())
    if not count:
        return []
    if sample.table_index is not None:
        layout = sample.table_index[sample.image_mask == 1].tobytes()
        return [Picture(_digest(sample.pictures, 0, sample.tiles, layout), (0, sample.tiles), (0, count))]
    found, tile, row = [], 0, 0
    for grid in sample.grids:
        next_tile, next_row = tile + grid.tiles + 1, row + image_token_count(grid, sample.tokens_per_side)
        layout = repr((*grid, sample.tokens_per_side)).encode()
        found.append(Picture(_digest(sample.pictures, tile, next_tile, layout), (tile, next_tile), (row, next_row)))
        tile, row = next_tile, next_row
    return found


def _digest(tiles: Tiles, first: int, end: int, layout: bytes) -> bytes:
    """Hash of some tiles, their kinds and pixels, and of their layout."""
    found = hashlib.blake2b(layout, digest_size=16)
    for slot in range(first, end):
        view = int(tiles.view_index[slot])
        found.update(b"view" if view else b"tile")
        found.update(np.ascontiguousarray(tiles.views[view - 1] if view else tiles.local[slot]).data)
    return found.digest()


def without_others(sample: EncodedSample, kept: Sequence[int], pictures: Sequence[Picture]) -> EncodedSample:
    """The pictures with the numbers `kept` alone, as a sample without text."""
    if len(kept) == len(pictures):
        return sample
    chosen = [pictures[number] for number in kept]
    tiles = [_tiles_between(sample.pictures, *one.tiles) for one in chosen]
    ones = np.ones(sum(one.rows[1] - one.rows[0] for one in chosen), np.int32)
    return replace(sample, input_ids=ones, labels=ones, image_mask=ones, pictures=Tiles.joined(tiles),
                   grids=[sample.grids[number] for number in kept])


def _tiles_between(tiles: Tiles, first: int, end: int) -> Tiles:
    index = tiles.view_index[first:end]
    used = index[index > 0]
    low = int(used.min()) - 1 if len(used) else 0
    return Tiles(tiles.local[first:end], tiles.views[low:low + len(used)], np.where(index > 0, index - low, 0))


def weights_mark(parameters: Iterable[Any]) -> bytes:
    """What changes with the weights of MindSpore's parameters.

    Of at most `WHOLE_BYTES` all is seen: any number that becomes another one, and rows that change places. Of a larger
    model a few numbers of each parameter are looked at. That sees what changes all of a parameter, as training and
    loading do; it does not see one row of an embedding that was written over: who does that says so
    (`InferenceEngine.reset`).
    """
    parameters, found = list(parameters), hashlib.blake2b(digest_size=16)
    is_small = sum(parameter.nbytes for parameter in parameters) <= WHOLE_BYTES
    for parameter in parameters:
        values = parameter.asnumpy().reshape(-1)
        if is_small:
            found.update(zlib.crc32(np.ascontiguousarray(values).view(np.uint8).data).to_bytes(4, "little"))
        else:
            found.update(values[::max(1, len(values) // SAMPLED)].tobytes())
    return found.digest()


class Reuse:
    """What one model takes from a store and gives to it.

    Args:
        store: may be that of other models too.
        config: of the model.

    Attributes:
        identity: tells the model, with the weights it has now, from all others of the process.
    """

    def __init__(self, store: Store, config: IXC25Config):
        self.store, self.config = store, config
        self.identity = self.mark = b""
        self.renew()

    def renew(self) -> None:
        """Says that the weights change: nothing of before is found from now on, and none of it stays."""
        if self.identity:
            self.store.forget(self.identity)
        self.identity = uuid.uuid4().bytes

    def notice(self, parameters: Iterable[Any]) -> bool:
        """Whether the weights are others than when this was asked last; then nothing of before is found."""
        mark = weights_mark(parameters)
        if mark == self.mark:
            return False
        self.mark = mark
        self.renew()
        return True

    def image_rows(self, prompt: Prompt, start: int,
                   encode: Callable[[EncodedSample], np.ndarray]) -> np.ndarray:
        """Embeddings of a prompt's image positions from the position `start` on, `(N, D)`.

        Args:
            prompt: whose; it has image positions there.
            start: position that the first one asked for is not before.
            encode: gives the embeddings of all image positions of a sample.
        """
        sample, pictures = prompt.sample, prompt.pictures
        before = int(sample.image_mask[:start].sum())
        wanted = [number for number, one in enumerate(pictures) if one.rows[1] > before]
        known = {number: self.picture(pictures[number]) for number in wanted}
        rows = {number: one for number, one in known.items() if one is not None}
        missing = [number for number in wanted if number not in rows]
        if missing:
            new, first = encode(without_others(sample, missing, pictures)), 0
            for number in missing:
                end = first + pictures[number].rows[1] - pictures[number].rows[0]
                rows[number] = new[first:end].copy()
                self.keep_picture(pictures[number], rows[number])
                first = end
        found = np.concatenate([rows[number] for number in wanted])
        return found[before - pictures[wanted[0]].rows[0]:]

    def picture(self, picture: Picture) -> np.ndarray | None:
        """Embeddings of a picture that is known, `(N, D)`."""
        return self.store.get(self._picture_key(picture))

    def keep_picture(self, picture: Picture, rows: np.ndarray) -> None:
        """Keeps the embeddings of a picture."""
        self.store.put(self._picture_key(picture), rows)

    def _picture_key(self, picture: Picture) -> bytes:
        return self.identity + b"picture" + str(self.config.compute_dtype).encode() + picture.digest

    def keys(self, prompt: Prompt, mode: str, base: float, more: Sequence[int] = ()) -> list[bytes]:
        """Keys of the whole blocks of a prompt and what came after it.

        Args:
            prompt: the prompt.
            mode: which task LoRAs are in use.
            base: of the rotary embedding of all positions.
            more: token ids after the prompt.
        """
        sample = prompt.sample
        ids = np.concatenate((sample.input_ids, np.asarray(more, np.int32))).astype(np.int64)
        owners, image = np.full(len(ids), -1), np.flatnonzero(sample.image_mask)
        for number, picture in enumerate(prompt.pictures):
            own = image[slice(*picture.rows)]
            # no token id is negative, so a picture's positions cannot be taken for text
            ids[own], owners[own] = -1 - np.arange(len(own)), number
        dtypes = str(self.config.compute_dtype), self.config.cache_dtype
        key = hashlib.blake2b(repr((mode, base, *dtypes)).encode(), digest_size=16).digest()
        keys = []
        for start in range(0, len(ids) - len(ids) % BLOCK, BLOCK):
            block = hashlib.blake2b(key + ids[start:start + BLOCK].tobytes(), digest_size=16)
            for number in sorted(set(owners[start:start + BLOCK].tolist()) - {-1}):
                block.update(prompt.pictures[number].digest)
            key = block.digest()
            keys.append(self.identity + b"block" + key)
        return keys

    def beginning(self, prompt: Prompt, mode: str, total: int) -> list[np.ndarray]:
        """The blocks, `(2 * layers, KV, BLOCK, d)` each, with which a prompt begins and which are known.

        The last position is never among them: its logits are what a prompt is computed for.

        Args:
            prompt: the prompt.
            mode: which task LoRAs are in use.
            total: length that sets the rotary base of the prompt.
        """
        keys = self.keys(prompt, mode, rotary_base(self.config, total))
        return self.store.longest(keys[:(len(prompt) - 1) // BLOCK])

    def keep(self, prompt: Prompt, mode: str, totals: Sequence[int], more: Sequence[int],
             halves: Iterable[np.ndarray]) -> None:
        """Keeps what a cache holds of a prompt and of what came after it.

        Args:
            prompt: the prompt.
            mode: which task LoRAs were in use.
            totals: length that set the rotary base of the prompt, then that of each position after it.
            more: token ids after the prompt that the cache holds.
            halves: keys and values of every layer in turn, `(KV, S, d)` each; looked through at most once.
        """
        bases = [rotary_base(self.config, total) for total in totals]
        # behind a change of the base nothing can be found: a prompt has one for all its positions
        same = next((number for number, base in enumerate(bases) if base != bases[0]), len(bases)) - 1
        keys = self.keys(prompt, mode, bases[0], more[:same])
        blocks: dict[int, np.ndarray] = {}
        missing = [number for number, key in enumerate(keys) if key not in self.store]
        for place, half in enumerate(halves if missing else ()):        # one at a time: a cache may be large
            for number in missing:
                part = half[:, BLOCK * number:BLOCK * number + BLOCK]
                if not place:
                    blocks[number] = np.empty((2 * self.config.num_hidden_layers, *part.shape), part.dtype)
                blocks[number][place] = part
        self.store.put_chain(keys, [blocks.get(number) for number in range(len(keys))])
