"""Pictures and videos at http(s) addresses, fetched once into the user's cache; only where a YAML asks for it."""
from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from mindformers_ixc.errors import DataError
from mindformers_ixc.files import whole_file
from mindformers_ixc.resources import usable_cache_folder

# Seconds that a server may be silent; bytes of a file at most; bytes that are read at a time.
SILENCE, LARGEST, CHUNK = 30, 1 << 28, 1 << 20


def _check_content(file: Path, address: str, where: str) -> None:
    """Refuses a page that a server sends in place of a file, before it is kept as that."""
    with open(file, "rb") as opened:
        head = opened.read(512).lstrip().lower()
    if not head or head.startswith((b"<!doctype", b"<html", b"{")):
        found = "a page or message" if head else "nothing"
        raise DataError(f"{where}: {address} gave {found} and no picture; fetch it by hand and name the file, or take "
                        "the sample out.")


def is_web_address(name: str) -> bool:
    """Whether a name is an http or https address."""
    return name.lower().startswith(("http://", "https://"))


def fetched(address: str, where: str) -> Path:
    """The file at an address, from the cache if it was fetched before.

    Args:
        address: http or https.
        where: sample and key, for messages.

    Raises:
        DataError: when it cannot be fetched.
    """
    ending = PurePosixPath(urlsplit(address).path).suffix[:10]
    target = usable_cache_folder("fetched") / (hashlib.sha256(address.encode()).hexdigest()[:32] + ending)
    if target.exists():
        return target
    request = urllib.request.Request(address, headers={"User-Agent": "mindformers_ixc"})
    try:
        with urllib.request.urlopen(request, timeout=SILENCE) as answer, whole_file(target) as part, \
                open(part, "wb") as file:
            while content := answer.read(CHUNK):
                file.write(content)
                if file.tell() > LARGEST:
                    raise DataError(f"{where}: {address} has more than {LARGEST >> 20} MiB; fetch it by hand and name "
                                    "the file.")
            file.flush()
            _check_content(part, address, where)
            missing = int(answer.headers.get("Content-Length") or 0) - file.tell()
            if missing > 0:
                raise DataError(f"{where}: {address} ended {missing} bytes early; try again.")
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(f"{where}: {address} cannot be fetched ({reason}); fetch it by hand and name the file, or take "
                        "the sample out.") from error
    return target
