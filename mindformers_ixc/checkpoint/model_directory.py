"""Model directories in the public layout: `config.json`, tokenizer files, weights.

The cells name their parameters as the public checkpoint does, so weights go in and out without renaming. A directory
is written beside its target and moved into place whole: a killed run leaves nothing that looks complete.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.common import np_dtype

from mindformers_ixc.checkpoint.digests import write_digests
from mindformers_ixc.checkpoint.dtypes import STORAGE, convert_dtype, count_not_finite, format_of
from mindformers_ixc.checkpoint.quantised import NUMBERS, refuse_quantised
from mindformers_ixc.checkpoint.sources import OpenedCheckpoint, open_source
from mindformers_ixc.checkpoint.start import Recipe, match_tensors
from mindformers_ixc.checkpoint.streaming import say_not_finite
from mindformers_ixc.checkpoint.tensor_file import TensorFile
from mindformers_ixc.checkpoint.tensors import PIECE, LazyTensor, PartOfTensor
from mindformers_ixc.config import CONFIG_FILE
from mindformers_ixc.device import is_parallel, rank
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.files import whole_folder
from mindformers_ixc.parallel.slices import slices_of_rank
from mindformers_ixc.processing.tokenizer import Tokenizer

# The second side of a pair: Partial LoRA's and the task LoRAs', and that of MindFormers' own LoRA.
SECOND_SIDE = re.compile(r"_B\.weight$|mindpet_delta_lora_[bB](\.weight)?$")

WEIGHTS_FILE = "model.safetensors"


def load_weights(model: nn.Cell, directory: str | os.PathLike | OpenedCheckpoint,
                 recipe: Recipe | None = None) -> list[str]:
    """Loads a checkpoint's weights into a model, a few rows of one tensor at a time.

    In a parallel layout each rank takes its own slices of the parameters of its own stage.

    Args:
        model: the model; its parameters keep their dtype.
        directory: a model directory (safetensors or .bin), or any whole checkpoint `convert` reads; opened or not.
        recipe: how the model differs from the checkpoint; by default not at all.

    Returns:
        Names of the parameters that the recipe adds; they stay as they are.

    Raises:
        CheckpointError: for a damaged file, a missing or surplus parameter, a shape that differs, or whole numbers.
    """
    source = directory if isinstance(directory, OpenedCheckpoint) else open_source(directory)
    refuse_quantised(source, "what loads it here")
    wanted = {parameter.name: parameter for parameter in model.get_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in wanted.items()}
    parts, new = match_tensors(source, shapes, recipe)
    for name in new:      # a pair has no effect while its second side is zero
        if SECOND_SIDE.search(name) and wanted[name].asnumpy().any():
            raise CheckpointError(f"{name} is not in {source.path} and does not start at zero, so the model would not "
                                  "be the checkpoint's; build the pair anew.")
    if is_parallel():
        own = slices_of_rank({name: tensor.shape for name, tensor in parts.items()}, model.config, rank())
        parts = {name: PartOfTensor(parts[name], slices) for name, slices in own.items()}
    odd = {}
    for name, tensor in parts.items():
        parameter = wanted[name]
        value = read_as(tensor, _format(parameter))
        odd[name] = count_not_finite(value.view(STORAGE[_format(parameter)]), _format(parameter))
        # the parameter takes the array's own memory over
        parameter.set_data(Tensor.from_numpy(value), is_parallel())
        parameter.sliced = is_parallel()            # or the compiler would cut it again
    say_not_finite(odd, str(source.path))
    return new


def read_as(tensor: LazyTensor, dtype: str) -> np.ndarray:
    """A tensor in memory of its own, in a format MindSpore's arrays have."""
    value = np.empty(tensor.shape, STORAGE[dtype])
    for begin, piece in tensor.pieces():
        piece = convert_dtype(piece, tensor.dtype, dtype)
        if tensor.shape:
            value[begin:begin + len(piece)] = piece
        else:
            value[()] = piece
    return value.view(numpy_type(dtype))


def numpy_type(dtype: object) -> type[np.generic]:
    """NumPy's type for numbers of MindSpore's type, or of any name in the table; MindSpore brings its bfloat16."""
    name = format_of(dtype)
    assert name is not None, f"{dtype} is no format of numbers"
    return np_dtype.bfloat16 if name == "BF16" else STORAGE[name]


