"""Pictures and videos that lie inside another file: in a record, a tar shard or a table."""
from __future__ import annotations

from collections.abc import Callable


class StoredFile:
    """A file whose bytes are read when they are asked for.

    Args:
        name: what messages call it; its ending says what it is, where that matters.
        read: gives its bytes.
        mark: that changes with its bytes; empty where nobody knows one.
    """

    def __init__(self, name: str, read: Callable[[], bytes], mark: str = ""):
        self.name, self.read, self.mark = name, read, mark

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"StoredFile({self.name!r})"
