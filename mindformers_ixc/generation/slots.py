"""What a batch of prompts holds on the device: the caches of all layers, the graphs over them, and the host's
bookkeeping of where new keys and values go.

Graphs are compiled for a shape and kept. The keys and values that they work on come and go (`Contents`): several
answers of one shape may be in the making, and memory that is not needed is given back.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mindspore.common.dtype as mstype
import numpy as np
from mindformers.modules.block_tables import BlockTables
from mindspore import Tensor, nn
from mindspore.ops import functional as F
from mindspore.ops import operations as P

from mindformers_ixc.checkpoint.dtypes import dtype_bytes
from mindformers_ixc.checkpoint.model_directory import numpy_type
from mindformers_ixc.device import is_parallel, on_ascend, rank
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.generation.ascend import blocks_needed, check_blocks, check_paged_dtype
from mindformers_ixc.generation.caches import (
    ContiguousCache,
    NativeCache,
    PagedCache,
    held_dtype,
)
from mindformers_ixc.generation.sharded_cache import ShardedCache
from mindformers_ixc.models.attention import MASKED, compressed_causal_mask
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.native import kernels
from mindformers_ixc.parallel.slices import layers_of_rank


class InferenceGraph(nn.Cell):
    """Base of the graphs here: one that is compiled for one set of shapes and then called again and again.

    MindSpore tells every cell below a graph its phase at every call. With hundreds of cells that took two milliseconds
    of Python a token, so here they are told only when the phase is a new one.
    """

    def __init__(self):
        super().__init__(auto_prefix=False)

    @property
    def compile_phase(self) -> str:
        """Phase the graph was last compiled or run in."""
        return self._compile_phase

    @compile_phase.setter
    def compile_phase(self, value: str) -> None:
        if value != self._compile_phase:
            nn.Cell.compile_phase.fset(self, value)


class ReorderGraph(InferenceGraph):
    """Makes each entry of the caches' first axis hold what another one held (beam search)."""

    def __init__(self, caches: nn.CellList):
        super().__init__()
        self.caches = caches
        self.gather = P.Gather()
        self.assign = P.Assign()
        # MindSpore gathers no bfloat16 on the CPU
        self.is_native = isinstance(caches[0], NativeCache) and caches[0].keys.dtype == mstype.bfloat16
        if self.is_native:
            self.take_over = kernels.kernel("reorder_cache", lambda *_: (1,))

    def construct(self, source):
        """Reorders by int32 `(N,)`, N the caches' first axis."""
        done = 0
        if self.is_native:
            for cache in self.caches:
                done = F.depend(self.take_over(cache.keys, cache.values, source), done)
            return done
        for cache in self.caches:
            done = F.depend(done, self.assign(cache.keys, self.gather(cache.keys, source, 0)))
            done = F.depend(done, self.assign(cache.values, self.gather(cache.values, source, 0)))
        return done


@dataclass(eq=False)
class Contents:
    """Keys and values of one batch of prompts.

    Attributes:
        slot: of whose shape they are.
        tensors: keys and values of every layer.
        tables: which blocks a row owns, of paged caches.
        used: grows with every use.
    """

    slot: Slot
    tensors: list[Tensor] = field(default_factory=list)
    tables: BlockTables | None = None
    used: int = 0

    @property
    def bytes(self) -> int:
        """Size of keys and values."""
        return self.slot.bytes


