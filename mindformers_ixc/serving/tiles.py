"""A picture as the model sees it: its tiles and the view of the whole, for `/v1/ixc/tiles`."""
from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from mindformers_ixc.errors import ImageError, VideoError
from mindformers_ixc.processing.image import IMAGE_MEAN, IMAGE_STD
from mindformers_ixc.processing.processor import Processor
from mindformers_ixc.sections import is_whole
from mindformers_ixc.serving.messages import Given, check_pictures, read_source
from mindformers_ixc.serving.settings import ServerSettings
from mindformers_ixc.serving.wire import RequestError

# Of the pictures that are sent back.
QUALITY = 85

# Fields of a request: the picture as in `image_url.url`, its `hd_num`, and how many pictures the question has.
TILE_FIELDS = ("image", "hd_num", "pictures")


def read_tiles(body: Mapping[str, Any], processor: Processor, settings: ServerSettings) -> dict:
    """The tiles of a picture.

    Args:
        body: `image`, an address as in `image_url.url`; `hd_num`, tiles at most; `pictures`, how many the question has
            (with several each has fewer tiles).
        processor: of the model.
        settings: of the server.

    Returns:
        `grid` (rows, columns), `positions` in the prompt, `tile_size` in pixels, `whole` (data URL of the view of the
        whole) and `tiles` (data URLs, row by row).

    Raises:
        RequestError: naming the field.
    """
    for name in body:
        if name not in TILE_FIELDS:
            raise RequestError(f"There is no field {name[:60]}; the choices are {', '.join(TILE_FIELDS)}.", name[:60])
    image, hd_num, pictures = body.get("image"), body.get("hd_num"), body.get("pictures")
    if not isinstance(image, str):
        raise RequestError("image must be a text: a data URL, or an address as in image_url.url.", "image")
    for name, value in (("hd_num", hd_num), ("pictures", pictures)):
        if value is not None and not (is_whole(value, 1) and value <= 256):
            raise RequestError(f"{name} must be a whole number from 1 to 256.", name)
    images = processor.image_processor
    limit = images.hd_num_for(pictures or 1, hd_num)
    given = [Given("image", read_source(image, "image", settings))]
    check_pictures(given, limit, processor, settings)
    try:
        tiles, (grid,) = images.cut([given[0].source], limit)
    except (ImageError, VideoError) as error:
        raise given[0].refusal(error) from error
    local = [_address(np.moveaxis(tiles.local[place], 0, -1)) for place in range(1, len(tiles))]
    return {"object": "ixc.tiles", "grid": {"rows": grid.rows, "columns": grid.columns},
            "positions": processor.image_processor.token_count(grid), "tile_size": tiles.side,
            "whole": _address(_pixels_of_view(tiles.views[0])), "tiles": local}


def _pixels_of_view(view: np.ndarray) -> np.ndarray:
    """uint8 pixels of a normalised view."""
    values = np.moveaxis(view, 0, -1) * np.array(IMAGE_STD) + np.array(IMAGE_MEAN)
    return np.rint(values.clip(0, 1) * 255).astype(np.uint8)


def _address(pixels: np.ndarray) -> str:
    """A picture as a data URL."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
