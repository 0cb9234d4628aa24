"""Dynamic partition, tiles and the global-local order: reference outputs, closed formulae, bad pictures."""
from __future__ import annotations

import io
import math

import numpy as np
import parity_host
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from mindformers_ixc.errors import ImageError
from mindformers_ixc.processing.image import (
    Grid,
    bicubic_resize,
    image_to_tiles,
    image_token_count,
    image_token_rows,
    load_image,
    normalise,
    partition_image,
    plan_partition,
)

SIZES = st.integers(1, 4000)
OPTIONS = settings(deadline=None, max_examples=150)


def test_reference_transforms(goldens):
    assert [row for row in parity_host.check_images(goldens) if not row.passed] == []


@pytest.mark.parametrize("folder", ["t1", "t2"])
def test_reference_global_views(goldens, folder):
    assert [row for row in parity_host.check_global_view(goldens / folder) if not row.passed] == []


def plan(width, height, hd_num, training):
    try:
        return plan_partition(width, height, hd_num, 56, training)
    except ImageError as error:
        assert "too elongated" in str(error)
        assume(False)


@OPTIONS
@given(SIZES, SIZES, st.integers(1, 40), st.booleans())
def test_partition_fills_whole_tiles_within_the_budget(width, height, hd_num, training):
    result = plan(width, height, hd_num, training)
    assert result.grid.tiles <= hd_num
    assert result.padded == (result.grid.columns * 56, result.grid.rows * 56)
    assert all(0 <= p - r < 56 for p, r in zip(result.padded, result.resized))
    # the long side is a whole number of tiles, the aspect ratio is kept to the pixel
    long, short = max(result.resized), min(result.resized)
    assert long % 56 == 0
    assert short == int(long / (max(width, height) / min(width, height)))


@OPTIONS
@given(SIZES, SIZES, st.integers(1, 40), st.booleans())
def test_one_more_tile_would_not_fit_or_not_help(width, height, hd_num, training):
    result = plan(width, height, hd_num, training)
    ratio = max(width, height) / min(width, height)
    scale = max(result.grid)
    wanted = math.ceil(max(width, height) * (1.5 if training else 1) / 56)
    assert scale == wanted or (scale + 1) * math.ceil((scale + 1) / ratio) > hd_num


@OPTIONS
@given(SIZES, SIZES, st.integers(1, 40), st.booleans())
def test_transposing_a_picture_transposes_its_plan(width, height, hd_num, training):
    assume(width != height)
    upright, turned = plan(width, height, hd_num, training), plan(height, width, hd_num, training)
    assert turned.grid == upright.grid[::-1]
    assert (turned.resized, turned.padded, turned.offset) == (
        upright.resized[::-1], upright.padded[::-1], upright.offset[::-1])


@settings(deadline=None, max_examples=20)
@given(st.integers(10, 200), st.integers(10, 200), st.integers(1, 9), st.booleans())
def test_transposing_a_picture_transposes_its_pixels(width, height, hd_num, training):
    assume(width != height)
    rng = np.random.default_rng(width * height)
    picture = Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))
    upright = np.asarray(partition_image(picture, hd_num, 56, training))
    turned = np.asarray(partition_image(picture.transpose(Image.TRANSPOSE), hd_num, 56, training))
    np.testing.assert_array_equal(turned, upright.transpose(1, 0, 2))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 5), st.integers(0, 3))
def test_rows_cover_every_tile_row_once_and_separators_by_the_format(rows, columns, side, first, rest):
    grid, tokens = Grid(rows, columns), side * side
    tiles = first + 1 + grid.tiles + rest
    index = image_token_rows(grid, first, side, tiles)
    assert len(index) == image_token_count(grid, side) == (grid.tiles + 1) * tokens + 1 + (rows + 1) * side
    sub, glb = tiles * tokens, tiles * tokens + 1
    assert (index == sub).sum() == (rows + 1) * side
    assert (index == glb).sum() == 1
    assert index[side * (side + 1)] == glb
    own = np.sort(index[index < sub])
    np.testing.assert_array_equal(own, np.arange(first * tokens, (first + 1 + grid.tiles) * tokens))