def _format(parameter: Parameter) -> str:
    """Format of a parameter."""
    found = format_of(parameter.dtype)
    assert found is not None, f"{parameter.name} is {parameter.dtype}"      # the table has every type of a weight
    return found


def save_model_directory(model: nn.Cell, target: str | os.PathLike,
                         tokenizer_file: str | os.PathLike | None = None, hd_num: int | None = None,
                         parameters: list[str] | None = None, image_options: dict[str, Any] | None = None) -> None:
    """Writes a model directory, replacing an older one at the same place.

    Args:
        model: the model; its parameters keep their dtype.
        target: directory to write.
        tokenizer_file: SentencePiece model to copy; without one the directory has no tokenizer.
        hd_num: tiles of the dynamic partition the model was trained with; the processor's default from then on.
        parameters: names of what to write (what `mindformers merge --attach` takes); by default everything.
        image_options: further arguments of `ImageProcessor` that the model was trained with and that are not its
            defaults: `transparency`, `exif`.
    """
    write_model_directory(model, weights_of(model, parameters), target, tokenizer_file, hd_num, image_options)


def weights_of(model: nn.Cell, names: Iterable[str] | None = None) -> dict[str, LazyTensor]:
    """Parameters in a model's memory by name, all or some of them."""
    wanted = None if names is None else set(names)
    return {parameter.name: ParameterTensor(parameter) for parameter in model.get_parameters()
            if wanted is None or parameter.name in wanted}


def write_model_directory(model: nn.Cell, tensors: dict[str, LazyTensor], target: str | os.PathLike,
                          tokenizer_file: str | os.PathLike | None = None, hd_num: int | None = None,
                          image_options: dict[str, Any] | None = None) -> None:
    """Writes a model directory whose weights are not, or not all, in the model's memory, a few rows at a time.

    Args:
        model: gives the configuration.
        tensors: the weights, by public name.
        target, tokenizer_file, hd_num, image_options: as in `save_model_directory`.

    Raises:
        CheckpointError: for a model with quantised weights.
    """
    if any(name.endswith(f".{NUMBERS}") for name in tensors):
        raise CheckpointError(f"The model computes with quantised weights, which are not written to {target}: copy the "
                              "directory that it was loaded from, or make full weights of it: mindformers convert "
                              "DIRECTORY TARGET --to hf.")
    with whole_folder(target) as folder:
        config = model.config.to_public_dict()
        config["torch_dtype"] = str(next(iter(model.get_parameters())).dtype).lower()
        if hd_num is not None:
            config["hd_num"] = hd_num
        config.update(image_options or {})
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer_file is not None:
            Tokenizer(str(tokenizer_file)).save_pretrained(str(folder))
        write_digests(folder, known={WEIGHTS_FILE: write_tensors(folder / WEIGHTS_FILE, tensors)})


class ParameterTensor(LazyTensor):
    """A parameter that is in the model's memory; in a parallel run this device's slice of it."""

    def __init__(self, parameter: Parameter):
        self.parameter, self.dtype, self.shape = parameter, _format(parameter), tuple(parameter.shape)

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`."""
        parameter = self.parameter.init_data() if self.parameter.has_init else self.parameter   # in no graph
        value = np.ascontiguousarray(parameter.asnumpy())
        value = value.view(np.uint16) if self.dtype == "BF16" else value
        return value[begin:end] if self.shape else value

    def pieces(self, limit: int = PIECE) -> Iterator[tuple[int, np.ndarray]]:
        """One piece: it is fetched from the device as a whole anyway."""
        yield 0, self.rows(0, self.shape[0] if self.shape else 1)


def write_tensors(path: Path, tensors: dict[str, LazyTensor]) -> dict[str, str]:
    """Writes a safetensors file; returns the SHA-256 of each tensor, of what was in memory."""
    file = TensorFile(path, [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()])
    sums = {}
    try:
        file.open()
        for name, tensor in tensors.items():
            digest = hashlib.sha256()
            for begin, piece in tensor.pieces():
                piece = np.ascontiguousarray(piece)
                file.write(name, begin, piece)
                digest.update(piece.reshape(-1).view(np.uint8).data)
            sums[name] = digest.hexdigest()
    finally:
        file.close()
    return sums
