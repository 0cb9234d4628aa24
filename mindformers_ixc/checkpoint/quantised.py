"""Quantised checkpoints as they lie on disk: which weights are whole numbers, and all of them as weights again.

A directory whose `config.json` has a `quantization_config` holds, for some weights, three or two arrays instead of
`NAME.weight`: `NAME.qweight`, `NAME.scales` and, of four bits, `NAME.qzeros`. Two layouts are read: this package's own
(`quant_method: mindformers_ixc`) and AWQ's (`awq`, version gemm), both described in `packing`.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ixc.checkpoint.dtypes import WEIGHTS
from mindformers_ixc.checkpoint.family import fields_of
from mindformers_ixc.checkpoint.packing import GROUP, MOST_4, pack_4, unpack_4, unpack_awq, widen_4, widen_8
from mindformers_ixc.checkpoint.sources import OpenedCheckpoint
from mindformers_ixc.checkpoint.tensors import LazyTensor
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.parameters import part_of

# The section of config.json, and the methods it may name.
SECTION = "quantization_config"
OWN, AWQ = "mindformers_ixc", "awq"
OWN_VERSION = 1

# What stands in the place of `NAME.weight`: the numbers, and what belongs to them.
NUMBERS, SCALES, ZEROS = "qweight", "scales", "qzeros"

# What AWQ's section must say; other values are other packings.
AWQ_FIELDS: dict[str, Any] = {"bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}

# The linears of a decoder layer, which have the bits that the section says; the pairs beside them have 8.
_LINEAR = re.compile(r"model\.layers\.\d+\.\w+\.\w+$")

# Its rows are looked up, of 8 bits and of 16; of four none are.
EMBEDDING = "model.tok_embeddings"

# Formats of the arrays of a weight, by kind, in the order in which they are written.
FORMATS = {"int4": {NUMBERS: "U8", SCALES: "F16", ZEROS: "U8"}, "int8": {NUMBERS: "I8", SCALES: "F32"},
           AWQ: {NUMBERS: "I32", SCALES: "F16", ZEROS: "I32"}}


@dataclass(frozen=True)
class Quantization:
    """What a `quantization_config` says.

    Attributes:
        method: `OWN` or `AWQ`.
        bits: of the decoder's linears, 4 or 8.
        dtype: format that the weights had before, in which they are written when they are widened.
    """

    method: str
    bits: int
    dtype: str

    def to_section(self) -> dict[str, Any]:
        """The section of config.json."""
        if self.method == AWQ:
            return {"quant_method": AWQ, **AWQ_FIELDS}
        label = next(name for name, entry in WEIGHTS.items() if entry == self.dtype)
        grouped = {"group_size": GROUP, "zero_point": True} if self.bits == 4 else {}
        return {"quant_method": OWN, "version": OWN_VERSION, "bits": self.bits, **grouped, "source_dtype": label}


def read_section(section: object, where: str | Path) -> Quantization:
    """A `quantization_config`, checked.

    Raises:
        CheckpointError: for another method or another packing.
    """
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{where}: {SECTION} is {section!r:.80}; it must be a section.")
    method = section.get("quant_method")
    if method == AWQ:
        for name, wanted in AWQ_FIELDS.items():
            found = section.get(name)
            if (found.lower() if isinstance(found, str) else found) != wanted:
                raise CheckpointError(f"{where}: {SECTION} has {name} {found!r:.80}; of AWQ's packings the one with "
                                      f"{name} {wanted!r} is read (4 bits, groups of {GROUP}, version gemm).")
        return Quantization(AWQ, 4, "F16")
    if method != OWN:
        raise CheckpointError(f"{where}: {SECTION} has quant_method {method!r:.80}; the choices are {OWN} and {AWQ}.")
    bits, dtype, group = section.get("bits"), section.get("source_dtype", "float32"), section.get("group_size", GROUP)
    if group != GROUP:
        raise CheckpointError(f"{where}: {SECTION} has group_size {group!r:.80}; groups of {GROUP} are read.")
    if section.get("version") != OWN_VERSION or bits not in (4, 8) or dtype not in WEIGHTS:
        raise CheckpointError(f"{where}: {SECTION} says version {section.get('version')!r:.80}, bits {bits!r:.80} and "
                              f"source_dtype {dtype!r:.80}; this version of the package reads version {OWN_VERSION} "
                              f"with bits 4 or 8 and a source_dtype of {', '.join(dict.fromkeys(WEIGHTS))}.")
    return Quantization(OWN, int(bits), WEIGHTS[dtype])


def quantization_of(source: OpenedCheckpoint) -> Quantization | None:
    """How a checkpoint is quantised; `None` if its weights are all there as such.

    Raises:
        CheckpointError: when it is quantised in a way that is not read, or no config.json says how.
    """
    section = fields_of(source).get(SECTION)
    whole = not any(name.endswith(f".{NUMBERS}") for name in source.tensors)
    if section is not None and not whole:
        return read_section(section, source.config_file or source.path)
    if whole:       # of a section that speaks of nothing here; some tools leave it behind when they widen
        return None
    raise CheckpointError(f"{source.path} holds whole numbers in place of weights (`{NUMBERS}`), but no {SECTION} in a "
                          "config.json says how they are packed; copy the config.json that belongs to it.")


def refuse_quantised(source: OpenedCheckpoint, what: str, part: str | None = None) -> None:
    """Refuses a quantised checkpoint where full weights are needed.

    Args:
        source: the checkpoint.
        what: needs them, for the message.
        part: of the model, whose weights are needed alone; by default all of them.

    Raises:
        CheckpointError: with the command that makes full weights of it.
    """
    if any(name.endswith(f".{NUMBERS}") and part in (None, part_of(name)) for name in source.tensors):
        raise CheckpointError(f"{source.path} is quantised, and {what} needs full weights: take those it was made "
                              f"from, or widen it: mindformers convert {source.path} TARGET --to hf.")


@dataclass(frozen=True)
class StoredWeight:
    """A weight that is kept as whole numbers.

    Attributes:
        name: without `.weight`.
        kind: key of `FORMATS`.
        shape: `(O, F)`.
        parts: its arrays, unread.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    parts: dict[str, LazyTensor] = field(hash=False)

    def numbers(self, begin: int, end: int) -> np.ndarray:
        """The whole numbers of rows `begin` to `end`, `(n, F)`: 0 to 15, or int8."""
        if self.kind == AWQ:
            return self._columns(NUMBERS, begin, end)
        found = self.parts[NUMBERS].rows(begin, end)
        return unpack_4(found) if self.kind == "int4" else found

    def scales(self, begin: int, end: int) -> np.ndarray:
        """The scales of rows: float16 `(n, G)`, or float32 `(n,)`.

        Raises:
            CheckpointError: for scales that are no numbers.
        """
        scales = self.parts[SCALES]
        found = (np.ascontiguousarray(scales.rows(0, scales.shape[0])[:, begin:end].T) if self.kind == AWQ
                 else scales.rows(begin, end))
        check_scales(f"{self.name}.{SCALES}", found)
        return found

    def zeros(self, begin: int, end: int) -> np.ndarray:
        """The zeros of rows of four-bit weights, uint8 `(n, G)`.

        Raises:
            CheckpointError: for zeros that four bits do not hold.
        """
        if self.kind == AWQ:
            return self._columns(ZEROS, begin, end)
        found = self.parts[ZEROS].rows(begin, end)
        check_zeros(f"{self.name}.{ZEROS}", found)
        return found

    def check(self) -> None:
        """Looks at what stands beside the numbers, where it is copied unread.

        Raises:
            CheckpointError: for scales that are no numbers, and zeros that four bits do not hold.
        """
        self.scales(0, self.shape[0])
        if self.kind == "int4":
            self.zeros(0, self.shape[0])

    def widened(self, begin: int, end: int) -> np.ndarray:
        """Rows of the weight, in float32."""
        if self.kind == "int8":
            return widen_8(self.numbers(begin, end), self.scales(begin, end))
        return widen_4(self.numbers(begin, end), self.scales(begin, end), self.zeros(begin, end))

    def _columns(self, part: str, begin: int, end: int) -> np.ndarray:
        """Of AWQ's words, which lie along the outputs, some outputs as rows."""
        words, first = self.parts[part], begin // 8
        found = unpack_awq(words.rows(0, words.shape[0])[:, first:-(-end // 8)])
        return np.ascontiguousarray(found[:, begin - 8 * first:end - 8 * first].T)


def check_scales(name: str, scales: np.ndarray) -> None:
    """Refuses scales that are no numbers; what rounds weights writes none.

    Raises:
        CheckpointError: naming the array.
    """
    odd = int(scales.size - np.count_nonzero(np.isfinite(scales)))
    if odd:
        raise CheckpointError(f"{name} holds {odd} NaN or infinities, which no scale is; the file is damaged, fetch or "
                              "make it anew.")


def check_zeros(name: str, zeros: np.ndarray) -> None:
    """Refuses zeros of the own layout, a byte each, that are none of the numbers 0 to 15 of the weights.

    Packed as AWQ they would spill over into their neighbours' four bits.

    Raises:
        CheckpointError: naming the array.
    """
    odd = int(np.count_nonzero(zeros > MOST_4))
    if odd:
        raise CheckpointError(f"{name} holds {odd} numbers above {MOST_4}, which no zero of four bits is; the file is "
                              "damaged, fetch or make it anew.")


class ComputedTensor(LazyTensor):
    """A tensor whose rows are computed from others.

    Args:
        dtype: its format.
        shape: its shape.
        compute: gives rows `begin` to `end`.
        stored: format it is written in unless another is asked for.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...], compute: Callable[[int, int], np.ndarray],
                 stored: str | None = None):
        self.dtype, self.shape, self.compute, self._stored = dtype, shape, compute, stored or dtype

    @property
    def stored_dtype(self) -> str:
        """See `LazyTensor`."""
        return self._stored

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`."""
        return self.compute(begin, end)


def stored_weights(source: OpenedCheckpoint, quantization: Quantization) -> dict[str, StoredWeight]:
    """The weights of a checkpoint that are whole numbers, by name without `.weight`; shapes and formats are checked.

    Raises:
        CheckpointError: naming the array that is missing or of another kind.
    """
    found = {}
    for name, tensor in source.tensors.items():
        stem, _, last = name.rpartition(".")
        if last != NUMBERS:
            continue
        kind = AWQ if quantization.method == AWQ else "int4" if tensor.dtype == "U8" else "int8"
        if kind != AWQ and _LINEAR.match(stem) and kind != f"int{quantization.bits}":
            raise CheckpointError(f"{source.path} holds {name} with {kind[3:]} bits, and its config.json says that the "
                                  f"decoder's linears have {quantization.bits}; copy the config.json that belongs to "
                                  "it.")
        if f"{stem}.weight" in source.tensors:
            raise CheckpointError(f"{source.path} holds both {name} and {stem}.weight, and nothing says which of them "
                                  "counts; take the one out that does not belong there.")
        parts = {}
        for part, dtype in FORMATS[kind].items():
            array = source.tensors.get(f"{stem}.{part}")
            if array is None:
                raise CheckpointError(f"{source.path} holds {name} without {stem}.{part}, which says what its numbers "
                                      "mean; the directory is incomplete, or packed in another way.")
            if array.dtype != dtype:
                raise CheckpointError(f"{source.path} holds {stem}.{part} in the format {array.dtype}; in this packing "
                                      f"it is {dtype}.")
            parts[part] = array
        found[stem] = StoredWeight(stem, kind, _shape(source, stem, kind, parts), parts)
    return found


def array_shapes(kind: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a weight `(O, F)`."""
    outputs, width = shape
    groups = width // GROUP
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "int4": {NUMBERS: (outputs, width // 2), SCALES: (outputs, groups), ZEROS: (outputs, groups)},
        "int8": {NUMBERS: (outputs, width), SCALES: (outputs,)},
        AWQ: {NUMBERS: (width, outputs // 8), SCALES: (groups, outputs), ZEROS: (groups, outputs // 8)}}
    return shapes[kind]


def _shape(source: OpenedCheckpoint, name: str, kind: str, parts: Mapping[str, LazyTensor]) -> tuple[int, int]:
    """Shape `(O, F)` of a weight, from that of its numbers; the other arrays must fit.

    Raises:
        CheckpointError: for shapes that do not belong together.
    """
    numbers = parts[NUMBERS].shape
    rows, width = (*numbers, 0, 0)[:2]
    shape = {"int4": (rows, 2 * width), "int8": (rows, width), AWQ: (8 * width, rows)}[kind]
    expected = array_shapes(kind, shape)
    wrong = next((part for part, wanted in expected.items() if parts[part].shape != wanted), None)
    if len(numbers) != 2 or (kind != "int8" and shape[1] % GROUP) or wrong is not None:
        part = wrong or SCALES
        raise CheckpointError(f"{source.path} holds {name}.{NUMBERS} with shape {numbers} and {name}.{part} with shape "
                              f"{parts[part].shape}, which do not belong together in groups of {GROUP}.")
    return shape


def widened(source: OpenedCheckpoint) -> OpenedCheckpoint:
    """The checkpoint with every weight as such, computed when its rows are asked for; itself if it is not quantised.

    Raises:
        CheckpointError: see `quantization_of` and `stored_weights`.
    """
    quantization = quantization_of(source)
    if quantization is None:
        return source
    weights, tensors = stored_weights(source, quantization), {}
    for name, tensor in source.tensors.items():
        stem, _, last = name.rpartition(".")
        if stem not in weights or last not in FORMATS[weights[stem].kind]:
            tensors[name] = tensor
        elif last == NUMBERS:
            weight = weights[stem]
            tensors[f"{stem}.weight"] = ComputedTensor("F32", weight.shape, weight.widened, quantization.dtype)
    return replace(source, tensors=tensors)


def own_parts(weight: StoredWeight) -> dict[str, LazyTensor]:
    """The arrays of a weight in the own layout; those of AWQ's are packed anew, number by number the same."""
    if weight.kind != AWQ:
        return weight.parts
    outputs, width = weight.shape
    return {
        NUMBERS: ComputedTensor("U8", (outputs, width // 2), lambda begin, end: pack_4(weight.numbers(begin, end))),
        SCALES: ComputedTensor("F16", (outputs, width // GROUP), weight.scales),
        ZEROS: ComputedTensor("U8", (outputs, width // GROUP), weight.zeros)}
