"""`config.json` of a model directory, read and written."""
from __future__ import annotations

import json
import os
from pathlib import Path

from mindformers_ixc.checkpoint.dtypes import LABELS, WEIGHTS
from mindformers_ixc.checkpoint.sources import OpenedCheckpoint
from mindformers_ixc.config import CONFIG_FILE, ModelConfig, read_config
from mindformers_ixc.errors import CheckpointError


def config_of(source: OpenedCheckpoint, path: str | os.PathLike | None = None) -> ModelConfig:
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


def write_config(config: ModelConfig, original: Path | None, target: Path, dtypes: set[str]) -> None:
    """Writes `config.json`, keeping fields of the original that this model does not know.

    Args:
        config: the model's.
        original: the source's file, if it has one.
        target: file to be written.
        dtypes: formats of the weights.
    """
    fields = json.loads(original.read_text(encoding="utf-8")) if original else {}
    fields.update(config.to_public_dict())
    names = [LABELS[dtype] for dtype in dtypes if dtype in WEIGHTS.values()]
    fields["torch_dtype"] = names[0] if len(names) == 1 else "float32"
    if fields.pop("rope_parameters", None) is not None or "rope_scaling" in fields:
        fields["rope_scaling"] = config.rope_scaling       # whatever spelling the original had
    target.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
