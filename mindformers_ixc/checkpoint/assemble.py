"""Puts a model together that pre-training can start from: a language model, a vision tower, and everything new.

    assemble("internlm2-7b", "clip-vit-large-patch14-336", "ixc25_start")

The language model's and the tower's numbers stay as they are, bit by bit; only the tower's table of positions is
interpolated when its pictures have another size. Projector, separators and Partial LoRA start as the cells start them.
"""
from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mindformers_ixc.checkpoint.dtypes import to_float32
from mindformers_ixc.checkpoint.family import WRITING_HEAD, fields_of
from mindformers_ixc.checkpoint.quantised import refuse_quantised
from mindformers_ixc.checkpoint.sources import OpenedCheckpoint, is_state, open_source
from mindformers_ixc.checkpoint.start import check_tensor, mismatch
from mindformers_ixc.checkpoint.streaming import is_file_target
from mindformers_ixc.checkpoint.tensors import LazyTensor
from mindformers_ixc.checkpoint.writing import SHARD_BYTES, Options, check_target, write_checkpoint
from mindformers_ixc.config import CONFIG_FILE, ModelConfig, read_config
from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.fields import FIELDS
from mindformers_ixc.hub import relative_of
from mindformers_ixc.parameters import BUFFERS, SCORE_HEAD, UNUSED, VISION, Entry, parameter_table, part_of
from mindformers_ixc.processing.image import bicubic_resize
from mindformers_ixc.sections import check_value, whole

logger = logging.getLogger(__name__)

# The tokenizer of a model directory, which pre-training takes from the one that is made.
TOKENIZER_FILE = "tokenizer.model"

# What a language model's config.json is asked for: InternLM2 and IXC2.5 name these fields alike. Without the sizes
# nothing can be said of the weights; the others have IXC2.5's defaults.
LANGUAGE_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads")
LANGUAGE_FIELDS = (*LANGUAGE_SIZES, "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta",
                   "rope_scaling", "bias", "tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id",
                   "pad_token_id")
LANGUAGE_TYPES = ("internlm2", ModelConfig.model_type)

# The same of a tower, with Hugging Face's defaults of CLIP's tower: a config.json may leave out what is a default.
TOWER_FIELDS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
                "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
TOWER_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
TOWER_TYPES = ("clip", "clip_vision_model", ModelConfig.model_type)

POSITIONS = f"{VISION}.embeddings.position_embedding.weight"
# Side of a tile in pixels (arXiv 2407.03320).
PIXELS = 560

# What a tower's names begin with in its own repository, and what the model puts in front of that.
TOWER_PREFIX = "vision_model."
ABOVE_TOWER = VISION.removesuffix(TOWER_PREFIX.rstrip("."))


@dataclass
class AssembledSource(OpenedCheckpoint):
    """Language model and tower as one source: the tokenizer is the language model's, the configuration is new."""

    side_suffixes: ClassVar[tuple[str, ...]] = (".model",)

    @property
    def config_file(self) -> Path | None:
        """None: a `config.json` of either says nothing about the whole."""
        return None


