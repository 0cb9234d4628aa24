"""The safetensors container: where each tensor lies in a file, and headers for files that are written in pieces.

The safetensors library writes a file from memory in one go and gives NumPy no bfloat16. Here one tensor, or a few rows
of it, is in memory at a time. The container is an 8-byte little-endian length, that many bytes of JSON
(`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, offsets behind the header), then the tensors' bytes.
"""
from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from mindformers_ixc.checkpoint.dtypes import STORAGE, item_size
from mindformers_ixc.checkpoint.tensors import MappedTensor, Stretch
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.files import parse_json

# The format's own limit for the JSON part (safetensors specification).
MAX_HEADER = 100_000_000


def read_header(path: Path) -> dict[str, MappedTensor]:
    """Tensors of a file by name, in the order of the header.

    Raises:
        CheckpointError: for a file that is no safetensors file, is cut off or contradicts itself.
    """
    fields, start = _read_fields(path)
    fields.pop("__metadata__", None)
    size = path.stat().st_size
    tensors = {name: _tensor(path, name, field, start, size) for name, field in fields.items()}
    _check_places(path, tensors, start, size)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a file's header holds beside the tensors.

    Raises:
        CheckpointError: as `read_header` does.
    """
    metadata = _read_fields(path)[0].get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} has a `__metadata__` that is no map of texts; its header is damaged, copy the "
                              "file again.")
    return metadata


def _read_fields(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a file, and where the tensors begin."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise CheckpointError(f"{path} is no safetensors file or its header is cut off ({size} bytes, the header "
                                  f"claims {length}); copy it again.")
        text = file.read(length)
    fields = parse_json(text, f"The header of {path}", CheckpointError)
    if not isinstance(fields, dict):
        raise CheckpointError(f"The header of {path} is a {type(fields).__name__}, not a map of tensors; copy it "
                              "again.")
    names = Counter(json.loads(text, object_pairs_hook=lambda pairs: [name for name, _ in pairs]))
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise CheckpointError(f"The header of {path} names {twice[0]} {names[twice[0]]} times, so which bytes are "
                              "meant is unknown; get the file from its source again.")
    return fields, 8 + length


def _tensor(path: Path, name: str, field: Any, start: int, size: int) -> MappedTensor:
    """The tensor that an entry of the header describes."""
    if not isinstance(field, dict) or not _are_sizes(field.get("shape")) or not isinstance(field.get("dtype"), str) \
            or not _are_sizes(field.get("data_offsets")) or len(field["data_offsets"]) != 2:
        raise CheckpointError(f"The header of {path} has {name}, which is no tensor: it needs a `dtype`, and a `shape` "
                              "and two `data_offsets` of whole numbers from 0 on. The file is damaged, copy it again.")
    begin, end = field["data_offsets"]
    dtype, shape = field["dtype"], tuple(field["shape"])
    if dtype not in STORAGE:
        raise CheckpointError(f"{path} holds {name} in the format {dtype}, which no weight of this model has; the "
                              f"choices are {', '.join(STORAGE)}.")
    needed = math.prod(shape) * item_size(dtype)
    if end - begin != needed:
        raise CheckpointError(f"{path} gives {name} {end - begin} bytes, its shape {shape} in {dtype} needs "
                              f"{needed}; the file is damaged.")
    if start + end > size:
        raise CheckpointError(f"{path} is truncated: {name} should end at byte {start + end}, the file has "
                              f"{size}; copy it again.")
    return MappedTensor(dtype, shape, [Stretch(path, start + begin, needed)])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_places(path: Path, tensors: dict[str, MappedTensor], start: int, size: int) -> None:
    """Refuses tensors that lie on each other or leave bytes between them; the format has neither."""
    position, before = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda entry: (entry[1].stretches[0].offset, entry[1].nbytes)):
        begin = tensor.stretches[0].offset
        if begin != position:
            relation = "overlaps" if begin < position else f"leaves {begin - position} bytes of no tensor after"
            raise CheckpointError(f"{path} is damaged: {name} begins at byte {begin} and so {relation} {before}, which "
                                  f"ends at {position}; copy it again.")
        position, before = begin + tensor.nbytes, name
    if position != size:
        raise CheckpointError(f"{path} has {size - position} bytes behind its last tensor, which belong to nothing; it "
                              "is damaged, copy it again.")


def make_header(tensors: list[tuple[str, str, tuple[int, ...]]],
                metadata: dict[str, str] | None = None) -> tuple[bytes, dict[str, int]]:
    """Header of a file to be written, and where each tensor's bytes begin.

    Args:
        tensors: name, format and shape of each, in the order they lie in the file.
        metadata: further texts, such as the `rank` a file is of.
    """
    # the format is what MindSpore writes; PyTorch's loaders do not mind
    fields: dict = {"__metadata__": {"format": "ms", **(metadata or {})}}
    begin, offsets = 0, {}
    for name, dtype, shape in tensors:
        end = begin + math.prod(shape) * item_size(dtype)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        offsets[name], begin = begin, end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)      # tensors begin at a line of the processor's cache: they are mapped
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}