class Slot:
    """Caches of one shape.

    Args:
        caches: one a layer.
        config: of the model.

    Attributes:
        graphs: prefill and decode graph of each mode used so far.
        extensions: graphs that extend the caches, by mode, rows and purpose (`mindformers_ixc.generation.extending`).
        query_scale: scale of the queries that the rotary tables of decoding carry.
        prefilled: modes and buckets whose prefill graph has run, and so is compiled.
        missed: operations that graphs not compiled yet would have saved.
        movable: whether contents can be taken out and put back; in parallel layouts they stay where they are.
        attached: the contents that the caches hold, `None` while they hold no memory.
        layout: shape and type of the keys and values of every layer in turn.
        bytes: size of all keys and values.
    """

    query_scale = 1.0

    def __init__(self, caches: nn.CellList, config: IXC25Config):
        self.caches = caches
        self.graphs: dict[str, tuple[nn.Cell, nn.Cell]] = {}
        self.extensions: dict[tuple[str, int, str], Any] = {}
        self.prefilled: set[tuple[str, int]] = set()
        self.missed = 0.0
        self.movable = not is_parallel()
        self._parameters = [cache_half for cache in caches for cache_half in (cache.keys, cache.values)]
        self.layout = [(half.shape, numpy_type(half.dtype)) for half in self._parameters]
        self.bytes = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.layout)
        self._as_built = True                           # the caches still have the memory they were built with
        self.attached: Contents | None = None
        self._reorder = None if is_parallel() else ReorderGraph(caches)
        self._replicas = config.parallel_config.data_parallel
        self._own = layers_of_rank(config, rank()) if is_parallel() and self._replicas == 1 else []

    def new_contents(self) -> Contents:
        """Contents for prompts that begin anew; a prompt overwrites what they hold."""
        tensors = []
        if self.movable and self._as_built:
            for parameter in self._parameters:
                tensors.append(Tensor(0, parameter.dtype))
                tensors[-1].assign_value(parameter)     # the same memory, not a copy
        elif self.movable:
            tensors = [Tensor(np.zeros(shape, dtype)) for shape, dtype in self.layout]
        self._as_built = False
        return Contents(self, tensors, self.new_tables())

    def new_tables(self) -> BlockTables | None:
        """Block tables of new contents, where a slot needs some."""
        return None

    def attach(self, contents: Contents | None) -> None:
        """Makes the caches hold contents, or no memory at all; nothing is copied."""
        if contents is self.attached:
            return
        if self.movable:
            tensors = [Tensor(np.zeros(1, dtype)) for _, dtype in self.layout] if contents is None \
                else contents.tensors
            for parameter, tensor in zip(self._parameters, tensors):
                parameter.set_data(tensor, slice_shape=True)    # a placeholder of another shape may come or go
        self.attached = contents

    def halves(self, contents: Contents) -> Iterator[np.ndarray]:
        """Keys and values of every layer in turn, as arrays; for contents that can move."""
        self.attach(contents)
        for parameter in self._parameters:
            yield parameter.asnumpy()

    def start(self, lengths: np.ndarray, positions: int) -> np.ndarray:
        """Begins with prompts of `lengths` `(B,)` padded to `positions`; the places their keys and values go to."""
        raise NotImplementedError

    def places(self, at: np.ndarray) -> tuple[np.ndarray, ...]:
        """Places of one more token a row, at positions `at` `(B,)`, as the caches' `decode` takes them."""
        raise NotImplementedError

    def source(self, rows: np.ndarray) -> np.ndarray:
        """For each entry of the caches' first axis the one it takes over when row i takes over row `rows[i]`."""
        raise NotImplementedError

    def reorder(self, rows: np.ndarray) -> None:
        """Makes row i hold what row `rows[i]` held."""
        source = Tensor(self.source(rows).astype(np.int32))
        if self._reorder is not None:
            self._reorder(source)
            return
        # every device holds whole rows of its heads, so each reorders its own; a graph would have to span all stages
        if self._replicas > 1:
            raise ConfigError(f"parallel_config.data_parallel is {self._replicas}, so the rows of a batch are on "
                              "different devices, and beams cannot take over one another; use num_beams 1.")
        for layer in self._own:
            for parameter in (self.caches[layer].keys, self.caches[layer].values):
                F.assign(parameter, F.gather(parameter, source, 0))


