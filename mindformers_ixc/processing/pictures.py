"""Picture files to RGB pixels: the formats that are read, the limits, transparency, deep pixels, orientation.

The only place of the package that opens pictures: whatever a decoder raises leaves it as `ImageError`.
"""
from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from typing import IO, TypeVar, Union

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from mindformers_ixc.errors import ImageError
from mindformers_ixc.processing.stored import StoredFile
from mindformers_ixc.reading import reading
from mindformers_ixc.sections import check_value, one_of

# What an image may be given as: a path (of a video too, where both may come), a file inside another one, a file's
# bytes, or pixels.
ImageSource = Union[str, "os.PathLike[str]", StoredFile, bytes, bytearray, Image.Image, np.ndarray]

Result = TypeVar("Result")

# Pillow's decoders that are used, by its names: what collections of pictures are made of. Its others stay shut: some
# start foreign programs (PostScript: Ghostscript), some take files without a signature for pictures. MPO, several JPEGs
# in one file, comes with JPEG, APNG with PNG, and PBM, PGM and PNM are PPM.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# Pixels of a picture at most: Pillow's own default, above which it suspects a decompression bomb; most formats take up
# to 0.8 GiB for so many. Decoders of some hold several copies: WebP's took 1.4 GiB, a progressive JPEG's in CMYK 1.05.
PIXEL_LIMIT = 89_478_485
PIXEL_LIMIT_OF_COPIES = 50_000_000
COPYING_FORMATS, COPYING_MODES = ("AVIF", "WEBP"), ("CMYK",)

# Transparent pixels: on white, as the padding of partitions is, or without their alpha channel, as the public code.
TRANSPARENCY = ("white", "public")

# EXIF orientation: not looked at, as in the public code, or the picture is turned upright.
EXIF = ("ignore", "apply")

# Rows are composited so many pixels at a time, so that a large picture is not held in further copies.
STRIP = 1 << 22

# A message shows at most so much of a value that can hardly be a path, and so much of one that can.
SHOWN, SHOWN_PATH = 60, 200

# Beginnings of files that are often found under a picture's name; the second number is the place of the signature.
SIGNATURES = ((b"%!PS", 0, "PostScript"), (b"%PDF", 0, "a PDF document"), (b"8BPS", 0, "a Photoshop file"),
              (b"ftyphei", 4, "a HEIC picture"), (b"ftypmif1", 4, "a HEIC picture"), (b"ftypavi", 4, "an AVIF picture"),
              (b"ftyp", 4, "a video"), (b"\x1aE\xdf\xa3", 0, "a video"), (b"AVI ", 8, "a video"),
              (b"jP  ", 4, "a JPEG 2000 picture"), (b"<svg", 0, "an SVG drawing"), (b"<?xml", 0, "an XML text"),
              (b"<!DOCTYPE", 0, "a web page"), (b"<!doctype", 0, "a web page"), (b"<html", 0, "a web page"),
              (b"version https://git-lfs", 0, "a pointer of Git LFS, whose file was not fetched"),
              (b"SIMPLE  =", 0, "a FITS file"), (b"\xd7\xcd\xc6\x9a", 0, "a Windows metafile"))


def check_transparency(transparency: object, name: str = "transparency", error: type[Exception] = ImageError) -> None:
    """Refuses what is none of `TRANSPARENCY`."""
    check_value(name, transparency, one_of(TRANSPARENCY), error)


def check_exif(exif: object, name: str = "exif", error: type[Exception] = ImageError) -> None:
    """Refuses what is none of `EXIF`."""
    check_value(name, exif, one_of(EXIF), error)


def shown(source: object) -> str:
    """A path as messages name it; what is too long for one is cut."""
    text = str(source)
    if text.startswith("data:") or len(text) > SHOWN_PATH:
        return f"{text[:SHOWN]!r}... ({len(text)} characters)"
    return text if text.isprintable() else ascii(text)


def load_image(source: ImageSource, where: str = "", transparency: str = "public", exif: str = "ignore") -> Image.Image:
    """Reads an image as RGB.

    Of an animation or a file of several pages the first one is taken. Greyscale of 9 to 16 bits gives its upper 8 bits.
    Floats that all lie within 0 and 1 go from black to white, others within 0 and 255 are grey levels, as in Pillow's
    own conversions; all other floats, and integers of 32 bits, do not say what is white and are refused.

    Args:
        source: path, file inside another one, bytes of an image file (`FORMATS`), PIL image or uint8 array
            `(height, width)` with an axis of 3 or 4 channels or none.
        where: what the image belongs to, for the messages (`train.json, sample 3, field image`).
        transparency: `white` puts transparent pixels on white; `public` drops the alpha channel, as the public code.
        exif: `apply` turns the picture by its EXIF orientation; `ignore` does not, as the public code. (TIFF's own
            orientation belongs to the format and is always followed.)

    Returns:
        RGB image.

    Raises:
        ImageError: for a missing, damaged or oversized image, another format or type of source, unknown options.
    """
    check_transparency(transparency)
    check_exif(exif)
    prefix = f"{where}: " if where else ""
    if isinstance(source, Image.Image):
        return _guarded(prefix, "the picture", lambda: _to_upright_rgb(source, transparency, exif))
    if isinstance(source, np.ndarray):
        flat_or_colour = source.ndim == 2 or (source.ndim == 3 and source.shape[2] in (3, 4))
        if source.dtype != np.uint8 or not flat_or_colour:
            raise ImageError(f"{prefix}an array picture must be uint8 (H, W), (H, W, 3) or (H, W, 4); found "
                             f"{source.dtype} {source.shape}.")
        if not source.size:
            raise ImageError(f"{prefix}an array picture of shape {source.shape} has no area.")
        return _guarded(prefix, "the picture", lambda: to_rgb(Image.fromarray(source), transparency))
    file, name = _file_of(source, prefix)
    return _guarded(prefix, name, lambda: _read(file, lambda image: _to_upright_rgb(image, transparency, exif)))


