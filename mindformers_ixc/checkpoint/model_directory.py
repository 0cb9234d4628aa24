"""Model directories in the public layout: `config.json`, tokenizer files, `model.safetensors`.

The cells name their parameters as the public checkpoint does, so weights go in and out without renaming. A directory
is written beside its target and moved into place whole: a killed run leaves nothing that looks complete.
"""
from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mindformers.models.modeling_utils import PreTrainedModel
from mindspore import Tensor, nn
from safetensors import safe_open
from safetensors.numpy import save_file

from mindformers_ixc.config import IXC25Config

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Bytes read of a safetensors file (of float32, at most) before it is opened anew, see `_read`.
MAPPED_BYTES = 2**26


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged or of another model."""


def read_config(directory: str | os.PathLike, **overrides) -> IXC25Config:
    """Reads `config.json` of a model directory.

    Args:
        directory: the model directory.
        **overrides: runtime fields of `IXC25Config` (`seq_length`, `compute_dtype`, ...).

    Raises:
        CheckpointError: when the file is missing, is not JSON or describes another model.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; a model directory holds {CONFIG_FILE}, the tokenizer and "
                              f"{WEIGHTS_FILE}.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(fields, dict) or fields.get("model_type") != IXC25Config.model_type:
        found = fields.get("model_type") if isinstance(fields, dict) else type(fields).__name__
        raise CheckpointError(f"{path} has model_type '{found}', expected '{IXC25Config.model_type}'.")
    fields.pop("model_type")
    fields.update(overrides)
    return IXC25Config(**fields)


def weight_files(directory: str | os.PathLike) -> list[Path]:
    """Safetensors files of a model directory, in index order.

    Raises:
        CheckpointError: when there is none or a shard named by the index is missing.
    """
    directory = Path(directory)
    index = directory / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(f"{index} names the shards {missing}, which are not in {directory}.")
        return [directory / name for name in names]
    single = directory / WEIGHTS_FILE
    if not single.is_file():
        raise CheckpointError(f"{directory} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}.")
    return [single]


def load_weights(model: PreTrainedModel, directory: str | os.PathLike) -> None:
    """Loads a model directory's weights into a model, one tensor at a time.

    Raises:
        CheckpointError: for a damaged file, a missing or surplus parameter, or a shape that differs.
    """
    wanted = {parameter.name: parameter for parameter in model.get_parameters()}
    surplus = []
    for path in weight_files(directory):
        try:
            for name, value in tensors_of(path):
                parameter = wanted.pop(name, None)
                if parameter is None:
                    surplus.append(name)
                else:
                    _assign(parameter, value, path)
        except CheckpointError:
            raise
        except Exception as error:   # safetensors raises its own untyped errors for damaged files
            raise CheckpointError(f"{path} cannot be read as safetensors ({error}); the file is damaged or truncated, "
                                  "copy it again.") from error
    if wanted or surplus:
        raise CheckpointError(
            f"{directory} does not match its config.json: {len(wanted)} parameters are missing "
            f"(first: {sorted(wanted)[:3]}), {len(surplus)} are surplus (first: {sorted(surplus)[:3]}).")


def tensors_of(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors of a safetensors file, each tensor in memory of its own."""
    with safe_open(str(path), framework="np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}   # noqa: SIM118 - no dict
    for name, shape in shapes.items():
        yield name, _read(path, name, shape)


def _read(path: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """One tensor, in pieces of whole rows.

    The file is mapped, and what was read of it counts as this process's memory as long as it is open.
    """
    if not shape or 0 in shape:
        with safe_open(str(path), framework="np") as file:
            return file.get_tensor(name)
    rows = max(1, MAPPED_BYTES // (4 * math.prod(shape[1:])))
    value = None
    for begin in range(0, shape[0], rows):
        with safe_open(str(path), framework="np") as file:
            part = file.get_slice(name)[begin:min(begin + rows, shape[0])]
        if value is None:
            value = np.empty(shape, part.dtype)
        value[begin:begin + len(part)] = part
    return value


def _assign(parameter, value: np.ndarray, path: Path) -> None:
    if tuple(value.shape) != tuple(parameter.shape):
        raise CheckpointError(f"{path} holds {parameter.name} with shape {tuple(value.shape)}, the configuration asks "
                              f"for {tuple(parameter.shape)}.")
    # the parameter takes the array's own memory over where no conversion is needed
    tensor = Tensor.from_numpy(value)
    parameter.set_data(tensor if tensor.dtype == parameter.dtype else tensor.astype(parameter.dtype))


def load_model(directory: str | os.PathLike, **overrides):
    """Builds the model of a directory and loads its weights, ready for inference.

    Args:
        directory: the model directory.
        **overrides: runtime fields of `IXC25Config`.

    Returns:
        `IXC25ForCausalLM` in evaluation mode.
    """
    from mindformers_ixc.models.ixc25 import IXC25ForCausalLM  # builds graphs: only when a model is wanted

    config = read_config(directory, **overrides)
    with nn.no_init_parameters():    # the weights come from the files: drawing them first takes time and memory
        model = IXC25ForCausalLM(config)
    load_weights(model, directory)
    model.set_train(False)
    return model


def save_model_directory(model: PreTrainedModel, target: str | os.PathLike,
                         tokenizer_file: str | os.PathLike | None = None, hd_num: int | None = None) -> None:
    """Writes a model directory, replacing an older one at the same place.

    Args:
        model: the model; its parameters keep their dtype.
        target: directory to write.
        tokenizer_file: SentencePiece model to copy; without one the directory has no tokenizer.
        hd_num: tiles of the dynamic partition the model was trained with; the processor's default from then on.
    """
    from mindformers_ixc.processing.tokenizer import InternLM2Tokenizer

    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        config = model.config.to_public_dict()
        config["torch_dtype"] = str(next(iter(model.get_parameters())).dtype).lower()
        if hd_num is not None:
            config["hd_num"] = hd_num
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer_file is not None:
            InternLM2Tokenizer(str(tokenizer_file)).save_pretrained(str(temporary))
        weights = {parameter.name: parameter.asnumpy() for parameter in model.get_parameters()}
        save_file(weights, str(temporary / WEIGHTS_FILE), metadata={"format": "np"})
        # both come into being for their owner only
        temporary.chmod(0o755)
        (temporary / WEIGHTS_FILE).chmod(0o644)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
