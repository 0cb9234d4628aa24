"""Who has which blocks of a paged cache: answers that begin and end when they like share one pool. Host code.

A request gets all blocks that its prompt and new tokens can fill when it begins, those of its further answers being
promised to it. So an answer that has begun is never short of one, and a request for which there are too few waits until
others have ended. Whole blocks are shared: by the answers to one prompt, and by requests whose prompts begin alike
(blocks have names, made of what they hold). A block that nobody has any more keeps its name until it is needed.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from mindformers_ixc.errors import GenerationError

# The block that is nobody's: what only fills a graph is written there.
NOBODYS = 0


class BlockPool:
    """Blocks of a number of positions each, by their numbers.

    Args:
        count: blocks that there are, `NOBODYS` included.
        size: positions of each.

    Attributes:
        promised: blocks that nobody else gets, though nobody has them yet.
    """

    def __init__(self, count: int, size: int):
        self.count, self.size, self.promised = count, size, 0
        self._unused = [block for block in range(count - 1, -1, -1) if block != NOBODYS]    # taken from the end
        self._kept: OrderedDict[int, None] = OrderedDict()      # unused, with a name; the first one goes first
        self._users = [0] * count
        self._named: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Blocks that may be taken now."""
        return len(self._unused) + len(self._kept) - self.promised

    @property
    def used(self) -> int:
        """Blocks that somebody has."""
        return self.count - 1 - len(self._unused) - len(self._kept)

    def users(self, block: int) -> int:
        """How many have a block."""
        return self._users[block]

    def blocks_of(self, positions: int) -> int:
        """Blocks that so many positions take."""
        return -(-positions // self.size)

    def promise(self, count: int) -> None:
        """Keeps blocks for later; a negative number gives promised ones up.

        Raises:
            GenerationError: when there are not so many.
        """
        self.check(count)
        self.promised += count

    def take(self, count: int) -> list[int]:
        """Blocks of one's own, whose contents are of no meaning.

        Raises:
            GenerationError: when there are not so many.
        """
        self.check(count)
        taken = []
        for _ in range(count):
            if self._unused:
                block = self._unused.pop()
            else:
                block, _ = self._kept.popitem(last=False)
                del self._named[self._names.pop(block)]
            self._users[block] = 1
            taken.append(block)
        return taken

    def check(self, count: int) -> None:
        """Sees to it that so many may be taken.

        Raises:
            GenerationError: when there are not so many.
        """
        if count > self.free:
            raise GenerationError(f"{count} blocks of {self.size} positions are needed for keys and values, but "
                                  f"{self.free} of {self.count - 1} are free; ask again when other answers have ended.")

    def share(self, blocks: Sequence[int]) -> None:
        """Lets one more have blocks that somebody has, or that `find` has just given: of these as many must be free."""
        for block in blocks:
            self._users[block] += 1
            self._kept.pop(block, None)

    def give_back(self, blocks: Sequence[int]) -> None:
        """Says that one of those who have blocks has them no more.

        Of a chain that nobody has any more the last blocks go first: without its beginning the rest is never found.
        """
        for block in reversed(blocks):
            assert self._users[block] > 0, "a block is given back by those who have it"
            self._users[block] -= 1
            if self._users[block]:
                continue
            if block in self._names:
                self._kept[block] = None
            else:
                self._unused.append(block)

    def name(self, block: int, name: bytes) -> None:
        """Says what a block, from now on never written to, holds; another one of that name stays the known one."""
        if name not in self._named and block not in self._names:
            self._named[name], self._names[block] = block, name

    def find(self, names: Sequence[bytes], most: int) -> list[int]:
        """The known blocks of a chain of names up to the first that is missing, at most so many."""
        return [self._named[name] for name in takewhile(self._named.__contains__, names[:most])]

    def forget(self) -> None:
        """Forgets all names: nothing of before is found any more."""
        self._unused += self._kept
        self._kept.clear()
        self._named.clear()
        self._names.clear()


class RowBlocks:
    """The blocks of one answer, in order of its positions.

    Args:
        pool: whose.
        positions: that they must hold at most.
        forks: further answers to the same prompt, for which blocks are promised.
        prompt: positions of the prompt, which the forks share but for a last block that is not whole.

    Attributes:
        table: the blocks.
        is_clean: whether all that was written to them are numbers.

    Raises:
        GenerationError: when there are not so many blocks.
    """

    def __init__(self, pool: BlockPool, positions: int, forks: int = 0, prompt: int = 0):
        self.pool, self._forks, self.is_clean = pool, forks, True
        count = pool.blocks_of(positions)
        self._each_fork = count - prompt // pool.size
        pool.check(self.needed(pool, positions, 1 + forks, prompt))
        self.table = pool.take(count)
        pool.promise(forks * self._each_fork)

    @staticmethod
    def needed(pool: BlockPool, positions: int, answers: int, prompt: int) -> int:
        """Blocks that so many answers to one prompt take together."""
        count = pool.blocks_of(positions)
        return count + (answers - 1) * (count - prompt // pool.size)

    def begin_with(self, blocks: Sequence[int]) -> None:
        """Puts known blocks in the place of the first ones, which are given back."""
        self.pool.give_back(self.table[:len(blocks)])
        self.pool.share(blocks)
        self.table[:len(blocks)] = blocks

    def fork(self, prompt: int) -> RowBlocks:
        """Blocks of a further answer; the whole ones of the prompt's positions are shared."""
        assert self._forks, "forks are promised"
        whole = prompt // self.pool.size
        self._forks -= 1
        self.pool.promise(-self._each_fork)
        other = RowBlocks(self.pool, 0)
        other.table = [*self.table[:whole], *self.pool.take(self._each_fork)]
        self.pool.share(self.table[:whole])
        other.is_clean = self.is_clean
        return other

    def own(self) -> list[int]:
        """Those that nobody else has."""
        return [block for block in self.table if self.pool.users(block) == 1]

    def padded(self, width: int) -> np.ndarray:
        """int32 `(width,)`: the first blocks; behind the last one stands `NOBODYS`."""
        found = np.full(width, NOBODYS, np.int32)
        part = self.table[:width]
        found[:len(part)] = part
        return found

    def close(self) -> None:
        """Gives everything back."""
        self.pool.promise(-self._forks * self._each_fork)
        self.pool.give_back(self.table)
        self.table, self._forks = [], 0
