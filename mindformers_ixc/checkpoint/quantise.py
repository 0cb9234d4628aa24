"""Makes quantised checkpoints: `quantize("internlm-xcomposer2d5-7b", "ixc25_4bit", bits=4)`.

The five linears of every decoder layer become numbers of 4 or 8 bits; embedding, head, low-rank pairs, tower and
projector become 8 bits with a scale for every output. What is small stays as it is. Written in AWQ's layout everything
but the five linears is float16, as other tools expect it.
"""
from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.calibration import SAMPLES, Calibrator, calibration_samples
from mindformers_ixc.checkpoint.convert import select_tensors
from mindformers_ixc.checkpoint.dtypes import to_float32
from mindformers_ixc.checkpoint.host_model import HostModel
from mindformers_ixc.checkpoint.layer_rounding import WAYS
from mindformers_ixc.checkpoint.model_config import config_of
from mindformers_ixc.checkpoint.packing import GROUP, pack_4, pack_awq, round_4, round_8
from mindformers_ixc.checkpoint.quantised import (
    AWQ,
    EMBEDDING,
    FORMATS,
    NUMBERS,
    OWN,
    SCALES,
    SECTION,
    ZEROS,
    ComputedTensor,
    Quantization,
    StoredWeight,
    array_shapes,
    own_parts,
    quantization_of,
    stored_weights,
    widened,
)
from mindformers_ixc.checkpoint.sources import SUFFIXES, OpenedCheckpoint, open_source
from mindformers_ixc.checkpoint.streaming import WorkFolder
from mindformers_ixc.checkpoint.tensors import LazyTensor
from mindformers_ixc.checkpoint.writing import SHARD_BYTES, Options, write_checkpoint
from mindformers_ixc.config import ModelConfig
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.parameters import UNUSED, VISION, layer_of, linear_shapes, parameter_table, part_of
from mindformers_ixc.processing.processor import Processor

BITS = (4, 8)
LAYOUTS = (OWN, AWQ)

# Bytes of float32 weights that are rounded at once: they go through the processor's cache a dozen times.
ROUNDED_BYTES = 8 * 2**20

# Beside the decoder's linears, what becomes 8 bits. The starter's logits differ, as a root of the mean square, by 0.3 %
# for the embedding, 0.7 % for the head, 0.1 % at most for pairs, tower or projector, and by 12 % for linears in 4 bits.
EIGHT_BITS = re.compile(rf"(model\.tok_embeddings|output|vision_proj\.[02]|{re.escape(VISION)}\.encoder\.layers\.\d+\."
                        r"(self_attn\.\w+|mlp\.fc[12])|model\.layers\.\d+\..*(Plora|lora_[a-z]+)_[AB])\.weight$")