class DrawnTensor(LazyTensor):
    """Normally distributed numbers around 0, the same ones whenever and in whatever pieces they are read.

    Args:
        name: of the parameter; with the seed it decides the numbers.
        shape: of it.
        sigma: standard deviation; with 0 all numbers are 0.
        seed: of the whole model.
        stored_dtype: format it is written in.
    """

    dtype = "F32"

    def __init__(self, name: str, shape: tuple[int, ...], sigma: float, seed: int, stored_dtype: str):
        self.shape, self.sigma, self._stored = shape, sigma, stored_dtype
        self.key = [seed, zlib.crc32(name.encode())]

    @property
    def stored_dtype(self) -> str:
        """That of the language model."""
        return self._stored

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`. Each row has a generator of its own."""
        value = np.zeros((end - begin, *self.shape[1:]), np.float32)
        for row in range(begin, end) if self.sigma else ():
            value[row - begin] = np.random.default_rng([*self.key, row]).standard_normal(self.shape[1:], np.float32)
        return value * np.float32(self.sigma)


class InterpolatedPositions(LazyTensor):
    """A tower's table of positions for pictures of another size: bicubic over the grid, the class token as it is.

    Args:
        table: `(1 + g*g, C)` of the tower.
        side: patches along a side from now on.
    """

    dtype = "F32"

    def __init__(self, table: LazyTensor, side: int):
        self.table, self.shape = table, (side ** 2 + 1, table.shape[1])
        self.side = side

    @property
    def stored_dtype(self) -> str:
        """The tower's own format."""
        return self.table.stored_dtype

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`. The whole table is computed, which takes a few megabytes."""
        table = to_float32(self.table.whole(), self.table.dtype)
        old, width = math.isqrt(len(table) - 1), table.shape[1]
        grid = np.ascontiguousarray(table[1:].T).reshape(width, old, old)
        patches = bicubic_resize(grid, self.side).reshape(width, -1).T
        return np.ascontiguousarray(np.concatenate([table[:1], patches])[begin:end])


def assemble(language: str | Path, tower: str | Path, target: str | Path, *, config: str | Path | None = None,
             seed: int = 0, dtype: str | None = None, shard_bytes: int = SHARD_BYTES, overwrite: bool = False) -> Path:
    """Makes a model directory of a language model and a vision tower. An interrupted run goes on where it stopped.

    Args:
        language: InternLM2 as it is published, or a model of this kind, whose other parts are left out.
        tower: a CLIP tower as it is published, alone or with its text side, or a model of this kind.
        target: directory to be made.
        config: `config.json` or its directory of the model to be made; by default sizes are those of the two, pictures
            have 560 pixels, and Partial LoRA has rank and alpha 256.
        seed: of the numbers that are drawn.
        dtype: `float32`, `bfloat16` or `float16`; by default each tensor keeps its own, and what is new has the
            language model's.
        shard_bytes: size of a file at most, in bytes.
        overwrite: replace a target that exists.

    Returns:
        The target.

    Raises:
        CheckpointError: for a source that lacks parameters or has others, or has whole numbers in place of those that
            are taken; for sizes that do not go together, and what `convert` refuses of a target.
        ConfigError: for sizes that no model of this kind can have.
    """
    options = Options("hf", dtype=dtype, shard_bytes=shard_bytes)
    options.check()
    check_value("seed", seed, whole(0), CheckpointError)
    if is_file_target(Path(target)):
        raise CheckpointError(f"{target} is the name of one file; a model to start from is a directory with its "
                              "configuration and tokenizer.")
    words, sight = open_source(language), open_source(tower)
    for one, part in ((words, "language"), (sight, "vision")):
        refuse_quantised(one, "a model that training begins with", part)
    given = _fields_of(words, LANGUAGE_TYPES, "a language model"), _fields_of(sight, TOWER_TYPES, "a CLIP tower")
    model = _new_config(words, sight, *given) if config is None else read_config(config)
    model.task_lora_ranks = {}
    if model.reward_pooling is not None:
        raise CheckpointError(f"{config} is a reward model's; name the config.json of a model that writes, which a "
                              "reward model is trained from.")
    if config is not None:
        _check_sizes(words, given[0], model, LANGUAGE_SIZES, config)
        _check_sizes(sight, _tower_of(given[1]), model.vision_config, TOWER_SIZES, config)
    table = parameter_table(model)
    parts = {**_language(words, table), **_tower(sight, table, model)}
    new = parts["model.norm.weight"].stored_dtype
    tensors = {name: parts.get(name) or _fresh(entry, model.initializer_range, seed, new)
               for name, entry in table.items()}
    source = AssembledSource(words.path, "public", tensors, [*words.files, *sight.files])
    check_target(sight, Path(target), options)
    if not (words.side_folder / TOKENIZER_FILE).is_file():
        logger.warning(f"{words.side_folder} has no {TOKENIZER_FILE}, so {target} gets none: copy the language model's "
                       "there before training begins.")
    write_checkpoint(tensors, model, source, Path(target), options, overwrite, {"assemble": seed})
    return Path(target)


def _fields_of(source: OpenedCheckpoint, types: tuple[str, ...], wanted: str) -> dict[str, Any]:
    """A source's `config.json`; empty where it has none.

    Raises:
        CheckpointError: when it is another kind of model's.
    """
    if source.config_file is None:
        return {}
    fields = fields_of(source)
    kind = fields.get("model_type")
    if kind not in types:
        other = relative_of(fields, ModelConfig.model_type)
        raise CheckpointError(f"{source.config_file} has model_type {kind!r:.80}, expected {wanted} of type "
                              f"{', '.join(types[:-1])} or {types[-1]}{f': it is {other}' if other else ''}.")
    return fields


def _tower_of(fields: Mapping) -> dict[str, Any]:
    """The tower's fields of its `config.json`, or of the section of it in that of a larger model."""
    if fields.get("model_type") == "clip_vision_model":
        return dict(fields)
    section = fields.get("vision_config")
    return dict(section) if isinstance(section, Mapping) else {}