def image_size(path: str | os.PathLike | StoredFile, exif: str = "ignore") -> tuple[int, int]:
    """(width, height) of the picture that `load_image` will give, from the file's header.

    Raises:
        ImageError: for what the header shows `load_image` to refuse.
    """
    check_exif(exif)
    file, name = _file_of(path, "")
    return _guarded("", name, lambda: _read(file, lambda image: _upright_size(image, exif)))


def to_rgb(image: Image.Image, transparency: str = "public") -> Image.Image:
    """A PIL image of any mode as RGB; see `load_image`.

    Raises:
        ImageError: for floats and integers without a known range.
    """
    image.load()
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    if image.mode == "F":
        return _from_floats(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _deep_grey(image, transparency)
    if transparency == "white" and _has_alpha(image):
        return _on_white(image)
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")    # without Pillow's advice to do so
    return image if image.mode == "RGB" else image.convert("RGB")


# Pillow's modes of colours that are multiplied with their alpha, and the plain ones.
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def _file_of(source: object, prefix: str) -> tuple[str | os.PathLike | IO[bytes], str]:
    """What Pillow opens, and its name in messages."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source), "the picture's bytes"
    if isinstance(source, StoredFile):
        with reading(source):
            return io.BytesIO(source.read()), shown(source.name)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"{prefix}a picture must be a path, bytes, a PIL image or a uint8 array; found "
                         f"{type(source).__name__}.")
    name = shown(source)
    with reading(name):
        if os.path.isfile(source):
            return source, name
    if str(source).startswith("data:"):
        raise ImageError(f"{prefix}the picture {name} is a data: URI; write it to a file and name that.")
    if len(str(source)) > SHOWN_PATH:
        raise ImageError(f"{prefix}the picture {name} does not exist; it is too long for a path. A picture in base64 "
                         "must be written to a file.")
    if os.path.exists(source):
        kind = "a folder" if os.path.isdir(source) else "no regular file"
        raise ImageError(f"{prefix}the picture {name} is {kind}; name a picture's file.")
    raise ImageError(f"{prefix}the picture {name} does not exist.")


def _guarded(prefix: str, name: str, work: Callable[[], Result]) -> Result:
    """What `work` gives; whatever it raises becomes `ImageError` naming the picture."""
    try:
        with reading(name):
            return work()
    except ImageError as error:
        raise ImageError(f"{prefix}{name} {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{prefix}{name} {_too_large(PIXEL_LIMIT)}") from error
    except MemoryError as error:
        raise ImageError(f"{prefix}{name} needs more memory than there is; shrink it first.") from error
    except Exception as error:   # decoders raise whatever they happen to meet: struct.error, zlib.error, KeyError, ...
        reason = (str(error).splitlines() or [""])[0][:100] or type(error).__name__
        raise ImageError(f"{prefix}{name} is damaged and cannot be decoded ({reason}).") from error


def _too_large(limit: int) -> str:
    return f"has more than {limit} pixels, which may be a decompression bomb; shrink it first."


def _read(file: str | os.PathLike | IO[bytes], work: Callable[[Image.Image], Result]) -> Result:
    """What `work` makes of the open picture, whose pixels are not yet read."""
    Image.init()   # AVIF has a decoder only in newer releases of Pillow
    try:
        with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            _check_header(image)
            return work(image)
    except UnidentifiedImageError as error:
        raise ImageError(f"{_unknown_kind(file)}; the formats are {', '.join(FORMATS)}.") from error


def _unknown_kind(file: str | os.PathLike | IO[bytes]) -> str:
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            head = opened.read(64)
    else:
        file.seek(0)
        head = file.read(64)
    if not head:
        return "is no image file but empty (0 bytes)"
    kind = next((name for mark, place, name in SIGNATURES if head[place:].startswith(mark)), None)
    if kind == "an AVIF picture":
        return "is an AVIF picture, and damaged or of a kind that this Pillow cannot decode"
    return f"is {kind}, no image file that is read here" if kind else "is no image file that is known, or it is damaged"


def _check_header(image: Image.Image) -> None:
    if image.width < 1 or image.height < 1:
        raise ImageError(f"has {image.width} x {image.height} pixels, which is no area.")
    copying = image.format in COPYING_FORMATS or image.mode in COPYING_MODES
    limit = PIXEL_LIMIT_OF_COPIES if copying else PIXEL_LIMIT
    if image.width * image.height > limit:
        raise ImageError(_too_large(limit))
    if image.mode == "I":
        _grey_bits(image)
    if isinstance(image, PngImagePlugin.PngImageFile) and image.tile:
        image.info[_FILE_BITS] = _PNG_BITS.get(str(image.tile[0][3]), 8)


# Bits of a PNG's channel in its file by Pillow's name of their layout; kept in `info`, since they are needed when the
# pixels, of which Pillow makes 8 bits, are there.
_PNG_BITS, _FILE_BITS = {"L;2": 2, "L;4": 4, "RGB;16B": 16}, "mindformers_ixc_bits"

# EXIF and TIFF: tag of the orientation, and its values that swap width and height; what turns each value upright.
_ORIENTATION, _SWAPPING = 274, (5, 6, 7, 8)
_TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
          5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
          8: Image.Transpose.ROTATE_90}


def _upright_size(image: Image.Image, exif: str) -> tuple[int, int]:
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # turned when it is loaded, whatever size this release of Pillow gives before
        width, height = int(image.tag_v2.get(256, width)), int(image.tag_v2.get(257, height))
        turned = image.tag_v2.get(_ORIENTATION, 1) in _SWAPPING
    else:
        turned = exif == "apply" and image.getexif().get(_ORIENTATION, 1) in _SWAPPING
    return (height, width) if turned else (width, height)


def _to_upright_rgb(image: Image.Image, transparency: str, exif: str) -> Image.Image:
    turn = exif == "apply" and not isinstance(image, TiffImagePlugin.TiffImageFile)
    orientation = image.getexif().get(_ORIENTATION, 1) if turn else 1
    rgb = to_rgb(image, transparency)
    return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in pieces of some rows, each with its first row's number."""
    rows = max(1, STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def pixels_of(image: Image.Image) -> np.ndarray:
    """uint8 `(height, width, 3)` of an RGB image; of a large one without a second copy in between."""
    if image.width * image.height <= STRIP:
        return np.asarray(image)
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top, strip in _strips(image):
        pixels[top:top + strip.height] = strip
    return pixels


def _from_floats(image: Image.Image) -> Image.Image:
    """RGB of float pixels; see `load_image`."""
    low, high = (float(value) for value in image.getextrema())   # type: ignore[arg-type]
    if not 0 <= low <= high <= 255:
        raise ImageError(f"has floating-point pixels from {low:g} to {high:g}, {_NO_RANGE}")
    scale, levels = np.float32(255 if high <= 1 else 1), np.empty(image.size[::-1], np.uint8)
    for top, strip in _strips(image):
        values = np.asarray(strip)
        if not np.isfinite(values).all():
            raise ImageError(f"has floating-point pixels without a value, {_NO_RANGE}")
        levels[top:top + strip.height] = np.rint(values * scale)
    return _grey(image, levels)


_NO_RANGE = ("which do not say what is black and what is white; save it with 8 or 16 bits without sign, or with floats "
             "from 0 to 1.")


def _grey_bits(image: Image.Image) -> int:
    """Bits of a deep greyscale image, by its file; Pillow's mode alone does not say."""
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ImageError(f"has integer pixels of 32 bits or with a sign, {_NO_RANGE}")
    return int(image.tag_v2.get(258, (16,))[0]) if isinstance(image, TiffImagePlugin.TiffImageFile) else 16


def _deep_grey(image: Image.Image, transparency: str) -> Image.Image:
    """Greyscale of 9 to 16 bits: its upper 8 bits. Pillow would clip, and a scan come out white."""
    bits, values = _grey_bits(image), np.asarray(image)
    levels = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    clear = image.info.get("transparency")
    if transparency == "white" and isinstance(clear, int):
        levels[values == clear] = 255
    return _grey(image, levels)


def _grey(image: Image.Image, levels: np.ndarray) -> Image.Image:
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(262) == 0:
        levels = 255 - levels      # white is zero, which Pillow minds with up to 8 bits only
    return Image.fromarray(levels).convert("RGB")


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info


def _on_white(image: Image.Image) -> Image.Image:
    """Composites an image on white."""
    if image.format == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getextrema()[1]:
        return image.convert("RGB")     # the fourth byte of many bitmaps is no alpha channel but unused
    result = Image.new("RGB", image.size, (255, 255, 255))
    for top, strip in _strips(image):
        if "transparency" in image.info:
            strip.info["transparency"] = _clear_colour(image)
        opaque = strip.convert("RGBA")
        result.paste(opaque, (0, top), opaque)
    return result


def _clear_colour(image: Image.Image) -> int | bytes | tuple[int, ...]:
    """The transparent colour of an image in the 8 bits that Pillow's pixels have; of 16 bits the upper ones."""
    clear, bits = image.info["transparency"], image.info.get(_FILE_BITS, 8)
    if image.mode not in ("L", "RGB") or bits == 8:
        return clear
    if isinstance(clear, int):
        return clear * 255 // ((1 << bits) - 1)
    return tuple(value >> 8 for value in clear)
