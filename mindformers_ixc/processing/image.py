"""Images to tiles: dynamic image partition, global view, and the vision-table rows of the global-local format.

Everything whose shape depends on the image is decided here, on the host. An image is resized so that its tiles fill
the budget `hd_num`, padded with white to whole tiles and cut; the image shrunk to one tile is the global view.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from mindformers_ixc.errors import ImageError
from mindformers_ixc.native import images
from mindformers_ixc.processing.pictures import ImageSource, load_image, pixels_of

__all__ = ["BICUBIC_A", "HD_NUM_SEVERAL", "HD_NUM_SINGLE", "HD_NUM_TRAINING", "IMAGE_MEAN", "IMAGE_STD", "WHITE",
           "Grid", "ImageSource", "Partition", "Tiles", "bicubic_resize", "cut_image", "image_to_tiles",
           "image_token_count", "image_token_rows", "load_image", "normalise", "partition_image", "partition_pixels",
           "pixel_scale", "plan_partition", "resize_image"]

# CLIP's pixel statistics (public preprocessor of CLIP ViT-L/14).
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# Tiles of one image at most: the public inference default, what it becomes with several images, and the training
# default of the public fine-tuning scripts.
HD_NUM_SINGLE = 24
HD_NUM_SEVERAL = 6
HD_NUM_REWARD = 9          # of each picture of a reward model
HD_NUM_TRAINING = 18

# What fills a partition up to whole tiles.
WHITE = 255

# PyTorch's bicubic kernel, which the global view must match.
BICUBIC_A = -0.75


class Grid(NamedTuple):
    """Tiles of an image."""

    rows: int
    columns: int

    @property
    def tiles(self) -> int:
        """Number of local tiles."""
        return self.rows * self.columns


class Partition(NamedTuple):
    """How one image becomes whole tiles, in pixels of the upright image.

    Attributes:
        resized: (width, height) after the resize.
        padded: (width, height) after the padding.
        offset: (left, top) of the resized image inside the padded one.
        transposed: whether the image was swapped along its diagonal meanwhile (portrait images).
        grid: the tiles.
    """

    resized: tuple[int, int]
    padded: tuple[int, int]
    offset: tuple[int, int]
    transposed: bool
    grid: Grid


@dataclass(frozen=True)
class Tiles:
    """Tiles of P x P pixels, those of one picture after another, as they go to the device.

    Local tiles are bytes, so a picture takes little more than a fourth of what it takes normalised. Global views are
    bicubic resizes of normalised pictures, which no byte holds, and stand apart.

    Attributes:
        local: uint8 `(t, 3, P, P)`, the pixels of local tiles; zeros in the slots of global views.
        views: float32 `(n, 3, P, P)`, the normalised global views, in the order of their slots.
        view_index: int32 `(t,)`, 0 for a local tile, i > 0 for global view i - 1.
    """

    local: np.ndarray
    views: np.ndarray
    view_index: np.ndarray

    @classmethod
    def none(cls, side: int) -> Tiles:
        """No tiles, of P = `side`."""
        shape = (0, 3, side, side)
        return cls(np.zeros(shape, np.uint8), np.zeros(shape, np.float32), np.zeros(0, np.int32))

    @classmethod
    def of_normalised(cls, pixels: np.ndarray) -> Tiles:
        """Tiles of which only the normalised values are known, float32 `(t, 3, P, P)`: each is kept like a view."""
        nothing = np.broadcast_to(np.zeros((), np.uint8), pixels.shape)
        return cls(nothing, pixels, np.arange(1, len(pixels) + 1, dtype=np.int32))

    @classmethod
    def joined(cls, parts: Sequence[Tiles]) -> Tiles:
        """The tiles of one or several parts, one part after the other."""
        if len(parts) == 1:
            return parts[0]
        before = np.cumsum([0, *(len(part.views) for part in parts)])
        index = [np.where(part.view_index > 0, part.view_index + count, 0) for part, count in zip(parts, before)]
        return cls(np.concatenate([part.local for part in parts]), np.concatenate([part.views for part in parts]),
                   np.concatenate(index).astype(np.int32))

    def __len__(self) -> int:
        return len(self.view_index)

    @property
    def side(self) -> int:
        """P, of a tile."""
        return self.local.shape[-1]

    def first(self, count: int) -> Tiles:
        """The first `count` tiles."""
        index = self.view_index[:count]
        return Tiles(self.local[:count], self.views[:index.max(initial=0)], index)

    def normalised(self) -> np.ndarray:
        """All tiles normalised, float32 `(t, 3, P, P)`."""
        if np.array_equal(self.view_index, np.arange(1, len(self.views) + 1)):
            return self.views
        result = np.empty(self.local.shape, np.float32)
        for slot, view in enumerate(self.view_index):
            if view:
                result[slot] = self.views[view - 1]
            else:
                _normalise_planes(self.local[slot], result[slot])
        return result


def plan_partition(width: int, height: int, hd_num: int, tile_size: int = 560, training: bool = False) -> Partition:
    """Plans the dynamic partition of an image; no pixels are touched.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        hd_num: tiles at most.
        tile_size: side of a tile in pixels (public 560).
        training: the training transform (scaled by 1.5, padding split) instead of the inference one.

    Raises:
        ImageError: when `hd_num` is below 1 or the image is so elongated that nothing of it would be left.
    """
    if hd_num < 1:
        raise ImageError(f"hd_num is {hd_num}; it must be at least 1.")
    if width < 1 or height < 1:
        raise ImageError(f"A picture of {width} x {height} pixels has no area.")
    transposed = width < height
    if transposed:
        width, height = height, width
    ratio = width / height                       # double precision, as the public code: the height below depends on it
    scale = 1
    while scale * math.ceil(scale / ratio) <= hd_num:
        scale += 1
    scale -= 1
    scale = min(math.ceil(width * (1.5 if training else 1.0) / tile_size), scale)
    new_width = scale * tile_size
    new_height = int(new_width / ratio)
    if new_height < 1:
        size = f"{height} x {width}" if transposed else f"{width} x {height}"
        raise ImageError(f"A picture of {size} pixels is too elongated: resized to a long side of {new_width} its "
                         "short one would be 0. Crop it or raise hd_num.")
    rows = math.ceil(new_height / tile_size)
    missing = rows * tile_size - new_height
    top = int(missing / 2) if training else 0
    grid = Grid(rows, scale)
    if transposed:
        return Partition((new_height, new_width), (rows * tile_size, new_width), (top, 0), True, Grid(scale, rows))
    return Partition((new_width, new_height), (new_width, rows * tile_size), (0, top), False, grid)


def partition_image(image: Image.Image, hd_num: int, tile_size: int = 560, training: bool = False,
                    transparency: str = "public") -> Image.Image:
    """Resizes an image and pads it with white to whole tiles.

    Args:
        image: image of any mode.
        hd_num: tiles at most.
        tile_size: side of a tile in pixels.
        training: the training transform instead of the inference one.
        transparency: `white` or `public`, as in `load_image`.

    Returns:
        RGB image whose sides are multiples of `tile_size`.
    """
    return Image.fromarray(partition_pixels(image, hd_num, tile_size, training, transparency))


def partition_pixels(image: Image.Image, hd_num: int, tile_size: int = 560, training: bool = False,
                     transparency: str = "public") -> np.ndarray:
    """`partition_image` as uint8 `(rows * tile_size, columns * tile_size, 3)`."""
    image = load_image(image, transparency=transparency)
    plan = plan_partition(image.width, image.height, hd_num, tile_size, training)
    width, height = plan.padded
    left, top = plan.offset
    board = np.empty((height, width, 3), np.uint8)
    inside = board[top:top + plan.resized[1], left:left + plan.resized[0]]
    if plan.transposed:
        # resizing the swapped image is what the public code does; bilinear sums differ in the last bit otherwise
        inside[:] = resize_image(image.transpose(Image.Transpose.TRANSPOSE), plan.resized[::-1]).transpose(1, 0, 2)
    else:
        resize_image(image, plan.resized, inside)
    board[:top], board[top + plan.resized[1]:] = WHITE, WHITE
    board[:, :left], board[:, left + plan.resized[0]:] = WHITE, WHITE
    return board


def resize_image(image: Image.Image, size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
    """Bilinear resize of an RGB image; the compiled one gives Pillow's pixels, sooner.

    Args:
        image: RGB image.
        size: (width, height).
        out: uint8 `(height, width, 3)` for the result, rows without gaps.

    Returns:
        uint8 `(height, width, 3)`.
    """
    out = np.empty((size[1], size[0], 3), np.uint8) if out is None else out
    if images.available():
        images.resize(pixels_of(image), out)
    else:
        out[:] = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    return out


def pixel_scale() -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift of each channel, float32 `(3,)`: a normalised pixel is `pixel * scale + shift`.

    The host and the network (`mindformers_ixc.models.pixels`) compute it alike, in float32.
    """
    scale = (1.0 / (255.0 * np.array(IMAGE_STD))).astype(np.float32)
    return scale, (-np.array(IMAGE_MEAN) / np.array(IMAGE_STD)).astype(np.float32)


