"""What a process keeps of the files it reads records from: so much of it, however many files there are."""
from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any


class Latest:
    """Values that are made when they are asked for, of which the latest are kept.

    Whoever has been given a value may go on using it when it is no longer kept. Threads may ask at the same time, and
    a process may be forked meanwhile: there is no lock, each step is one of Python's own.

    Args:
        limit: of all weights together; the last value is kept whatever it weighs.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._held: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Any], weigh: Callable[[Any], int] = lambda value: 1) -> Any:
        """The value of a key.

        Args:
            key: of the value.
            make: makes it.
            weigh: how much it is.
        """
        found = self._held.get(key)
        if found is not None:
            with contextlib.suppress(KeyError):      # another thread has let it go just now
                self._held.move_to_end(key)
            return found[0]
        value = make()
        self._held[key] = value, weigh(value)
        while len(self._held) > 1 and self.weight > self.limit:
            with contextlib.suppress(KeyError):
                self._held.popitem(last=False)
        return value

    @property
    def weight(self) -> int:
        """Of all that is kept."""
        return sum(weight for _, weight in list(self._held.values()))

    def __len__(self) -> int:
        return len(self._held)


# Files that a process keeps open: a data set may have thousands of shards.
OPEN_FILES = Latest(64)

# Bytes of row groups that a process keeps decoded; of a larger one rows are read from its start on.
GROUP_BYTES = 1 << 27
GROUPS = Latest(GROUP_BYTES)