class RoundedWeight:
    """A weight as whole numbers, rounded to the nearest; its arrays are read one after the other.

    Args:
        name: of the weight.
        tensor: the weight `(O, F)`.
        kind: `int4`, `int8` or AWQ.
    """

    def __init__(self, name: str, tensor: LazyTensor, kind: str):
        self.name, self.tensor, self.kind = name, tensor, kind
        # what was rounded beside the numbers; reading the numbers makes it
        self.beside: dict[str, np.ndarray] = {}

    def parts(self) -> dict[str, LazyTensor]:
        """Its arrays, computed when they are read."""
        shapes = array_shapes(self.kind, self.tensor.shape)
        return {part: _RoundedPart(self, part, dtype, shapes[part]) for part, dtype in FORMATS[self.kind].items()}

    def pieces(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """First row, and the arrays of consecutive rows, by part; numbers of four bits as they are, unpacked."""
        for begin, piece in self.tensor.pieces(ROUNDED_BYTES):
            weight = to_float32(piece, self.tensor.dtype)
            if not np.isfinite(weight).all():
                raise CheckpointError(f"{self.name} holds NaN or infinities, which whole numbers cannot say; take a "
                                      "checkpoint without them.")
            if self.kind == "int8":
                yield begin, dict(zip((NUMBERS, SCALES), round_8(weight)))
            else:
                numbers, scales, zeros = round_4(weight)
                if np.isinf(scales).any():
                    raise CheckpointError(f"{self.name} holds weights up to {np.abs(weight).max():.3g}, whose scale is "
                                          "beyond float16; four bits cannot say them.")
                yield begin, {NUMBERS: numbers, SCALES: scales, ZEROS: zeros}

    def whole(self, part: str) -> np.ndarray:
        """An array for all rows, `(O, ...)`; those beside the numbers, which are small, are kept."""
        if part == NUMBERS or not self.beside:
            found = [arrays for _, arrays in self.pieces()]
            self.beside = {name: np.concatenate([arrays[name] for arrays in found])
                           for name in found[0] if name != NUMBERS}
            if part == NUMBERS:
                return np.concatenate([arrays[NUMBERS] for arrays in found])
        return self.beside[part]


class CalibratedWeight(RoundedWeight):
    """A linear of a decoder layer in four bits that a calibrator chooses.

    Args:
        name, tensor, kind: as of `RoundedWeight`.
        calibrator: of the whole model.
    """

    def __init__(self, name: str, tensor: LazyTensor, kind: str, calibrator: Calibrator):
        super().__init__(name, tensor, kind)
        self.calibrator = calibrator

    def pieces(self) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """See `RoundedWeight`; all rows are one piece."""
        for _ in super().pieces():       # refuses what four bits cannot say
            pass
        layer = layer_of(self.name)
        assert layer is not None, self.name
        path = self.name.split(f".{layer}.", 1)[1][:-len(".weight")]
        yield 0, dict(zip((NUMBERS, SCALES, ZEROS), self.calibrator.rounded(layer, path)))


class _RoundedPart(LazyTensor):
    """An array of a `RoundedWeight`."""

    def __init__(self, weight: RoundedWeight, part: str, dtype: str, shape: tuple[int, ...]):
        self.weight, self.part, self.dtype, self.shape, self.group = weight, part, dtype, shape, weight.name

    def pieces(self, limit: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """See `LazyTensor`; pieces are as large as can be rounded at once."""
        kind = self.weight.kind
        if kind == AWQ:         # lies along the outputs: all of them are needed
            whole = np.ascontiguousarray(self.weight.whole(self.part).T)
            yield 0, whole if self.part == SCALES else pack_awq(whole)
            return
        if self.part != NUMBERS:
            yield 0, self.weight.whole(self.part)
            return
        beside: list[dict[str, np.ndarray]] = []
        for begin, arrays in self.weight.pieces():
            numbers = arrays.pop(NUMBERS)
            beside.append(arrays)
            yield begin, pack_4(numbers) if kind == "int4" else numbers
        self.weight.beside = {name: np.concatenate([arrays[name] for arrays in beside]) for name in beside[0]}

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`."""
        return self.whole()[begin:end]


def quantize(source: str | Path, target: str | Path, bits: int = 4, *, layout: str = OWN,
             calibrate: str | Path | None = None, samples: int | None = None, ways: Sequence[str] = WAYS,
             config: str | Path | None = None, shard_bytes: int = SHARD_BYTES, overwrite: bool = False) -> Path:
    """Quantises a checkpoint. An interrupted run goes on where it stopped.

    A source in AWQ's layout is packed anew for the own one, number by number the same, and the other way round.

    Args:
        source: any checkpoint that `convert` reads.
        target: directory to be made.
        bits: of the decoder's linears, 4 or 8.
        layout: this package's, or `awq`, which other tools read.
        calibrate: conversations with pictures, by which four-bit weights are chosen; by default they are rounded to the
            nearest.
        samples: of them, at most; 16 by default.
        ways: of rounding that calibration tries for each linear, of `layer_rounding.WAYS`.
        config: `config.json` or its directory, if the source has none beside it.
        shard_bytes: size of a file at most, in bytes.
        overwrite: replace a target that exists.

    Returns:
        The target.

    Raises:
        CheckpointError: for what is wrong with source or target, or for sizes that do not fit the layout.
        DataError: for calibration samples that are none.
    """
    if samples is not None and calibrate is None:
        raise CheckpointError(f"samples is {samples} without a file to calibrate with; name it (--calibrate FILE), or "
                              "leave samples out.")
    samples = SAMPLES if samples is None else samples
    _check_wishes(Path(target), bits, layout, calibrate is not None, samples, ways)
    opened = open_source(source)
    before = quantization_of(opened)
    model = config_of(opened, config)
    options = Options(to="hf", shard_bytes=shard_bytes)
    chosen = select_tensors(widened(opened), model, options)
    check_sizes(model, bits, layout)
    if before is not None:
        _check_source(opened, before, bits, calibrate is not None)
    stored = stored_weights(opened, before) if before is not None else {}
    for weight in stored.values():
        weight.check()
    calibrator = None
    if calibrate is not None:
        found = calibration_samples(calibrate, Processor.from_directory(_processor_folder(opened, config)), samples)
        calibrator = Calibrator(HostModel(chosen, model), found, ways, _other_dtype(layout),
                                WorkFolder(Path(target), {}).path)
    quantization = Quantization(layout, bits, _dtype_of(chosen))
    section = quantization.to_section()
    tensors = dict(_tensors(chosen, stored, model, quantization, calibrator))
    write_checkpoint(tensors, model, opened, Path(target), options, overwrite,
                     {"quantization": section, "calibration": calibrator and calibrator.digest()}, {SECTION: section})
    if calibrator is not None and calibrator.choices:
        terminal.current.say(calibrator.sentence())
    return Path(target)


def _processor_folder(opened: OpenedCheckpoint, config: str | Path | None) -> Path:
    """Where tokenizer and picture options are: with the configuration."""
    if config is None or opened.config_file is not None:
        return opened.side_folder
    return Path(config) if Path(config).is_dir() else Path(config).parent


def _check_wishes(target: Path, bits: int, layout: str, calibrated: bool, samples: int, ways: Sequence[str]) -> None:
    """Refuses what is not available or does not go together."""
    if bits not in BITS or layout not in LAYOUTS:
        raise CheckpointError(f"bits is {bits!r:.80} and layout {layout!r:.80}; the choices are bits {BITS[0]} and "
                              f"{BITS[1]}, layout {' and '.join(LAYOUTS)}.")
    if layout == AWQ and bits != 4:
        raise CheckpointError(f"AWQ's layout has 4 bits; {bits} bits are written in the layout {OWN}.")
    if calibrated and (bits != 4 or samples < 1):
        raise CheckpointError(f"Calibration is for 4 bits and takes one sample at least; found {bits} bits and "
                              f"{samples} samples. Eight bits are rounded to the nearest, which loses next to nothing.")
    if not ways or not set(ways) <= set(WAYS):
        raise CheckpointError(f"ways is {ways!r:.80}; the choices are {', '.join(WAYS)}, one of them at least.")
    if target.suffix in SUFFIXES:
        raise CheckpointError(f"{target} looks like a file; a quantised model is a directory, whose config.json says "
                              "how it is packed.")


def _check_source(opened: OpenedCheckpoint, before: Quantization, bits: int, calibrated: bool) -> None:
    """Refuses a quantised source whose numbers would have to be rounded again."""
    if (before.bits, bits) != (4, 4):
        raise CheckpointError(f"{opened.path} is quantised already, with {before.bits} bits; rounding it again would "
                              "add to its error. Take the weights it was made from, or widen it first: mindformers "
                              f"convert {opened.path} TARGET --to hf.")
    if calibrated:
        raise CheckpointError(f"{opened.path} is quantised already, so there is nothing to choose; calibrate with the "
                              "weights it was made from.")


def _dtype_of(tensors: dict[str, LazyTensor]) -> str:
    """The format that weights have once they are widened again: that of the source, where it is one."""
    found = {tensor.stored_dtype for name, tensor in tensors.items() if len(tensor.shape) == 2}
    return found.pop() if len(found) == 1 and found <= {"F16", "BF16"} else "F32"


def check_sizes(model: ModelConfig, bits: int, layout: str) -> None:
    """Refuses a model whose linears do not divide into groups, or into AWQ's words.

    Raises:
        CheckpointError: naming the linear.
    """
    if bits == 8:
        return
    for path, (outputs, width) in linear_shapes(model).items():
        if width % GROUP:
            raise CheckpointError(f"{path} has {width} inputs, which do not divide into the groups of {GROUP} that "
                                  "share a scale in 4 bits; --bits 8 has a scale for every output and takes any size.")
        if layout == AWQ and outputs % 8:
            raise CheckpointError(f"{path} has {outputs} outputs, which do not divide by 8, as AWQ's words of eight "
                                  f"numbers need it; take the layout {OWN}.")


def kind_of(name: str, model: ModelConfig, quantization: Quantization) -> str | None:
    """As which whole numbers a parameter is written, a key of `FORMATS`; `None` for what is none."""
    own = quantization.method == OWN
    if part_of(name) == "language" and name.endswith(tuple(f".{path}.weight" for path in linear_shapes(model))):
        return f"int{quantization.bits}" if own else AWQ
    return "int8" if own and EIGHT_BITS.match(name) else None


def _tensors(chosen: dict[str, LazyTensor], stored: dict[str, StoredWeight], model: ModelConfig,
             quantization: Quantization, calibrator: Calibrator | None) -> Iterator[tuple[str, LazyTensor]]:
    """The arrays of the target by name, in the order in which they are written."""
    own = quantization.method == OWN
    for name in (*parameter_table(model), *(name for name in UNUSED if name in chosen)):
        tensor, stem, kind = chosen[name], name[:-len(".weight")], kind_of(name, model, quantization)
        if calibrator is not None:
            tensor = calibrator.fitted(name, tensor)
        if kind is None:
            yield name, _InFormat(name, tensor, _other_dtype(quantization.method) or tensor.stored_dtype)
        elif stem in stored and (stem != EMBEDDING or stored[stem].kind == "int8"):
            yield from _packed(stored[stem], own)
        elif calibrator is not None and kind in ("int4", AWQ):
            yield from _named(stem, CalibratedWeight(name, tensor, kind, calibrator).parts())
        else:
            yield from _named(stem, RoundedWeight(name, tensor, kind).parts())


def _other_dtype(layout: str) -> str | None:
    """Format of what stays as it is: float16 for other tools, or its own."""
    return "F16" if layout == AWQ else None


def _named(stem: str, parts: dict[str, LazyTensor]) -> Iterator[tuple[str, LazyTensor]]:
    return ((f"{stem}.{part}", tensor) for part, tensor in parts.items())


def _packed(weight: StoredWeight, own: bool) -> Iterator[tuple[str, LazyTensor]]:
    """A weight that is whole numbers already, in the layout of the target."""
    if own or weight.kind == AWQ:
        return _named(weight.name, own_parts(weight) if own else weight.parts)
    outputs, width = weight.shape

    def numbers(begin: int, end: int) -> np.ndarray:
        return pack_awq(np.ascontiguousarray(weight.numbers(0, outputs)[:, begin:end].T))

    def scales(begin: int, end: int) -> np.ndarray:
        return np.ascontiguousarray(weight.scales(0, outputs)[:, begin:end].T)

    def zeros(begin: int, end: int) -> np.ndarray:
        return pack_awq(np.ascontiguousarray(weight.zeros(0, outputs)[:, begin:end].T))

    return _named(weight.name, {
        NUMBERS: ComputedTensor("I32", (width, outputs // 8), numbers),
        SCALES: ComputedTensor("F16", (width // GROUP, outputs), scales),
        ZEROS: ComputedTensor("I32", (width // GROUP, outputs // 8), zeros)})


class _InFormat(LazyTensor):
    """A tensor that is written in another format than it is read in."""

    def __init__(self, name: str, tensor: LazyTensor, stored: str):
        self.name, self.tensor, self.dtype, self.shape, self._stored = name, tensor, tensor.dtype, tensor.shape, stored

    @property
    def stored_dtype(self) -> str:
        """See `LazyTensor`."""
        return self._stored

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`."""
        found = self.tensor.rows(begin, end)
        if self._stored == "F16" and self.dtype != "F16":
            values = to_float32(found, self.dtype)
            highest = float(np.abs(values[np.isfinite(values)]).max(initial=0))
            if highest > np.finfo(np.float16).max:
                raise CheckpointError(f"{self.name} holds values up to {highest:.3g}, beyond float16, which AWQ's "
                                      f"layout keeps it in; take the layout {OWN}.")
        return found
