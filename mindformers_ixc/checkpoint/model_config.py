"""`config.json` of a model directory, read and written."""
from __future__ import annotations

import json
import os
from pathlib import Path

from mindformers_ixc.checkpoint.errors import CheckpointError
from mindformers_ixc.checkpoint.sources import CONFIG_FILE, Source
from mindformers_ixc.config import IXC25Config

# Names of formats in `torch_dtype`, which says what the weights are kept in.
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_config(directory: str | os.PathLike, **overrides) -> IXC25Config:
    """Reads `config.json` of a model directory.

    Args:
        directory: the model directory, or the file itself.
        **overrides: runtime fields of `IXC25Config` (`seq_length`, `compute_dtype`, ...).

    Raises:
        CheckpointError: when the file is missing, is not JSON or describes another model.
    """
    path = Path(directory)
    path = path / CONFIG_FILE if path.suffix != ".json" else path
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; a model directory holds it beside the tokenizer and "
                              "the weights.")
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


def config_of(source: Source, path: str | os.PathLike | None = None) -> IXC25Config:
    """The configuration of a checkpoint.

    Args:
        source: the opened checkpoint.
        path: `config.json` or its directory, if it is not beside the weights.

    Raises:
        CheckpointError: when there is none, or it is another model's.
    """
    found = Path(path) if path is not None else source.config_file
    if found is None:
        raise CheckpointError(f"{source.directory} has no {CONFIG_FILE}; name the model's with --config.")
    return read_config(found)


def write_config(config: IXC25Config, original: Path | None, target: Path, dtypes: set[str]) -> None:
    """Writes `config.json`, keeping fields of the original that this model does not know.

    Args:
        config: the model's.
        original: the source's file, if it has one.
        target: file to be written.
        dtypes: formats of the weights.
    """
    fields = json.loads(original.read_text(encoding="utf-8")) if original else {}
    fields.update(config.to_public_dict())
    names = [_NAMES[dtype] for dtype in dtypes if dtype in _NAMES]
    fields["torch_dtype"] = names[0] if len(names) == 1 else "float32"
    target.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
