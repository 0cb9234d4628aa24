"""Pictures written into a sample's own text, as base64."""
from __future__ import annotations

import base64
import binascii
import re
from functools import partial

from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.stored import StoredFile

# A data: address of what may be a picture or video, with or without parameters; the beginnings, in base64, of JPEG,
# PNG, GIF, WebP, BMP and TIFF files, which some tables have bare.
_ADDRESS = re.compile(r"data:(?:(image|video)/([\w.+-]+)|application/octet-stream)?(?:;[\w-]+=[^;,]*)*;base64,",
                      re.IGNORECASE)
_BARE = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK")

# Characters of a text above which it is no path of Linux, and may be a file in base64; and above which one that has no
# sign but those of base64 is no path that anybody has.
LONGEST_PATH, ODD_PATH = 4095, 64

_SIGNS = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")

# Base64 as it is written in addresses of the web, and what stands between its lines.
_WEB, _SPACE = str.maketrans("-_", "+/"), re.compile(r"\s+")


def held_in(text: str, where: str) -> StoredFile | None:
    """The file that a text holds, if it is no path.

    Args:
        text: what stands where a path may.
        where: sample and key, for messages.

    Raises:
        DataError: when the text is meant to be base64 and is damaged.
    """
    address = _ADDRESS.match(text)
    if address is None and not (text.startswith(_BARE) and _is_long(text)):
        return None
    content = _SPACE.sub("", text[address.end():] if address else text).translate(_WEB).rstrip("=")
    try:
        held = base64.b64decode(content + "=" * (-len(content) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the file written into it as base64 is damaged ({error}).") from error
    ending = "." + address[2].lower() if address and address[2] else ""
    return StoredFile(f"{where}{': a file in base64' if not ending else f': base64{ending}'}", partial(bytes, held))


def _is_long(text: str) -> bool:
    return len(text) > LONGEST_PATH or (len(text) > ODD_PATH and _SIGNS.fullmatch(text) is not None)
