"""Whose keys and values are in memory: answers that are made in turns, and memory that is bounded."""
from __future__ import annotations

import itertools
import weakref
from typing import Protocol

from mindformers_ixc.generation.slots import Contents, Slot

# Bytes of keys and values that stay in memory after their use, or for streams that wait. The largest that is in use is
# kept whatever its size.
CACHE_BYTES = 1 << 30


class Owner(Protocol):
    """Who continues what a cache holds."""

    closed: bool


class CachePool:
    """Hands the contents of caches to those who continue them, and takes the least recently used away.

    An owner that lost its contents is told so and can compute them anew. Owners are remembered weakly: one that was
    dropped without a word is as good as closed.

    Args:
        limit: bytes of contents at most, unless a single one is larger.
    """

    def __init__(self, limit: int = CACHE_BYTES):
        self.limit = limit
        self._held: list[Contents] = []
        self._owners: dict[Contents, weakref.ref[Owner]] = {}
        self._clock = itertools.count()

    @property
    def bytes(self) -> int:
        """Size of all contents in memory."""
        return sum(contents.bytes for contents in self._held)

    def begin(self, slot: Slot, owner: Owner) -> None:
        """Makes a slot hold contents for an owner that starts anew; what they are from before does not count."""
        own = self._of(owner)
        if own is None or own.slot is not slot:
            self.lose(owner)
            own = self._unused(slot)
        if own is None:
            self.make_room(slot.bytes)
            own = slot.new_contents()
            self._held.append(own)
        self._owners[own] = weakref.ref(owner)
        self._use(own)

    def resume(self, owner: Owner) -> bool:
        """Makes a slot hold what its owner left there; false when that was taken away."""
        own = self._of(owner)
        if own is not None:
            self._use(own)
        return own is not None

    def lose(self, owner: Owner) -> None:
        """Takes an owner's contents away; their memory serves the next one."""
        own = self._of(owner)
        if own is not None:
            del self._owners[own]

    def contents_of(self, owner: Owner) -> Contents | None:
        """What is there of an owner's."""
        return self._of(owner)

    def make_room(self, size: int) -> None:
        """Drops contents until `size` more bytes fit: first what nobody continues, the least recently used first."""
        for contents in sorted(self._held, key=lambda one: (self._is_live(one), one.used)):
            if self.bytes + size <= self.limit:
                return
            self._drop(contents)

    def clear(self) -> None:
        """Frees everything."""
        while self._held:
            self._drop(self._held[0])

    def _use(self, contents: Contents) -> None:
        contents.slot.attach(contents)
        contents.used = next(self._clock)

    def _of(self, owner: Owner) -> Contents | None:
        return next((one for one, known in self._owners.items() if known() is owner), None)

    def _is_live(self, contents: Contents) -> bool:
        known = self._owners.get(contents)
        owner = known() if known is not None else None
        return owner is not None and not owner.closed

    def _unused(self, slot: Slot) -> Contents | None:
        """Contents of a slot that nobody continues; of one whose contents cannot move, whoever continues them."""
        return next((one for one in self._held if one.slot is slot and not (slot.movable and self._is_live(one))), None)

    def _drop(self, contents: Contents) -> None:
        self._held.remove(contents)
        self._owners.pop(contents, None)
        if contents.slot.attached is contents:
            contents.slot.attach(None)
