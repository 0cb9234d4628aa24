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
from mindformers_ixc.checkpoint.protobuf import BYTES, VARINT, encode_field, encode_varint
from mindformers_ixc.checkpoint.tensors import MappedTensor, Stretch
from mindformers_ixc.errors import CheckpointError

# Bytes of a tensor in one value at most (SLICE_SIZE of mindspore.train.serialization).
SLICE = 512 * 2**20

_FORMATS = {name: dtype for dtype, name in MINDSPORE.items()}
_VALUE, _TAG, _TENSOR, _DIMS, _TYPE, _CONTENT = 1, 1, 2, 1, 2, 3     # field numbers of checkpoint.proto


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

    def fields(self, end: int) -> Iterator[tuple[int, Any]]:
        """Yields field number and value, an int or the `(begin, length)` of bytes, up to an offset."""
        while self.file.tell() < end:
            key = self.varint()
            number, wire = key >> 3, key & 7
            if wire == VARINT:
                yield number, self.varint()
            elif wire == BYTES:
                length = self.varint()
                begin = self.file.tell()
                if begin + length > self.size:
                    raise CheckpointError(f"{self.path} is truncated: a value should end at byte {begin + length}, the "
                                          f"file has {self.size}; copy it again.")
                yield number, (begin, length)
                self.file.seek(begin + length)
            else:
                raise CheckpointError(f"{self.path} is no MindSpore .ckpt file (unexpected field at byte "
                                      f"{self.file.tell()}), or it is encrypted.")

    def text(self, place: tuple[int, int]) -> str:
        here = self.file.tell()
        self.file.seek(place[0])
        value = self.file.read(place[1]).decode(errors="replace")
        self.file.seek(here)
        return value


def read_tensors(path: Path) -> dict[str, MappedTensor]:
    """Tensors of a file by name.

    Raises:
        CheckpointError: for a file that is cut off, encrypted or of another format.
    """
    size = path.stat().st_size
    found: dict[str, tuple[str, tuple[int, ...], list[Stretch]]] = {}
    with open(path, "rb") as file:
        reader = _Reader(file, path, size)
        for number, (begin, length) in reader.fields(size):
            if number != _VALUE:
                raise CheckpointError(f"{path} is no MindSpore .ckpt file (unexpected field {number}).")
            name, dtype, shape, stretch = _read_value(reader, begin, length)
            found.setdefault(name, (dtype, shape, []))[2].append(stretch)
    if not found:
        raise CheckpointError(f"{path} holds no tensors.")
    return {name: MappedTensor(*tensor) for name, tensor in found.items()}


def _read_value(reader: _Reader, begin: int, length: int) -> tuple[str, str, tuple[int, ...], Stretch]:
    """Name, format and shape of the tensor of one value, and where its bytes, or some of them, lie."""
    name, tensor = None, None
    reader.file.seek(begin)
    for number, place in reader.fields(begin + length):
        if number == _TAG:
            name = reader.text(place)
        elif number == _TENSOR:
            tensor = place
    if name is None or tensor is None:
        raise CheckpointError(f"{reader.path} holds a value without a name or a tensor at byte {begin}.")
    shape, dtype, content = [], None, (0, 0)
    reader.file.seek(tensor[0])
    for number, value in reader.fields(sum(tensor)):
        if number == _DIMS:
            shape.append(value)
        elif number == _TYPE:
            dtype = reader.text(value)
        elif number == _CONTENT:
            content = value
    if dtype not in _FORMATS:
        raise CheckpointError(f"{reader.path} holds {name} in the format {dtype}; the choices are "
                              f"{', '.join(_FORMATS)}.")
    return name, _FORMATS[dtype], tuple(shape), Stretch(reader.path, *content)


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