class ContiguousSlot(Slot):
    """Contiguous caches: row i of the batch owns the first-axis entries i * KV to i * KV + KV - 1.

    Args:
        config: sizes and dtypes.
        batch: rows.
        positions: positions of each row.
    """

    def __init__(self, config: IXC25Config, batch: int, positions: int):
        cache = NativeCache if kernels.available(config.compute_dtype, config.softmax_compute_type) else ContiguousCache
        layers = range(config.num_hidden_layers)
        super().__init__(nn.CellList([cache(config, batch, positions) for _ in layers]), config)
        self.kv, self.entries = config.num_key_value_heads, np.arange(batch * config.num_key_value_heads)
        self.query_scale = config.head_size ** -0.5

    def start(self, lengths: np.ndarray, positions: int) -> np.ndarray:
        """int32 `(B, 1, L, 1)`: 1 on the positions of the padded prompts that are real."""
        return (np.arange(positions) < lengths[:, None]).astype(np.int32)[:, None, :, None]

    def places(self, at: np.ndarray) -> tuple[np.ndarray, ...]:
        """int32 `(B*KV, 2)`, entry and position, and the positions again, `(B*KV, 1, 1)`, for the mask."""
        at = np.repeat(at, self.kv).astype(np.int32)
        return np.stack((self.entries, at), -1).astype(np.int32), at[:, None, None]

    def hold(self, contents: Contents, known: Sequence[Sequence[np.ndarray]]) -> None:
        """Makes contents hold the beginning of each row, given as blocks, and zeros behind it.

        Args:
            contents: of this slot.
            known: for each row its blocks, `(2 * layers, KV, positions of a block, d)` each.
        """
        self.attach(contents)
        for number, (shape, dtype) in enumerate(self.layout):
            half = np.zeros(shape, dtype)
            for row, blocks in enumerate(known):
                if blocks:
                    beginning = np.concatenate([block[number] for block in blocks], 1)      # (KV, positions, d)
                    half[row * self.kv:row * self.kv + self.kv, :beginning.shape[1]] = beginning
            contents.tensors[number] = Tensor(half)
            self._parameters[number].set_data(contents.tensors[number], slice_shape=True)

    def source(self, rows: np.ndarray) -> np.ndarray:
        """See `Slot.source`; a row has an entry for each key/value head."""
        return (rows[:, None] * self.kv + np.arange(self.kv)).reshape(-1)


