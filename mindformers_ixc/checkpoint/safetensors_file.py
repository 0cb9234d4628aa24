"""The safetensors container: where each tensor lies in a file, and headers for files that are written in pieces.

The safetensors library writes a file from memory in one go and gives NumPy no bfloat16. Here one tensor, or a few rows
of it, is in memory at a time. The container is an 8-byte little-endian length, that many bytes of JSON
(`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, offsets behind the header), then the tensors' bytes.
"""
from __future__ import annotations

import json
import math
from pathlib import Path

from mindformers_ixc.checkpoint.dtypes import STORAGE, item_size
from mindformers_ixc.checkpoint.tensors import MappedTensor, Stretch
from mindformers_ixc.errors import CheckpointError

# The format's own limit for the JSON part (safetensors specification).
MAX_HEADER = 100_000_000


def read_header(path: Path) -> dict[str, MappedTensor]:
    """Tensors of a file by name.

    Raises:
        CheckpointError: for a file that is no safetensors file, is cut off or contradicts itself.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise CheckpointError(f"{path} is no safetensors file or its header is cut off ({size} bytes, the header "
                                  f"claims {length}); copy it again.")
        try:
            fields = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path} has a header that is not valid JSON ({error}); copy it again.") from error
    fields.pop("__metadata__", None)
    tensors = {}
    for name, field in fields.items():
        begin, end = field["data_offsets"]
        dtype, shape = field["dtype"], tuple(field["shape"])
        if dtype not in STORAGE:
            raise CheckpointError(f"{path} holds {name} in the format {dtype}, which no weight of this model has; the "
                                  f"choices are {', '.join(STORAGE)}.")
        needed = math.prod(shape) * item_size(dtype)
        if end - begin != needed:
            raise CheckpointError(f"{path} gives {name} {end - begin} bytes, its shape {shape} in {dtype} needs "
                                  f"{needed}; the file is damaged.")
        if 8 + length + end > size:
            raise CheckpointError(f"{path} is truncated: {name} should end at byte {8 + length + end}, the file has "
                                  f"{size}; copy it again.")
        tensors[name] = MappedTensor(dtype, shape, [Stretch(path, 8 + length + begin, needed)])
    return tensors


def make_header(tensors: list[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """Header of a file to be written, and where each tensor's bytes begin.

    Args:
        tensors: name, format and shape of each, in the order they lie in the file.
    """
    fields: dict = {"__metadata__": {"format": "ms"}}     # what MindSpore writes; PyTorch's loaders do not mind
    begin, offsets = 0, {}
    for name, dtype, shape in tensors:
        end = begin + math.prod(shape) * item_size(dtype)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        offsets[name], begin = begin, end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                       # tensors begin at a multiple of 8
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}