def _new_config(words: OpenedCheckpoint, sight: OpenedCheckpoint, language: Mapping, tower: Mapping) -> ModelConfig:
    """The configuration that follows from a language model's and a tower's.

    Raises:
        CheckpointError: when one of them has none, or a size is missing.
        ConfigError: for sizes no model of this kind can have, naming the source.
    """
    for source, fields in ((words, language), (sight, tower)):
        if not fields:
            raise CheckpointError(f"{source.directory} has no {CONFIG_FILE}; copy the one that belongs to the weights, "
                                  "or name that of the model to be made with --config.")
    missing = [name for name in LANGUAGE_SIZES if name not in language]
    if missing:
        raise CheckpointError(f"{words.config_file} does not say {', '.join(missing)}; copy the config.json that "
                              "belongs to the weights.")
    own = {name: language[name] for name in LANGUAGE_FIELDS if language.get(name) is not None}
    if isinstance(own.get("eos_token_id"), list):       # of a chat model: the first ends a text
        own["eos_token_id"] = own["eos_token_id"][0] if own["eos_token_id"] else None
    trained = FIELDS["max_position_embeddings"].default
    if isinstance(own.get("max_position_embeddings"), int):
        own["max_position_embeddings"] = min(own["max_position_embeddings"], trained)
    section = {name: _tower_of(tower).get(name, default) for name, default in TOWER_FIELDS.items()}
    try:
        return ModelConfig(**own, vision_config={**section, "image_size": PIXELS}, task_lora_ranks={})
    except ConfigError as error:
        raise ConfigError(f"{words.path} and {sight.path} make no model: {error}") from error


def _check_sizes(source: OpenedCheckpoint, given: Mapping, wanted: object, names: tuple[str, ...],
                 config: str | Path) -> None:
    """Refuses a source whose own `config.json` says other sizes than that of the model to be made."""
    odd = [f"{name} {given[name]!r:.40} instead of {getattr(wanted, name)}" for name in names
           if given.get(name) is not None and given[name] != getattr(wanted, name)]
    if odd:
        raise CheckpointError(f"{source.path} does not go into the model of {config}: it has {', '.join(odd)}.")


def _language(source: OpenedCheckpoint, table: dict[str, Entry]) -> dict[str, LazyTensor]:
    """The language model's tensors, checked; other parts of a model of this kind are left out.

    Raises:
        CheckpointError: see `_matched`; for a reward model, which has no head that writes.
    """
    if SCORE_HEAD in source.tensors and WRITING_HEAD not in source.tensors:
        raise CheckpointError(f"{source.path} is a reward model: it has {SCORE_HEAD} in place of {WRITING_HEAD}, so no "
                              "language model can be taken from it; take the model that it was trained from.")
    wanted = {name: entry for name, entry in table.items() if entry.part == "language"}
    return _matched(source, source.tensors, wanted, {*_parts_of(source)} - {"language"}, "a language model")


def _tower(source: OpenedCheckpoint, table: dict[str, Entry], model: ModelConfig) -> dict[str, LazyTensor]:
    """The tower's tensors under the model's names, its positions for the model's pictures."""
    wanted = {name: entry for name, entry in table.items() if entry.part == "vision"}
    found = {ABOVE_TOWER + name if name.startswith(TOWER_PREFIX) else name: tensor
             for name, tensor in source.tensors.items()}
    positions, side = found.get(POSITIONS), model.vision_config.patches_per_side
    if positions is not None and len(positions.shape) == 2 and positions.shape[0] != side ** 2 + 1:
        if positions.shape[0] != math.isqrt(max(0, positions.shape[0] - 1)) ** 2 + 1 or positions.shape[0] < 2:
            raise CheckpointError(f"{source.path} holds a table of {positions.shape[0]} positions, which is no square "
                                  "grid of patches and a class token.")
        found[POSITIONS] = InterpolatedPositions(positions, side)
    # a CLIP model's text side, and the other parts of a model of this kind
    text = {name for name in found if name.startswith(("text_model.", "text_projection.", "visual_projection."))
            or name == "logit_scale"}
    kept = {name: tensor for name, tensor in found.items() if name not in text}
    return _matched(source, kept, wanted, {*_parts_of(source)} - {"vision"}, "a CLIP tower")


def _parts_of(source: OpenedCheckpoint) -> set[str]:
    return {part for part in map(part_of, source.tensors) if part is not None}


def _matched(source: OpenedCheckpoint, found: Mapping[str, LazyTensor], wanted: dict[str, Entry],
             left_out: set[str], what: str) -> dict[str, LazyTensor]:
    """The tensors that are wanted of a source, all of them.

    Raises:
        CheckpointError: for missing and surplus ones, and for other shapes or formats.
    """
    missing = [name for name in wanted if name not in found]
    surplus = [name for name in found if name not in wanted and part_of(name) not in left_out
               and not (is_state(name) or BUFFERS.match(name) or name in UNUSED)]
    if len(missing) == len(wanted):
        raise CheckpointError(f"{source.path} is not {what}: it holds none of the {len(wanted)} parameters of one "
                              f"(first: {', '.join(missing[:3])}).")
    if missing or surplus:
        raise CheckpointError(mismatch(source.path, missing, surplus))
    for name, entry in wanted.items():
        check_tensor(source, name, found[name], entry.shape)
    return {name: found[name] for name in wanted}


def _fresh(entry: Entry, sigma: float, seed: int, dtype: str) -> DrawnTensor:
    """A parameter that starts anew, as the cells start it: biases and the second sides of Partial LoRA at 0."""
    still = entry.name.endswith((".bias", ".Plora_B.weight"))
    return DrawnTensor(entry.name, entry.shape, 0.0 if still else sigma, seed, dtype)
