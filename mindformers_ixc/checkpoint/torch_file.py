"""PyTorch's .bin files, read by PyTorch itself with nothing but tensors allowed in the pickle.

The files are pickles, and a pickle can run any code. PyTorch's weights-only loading refuses everything that is not a
tensor or a plain container, and maps the file. PyTorch is optional: `pip install "mindformers_ixc[torch]"`; the
`mindnlp` extra brings it too.
"""
from __future__ import annotations

import ctypes
import mmap
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mindformers_ixc.checkpoint.errors import CheckpointError
from mindformers_ixc.checkpoint.tensors import PIECE, LazyTensor

_DONTNEED = getattr(mmap, "MADV_DONTNEED", 4)


def _torch():
    try:
        import torch
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
    formats = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
               torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
               torch.bool: "BOOL"}
    for name, value in state.items():
        if value.dtype not in formats:
            raise CheckpointError(f"{path} holds {name} as {value.dtype}, which no weight of this model is.")
    return {name: TorchTensor(value, formats[value.dtype], is_mapped) for name, value in state.items()}


def _load(torch, path: Path) -> tuple[object, bool]:
    """Content of a file, and whether its tensors are mapped."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True), True
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
    # the format before PyTorch 1.6 cannot be mapped
    return torch.load(path, map_location="cpu", weights_only=True), False


class TorchTensor(LazyTensor):
    """A tensor of a .bin file.

    Args:
        tensor: PyTorch's.
        dtype: its format.
        is_mapped: whether it lies in a mapped file.
    """

    def __init__(self, tensor, dtype: str, is_mapped: bool):
        self.tensor, self.dtype, self.shape = tensor.detach(), dtype, tuple(tensor.shape)
        self.is_mapped = is_mapped and tensor.is_contiguous()

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`."""
        torch = _torch()
        part = (self.tensor[begin:end] if self.shape else self.tensor).contiguous()
        if self.dtype == "BF16":
            return part.view(torch.int16).numpy().view(np.uint16)
        return part.numpy()

    def pieces(self, limit: int = PIECE) -> Iterator[tuple[int, np.ndarray]]:
        """See `LazyTensor`; gives mapped pages back, which count as this process's memory once they are read."""
        for begin, piece in super().pieces(limit):
            yield begin, piece
            if self.is_mapped:
                _forget(piece)


def _forget(array: np.ndarray) -> None:
    """Tells the system that the mapped pages wholly inside an array are not needed now; they can be read again."""
    begin = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _DONTNEED)
