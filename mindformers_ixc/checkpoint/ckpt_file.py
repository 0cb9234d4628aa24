"""MindSpore's .ckpt container: where each tensor lies in a file, and the bytes in front of tensors that are written.

A .ckpt is a protobuf message `Checkpoint {repeated Value {tag, tensor {dims, type, content}}}` (MindSpore's
checkpoint.proto). MindSpore reads and writes it from memory; here only the few bytes around the tensors are parsed, so
the tensors can be mapped and streamed. Tensors over 512 MiB are split into several values of one tag, as MindSpore
does.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mindformers_ixc.checkpoint.dtypes import MINDSPORE
from mindformers_ixc.checkpoint.protobuf import BYTES, VARINT, encode_field, encode_varint, signed
from mindformers_ixc.checkpoint.tensors import MappedTensor, Stretch
from mindformers_ixc.errors import CheckpointError

# Bytes of a tensor in one value at most (SLICE_SIZE of mindspore.train.serialization).
SLICE = 512 * 2**20

_FORMATS = {name: dtype for dtype, name in MINDSPORE.items()}
_VALUE, _TAG, _TENSOR, _DIMS, _TYPE, _CONTENT = 1, 1, 2, 1, 2, 3     # field numbers of checkpoint.proto
_VALUE_FIELDS = {_TAG: BYTES, _TENSOR: BYTES}
_TENSOR_FIELDS = {_DIMS: VARINT, _TYPE: BYTES, _CONTENT: BYTES}


class _Reader:
    """Walks over protobuf fields of a file without reading long ones."""

    def __init__(self, file: BinaryIO, path: Path, size: int):
        self.file, self.path, self.size = file, path, size

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.file.read(1)
            if not byte or shift > 63:
                raise CheckpointError(f"{self.path} is truncated or no MindSpore .ckpt file (at byte "
                                      f"{self.file.tell()} of {self.size}).")
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value
            shift += 7

    def fields(self, end: int, kinds: dict[int, int]) -> Iterator[tuple[int, Any]]:
        """Yields number and value of each field up to an offset.

        Args:
            end: offset behind the last one.
            kinds: wire type of each field there may be; a value is an int, or the `(begin, length)` of bytes.
        """
        while self.file.tell() < end:
            place = self.file.tell()
            key = self.varint()
            number, wire = key >> 3, key & 7
            if kinds.get(number) != wire:
                raise CheckpointError(f"{self.path} is no MindSpore .ckpt file, damaged or encrypted (unexpected field "
                                      f"{number} of wire type {wire} at byte {place}); copy it again.")
            if wire == VARINT:
                yield number, self.varint()
                continue
            length = self.varint()
            begin = self.file.tell()
            if begin + length > end:
                inside = "" if end == self.size else f", what holds it ends at {end}"
                raise CheckpointError(f"{self.path} is damaged or truncated: a value should end at byte "
                                      f"{begin + length}, the file has {self.size}{inside}; copy it again.")
            yield number, (begin, length)
            self.file.seek(begin + length)
        if self.file.tell() != end:
            raise CheckpointError(f"{self.path} is damaged: a number runs over the end of what holds it, at byte "
                                  f"{end}; copy it again.")

    def once(self, begin: int, length: int, kinds: dict[int, int]) -> dict[int, Any]:
        """The fields of a message of which each may be there once."""
        self.file.seek(begin)
        found: dict[int, Any] = {}
        for number, value in self.fields(begin + length, kinds):
            if number == _DIMS and kinds is _TENSOR_FIELDS:
                found.setdefault(number, []).append(value)
            elif number in found:
                raise CheckpointError(f"{self.path} is damaged: field {number} stands twice in the message at byte "
                                      f"{begin}; copy it again.")
            else:
                found[number] = value
        return found

    def text(self, place: tuple[int, int]) -> str:
        here = self.file.tell()
        self.file.seek(place[0])
        try:
            return self.file.read(place[1]).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path} is damaged: the name at byte {place[0]} is no text; copy it "
                                  "again.") from error
        finally:
            self.file.seek(here)


def read_tensors(path: Path) -> dict[str, MappedTensor]:
    """Tensors of a file by name.

    Raises:
        CheckpointError: for a file that is cut off, encrypted or of another format.
    """
    size = path.stat().st_size
    found: dict[str, tuple[str, tuple[int, ...], list[Stretch]]] = {}
    with open(path, "rb") as file:
        reader = _Reader(file, path, size)
        for _, (begin, length) in reader.fields(size, {_VALUE: BYTES}):
            name, dtype, shape, stretch = _read_value(reader, begin, length)
            first = found.setdefault(name, (dtype, shape, []))
            if first[:2] != (dtype, shape):
                raise CheckpointError(f"{path} is damaged: parts of {name} are {dtype} of shape {shape} and {first[0]} "
                                      f"of shape {first[1]}; copy it again.")
            first[2].append(stretch)
    if not found:
        raise CheckpointError(f"{path} holds no tensors.")
    return {name: MappedTensor(*tensor) for name, tensor in found.items()}


def _read_value(reader: _Reader, begin: int, length: int) -> tuple[str, str, tuple[int, ...], Stretch]:
    """Name, format and shape of the tensor of one value, and where its bytes, or some of them, lie."""
    value = reader.once(begin, length, _VALUE_FIELDS)
    if _TAG not in value or _TENSOR not in value:
        raise CheckpointError(f"{reader.path} holds a value without a name or a tensor at byte {begin}.")
    name = reader.text(value[_TAG])
    first, count = value[_TENSOR]
    tensor = reader.once(first, count, _TENSOR_FIELDS)
    dtype = reader.text(tensor[_TYPE]) if _TYPE in tensor else None
    if dtype not in _FORMATS:
        raise CheckpointError(f"{reader.path} holds {name} in the format {dtype}; the choices are "
                              f"{', '.join(_FORMATS)}.")
    shape, content = tuple(map(signed, tensor.get(_DIMS, []))), tensor.get(_CONTENT, (first, 0))
    if any(size < 0 for size in shape):
        raise CheckpointError(f"{reader.path} is damaged: {name} has shape {shape}; copy it again.")
    if shape == (0,) and content[1]:        # MindSpore writes numbers without axes so
        shape = ()
    return name, _FORMATS[dtype], shape, Stretch(reader.path, *content)


def slice_prefix(name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> bytes:
    """The bytes in front of a slice of `nbytes` of a tensor of `shape`."""
    kind, tag = MINDSPORE[dtype].encode(), name.encode()
    tensor = b"".join(encode_field(_DIMS, size) for size in shape)
    tensor += encode_field(_TYPE, kind) + _head(_CONTENT, nbytes)
    value = encode_field(_TAG, tag) + _head(_TENSOR, len(tensor) + nbytes) + tensor
    return _head(_VALUE, len(value) + nbytes) + value


def _head(number: int, length: int) -> bytes:
    """What stands in front of a field of so many bytes."""
    return encode_varint(number << 3 | BYTES) + encode_varint(length)