def test_local_view_runs_across_tiles():
    # 1 x 2 tiles of 2 x 2 tokens: tile 1 is rows 4..7, tile 2 rows 8..11, sub_GN 12, glb_GN 13
    assert image_token_rows(Grid(1, 2), 0, 2, 3).tolist() == [0, 1, 12, 2, 3, 12, 13, 4, 5, 8, 9, 12, 6, 7, 10, 11, 12]


@pytest.mark.parametrize(("tiles", "tokens"), [((1, 1), 841), ((3, 6), 7681), ((4, 6), 10101), ((6, 6), 14941)])
def test_public_token_counts(tiles, tokens):
    assert image_token_count(Grid(*tiles), 20) == tokens


def test_tiles_are_the_normalised_picture_cut_up():
    pixels = np.random.default_rng(0).integers(0, 255, (56, 112, 3), np.uint8)
    tiles, planes = image_to_tiles(pixels, 28), normalise(pixels)
    assert tiles.shape == (9, 3, 28, 28)
    np.testing.assert_array_equal(tiles[1 + 4 + 2], planes[:, 28:, 56:84])
    np.testing.assert_allclose(planes[:, 3, 5], (pixels[3, 5] / 255 - [0.48145466, 0.4578275, 0.40821073])
                               / [0.26862954, 0.26130258, 0.27577711], atol=1e-6)


def test_bicubic_keeps_a_constant_and_the_identity():
    constant = np.full((3, 40, 56), 0.7, np.float32)
    np.testing.assert_allclose(bicubic_resize(constant, 13), 0.7, atol=1e-6)
    picture = np.random.default_rng(1).standard_normal((3, 16, 16)).astype(np.float32)
    np.testing.assert_allclose(bicubic_resize(picture, 16), picture, atol=1e-6)


@pytest.mark.parametrize(("size", "hd_num", "word"), [((30000, 20), 0, "hd_num"), ((0, 5), 4, "no area"),
                                                      ((30000, 20), 1, "too elongated")])
def test_impossible_partitions(size, hd_num, word):
    with pytest.raises(ImageError, match=word):
        plan_partition(*size, hd_num, 560)


def test_long_strips_work_when_the_budget_allows():
    assert plan_partition(30000, 20, 24).grid == Grid(1, 24)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA", "F"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    picture = Image.new("RGB", (8, 6), (200, 30, 30)).convert(mode)
    assert load_image(picture).mode == "RGB"
    assert load_image(picture).size == (8, 6)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(path)
    assert np.asarray(load_image(path))[0, :, 0].tolist() == [0, 128, 255]


def test_sources_agree(tmp_path):
    pixels = np.random.default_rng(2).integers(0, 255, (9, 7, 3), np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    for source in (path, str(path), path.read_bytes(), Image.fromarray(pixels), pixels):
        np.testing.assert_array_equal(np.asarray(load_image(source)), pixels)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(load_image(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]


def test_bad_pictures_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:-2000])
    for name, words in (("gone.png", "does not exist"), ("text.png", "no image file"), ("empty.png", "no image file"),
                        ("cut.png", "damaged")):
        with pytest.raises(ImageError, match=words) as error:
            load_image(tmp_path / name, "x.json, sample 3, field image")
        assert str(error.value).startswith("x.json, sample 3, field image: ")
        assert name in str(error.value)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("1", (200, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10000)
    with pytest.raises(ImageError, match="more than 10000 pixels"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("source", [3, np.zeros((2, 2)), np.zeros((2, 2, 5), np.uint8)])
def test_other_sources_are_refused(source):
    with pytest.raises(ImageError, match="picture must be"):
        load_image(source)
