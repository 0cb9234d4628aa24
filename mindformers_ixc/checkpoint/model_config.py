"""`config.json` of a model directory, read and written."""
from __future__ import annotations

import json
import os
from pathlib import Path

from mindformers_ixc.checkpoint.dtypes import LABELS, WEIGHTS
from mindformers_ixc.checkpoint.sources import RUN_RECORD, OpenedCheckpoint
from mindformers_ixc.config import ALIASES, CONFIG_FILE, FIELDS, Field, ModelConfig, read_config
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.files import read_json


def config_of(source: OpenedCheckpoint, path: str | os.PathLike | None = None) -> ModelConfig:
    """The configuration of a checkpoint.

    Args:
        source: the opened checkpoint.
        path: `config.json` or its directory, if it is not beside the weights.

    Raises:
        CheckpointError: when there is none, or it is another model's.
    """
    found = Path(path) if path is not None else source.config_file
    if found is None and (record := _run_record(source)) is not None:
        return record
    if found is None:
        raise CheckpointError(f"{source.directory} has no {CONFIG_FILE}; name the model's with --config.")
    return read_config(found)


def _run_record(source: OpenedCheckpoint) -> ModelConfig | None:
    """The configuration that a run which ended before it wrote its model put down, if it alone made the weights.

    A run that began with other weights took what describes them from there.
    """
    path = source.run_folder / RUN_RECORD if source.run_folder is not None else None
    if path is None or not path.is_file():
        return None
    record = read_json(path, CheckpointError)
    fields = record.get("model", {}).get("model_config") if isinstance(record, dict) and isinstance(
        record.get("model"), dict) else None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} has no model.model_config; name the model's {CONFIG_FILE} with --config.")
    start = record.get("start")
    if start is not None:
        beside = [folder / CONFIG_FILE for folder in (Path(str(start)), Path(str(start)).parent)]
        began = next((file for file in beside if file.is_file()), None)
        if began is None:
            raise CheckpointError(f"{source.path} is of a run that began with {start}, which is not there any more; "
                                  f"name the model's {CONFIG_FILE} with --config.")
        config = read_config(began)
        odd = [key for key, value in fields.items() if key in FIELDS and FIELDS[key].public and key != "vision_config"
               and value is not None and value != getattr(config, key)]
        if odd:
            raise CheckpointError(f"{path} and {began} differ in {', '.join(odd)}, so it is not known what the weights "
                                  f"in {source.path} were trained as; name the model's {CONFIG_FILE} with --config.")
        return config
    given = {key: value for key, value in fields.items() if FIELDS.get(key, _NOT_PUBLIC).public or key in ALIASES}
    return ModelConfig(**given)


_NOT_PUBLIC = Field(None, "", public=False)


def write_config(config: ModelConfig, original: Path | None, target: Path, dtypes: set[str]) -> None:
    """Writes `config.json`, keeping fields of the original that this model does not know.

    Args:
        config: the model's.
        original: the source's file, if it has one.
        target: file to be written.
        dtypes: formats of the weights.
    """
    fields = read_json(original, CheckpointError) if original else {}
    fields.update(config.to_public_dict())
    names = [LABELS[dtype] for dtype in dtypes if dtype in WEIGHTS.values()]
    fields["torch_dtype"] = names[0] if len(names) == 1 else "float32"
    if fields.pop("rope_parameters", None) is not None or "rope_scaling" in fields:
        fields["rope_scaling"] = config.rope_scaling       # whatever spelling the original had
    target.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
