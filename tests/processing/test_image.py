"""Dynamic partition, tiles and the global-local order: reference outputs, closed formulae, bad pictures."""
from __future__ import annotations

import io
import math
import os
import struct
import zlib

import numpy as np
import odd_pictures
import parity_host
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from mindformers_ixc.errors import ImageError
from mindformers_ixc.processing import pictures
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
from mindformers_ixc.processing.pictures import image_size

SIZES = st.integers(1, 4000)
OPTIONS = settings(deadline=None, max_examples=150)


def test_reference_transforms(goldens):
    assert [row for row in parity_host.check_images(goldens) if not row.passed] == []


@pytest.mark.parametrize("folder", ["t1", "t2"])
def test_reference_global_views(goldens, folder):
    assert [row for row in parity_host.check_global_view(goldens / folder) if not row.passed] == []


def file_of(picture: Image.Image, kind: str, **options) -> bytes:
    """A picture's file."""
    target = io.BytesIO()
    picture.save(target, kind, **options)
    return target.getvalue()


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
                                                      ((30000, 20), 1, "30000 x 20 pixels is too elongated"),
                                                      ((20, 30000), 1, "20 x 30000 pixels is too elongated")])
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


def test_deep_greyscale_is_scaled_by_its_own_bits():
    levels = np.array([[0, 300, 65535]], np.uint16)
    for kind in ("PNG", "TIFF"):
        assert np.asarray(load_image(file_of(Image.fromarray(levels), kind)))[0, :, 0].tolist() == [0, 1, 255]
    netpbm = b"P5 3 1 65535\n" + levels.astype(">u2").tobytes()
    assert np.asarray(load_image(netpbm))[0, :, 0].tolist() == [0, 1, 255]


def tiff(samples: bytes, width: int, **tags: int) -> bytes:
    """A greyscale TIFF of one row with tags that Pillow does not write; tags by number, as `t258`."""
    found = {256: width, 257: 1, 258: 16, 259: 1, 262: 1, 273: 0, 277: 1, 278: 1, 279: len(samples),
             **{int(name[1:]): value for name, value in tags.items()}}
    found[273] = 8 + 2 + 12 * len(found) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, found[tag]) for tag in sorted(found))
    return b"II*\0" + struct.pack("<IH", 8, len(found)) + entries + bytes(4) + samples


def test_tiffs_whose_white_is_elsewhere():
    deep = np.array([0, 0x1234, 0xffff], "<u2").tobytes()
    assert np.asarray(load_image(tiff(deep, 3)))[0, :, 0].tolist() == [0, 0x12, 255]
    assert np.asarray(load_image(tiff(deep, 3, t262=0)))[0, :, 0].tolist() == [255, 255 - 0x12, 0]     # white is zero
    packed = bytes([0x00, 0x08, 0x00, 0xff, 0xf0, 0x00])                      # 12 bits: 0, 0x800, 0xfff, 0
    assert np.asarray(load_image(tiff(packed, 4, t258=12)))[0, :, 0].tolist() == [0, 0x80, 255, 0]


@pytest.mark.parametrize(("values", "levels"), [([0, 0.5, 1], [0, 128, 255]), ([0, 128, 255], [0, 128, 255]),
                                                ([0.0, 80.4, 200.6], [0, 80, 201])])
