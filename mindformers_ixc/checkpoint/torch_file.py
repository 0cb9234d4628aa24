"""PyTorch's .bin files, read by PyTorch itself with nothing but tensors allowed in the pickle.

The files are pickles, and a pickle can run any code. PyTorch's weights-only loading refuses everything that is not a
tensor or a plain container, and maps the file. PyTorch is optional: `pip install "mindformers_ixc[torch]"`; the
`mindnlp` extra brings it too.
"""
from __future__ import annotations

import pickle
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mindformers_ixc.checkpoint.dtypes import STORAGE, format_of
from mindformers_ixc.checkpoint.tensors import ArrayTensor, LazyTensor, MappedTensor, Stretch
from mindformers_ixc.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def _torch() -> ModuleType:
    try:
        import torch  # noqa: PLC0415 - optional
    except ImportError as error:
        raise CheckpointError('PyTorch is needed to read .bin files; install it with pip install '
                              '"mindformers_ixc[torch]", or take the checkpoint as safetensors.') from error
    return torch


def read_tensors(path: Path) -> dict[str, LazyTensor]:
    """Tensors of a .bin file by name, mapped.

    Raises:
        CheckpointError: when PyTorch is missing, or the file is damaged or holds anything but tensors.
    """
    torch = _torch()
    try:
        state, is_mapped = _load(torch, path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and was refused, because a pickle can run any code "
                              f"({str(error).splitlines()[0]}). Do not load it; get the checkpoint from its "
                              "source as safetensors.") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read as a PyTorch file ({str(error).splitlines()[0]}); it is damaged "
                              "or truncated, copy it again.") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no dict of tensors; save the model's state_dict.")
    formats: dict[str, str] = {}
    for name, value in state.items():
        dtype = format_of(value.dtype)
        if dtype is None:
            raise CheckpointError(f"{path} holds {name} as {value.dtype}, which no weight of this model is.")
        formats[name] = dtype
    mappings = _mappings(path) if is_mapped else []
    return {name: _locate(value, formats[name], path, mappings) for name, value in state.items()}


def _load(torch: ModuleType, path: Path) -> tuple[object, bool]:
    """Content of a file, and whether its tensors are mapped."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True), True
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
    # the format before PyTorch 1.6 cannot be mapped
    return torch.load(path, map_location="cpu", weights_only=True), False


def _mappings(path: Path) -> list[tuple[int, int, int]]:
    """Where a file is mapped in this process: first address, address behind the last, offset in the file."""
    found, name = [], str(path.resolve())
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == name:
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            found.append((begin, end, int(fields[2], 16)))
    return found


def _locate(tensor: Tensor, dtype: str, path: Path, mappings: list[tuple[int, int, int]]) -> LazyTensor:
    """The place of a tensor in its file, so that it can be read like any other; or the tensor itself, in memory.

    PyTorch maps the whole file, and what is read of it would count as this process's memory to the end.
    """
    tensor, shape = tensor.detach().contiguous(), tuple(tensor.shape)
    address = tensor.data_ptr()
    for begin, end, offset in mappings:
        if begin <= address and address + tensor.numel() * tensor.element_size() <= end:
            nbytes = tensor.numel() * tensor.element_size()
            return MappedTensor(dtype, shape, [Stretch(path, offset + address - begin, nbytes)])
    if dtype == "BF16":
        tensor = tensor.view(_torch().int16)
    return ArrayTensor(tensor.numpy().view(STORAGE[dtype]), dtype)
