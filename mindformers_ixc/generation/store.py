"""What earlier requests have computed, kept within so many bytes: rows of pictures, keys and values of beginnings.

A store knows no chat and no model: whatever may tell two values apart is in their keys (`mindformers_ixc.generation.
reuse`). So one store may serve all requests of a server, and several models.
"""
from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


class Store:
    """Arrays under keys; the least recently used go when there is no more room. Threads may share a store.

    Args:
        limit: bytes at most; 0 keeps nothing.

    Attributes:
        limit: may be changed; what is too much goes with the next value that comes.
        bytes: of all arrays that are kept.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.bytes = 0
        self._held: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def get(self, key: bytes) -> np.ndarray | None:
        """An array, which has been used now; `None` where there is none. It is not to be written to."""
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
            return self._held.get(key)

    def longest(self, keys: Sequence[bytes]) -> list[np.ndarray]:
        """The arrays of a chain of keys up to the first one that is missing; they have been used now.

        The first of a chain counts as used last: without it the others are of no use, so they go before it.
        """
        with self._lock:
            found: list[np.ndarray] = []
            for key in keys:
                if key not in self._held:
                    break
                found.append(self._held[key])
            self._use(keys[:len(found)])
            return found

    def put(self, key: bytes, value: np.ndarray) -> None:
        """Keeps an array of its own memory; one that is larger than the limit is not kept."""
        self.put_chain([key], [value])

    def put_chain(self, keys: Sequence[bytes], values: Iterable[np.ndarray | None]) -> None:
        """Keeps the arrays of a chain, of which `longest` finds all or the first ones.

        Args:
            keys: of the whole chain.
            values: one a key; `None` for those that are kept already.
        """
        with self._lock:
            own = 0
            for key, value in zip(keys, values):
                kept = self._held.get(key, value)
                if kept is None or own + kept.nbytes > self.limit:      # more would only push out its own beginning
                    break
                own += kept.nbytes
                if key not in self._held:
                    self._held[key] = kept
                    self.bytes += kept.nbytes
            self._use([key for key in keys if key in self._held])
            while self.bytes > self.limit:
                _, dropped = self._held.popitem(last=False)
                self.bytes -= dropped.nbytes

    def forget(self, beginning: bytes) -> None:
        """Forgets all whose keys begin so."""
        with self._lock:
            for key in [key for key in self._held if key.startswith(beginning)]:
                self.bytes -= self._held.pop(key).nbytes

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._held.clear()
            self.bytes = 0

    def _use(self, keys: Sequence[bytes]) -> None:
        for key in reversed(keys):
            self._held.move_to_end(key)