def test_floats_of_a_known_range_are_scaled(values, levels):
    picture = file_of(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert np.asarray(load_image(picture))[0, :, 1].tolist() == levels


@pytest.mark.parametrize(("values", "words"), [
    (np.array([[0, 4000]], np.float32), "floating-point pixels from 0 to 4000"),
    (np.array([[-1, 1]], np.float32), "floating-point"), (np.array([[0, np.inf]], np.float32), "floating-point"),
    (np.array([[0, np.nan, 1]], np.float32), "floating-point"), (np.array([[np.nan, 0, 1]], np.float32), "floating"),
    (np.array([[0, 1]], np.int32), "integer pixels of 32 bits"), (np.array([[0, 70000]], np.int32), "32 bits")])
def test_pixels_without_a_range_are_refused(tmp_path, values, words):
    Image.fromarray(values).save(tmp_path / "deep.tif")
    for source in (tmp_path / "deep.tif", Image.fromarray(values)):
        with pytest.raises(ImageError, match=words):
            load_image(source)
    if values.dtype == np.int32:       # the header says so
        with pytest.raises(ImageError, match=r"deep\.tif has integer"):
            image_size(tmp_path / "deep.tif")


# Transparency and orientation

def test_transparent_pictures_stand_on_white_or_lose_their_alpha():
    pixels = np.random.default_rng(3).integers(0, 256, (40, 30, 4), np.uint8)
    alpha = pixels[..., 3:] / 255
    expected = np.rint(pixels[..., :3] * alpha + 255 * (1 - alpha)).astype(int)
    for source in (pixels, Image.fromarray(pixels), file_of(Image.fromarray(pixels), "PNG")):
        white = np.asarray(load_image(source, transparency="white")).astype(int)
        assert np.abs(white - expected).max() <= 1
        np.testing.assert_array_equal(np.asarray(load_image(source)), pixels[..., :3])
    np.testing.assert_array_equal(np.asarray(partition_image(Image.fromarray(pixels), 1, 560)),
                                  np.asarray(partition_image(Image.fromarray(pixels).convert("RGB"), 1, 560)))


@pytest.mark.parametrize(("mode", "colour", "key"), [
    ("RGB", (0, 0, 0), (0, 0, 0)), ("L", 7, 7), ("1", 0, 0), ("P", 0, 0), ("P", 0, b"\0\xff")])
def test_a_transparent_colour_stands_on_white(mode, colour, key):
    picture = Image.new(mode, (3, 2), colour)
    picture.putpixel((1, 1), 1 if mode != "RGB" else (9, 9, 9))
    content = file_of(picture, "PNG", transparency=key)
    white, public = (np.asarray(load_image(content, transparency=how)) for how in ("white", "public"))
    assert white[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(public, np.asarray(picture.convert("RGB")))
    np.testing.assert_array_equal(white[1, 1], public[1, 1])


@pytest.mark.parametrize(("bits", "clear", "other"), [(2, 1, 85 * 3), (4, 5, 17 * 9)])
def test_a_transparent_colour_of_few_bits(bits, clear, other):
    levels = np.array([[clear, other // (255 // ((1 << bits) - 1))]])
    content = odd_pictures.deep_png(levels, bits, 0, struct.pack(">H", clear))
    assert np.asarray(load_image(content, transparency="white"))[0, :, 0].tolist() == [255, other]


def test_a_transparent_colour_of_sixteen_bits():
    levels = np.array([[[0x1234, 0, 0], [0x5600, 0, 0]]])
    content = odd_pictures.deep_png(levels, 16, 2, struct.pack(">HHH", 0x1234, 0, 0))
    found = np.asarray(load_image(content, transparency="white"))
    assert found[0].tolist() == [[255, 255, 255], [0x56, 0, 0]]


def test_the_fourth_byte_of_a_bitmap_may_be_unused():
    pixels = np.full((4, 4, 4), 0, np.uint8)
    pixels[..., 0] = 200
    content = file_of(Image.fromarray(pixels), "BMP")
    assert np.asarray(load_image(content, transparency="white"))[0, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation(tmp_path, kind, orientation):
    picture, exif = Image.fromarray(np.random.default_rng(4).integers(0, 256, (5, 3, 3), np.uint8)), Image.Exif()
    exif[0x112] = orientation
    (tmp_path / "a").write_bytes(file_of(picture, kind, exif=exif))
    marked = picture.copy()
    marked.getexif()[0x112] = orientation
    upright = ImageOps.exif_transpose(marked)
    for how, expected in (("apply", upright), ("ignore", upright if kind == "TIFF" else picture)):
        np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a", exif=how)), np.asarray(expected))
        assert image_size(tmp_path / "a", how) == expected.size


def test_unknown_options_are_refused():
    with pytest.raises(ImageError, match=r"transparency is 'black'; the choices are white, public"):
        load_image(np.zeros((2, 2), np.uint8), transparency="black")
    with pytest.raises(ImageError, match=r"exif is 'yes'; the choices are ignore, apply"):
        load_image(np.zeros((2, 2), np.uint8), exif="yes")


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
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "fifo.png")
    for name, words in (("gone.png", "does not exist"), ("text.png", "no image file"), ("empty.png", "no image file"),
                        ("cut.png", "damaged"), ("folder.png", "a folder"), ("fifo.png", "no regular file"),
                        ("loop.png", "does not exist")):
        with pytest.raises(ImageError, match=words) as error:
            load_image(tmp_path / name, "x.json, sample 3, field image")
        assert str(error.value).startswith("x.json, sample 3, field image: ")
        assert name in str(error.value)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("1", (200, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(pictures, "PIXEL_LIMIT", 10000)
    with pytest.raises(ImageError, match="more than 10000 pixels"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("source", [3, np.zeros((2, 2)), np.zeros((2, 2, 5), np.uint8)])
def test_other_sources_are_refused(source):
    with pytest.raises(ImageError, match="picture must be"):
        load_image(source)


@pytest.mark.parametrize("limit", ["PIXEL_LIMIT", "PIXEL_LIMIT_OF_COPIES"])
def test_the_limits_hold_in_the_header_too(tmp_path, monkeypatch, limit):
    Image.new("RGB", (200, 200)).save(tmp_path / "bomb.webp")
    monkeypatch.setattr(pictures, "COPYING_FORMATS", ("WEBP",) if "COPIES" in limit else ())
    monkeypatch.setattr(pictures, limit, 39999)
    for read in (load_image, image_size):
        with pytest.raises(ImageError, match=r"bomb\.webp has more than 39999 pixels"):
            read(tmp_path / "bomb.webp")


def test_pillows_own_limit_is_a_sentence_too(tmp_path, monkeypatch):
    Image.new("1", (200, 200)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10000)      # an error above twice as many
    with pytest.raises(ImageError, match=r"bomb\.png has more than \d+ pixels"):
        image_size(tmp_path / "bomb.png")


@pytest.mark.parametrize("error", [RuntimeError("a"), SyntaxError("b"), struct.error("c"), zlib.error("d"), KeyError(1),
                                   OverflowError("e"), MemoryError(), RecursionError(), AssertionError(), EOFError(),
                                   UserWarning("f"), Image.DecompressionBombWarning("g")])
def test_whatever_a_decoder_raises_is_an_image_error(tmp_path, monkeypatch, error):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def fail(*_):
        raise error

    for name in ("load", "__init__"):
        with monkeypatch.context() as patch, pytest.raises(ImageError, match=r"^x\.json, sample 3: .*a\.png "):
            patch.setattr(PngImagePlugin.PngImageFile, name, fail)
            load_image(tmp_path / "a.png", "x.json, sample 3")


def test_only_listed_formats_are_opened(tmp_path, monkeypatch):
    """PostScript would be handed to Ghostscript; the others take anything, or are nobody's training data."""
    picture = Image.new("RGB", (8, 8))
    for kind in ("EPS", "TGA", "PCX", "ICO", "SGI"):
        (tmp_path / "a.jpg").write_bytes(file_of(picture, kind))
        with pytest.raises(ImageError, match=r"a\.jpg is .*the formats are AVIF, BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"):
            load_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(file_of(picture, "EPS"))
    with pytest.raises(ImageError, match="is PostScript, no image file"):
        image_size(tmp_path / "a.jpg")


def test_a_pillow_without_a_decoder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "FORMATS", ("NONE", "PNG"))
    (tmp_path / "a.avif").write_bytes(b"\0\0\0\x1cftypavif\0\0\0\0")
    with pytest.raises(ImageError, match="is an AVIF picture"):
        load_image(tmp_path / "a.avif")


@pytest.mark.parametrize("source", ["data:image/png;base64," + "iVBORw0KGgo" * 5000, "/9j/4AAQSkZJRg" * 4000,
                                    "x" * 5000 + "\n" * 10, "a\0b.png", "a\udcff.png"])
def test_values_that_are_no_paths_give_a_short_sentence(source):
    with pytest.raises(ImageError) as error:
        load_image(source, "x.json, sample 3")
    assert len(str(error.value)) < 250
    assert str(error.value).isprintable()


def test_large_pictures_are_taken_in_strips(monkeypatch):
    pixels = np.random.default_rng(5).integers(0, 256, (50, 40, 4), np.uint8)
    whole = [np.asarray(load_image(pixels, transparency="white")), partition_image(Image.fromarray(pixels), 4, 28)]
    monkeypatch.setattr(pictures, "STRIP", 123)
    np.testing.assert_array_equal(whole[0], np.asarray(load_image(pixels, transparency="white")))
    np.testing.assert_array_equal(np.asarray(whole[1]), np.asarray(partition_image(Image.fromarray(pixels), 4, 28)))
