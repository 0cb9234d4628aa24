"""Pictures written into a sample's own text, as base64."""
from __future__ import annotations

import base64
import binascii
import re
from functools import partial

from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.stored import StoredFile

# A data: address; the beginnings, in base64, of JPEG, PNG, GIF, WebP, BMP and TIFF files, which some tables have bare.
_ADDRESS = re.compile(r"data:(image|video)/([\w.+-]+);base64,", re.IGNORECASE)
_BARE = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkqA", "TU0AK")

# Characters of a text above which it is no path of Linux, and may be a file in base64.
LONGEST_PATH = 4095


def held_in(text: str, where: str) -> StoredFile | None:
    """The file that a text holds, if it is no path.

    Args:
        text: what stands where a path may.
        where: sample and key, for messages.

    Raises:
        DataError: when the text is meant to be base64 and is damaged.
    """
    address = _ADDRESS.match(text)
    if address is None and not (len(text) > LONGEST_PATH and text.startswith(_BARE)):
        return None
    content = text[address.end():] if address else text
    try:
        held = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: the file written into it as base64 is damaged ({error}).") from error
    ending = "." + address[2].lower() if address else ""
    return StoredFile(f"{where}{': a file in base64' if not ending else f': base64{ending}'}", partial(bytes, held))
