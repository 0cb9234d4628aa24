"""The weights a run starts with: its model becomes theirs before anything is built, and all of them are loaded."""
from __future__ import annotations

import shlex
from collections.abc import Collection, MutableMapping
from pathlib import Path
from typing import Any

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.model_directory import load_weights
from mindformers_ixc.checkpoint.sources import OpenedCheckpoint, open_source
from mindformers_ixc.checkpoint.start import (
    OVERRIDE,
    Recipe,
    begin,
    describe_start,
    match_tensors,
    said_rotary,
)
from mindformers_ixc.config import ModelConfig
from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.fields import ALIASES, FIELDS, VISION_FIELDS
from mindformers_ixc.hub import not_a_folder
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.parameters import parameter_table
from mindformers_ixc.rope import ROPE_FIELDS
from mindformers_ixc.training.resume import recorded_model

# What the cut of a checkpoint for ranks, which MindFormers does, reads.
CUT_FORMATS = (".safetensors", ".ckpt")


def adopt_start(fields: dict, say: bool = True) -> None:
    """Lets what a run starts with, or goes on with, say what model it is; in place.

    Args:
        fields: of the YAML.
        say: print what there is to say about it.

    Raises:
        ConfigError: when the YAML contradicts the directory's config.json.
        CheckpointError: when weights are missing, surplus, damaged, or of another shape.
        FileNotFoundError: when there is nothing.
    """
    section = (fields.get("model") or {}).get("model_config")
    if fields.get("run_mode") == "predict" or not isinstance(section, dict):
        return
    if fields.get("resume_training"):
        _fill_in(section, recorded_model(fields))
        return
    start = fields.get("load_checkpoint")
    if not start:
        if fields.get(OVERRIDE):
            raise ConfigError(f"{OVERRIDE} is for runs that start with a checkpoint (load_checkpoint); take it out.")
        return
    if not Path(start).exists():
        raise FileNotFoundError(not_a_folder(start, "load_checkpoint") or f"load_checkpoint: {start} does not exist.")
    # a stand-alone run compares weights with their digests when it loads them; in a parallel one MindFormers loads
    source = open_source(start, verify=None if fields.get("use_parallel") else False)
    lines = []
    if source.config_file is None:
        lines.append(f"{start} has no config.json: the YAML says what model its weights are.")
    recipe = begin(section, source, fields.get(OVERRIDE) or ())
    # a stand-alone run leaves a whole model, so it needs all of it; else pairs would be lost without a word
    recipe.outside_graph = bool(fields.get("use_parallel")) and source.kind == "ranks"
    new = _check(section, source, recipe, bool(fields.get("use_parallel")))
    for line in [*lines, *describe_start(start, recipe, new)] if say else ():
        terminal.current.say(line)


def _check(section: dict, source: OpenedCheckpoint, recipe: Recipe, parallel: bool) -> list[str]:
    """Checks names and shapes before anything is built; returns the names of parameters that are new."""
    config = ModelConfig(**{key: value for key, value in section.items() if key not in ("type", "parallel_config")})
    shapes = {name: entry.shape for name, entry in parameter_table(config).items()}
    _, new = match_tensors(source, shapes, recipe, config.adapter_mode)
    if parallel and (source.renamed or any(file.suffix not in CUT_FORMATS for file in source.files)):
        raise CheckpointError(f"{source.path} is not in a form that MindFormers cuts for the ranks of a parallel run; "
                              f"make one of it: mindformers convert {shlex.quote(str(source.path))} TARGET.")
    return new


def _fill_in(section: dict, recorded: dict) -> None:
    """Fields that describe the weights, as the run that goes on wrote them down; what the YAML says stays."""
    for own, theirs in ALIASES.items():
        if own in section and own not in recorded:
            section[theirs] = section.pop(own)
    rope, scaled = said_rotary(section, recorded.get("max_position_embeddings"))
    written, _ = said_rotary(recorded, recorded.get("max_position_embeddings"))
    if rope.theta in (None, written.theta) and not (scaled and rope.scaling != written.scaling):
        # the same, maybe in another spelling: it takes the one that was written down
        for name in ROPE_FIELDS:
            section.pop(name, None)
        section.update({name: recorded[name] for name in ROPE_FIELDS if name in recorded})
    described = [name for name, entry in FIELDS.items() if entry.describes or name == "task_lora_ranks"]
    vision = recorded.get("vision_config") or {}
    pairs: list[tuple[dict, dict, Any]] = [(section, recorded, described)]
    if vision:
        if section.get("vision_config") is None:
            section["vision_config"] = {"type": vision.get("type", "IXC25VisionConfig")}
        pairs.append((section["vision_config"], vision, VISION_FIELDS))
    for now, before, names in pairs:
        now.update({name: before[name] for name in names if now.get(name) is None and name in before})


def load_start(model: IXC25Model, start: str, section: MutableMapping, override: Collection[str] = (),
               added: Collection[str] = ()) -> None:
    """Loads the weights of a stand-alone run into its model.

    Args:
        model: the model, with the pairs that a PET type has put into it.
        start: the checkpoint.
        section: the run's `model_config`; see `begin`.
        override: fields of it that hold against the checkpoint's configuration.
        added: parts that the PET type has put into the model where it lacked them.

    Raises:
        CheckpointError: see `load_weights`.
    """
    recipe = begin(section, open_source(start, verify=False), override)
    recipe.new |= set(added)
    load_weights(model, start, recipe)
