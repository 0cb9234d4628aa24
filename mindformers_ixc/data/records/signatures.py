"""Files that are something else than their name says: told by their first bytes, before a reader stumbles over them."""
from __future__ import annotations

from pathlib import Path

from mindformers_ixc.errors import DataError

# Bytes that are looked at.
HEAD = 512

# Beginnings of files, what they are, and what to do.
SIGNATURES = (
    (b"version https://git-lfs", "a pointer of Git LFS, whose file was not fetched", "run `git lfs pull`"),
    (b"<!doctype html", "a web page and no data, as of a download that failed", "fetch the file again"),
    (b"<html", "a web page and no data, as of a download that failed", "fetch the file again"),
    (b"<?xml", "an XML text and no data, as of a download that failed", "fetch the file again"),
    (b"PAR1", "a Parquet table", "give it a name that ends in .parquet"),
    (b"\x1f\x8b", "compressed with gzip", "give it a name that ends in .gz, or unpack it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "give it a name that ends in .zst, or unpack it"),
    (b"BZh", "compressed with bzip2", "unpack it"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it"),
    (b"PK\x03\x04", "a zip archive", "unpack it, and name the file or folder in it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it, and name the file or folder in it"),
    (b"ARROW1", "an Arrow file", "write it as Parquet (`datasets` has to_parquet, pandas too)"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "write it as Parquet (`datasets` has to_parquet, pandas too)"),
    (b"\x89HDF", "an HDF5 file", "write its samples as JSON lines, or as Parquet"),
    (b"\x80\x04", "a pickle of Python, which may run anything when it is read", "write its samples as JSON lines"),
    (b"SQLite format 3", "an SQLite data base", "write its samples as JSON lines, or as Parquet"),
    (b"\0\0\0\0", "nothing but zero bytes at its beginning, as of a file whose content was lost", "fetch it again"))


def refuse_foreign(path: Path, name: str, own: tuple[bytes, ...] = ()) -> None:
    """Refuses a file that is known to be something else.

    Args:
        path: of the file.
        name: what messages call it.
        own: beginnings that the file may have.

    Raises:
        DataError: saying what it is, and what to do.
        OSError: when it cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head.startswith(own):
        return
    start = head.lstrip().lower()
    for mark, kind, remedy in SIGNATURES:
        if head.startswith(mark) or (mark[:1] == b"<" and start.startswith(mark)):
            raise DataError(f"{name} is {kind}; {remedy}.")
    if len(head) > 3 and head[:1] in (b"[", b"{") and head[1:2] == b"\0":
        raise DataError(f"{name} is UTF-16 or UTF-32 text, by its first bytes; save it as UTF-8.")
