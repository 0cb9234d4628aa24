"""The host's side of the caches, and Ascend's graphs compiled without a device."""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import mindspore.common.dtype as mstype
import numpy as np
import pytest

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.generation.slots import ContiguousSlot, PagedSlot, ShardedSlot
from mindformers_ixc.models.configuration import IXC25Config

ROOT = Path(__file__).resolve().parents[2]


def config(**fields) -> IXC25Config:
    return IXC25Config(**{"vocab_size": 8, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2,
                          "intermediate_size": 8, "num_hidden_layers": 1, "task_lora_ranks": {}, **fields})


def test_contiguous_places():
    slot = ContiguousSlot(config(), 2, 8)
    assert slot.start(np.array([2, 3]), 4).reshape(2, 4).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    where, at = slot.places(np.array([2, 3]))
    assert where.tolist() == [[0, 2], [1, 2], [2, 3], [3, 3]]
    assert at.ravel().tolist() == [2, 2, 3, 3]
    assert slot.source(np.array([1, 1])).tolist() == [2, 3, 2, 3]


class TestPaged:
    """Blocks of four positions."""

    def slot(self, **fields) -> PagedSlot:
        return PagedSlot(config(compute_dtype="float16", block_size=4, num_blocks=8, **fields), 2, 12)

    def test_every_position_has_a_slot_of_its_own_and_rows_grow_by_blocks(self):
        slot = self.slot()
        slots = slot.start(np.array([3, 6]), 8).reshape(2, 8)
        assert (slots[0, 3:] == -1).all()
        assert (slots[1, 6:] == -1).all()
        taken = [*slots[0, :3], *slots[1, :6]]
        blocks = []
        for step in range(5):
            new, tables, lengths = slot.places(np.array([3, 6]) + step)
            assert lengths.tolist() == [4 + step, 7 + step]
            taken += new.tolist()
            blocks = [[block for block in row if block >= 0] for row in tables.tolist()]
            for row in range(2):       # the slot lies in the block that the table names for the position
                assert new[row] // 4 == blocks[row][(lengths[row] - 1) // 4]
        assert len(set(taken)) == len(taken)
        assert max(taken) < 8 * 4
        assert not set(blocks[0]) & set(blocks[1])

    def test_a_row_takes_over_another_ones_blocks(self):
        slot = self.slot()
        slot.start(np.array([5, 5]), 8)
        source = slot.source(np.array([1, 1]))
        mine, theirs = (slot.tables.cache_engines[row].block_table for row in (0, 1))
        assert source[mine].tolist() == theirs
        assert source[theirs].tolist() == theirs

    def test_starting_again_frees_what_was_taken(self):
        slot = self.slot()
        for _ in range(5):
            slot.start(np.array([12, 11]), 12)

    def test_what_the_kernels_cannot_take_is_an_error(self):
        with pytest.raises(ConfigError, match=r"num_blocks is 8, but 2 row\(s\) of up to 40 positions take 20"):
            PagedSlot(config(compute_dtype="float16", block_size=4, num_blocks=8), 2, 40)
        with pytest.raises(ConfigError, match="float16 or bfloat16"):
            PagedSlot(config(compute_dtype=mstype.float32), 1, 8)


def test_sharded_places():
    slot = ShardedSlot(config(), 2, 4)
    where, mask = slot.places(np.array([2, 0]))
    assert where.shape == (2, 1, 4, 1)
    assert where[:, 0, :, 0].tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert mask.shape == (2, 1, 1, 4)
    assert (mask[:, 0, 0] < -1e8).tolist() == [[False, False, False, True], [False, True, True, True]]
    assert mask[0, 0, 0, 2] == 0
    assert slot.source(np.array([1, 1])).tolist() == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "prefill", "decode"), [
    ([], "none", "none"),
    # sums of the embedding, and of two linears a layer and of their pairs for image positions; the logits
    (["--tensor", "2"], "9 AllReduce, 1 AllGather", "5 AllReduce, 1 AllGather"),
    # a layer; the last stage's logits, gathered, go to the other as a sum with zeros
    (["--tensor", "2", "--stages", "2", "--rank", "2"], "5 AllReduce, 1 AllGather, 1 Receive",
     "3 AllReduce, 1 AllGather, 1 Receive")], ids=["alone", "tp2", "second stage of two, tp2"])
def test_ascends_graphs_compile_with_its_fused_cells(layout, prefill, decode):
    done = subprocess.run([sys.executable, ROOT / "scripts" / "compile_ascend.py", *layout], capture_output=True,
                          text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "caches: PagedSlot" in done.stdout
    messages = dict(re.findall(r"(prefill|decode): .*; messages: (.*)", done.stdout))
    assert messages == {"prefill": prefill, "decode": decode}
    assert "all fused operations are there and keep the rules" in done.stdout
    # two blocks of 128 positions for each row of up to 192
    assert "caches: PagedSlot of 4.0 MiB for 2 x 128 positions" in done.stdout


# sums as above: of the embedding and of two linears a layer, of their pairs for image positions
@pytest.mark.slow
@pytest.mark.parametrize(("words", "blocks", "largest", "rows", "reaches", "pictures", "text"), [
    # of 8 answers and nobody's; nothing is larger than the keys
    ([], 8 * 128 + 1, "(1025, 128, 8, 128)", (1, 2, 4, 8), (4096, 16384), "none", "none"),
    # nothing is larger than half of a consolidated weight
    (["--tensor", "2", "--positions", "2048", "--rows", "1"], 16 + 1, "(3072, 4096)", (1,), (2048,),
     "9 AllReduce, 1 AllGather", "5 AllReduce, 1 AllGather")], ids=["alone", "tp2"])
def test_the_graphs_of_a_server_compile_with_ascends_fused_cells(words, blocks, largest, rows, reaches, pictures,
                                                                 text):
    done = subprocess.run([sys.executable, ROOT / "scripts" / "compile_ascend.py", "--serving", *words],
                          capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"caches: {blocks} blocks of 128 positions" in done.stdout
    assert "all fused operations are there and keep the rules" in done.stdout
    found = re.findall(r"(.*): compiled in .*; largest tensor: (.*); messages: (.*)", done.stdout)
    assert {name: messages for name, _, messages in found} == {
        **{f"piece with pictures up to {reach}": pictures for reach in reaches},
        **{f"piece of text up to {reach}": text for reach in reaches},
        **{f"step {count}": text for count in rows}, "copy": "none"}
    assert {shape for name, shape, _ in found if name != "copy"} == {largest}
