"""The pool of blocks: whatever is opened, forked and closed in whatever order, blocks have the owners they should."""
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindformers_ixc.errors import GenerationError
from mindformers_ixc.generation.blocks import NOBODYS, BlockPool, RowBlocks

SIZE = 4

# open a row (prompt, new tokens, forks, which of three texts the prompt begins with), fork or close one of those open,
# forget all names
actions = st.lists(st.one_of(
    st.tuples(st.just("open"), st.integers(1, 30), st.integers(1, 12), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.sampled_from(["fork", "close"]), st.integers(0, 5)),
    st.just(("forget",))), max_size=40)


class Open:
    """A row of the test: what it should have."""

    def __init__(self, blocks, prompt, total, forks, text):
        self.blocks, self.prompt, self.total, self.forks, self.text = blocks, prompt, total, forks, text


class Model:
    """A pool, and what its blocks hold: the text and place that a row has written there."""

    def __init__(self, count):
        self.pool, self.rows, self.holds = BlockPool(count, SIZE), [], {}
        self.names = {}

    def open(self, prompt, new, forks, text):
        total = prompt + new
        needed = RowBlocks.needed(self.pool, total, forks + 1, prompt)
        before = self.pool.free, self.pool.used, self.pool.promised
        if needed > self.pool.free:
            with pytest.raises(GenerationError, match="blocks of 4 positions are needed"):
                RowBlocks(self.pool, total, forks, prompt)
            assert (self.pool.free, self.pool.used, self.pool.promised) == before
            return
        blocks = RowBlocks(self.pool, total, forks, prompt)
        assert self.pool.free == before[0] - needed
        names = [b"%d %d" % (text, place) for place in range(prompt // SIZE)]
        known = self.pool.find(names, (prompt - 1) // SIZE)
        for place, block in enumerate(known):
            assert self.holds[block] == (text, place)
        blocks.begin_with(known)
        for place, block in enumerate(blocks.table):
            if place >= len(known):
                assert not any(block in row.blocks.table for row in self.rows)
                self.holds[block] = (text, place) if place < len(names) else (len(self.holds), "an answer's")
        for block, name in zip(blocks.table, names):
            self.pool.name(block, name)
        self.rows.append(Open(blocks, prompt, total, forks, text))

    def fork(self, place):
        if place < len(self.rows) and self.rows[place].forks:
            row = self.rows[place]
            free, row.forks = self.pool.free, row.forks - 1
            other = row.blocks.fork(row.prompt)
            assert self.pool.free == free           # it was promised
            whole = row.prompt // SIZE
            assert other.table[:whole] == row.blocks.table[:whole]
            assert not set(other.table[whole:]) & {block for one in self.rows for block in one.blocks.table}
            for block in other.table[whole:]:
                self.holds[block] = (len(self.holds), "an answer's")
            self.rows.append(Open(other, row.prompt, row.total, 0, row.text))

    def close(self, place):
        if place < len(self.rows):
            self.rows.pop(place).blocks.close()

    def forget(self):
        self.pool.forget()
        assert self.pool.find([b"0 0"], 1) == []

    def check(self):
        owned = {block for row in self.rows for block in row.blocks.table}
        promised = sum(row.forks * (-(-row.total // SIZE) - row.prompt // SIZE) for row in self.rows)
        assert NOBODYS not in owned and owned <= set(range(self.pool.count))
        assert self.pool.used == len(owned) and self.pool.promised == promised
        assert self.pool.free == self.pool.count - 1 - len(owned) - promised >= 0
        for row in self.rows:
            assert len(set(row.blocks.table)) == len(row.blocks.table) == -(-row.total // SIZE)
            whole = row.prompt // SIZE
            assert [self.holds[block] for block in row.blocks.table[:whole]] == [(row.text, place)
                                                                                 for place in range(whole)]


@settings(max_examples=300, deadline=None)
@given(st.integers(4, 40), actions)
def test_blocks_have_the_owners_they_should(count, asked):
    model = Model(count)
    for action, *arguments in asked:
        getattr(model, action)(*arguments)
        model.check()
    while model.rows:
        model.close(len(model.rows) - 1)
        model.check()
    assert model.pool.free == count - 1


def test_of_what_nobody_has_the_least_used_goes_first_and_beginnings_last():
    pool = BlockPool(7, SIZE)
    rows = []
    for text in (b"a", b"b"):
        rows.append(RowBlocks(pool, 3 * SIZE))
        for place, block in enumerate(rows[-1].table):
            pool.name(block, text + b"%d" % place)
    for row in rows:
        row.close()

    def known():
        return [len(pool.find([text + b"%d" % place for place in range(3)], 3)) for text in (b"a", b"b")]

    assert pool.used == 0 and pool.free == 6 and known() == [3, 3]
    pool.take(2)
    assert known() == [1, 3]
    pool.take(2)
    assert known() == [0, 2]
    assert pool.find([b"b0", b"b1"], 1) == pool.find([b"b0", b"no"], 5) != []


def test_a_table_is_padded_with_the_block_that_is_nobodys():
    blocks = RowBlocks(BlockPool(9, SIZE), 2 * SIZE + 1)
    assert blocks.padded(5).tolist() == [*blocks.table, NOBODYS, NOBODYS]
    assert blocks.padded(2).tolist() == blocks.table[:2]
    assert RowBlocks(blocks.pool, 0).padded(2).tolist() == [NOBODYS, NOBODYS]
