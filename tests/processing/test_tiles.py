"""Tiles as bytes and global views beside them: the same numbers as normalised tiles, in a fourth of the memory."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import PromptError
from mindformers_ixc.native import SWITCH
from mindformers_ixc.processing.encoded import EncodedSample
from mindformers_ixc.processing.image import (
    IMAGE_MEAN,
    IMAGE_STD,
    Tiles,
    bicubic_resize,
    cut_image,
    image_to_tiles,
    partition_pixels,
    pixel_scale,
)
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.processing.tokenizer import Tokenizer

SIDE = 28
PROCESSOR = Processor(ImageProcessor(SIDE), Tokenizer(str(demo_path("tokenizer.model"))))
TURNS = [("user", "What?"), ("assistant", "A cat")]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def exact(board: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Global view (float32's bicubic) and local tiles of a board in float64."""
    planes = ((board / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)).transpose(2, 0, 1)
    rows, columns = board.shape[0] // SIDE, board.shape[1] // SIDE
    local = planes.reshape(3, rows, SIDE, columns, SIDE).transpose(1, 3, 0, 2, 4).reshape(-1, 3, SIDE, SIDE)
    return bicubic_resize(planes.astype(np.float32), SIDE), local


def network_pixels(columns: dict[str, np.ndarray]) -> np.ndarray:
    """What the network makes of the columns of one sample, in float32."""
    scale, shift = (value.reshape(3, 1, 1) for value in pixel_scale())
    index = columns["view_index"]
    local = columns["pixel_values"] * scale + shift
    return np.where((index > 0)[:, None, None, None], columns["global_views"][index - 1], local)


@settings(max_examples=40, deadline=None)
@given(st.integers(10, 200), st.integers(10, 200), st.integers(1, 12), st.booleans(), st.booleans(),
       st.integers(0, 99))
def test_pictures_of_any_size(width, height, hd_num, training, native, seed):
    board = partition_pixels(picture(width, height, seed), hd_num, SIDE, training)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, str(int(native)))
        tiles = cut_image(board, SIDE)
        normalised = image_to_tiles(board, SIDE)
    view, local = exact(board)
    assert (tiles.local.dtype, tiles.views.dtype, tiles.view_index.dtype) == (np.uint8, np.float32, np.int32)
    assert tiles.view_index.tolist() == [1, *[0] * len(local)]
    assert not tiles.local[0].any()
    np.testing.assert_array_equal(normalised, tiles.normalised())
    # one rounding of float32 at 2.7, the largest normalised value, in either of two operations
    np.testing.assert_allclose(normalised[1:], local, rtol=0, atol=5e-7)
    np.testing.assert_allclose(normalised[0], view, rtol=0, atol=4e-6)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(20, 150), st.integers(20, 150)), max_size=4), st.integers(0, 3),
       st.integers(0, 2))
def test_columns_hold_the_tiles_of_several_pictures_exactly(sizes, more_tiles, more_images):
    pictures = [picture(*size, seed) for seed, size in enumerate(sizes)]
    places = "<ImageHere> " * len(pictures)
    sample = PROCESSOR.encode_conversation([("user", f"{places}What?"), ("assistant", "A cat")], pictures, hd_num=4)
    length, tiles, images = len(sample.input_ids) + 3, max(1, sample.tiles + more_tiles), len(sizes) + more_images
    columns = sample.pad(length, tiles, images, 2)
    alone = [PROCESSOR.image_processor.preprocess(one, 4, training=True)[0] for one in pictures]
    expected = np.concatenate([np.zeros((0, 3, SIDE, SIDE), np.float32), *alone])
    assert columns["view_index"].max(initial=0) == columns["view_index"].astype(bool).sum() == len(sizes)
    assert columns["global_views"].shape == (images, 3, SIDE, SIDE)
    assert not columns["pixel_values"][columns["view_index"] > 0].any()
    assert not columns["pixel_values"][len(expected):].any()
    assert not columns["global_views"][len(sizes):].any()
    if images:
        np.testing.assert_array_equal(network_pixels(columns)[:len(expected)], expected)
    np.testing.assert_array_equal(sample.pixel_values, expected)


def test_a_video_has_one_global_view(goldens):
    sample = PROCESSOR.encode_conversation(TURNS, [goldens / "video_land.mp4"], hd_num=1)
    columns = sample.pad(len(sample.input_ids), sample.tiles, 1, 2)
    assert columns["view_index"].tolist() == [1, *[0] * (sample.tiles - 1)]
    np.testing.assert_array_equal(network_pixels(columns), sample.pixel_values)


def test_a_sample_of_text_has_empty_columns():
    sample = PROCESSOR.encode_conversation(TURNS)
    columns = sample.pad(64, 3, 2, 2)
    assert len(sample.pixel_values) == 0
    assert {name: columns[name].shape for name in ("pixel_values", "global_views", "view_index")} == {
        "pixel_values": (3, 3, SIDE, SIDE), "global_views": (2, 3, SIDE, SIDE), "view_index": (3,)}
    assert not any(columns[name].any() for name in ("pixel_values", "global_views", "view_index", "image_mask"))


def test_tiles_in_any_order_of_slots():
    rng = np.random.default_rng(0)
    tiles = Tiles(rng.integers(0, 256, (5, 3, SIDE, SIDE), np.uint8),
                  rng.standard_normal((2, 3, SIDE, SIDE)).astype(np.float32), np.array([0, 2, 0, 1, 0], np.int32))
    found = tiles.normalised()
    np.testing.assert_array_equal(found[[3, 1]], tiles.views)
    assert len(tiles) == 5 and tiles.side == SIDE
    np.testing.assert_array_equal(tiles.first(2).normalised(), found[:2])
    both = Tiles.joined([tiles, tiles])
    np.testing.assert_array_equal(both.normalised(), np.concatenate([found, found]))
    assert both.view_index.tolist() == [0, 2, 0, 1, 0, 0, 4, 0, 3, 0]


def test_normalised_tiles_are_kept_as_they_are():
    pixels = np.random.default_rng(0).standard_normal((3, 3, SIDE, SIDE)).astype(np.float32)
    ids = np.arange(4, dtype=np.int32)
    sample = EncodedSample(ids, ids, np.zeros_like(ids), [], pixels, 1)
    assert sample.pixel_values is pixels
    assert sample.pictures.local.strides == (0, 0, 0, 0)         # no memory for bytes that are not there
    np.testing.assert_array_equal(network_pixels(sample.pad(4, 5, 3, 2))[:3], pixels)
    assert sample.pictures.first(2).normalised().tobytes() == pixels[:2].tobytes()


def test_a_picture_of_18_tiles_takes_less_than_a_third_of_what_it_takes_normalised():
    tiles = cut_image(np.zeros((6 * 560, 3 * 560, 3), np.uint8), 560)
    sample = EncodedSample(np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32), [], tiles, 20)
    columns = sample.pad(1, 19, 1, 2)
    size = sum(columns[name].nbytes for name in ("pixel_values", "global_views", "view_index"))
    assert size == 19 * 3 * 560 ** 2 + 4 * 3 * 560 ** 2 + 4 * 19 < 21.7e6
    assert sample.pixel_values.nbytes == 71_500_800


def test_more_pictures_than_views_are_refused():
    sample = PROCESSOR.encode_conversation([("user", "<ImageHere><ImageHere>?"), ("assistant", "A cat")],
                                           [picture(30, 30)] * 2, hd_num=1)
    with pytest.raises(PromptError, match=r"A sample of 2 pictures does not fit max_images 1; raise train_dataset\."):
        sample.pad(100, 9, 1, 2)