class PagedSlot(Slot):
    """Paged caches: MindFormers' block tables say which blocks a row owns.

    Args:
        config: sizes and dtypes, `block_size` and `num_blocks` (see `blocks_needed`).
        batch: rows.
        positions: positions of each row at most.

    Raises:
        ConfigError: for float32, which the kernels do not take, or fewer blocks than the rows may need.
    """

    def __init__(self, config: IXC25Config, batch: int, positions: int):
        check_paged_dtype(config)
        blocks, mask = blocks_needed(config, batch, positions), compressed_causal_mask()
        self.blocks_a_row = -(-positions // config.block_size)
        layers = range(config.num_hidden_layers)
        super().__init__(nn.CellList([PagedCache(config, blocks, mask) for _ in layers]), config)
        self.batch, self.blocks, self.block_size = batch, blocks, config.block_size
        self.tables = self.new_tables()

    def new_tables(self) -> BlockTables:
        """See `Slot.new_tables`."""
        return BlockTables(self.blocks, self.block_size, self.blocks_a_row * self.block_size)

    def attach(self, contents: Contents | None) -> None:
        """See `Slot.attach`; the tables of what is attached are in use."""
        super().attach(contents)
        if contents is not None and contents.tables is not None:
            self.tables = contents.tables

    def start(self, lengths: np.ndarray, positions: int) -> np.ndarray:
        """int32 `(B*L,)`: slot of every key of the padded prompts, -1 for padding."""
        if self.tables.cache_engines:
            self.tables.clear_cache()
        self.tables.init_cache_engine(self.batch)
        length = max(positions, self.blocks_a_row)     # the block tables must fit in the array they are read from
        _, slots = self.tables.assemble_pa_full_inputs(length, lengths, [False] * self.batch)
        slots = slots.reshape(self.batch, length)[:, :positions]
        padding = np.arange(positions)[None] >= lengths[:, None]
        return np.where(padding, -1, slots).reshape(-1).astype(np.int32)

    def places(self, at: np.ndarray) -> tuple[np.ndarray, ...]:
        """Slots `(B,)`, block tables `(B, blocks)` and lengths `(B,)`, int32; a row grows by a block when it must."""
        lengths = (at + 1).astype(np.int32)
        tables, slots = self.tables.assemble_pa_inc_inputs(lengths, [False] * self.batch)
        return slots, tables, lengths

    def source(self, rows: np.ndarray) -> np.ndarray:
        """See `Slot.source`; rows that take over one another have as many blocks."""
        source = np.arange(self.blocks)
        for row, taken in enumerate(rows):
            mine, theirs = (self.tables.cache_engines[i].block_table for i in (row, taken))
            source[mine] = theirs
        return source


class ShardedSlot(Slot):
    """Contiguous caches in parallel layouts, cut by rows and key/value heads: the first axis is the batch.

    Args:
        config: sizes, dtypes and the layout.
        batch: rows.
        positions: positions of each row.
    """

    def __init__(self, config: IXC25Config, batch: int, positions: int):
        layers = range(config.num_hidden_layers)
        super().__init__(nn.CellList([ShardedCache(config, batch, positions) for _ in layers]), config)
        self.positions, self.query_scale = np.arange(positions), config.head_size ** -0.5

    def start(self, lengths: np.ndarray, positions: int) -> np.ndarray:
        """int32 `(B, 1, L, 1)`: 1 on the positions of the padded prompts that are real."""
        return (np.arange(positions) < lengths[:, None]).astype(np.int32)[:, None, :, None]

    def places(self, at: np.ndarray) -> tuple[np.ndarray, ...]:
        """float32: 1 on each row's new position, `(B, 1, S, 1)`, and the additive mask, `(B, 1, 1, S)`."""
        new, later = self.positions == at[:, None], self.positions > at[:, None]           # (B, S)
        return new.astype(np.float32)[:, None, :, None], (later * np.float32(MASKED))[:, None, None, :]

    def source(self, rows: np.ndarray) -> np.ndarray:
        """See `Slot.source`; entries are rows."""
        return rows

    def take_row(self, row: int, other: ShardedSlot, taken: int) -> None:
        """Makes a row hold what a row of another slot of as many positions, or of this one, holds.

        Every device copies its own heads. Both slots must have been in a graph that has run.
        """
        to, of = Tensor([row], mstype.int32), Tensor([taken], mstype.int32)
        for layer in self._own:
            mine, theirs = self.caches[layer], other.caches[layer]
            for held, given in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                F.scatter_update(held, to, F.gather(given, of, 0))


def is_paged(config: IXC25Config) -> bool:
    """Whether caches are MindFormers' paged ones: on Ascend with `use_past`, without replicas."""
    return config.use_past and on_ascend()


def cache_bytes(config: IXC25Config, batch: int, positions: int) -> int:
    """Bytes of the keys and values of all layers for a batch of that many rows and positions, on all devices."""
    entries = batch * positions
    if is_paged(config):
        entries = blocks_needed(config, batch, positions) * config.block_size
    itemsize = dtype_bytes(held_dtype(config))
    return 2 * config.num_hidden_layers * entries * config.num_key_value_heads * config.head_size * itemsize


def make_slot(config: IXC25Config, batch: int, positions: int) -> Slot:
    """Paged caches on Ascend with `use_past`, contiguous ones everywhere else."""
    replicas = config.parallel_config.data_parallel if is_parallel() else 1
    if is_paged(config) and replicas == 1:
        check_blocks(config)
        return PagedSlot(config, batch, positions)
    return (ShardedSlot if is_parallel() else ContiguousSlot)(config, batch, positions)
