"""PyTorch's .bin files, read by PyTorch itself with nothing but tensors allowed in the pickle.

The files are pickles, and a pickle can run any code. PyTorch's weights-only loading refuses everything that is not a
tensor or a plain container, and maps the file. PyTorch is optional: `pip install "mindformers_ixc[torch]"`; the
`mindnlp` extra brings it too.
"""
from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mindformers_ixc.checkpoint.dtypes import STORAGE, format_of
from mindformers_ixc.checkpoint.tensors import ArrayTensor, LazyTensor, MappedTensor, Stretch
from mindformers_ixc.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


# The first version whose weights-only loading holds (CVE-2025-32434).
OLDEST = (2, 6)


def _torch() -> ModuleType:
    try:
        import torch  # noqa: PLC0415 - optional
    except ImportError as error:
        raise CheckpointError('PyTorch is needed to read .bin files; install it with pip install '
                              '"mindformers_ixc[torch]", or take the checkpoint as safetensors.') from error
    version = re.match(r"(\d+)\.(\d+)", str(torch.__version__))
    if version is None or tuple(map(int, version.groups())) < OLDEST:
        raise CheckpointError(f"PyTorch {torch.__version__} is installed; before {OLDEST[0]}.{OLDEST[1]} a .bin file "
                              "can run code although nothing but tensors is allowed in it (CVE-2025-32434). Install a "
                              "newer one, or take the checkpoint as safetensors.")
    return torch


def read_tensors(path: Path) -> dict[str, LazyTensor]:
    """Tensors of a .bin file by name, mapped.

    Raises:
        CheckpointError: when PyTorch is missing, or the file is damaged or holds anything but tensors.
    """
    torch = _torch()
    _check_archive(path)
    try:
        state, is_mapped = _load(torch, path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and was refused, because a pickle can run any code "
                              f"({_first_line(error)}). Do not load it; get the checkpoint from its "
                              "source as safetensors.") from error
    except Exception as error:      # of damaged bytes PyTorch makes every kind of error
        raise CheckpointError(f"{path} cannot be read as a PyTorch file ({_first_line(error)}); it is damaged or "
                              "truncated, copy it again.") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                                              for name, value in state.items()):
        raise CheckpointError(f"{path} holds no dict of tensors by name; save the model's state_dict.")
    formats: dict[str, str] = {}
    size = path.stat().st_size
    for name, value in state.items():
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise CheckpointError(f"{path} holds {name} as a tensor that is sparse, quantised or has no content; save "
                                  "the model's state_dict with plain tensors.")
        if value.numel() * value.element_size() > size:
            raise CheckpointError(f"{path} holds {name} of shape {tuple(value.shape)}, more bytes than the whole file "
                                  f"has ({size}); it is damaged, or a view that was never a weight.")
        dtype = format_of(value.dtype)
        if dtype is None:
            raise CheckpointError(f"{path} holds {name} as {value.dtype}, which no weight of this model is.")
        formats[name] = dtype
    mappings = _mappings(path) if is_mapped else []
    return {name: _locate(value, formats[name], path, mappings) for name, value in state.items()}


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _check_archive(path: Path) -> None:
    """Refuses an empty file, and an archive of packed parts: PyTorch packs none, and they can unpack to anything.

    Raises:
        CheckpointError: naming the part.
    """
    if not path.stat().st_size:
        raise CheckpointError(f"{path} is empty; copy it again.")
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = next((part for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED
                           or part.file_size != part.compress_size), None)
    except Exception as error:      # of a damaged directory zipfile makes several kinds of error
        raise CheckpointError(f"{path} is a damaged archive ({_first_line(error)}); copy it again.") from error
    if packed is not None:
        raise CheckpointError(f"{path} is no file of PyTorch's: its part {packed.filename} is packed "
                              f"({packed.file_size} bytes in {packed.compress_size}). Get the checkpoint from its "
                              "source again.")


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