def normalise(pixels: np.ndarray) -> np.ndarray:
    """uint8 `(height, width, 3)` to normalised float32 `(3, height, width)`."""
    planes = np.empty((3, *pixels.shape[:2]), np.float32)
    _normalise_planes(pixels.transpose(2, 0, 1), planes)
    return planes


def _normalise_planes(pixels: np.ndarray, out: np.ndarray) -> None:
    """uint8 `(3, height, width)` to normalised float32 of the same shape."""
    for plane, scale, shift, result in zip(pixels, *pixel_scale(), out):
        np.multiply(plane, scale, out=result, casting="unsafe")
        result += shift


@functools.cache
def _normalised_values() -> np.ndarray:
    """What `normalise` makes of each pixel value, float32 `(3, 256)`."""
    grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    return np.ascontiguousarray(normalise(grey)[:, 0])


def _bicubic_taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Source indices and weights `(size, 4)` of a bicubic resize from `length` to `size` positions."""
    centre = (np.arange(size) + 0.5) * (length / size) - 0.5
    first = np.floor(centre)
    t = centre - first
    a = BICUBIC_A
    near = lambda x: ((a + 2) * x - (a + 3)) * x * x + 1                  # noqa: E731
    far = lambda x: ((a * x - 5 * a) * x + 8 * a) * x - 4 * a             # noqa: E731
    weights = np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], axis=1)
    indices = first[:, None].astype(np.int64) + np.arange(-1, 3)
    return np.clip(indices, 0, length - 1), weights.astype(np.float32)


def bicubic_resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bicubic resize as PyTorch does it (a = -0.75, corners not aligned, no antialiasing, edges repeated).

    Args:
        pixels: float32 `(3, height, width)`.
        size: side of the result.

    Returns:
        float32 `(3, size, size)`.
    """
    rows, row_weights = _bicubic_taps(pixels.shape[1], size)
    columns, column_weights = _bicubic_taps(pixels.shape[2], size)
    # rows first: four rows of the source for each row of the result, then four columns of those
    tall = np.zeros((pixels.shape[0], size, pixels.shape[2]), np.float32)
    for tap in range(4):
        tall += pixels[:, rows[:, tap], :] * row_weights[:, tap, None]
    result = np.zeros((pixels.shape[0], size, size), np.float32)
    for tap in range(4):
        result += tall[:, :, columns[:, tap]] * column_weights[:, tap]
    return result


