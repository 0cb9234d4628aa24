"""`config.json` of a model directory, read and written."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mindformers_ixc.checkpoint.dtypes import LABELS, WEIGHTS
from mindformers_ixc.checkpoint.family import know_member
from mindformers_ixc.checkpoint.sources import OpenedCheckpoint, open_source
from mindformers_ixc.config import CONFIG_FILE, ModelConfig, read_config
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.fields import ALIASES, FIELDS, Field
from mindformers_ixc.files import RUN_RECORD, read_json
from mindformers_ixc.resources import resolve_path


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
    return know_member(read_config(found), source)


def _run_record(source: OpenedCheckpoint) -> ModelConfig | None:
    """The configuration of a run that ended before it wrote its model.

    What a run that began with other weights needs to say of them is where it began.
    """
    path, record = run_record(source)
    if path is None:
        return None
    model = record.get("model")
    fields = model.get("model_config") if isinstance(model, dict) else None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} has no model.model_config; name the model's {CONFIG_FILE} with --config.")
    start = record.get("start")
    if start is not None and not Path(str(start)).exists():
        raise CheckpointError(f"{source.path} is of a run that began with {start}, which is not there any more; "
                              f"name the model's {CONFIG_FILE} with --config.")
    given = {key: value for key, value in fields.items() if FIELDS.get(key, _NOT_PUBLIC).public or key in ALIASES}
    config = ModelConfig(**given) if start is None else config_of(open_source(str(start), verify=False))
    if isinstance(given.get("plora_dropout"), (int, float)):
        config.plora_dropout = given["plora_dropout"]       # says how a run trains, not what its weights are
    odd = [key for key in given if key in FIELDS and key != "vision_config" and given[key] is not None
           and given[key] != getattr(config, key)]
    if odd:
        raise CheckpointError(f"{path} and {start} differ in {', '.join(odd)}, so it is not known what the weights in "
                              f"{source.path} were trained as; name the model's {CONFIG_FILE} with --config.")
    tiles = _section(record, "train_dataset").get("hd_num")
    config.hd_num = tiles if isinstance(tiles, int) else config.hd_num
    return config


_NOT_PUBLIC = Field(None, "", public=False)


def run_record(source: OpenedCheckpoint) -> tuple[Path | None, dict[str, Any]]:
    """What a run put down of its configuration, and in which file; nothing for other checkpoints."""
    path = source.run_folder / RUN_RECORD if source.run_folder is not None else None
    if path is None or not path.is_file():
        return None, {}
    record = read_json(path, CheckpointError)
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} is no record of a run: it holds a {type(record).__name__}; name the model's "
                              f"{CONFIG_FILE} with --config.")
    return path, record


def run_tokenizer(source: OpenedCheckpoint) -> Path | None:
    """The tokenizer that a run trained with, if its record names one that is there."""
    name = _section(_section(run_record(source)[1], "train_dataset"), "tokenizer").get("vocab_file")
    path = resolve_path(name) if isinstance(name, str) else None
    return path if path is not None and path.is_file() else None


def _section(fields: dict[str, Any], name: str) -> dict[str, Any]:
    section = fields.get(name)
    return section if isinstance(section, dict) else {}


def write_config(config: ModelConfig, original: Path | None, target: Path, dtypes: set[str],
                 sections: dict | None = None) -> None:
    """Writes `config.json`, keeping fields of the original that this model does not know.

    Args:
        config: the model's.
        original: the source's file, if it has one.
        target: file to be written.
        dtypes: formats of the weights.
        sections: further ones. How the original's weights were quantised is none of them unless it is here.
    """
    fields = read_json(original, CheckpointError) if original else {}
    fields.pop("quantization_config", None)
    fields.update({**config.to_public_dict(), **(sections or {})})
    names = [LABELS[dtype] for dtype in dtypes if dtype in WEIGHTS.values()]
    fields["torch_dtype"] = names[0] if len(names) == 1 else "float32"
    if fields.pop("rope_parameters", None) is not None or "rope_scaling" in fields:
        fields["rope_scaling"] = config.rope_scaling       # whatever spelling the original had
    target.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