def cut_image(image: Image.Image | np.ndarray, tile_size: int) -> Tiles:
    """Cuts a padded image into its global view and its local tiles.

    Args:
        image: RGB image or uint8 `(height, width, 3)` whose sides are multiples of `tile_size`.
        tile_size: side P of a tile.

    Returns:
        `1 + rows * columns` tiles: the global view, then the local tiles row by row.
    """
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // tile_size, pixels.shape[1] // tile_size
    shape = (3, tile_size, tile_size)
    local, view = np.empty((1 + rows * columns, *shape), np.uint8), np.empty((1, *shape), np.float32)
    local[0] = 0
    if images.available():
        taps = [_bicubic_taps(length, tile_size) for length in pixels.shape[:2]]
        images.shrink(pixels, _normalised_values(), taps, view[0])
        images.cut(pixels, local[1:])
    else:
        view[0] = bicubic_resize(normalise(pixels), tile_size)
        cut = pixels.reshape(rows, tile_size, columns, tile_size, 3).transpose(0, 2, 4, 1, 3)
        local[1:].reshape(rows, columns, *shape)[:] = cut                                 # (rows, columns, 3, P, P)
    index = np.zeros(len(local), np.int32)
    index[0] = 1
    return Tiles(local, view, index)


def image_to_tiles(image: Image.Image | np.ndarray, tile_size: int) -> np.ndarray:
    """`cut_image`, normalised: float32 `(1 + rows * columns, 3, P, P)`."""
    return cut_image(image, tile_size).normalised()


def image_token_count(grid: Grid, tokens_per_side: int) -> int:
    """Positions an image takes: tokens of all tiles and the global view, one separator a row, one in between."""
    return (grid.tiles + 1) * tokens_per_side ** 2 + 1 + (grid.rows + 1) * tokens_per_side


def image_token_rows(grid: Grid, first_tile: int, tokens_per_side: int, max_tiles: int) -> np.ndarray:
    """Vision-table row of each of an image's positions, in the global-local order.

    Global view row by row, each row followed by sub_GN; one glb_GN; all tiles laid out as one grid of tokens, row by
    row, each row followed by sub_GN.

    Args:
        grid: the image's tiles.
        first_tile: index of its global view among the sample's tiles.
        tokens_per_side: tokens along a side of a tile (public 20).
        max_tiles: tiles of the table; sub_GN and glb_GN are the two rows after them.

    Returns:
        int32 `(image_token_count(grid),)`.
    """
    side = tokens_per_side
    sub_gn = max_tiles * side * side

    def with_separators(tokens: np.ndarray) -> np.ndarray:
        return np.concatenate([tokens, np.full((len(tokens), 1), sub_gn)], axis=1).reshape(-1)

    rows = (first_tile + np.arange(1 + grid.tiles))[:, None, None] * side * side \
        + np.arange(side * side).reshape(1, side, side)                                   # (1 + tiles, k, k)
    local = rows[1:].reshape(grid.rows, grid.columns, side, side).transpose(0, 2, 1, 3)   # (rows, k, columns, k)
    local = local.reshape(grid.rows * side, grid.columns * side)
    pieces = [with_separators(rows[0]), np.array([sub_gn + 1]), with_separators(local)]
    return np.concatenate(pieces).astype(np.int32)
