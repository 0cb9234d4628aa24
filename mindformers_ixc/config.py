"""Configuration of IXC2.5: the classes that hold, check and write the fields of `fields.py`, and `config.json`.

`ModelConfig` needs neither MindSpore nor MindFormers. `mindformers_ixc.models.configuration` has what MindFormers
registers, `IXC25Config`: the same class as one of MindFormers' configurations.
"""
from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.fields import (
    ALIASES,
    ARCHITECTURES,
    DTYPE_FIELDS,
    DTYPES,
    DYNAMIC_NTK,
    FIELDS,
    FRAMEWORK_FIELDS,
    LOSS_FORMS,
    MODE_ADAPTERS,
    PADDED_MULTIPLE,
    POOLINGS,
    REWARD,
    REWARD_ARCHITECTURES,
    TASK_LORA_RANKS,
    TASK_LORAS,
    VISION_FIELDS,
    VISION_PARALLEL,
    Field,
    field_rule,
)
from mindformers_ixc.files import read_json
from mindformers_ixc.hub import not_a_folder, relative_of
from mindformers_ixc.resources import STARTER, resolve_model
from mindformers_ixc.rope import ROPE_FIELDS, read_rope
from mindformers_ixc.sections import Rule, check_keys, check_value, check_values, is_whole, one_of, whole

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class RecomputeOptions:
    """MindFormers' `recompute_config`, with its defaults.

    Attributes:
        recompute: decoder layers that keep only their inputs: true, false, a number or one number a stage.
        select_recompute: the same of attention cores and gates.
        mp_comm_recompute: whether sums over tensor-parallel devices are done again.
        parallel_optimizer_comm_recompute: whether weights that optimizer parallel cuts are gathered again.
        recompute_slice_activation: whether the kept inputs are cut over tensor-parallel devices.
    """

    recompute: Any = False
    select_recompute: Any = False
    mp_comm_recompute: bool = True
    parallel_optimizer_comm_recompute: bool = False
    recompute_slice_activation: bool = False


@dataclass(frozen=True)
class ParallelOptions:
    """What of MindFormers' `parallel_config` the model's cells and plans read, with MindFormers' defaults.

    Attributes:
        data_parallel: replicas that take different samples.
        model_parallel: tensor-parallel devices.
        pipeline_stage: stages.
        micro_batch_num: micro batches of a pipelined step.
        vocab_emb_dp: keep the embedding whole on every device.
        use_seq_parallel: cut positions between the linears over the tensor-parallel devices.
        recompute: see `RecomputeOptions`.
    """

    data_parallel: int = 1
    model_parallel: int = 1
    pipeline_stage: int = 1
    micro_batch_num: int = 1
    vocab_emb_dp: bool = True
    use_seq_parallel: bool = False
    recompute: RecomputeOptions = RecomputeOptions()

    @classmethod
    def of(cls, section: Mapping | None, recompute: Mapping | None = None) -> ParallelOptions:
        """Those of a YAML's `parallel_config` and `recompute_config`; keys that nothing here reads are left out."""
        known = {field.name for field in fields(cls)} - {"recompute"}
        given = {key: value for key, value in (section or {}).items() if key in known}
        own = {field.name for field in fields(RecomputeOptions)}
        options = {key: value for key, value in (recompute or {}).items() if key in own}
        return cls(**given, recompute=RecomputeOptions(**options))


def _assign(config: VisionConfig | ModelConfig, table: dict[str, Field], given: dict[str, Any]) -> None:
    """Sets every field of a table from what is given, or to its default; further names become attributes too."""
    for name, field in table.items():
        value = given.pop(name, field.default)
        value = field.default if value is None else value
        setattr(config, name, copy.deepcopy(value) if isinstance(value, (dict, list)) else value)
    for name, value in given.items():
        if isinstance(getattr(type(config), name, None), property) or callable(getattr(type(config), name, None)):
            raise ConfigError(f"{name} is no field of a configuration: it follows from the others; take it out.")
        setattr(config, name, value)


def _public(config: VisionConfig | ModelConfig, table: dict[str, Field]) -> dict[str, Any]:
    """The public fields that have a value, and what the file they were read from held beside them."""
    names = [name for name, field in table.items() if field.public] + list(getattr(config, "_kept", ()))
    return {name: getattr(config, name) for name in names if getattr(config, name) is not None}


def _check_types(config: VisionConfig | ModelConfig, table: dict[str, Field], where: str = "") -> None:
    """Refuses values of another type and sizes below 1; numbers that came as text (YAML reads 1e-5 so) become floats.

    Raises:
        ConfigError: naming the field, its value and what it must be.
    """
    for name, field in table.items():
        value = getattr(config, name)
        if isinstance(field.default, float) and isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)
                setattr(config, name, value)
        if value is not None:       # only where the default is none either
            check_value(where + name, value, field_rule(name, field))


_SECTION = Rule(lambda value: isinstance(value, Mapping), "a section")


class VisionConfig:
    """Sizes of the CLIP vision tower. Defaults: CLIP ViT-L/14 with positions interpolated to 560 x 560 pixels.

    Args:
        **given: fields of `VISION_FIELDS`; others are kept as attributes.

    Raises:
        ConfigError: for sizes that do not divide or an activation the tower does not have.
    """

    model_type = "clip_vision_model"

    image_size: int
    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    layer_norm_eps: float
    pad_positions: bool

    def __init__(self, /, **given: Any):
        _assign(self, VISION_FIELDS, given)
        _check_types(self, VISION_FIELDS, "vision_config.")
        if self.image_size % (2 * self.patch_size):
            unit = 2 * self.patch_size
            raise ConfigError(
                f"vision_config.image_size is {self.image_size}, which is not a multiple of {unit} (2 x 2 patches of "
                f"{self.patch_size} pixels merge into one token); choose a multiple of {unit}.")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"vision_config.hidden_size {self.hidden_size} does not divide by "
                              f"vision_config.num_attention_heads {self.num_attention_heads}.")
        if self.hidden_act != "quick_gelu":
            raise ConfigError(f"vision_config.hidden_act is '{self.hidden_act:.80}'; the only choice is 'quick_gelu'.")

    @property
    def patches_per_side(self) -> int:
        """Patches along a side of a tile (40 at 560 pixels)."""
        return self.image_size // self.patch_size

    @property
    def positions(self) -> int:
        """Positions of a tile in the tower, class token included (1601 at 560 pixels)."""
        return self.patches_per_side ** 2 + 1

    @property
    def padded_positions(self) -> int:
        """Positions of a tile as Ascend's fused attention takes them (1601 at 560 pixels, or 1616)."""
        return -(-self.positions // PADDED_MULTIPLE) * PADDED_MULTIPLE if self.pad_positions else self.positions

    @property
    def tokens_per_side(self) -> int:
        """Merged tokens along a side of a tile (20 at 560 pixels)."""
        return self.patches_per_side // 2

    @property
    def tokens_per_tile(self) -> int:
        """Merged tokens of a tile (400 at 560 pixels)."""
        return self.tokens_per_side ** 2

    def to_public_dict(self) -> dict[str, Any]:
        """The section `vision_config` of a `config.json`."""
        return {**_public(self, VISION_FIELDS), "model_type": self.model_type}


def default_max_images(max_tiles: int) -> int:
    """Pictures of a row where nobody says how many: each has two tiles at least, its global view and one of its own."""
    return max(1, max_tiles // 2)


class ModelConfig:
    """Configuration of IXC2.5, with the defaults of the 7B model.

    Args:
        **given: fields of `FIELDS`, MindFormers' `ALIASES` of them (which win), and others, kept as attributes.

    Raises:
        ConfigError: for a value that is not available or sizes that contradict each other.
    """

    model_type = "internlmxcomposer2"
    # whether it was said which task LoRAs there are
    says_tasks: bool
    vision_class: type[VisionConfig] = VisionConfig

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    bias: bool
    tie_word_embeddings: bool
    initializer_range: float
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    vision_config: VisionConfig
    plora_rank: int
    plora_alpha: int
    plora_dropout: float
    task_lora_ranks: dict[str, int]
    reward_pooling: str | None
    hd_num: int | None
    seq_length: int
    max_tiles: int
    max_images: int
    max_segments: int
    loss_chunk: int
    batch_size: int
    compute_dtype: Any
    param_init_type: Any
    layernorm_compute_type: Any
    softmax_compute_type: Any
    adapter_mode: str
    packing: bool
    neftune_alpha: float
    num_sources: int
    preference: dict | None
    reward: dict | None
    grpo: dict | None
    use_past: bool
    block_size: int
    num_blocks: int | None
    cache_dtype: str | None
    reuse_bytes: int
    use_flash_attention: bool
    rope_parameters: None
    dynamic_ntk: str
    apply_rope_fusion: bool
    fused_norm: bool
    vision_parallel: str
    offset: Any
    loss_form: str
    calculate_per_token_loss: bool
    disable_lazy_inline: bool
    parallel_config: Any

    def __init__(self, /, **given: Any):
        own = {name: value for name, value in given.items() if name not in ALIASES}
        own.update({ALIASES[name]: value for name, value in given.items() if name in ALIASES})
        no_pairs = own.get("task_lora_ranks") is None
        if own.get("reward_pooling") is None and names_reward(own):
            own["reward_pooling"] = POOLINGS[0]
        # what names its class is a file, and a public one leaves it to the weights which pairs there are
        self.says_tasks = not (no_pairs and "architectures" in own)
        rotary = {name: value for name, value in own.items() if name in ROPE_FIELDS or name not in FIELDS}
        _assign(self, FIELDS, own)
        _check_types(self, FIELDS)
        rope = read_rope(rotary, self.max_position_embeddings)
        self.rms_norm_eps = float(self.rms_norm_eps)
        self.rope_theta, self.rope_scaling, self.rope_parameters = rope.theta or self.rope_theta, rope.scaling, None
        self.vision_config = self._vision(self.vision_config)
        if self.max_images is None:
            self.max_images = default_max_images(self.max_tiles)
        check_value("task_lora_ranks", {} if no_pairs else self.task_lora_ranks, _SECTION)
        self.task_lora_ranks = dict(TASK_LORA_RANKS if no_pairs else self.task_lora_ranks)
        self.offset = 0 if self.offset is None else self.offset
        if self.calculate_per_token_loss and self.loss_form == "mean":
            self.loss_form = "sums"
        for name in DTYPE_FIELDS:
            setattr(self, name, _dtype(name, getattr(self, name)))
        if self.parallel_config is None or isinstance(self.parallel_config, Mapping):
            self.parallel_config = ParallelOptions.of(self.parallel_config)
        self._check()
        self._check_parallel()

    def check(self) -> None:
        """Checks the fields again: MindFormers' Auto classes set those that a caller gives after all was checked.

        Raises:
            ConfigError: naming the field, its value and what it must be.
        """
        _check_types(self, FIELDS)
        self._check()

    def _vision(self, value: VisionConfig | Mapping | None) -> VisionConfig:
        if isinstance(value, VisionConfig):
            return value
        check_value("vision_config", {} if value is None else value, _SECTION)
        return self.vision_class(**{key: item for key, item in dict(value or {}).items()
                                    if key not in ("type", "model_type")})

    def _check(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} does not divide by num_attention_heads "
                              f"{self.num_attention_heads}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(f"num_attention_heads {self.num_attention_heads} does not divide by num_key_value_heads "
                              f"{self.num_key_value_heads}.")
        if self.hidden_act != "silu":
            raise ConfigError(f"hidden_act is '{self.hidden_act:.80}'; the only choice is 'silu'.")
        if self.bias or self.tie_word_embeddings:
            raise ConfigError(f"bias is {self.bias} and tie_word_embeddings is {self.tie_word_embeddings}; IXC2.5 has "
                              "neither, set both to False.")
        check_keys(self.task_lora_ranks, TASK_LORAS, "task_lora_ranks")
        check_values(self.task_lora_ranks, dict.fromkeys(TASK_LORAS, whole(1)), "task_lora_ranks")
        check_value("adapter_mode", self.adapter_mode, one_of(MODE_ADAPTERS))
        missing = [name for name in MODE_ADAPTERS[self.adapter_mode] if name not in self.task_lora_ranks]
        if missing:
            raise ConfigError(f"adapter_mode '{self.adapter_mode}' needs the task LoRA pairs {missing}, but "
                              f"task_lora_ranks has only {sorted(self.task_lora_ranks)}.")
        if self.reward_pooling is not None:
            check_value("reward_pooling", self.reward_pooling, one_of(POOLINGS))
        check_value("dynamic_ntk", self.dynamic_ntk, one_of(DYNAMIC_NTK))
        check_value("loss_form", self.loss_form, one_of(LOSS_FORMS))

    def _check_parallel(self) -> None:
        if self.use_flash_attention and self.compute_dtype not in ("float16", "bfloat16"):
            raise ConfigError(f"use_flash_attention is True, but Ascend's fused attention takes float16 and bfloat16 "
                              f"only and compute_dtype is {self.compute_dtype}; set compute_dtype to bfloat16 or "
                              "use_flash_attention to False.")
        check_value("vision_parallel", self.vision_parallel, one_of(VISION_PARALLEL))
        numbers = self.offset if isinstance(self.offset, (list, tuple)) else [self.offset]
        if self.offset != "auto" and not all(is_whole(number) for number in numbers):
            raise ConfigError(f"offset is {self.offset!r:.80}; it takes 0, a list with one number a pipeline stage, or "
                              "auto.")

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def plora_scale(self) -> float:
        """Scale of the Partial LoRA product, alpha / rank."""
        return self.plora_alpha / self.plora_rank

    @property
    def vision_rows(self) -> int:
        """Rows of a sample's vision table: the tokens of `max_tiles` tiles and the two separators."""
        return self.max_tiles * self.vision_config.tokens_per_tile + 2

    def to_public_dict(self) -> dict[str, Any]:
        """The fields that belong in a model directory's `config.json`, under their public names.

        Returns:
            JSON-serialisable dict: the public fields of `FIELDS` that have a value, and what the file held beside them
            if `read_config` made this configuration.
        """
        return {**_public(self, FIELDS), "vision_config": self.vision_config.to_public_dict(),
                "model_type": self.model_type,
                "architectures": list(ARCHITECTURES if self.reward_pooling is None else REWARD_ARCHITECTURES)}


def _dtype(name: str, value: object) -> str:
    """A dtype's name from a name or MindSpore's type."""
    found = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}.get(str(value).lower(), str(value).lower())
    if found not in DTYPES:
        raise ConfigError(f"{name} is {value!r:.80}; the choices are {', '.join(DTYPES)}.")
    return found


def recomputed_layers(choice: Any, layers: int, key: str) -> int:
    """How many decoder layers a value of the YAML's `recompute_config` stands for.

    Args:
        choice: true (all), false (none), a number or a list of numbers (one a pipeline stage, added up).
        layers: of the model.
        key: of the YAML, for the message.

    Raises:
        ConfigError: for another value, or more layers than there are.
    """
    if isinstance(choice, bool):
        return layers if choice else 0
    numbers = choice if isinstance(choice, (list, tuple)) else [choice]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers) \
            or sum(numbers) > layers:
        raise ConfigError(f"recompute_config.{key} is {choice!r}; it takes true, false or how many of the {layers} "
                          "decoder layers (a list has one number a pipeline stage).")
    return sum(numbers)


def read_fields(path: str | os.PathLike) -> dict[str, Any]:
    """Content of a model directory's `config.json`.

    Args:
        path: the directory, or the file itself.

    Raises:
        CheckpointError: when the file is missing, is not JSON or describes another model.
    """
    file = resolve_model(path)
    file = file / CONFIG_FILE if file.suffix != ".json" else file
    if not file.is_file():
        on_a_hub = not_a_folder(path)
        if on_a_hub:
            raise CheckpointError(on_a_hub)
        raise CheckpointError(_no_model(path, file))
    found = read_json(file, CheckpointError)
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds a {type(found).__name__} and no object of fields; copy the one that "
                              "belongs to the weights.")
    if found.get("model_type") != ModelConfig.model_type:
        other = relative_of(found, ModelConfig.model_type)
        raise CheckpointError(f"{file} has model_type {found.get('model_type')!r:.80}, expected "
                              f"'{ModelConfig.model_type}'{f': it is {other}' if other else ''}.")
    return found


def names_reward(fields: Mapping) -> bool:
    """Whether a `config.json` says that its weights are a reward model's."""
    names = fields.get("architectures")
    return fields.get("reward_pooling") is not None or (
        isinstance(names, list) and any(REWARD in name for name in names if isinstance(name, str)))


def _no_model(path: str | os.PathLike, file: Path) -> str:
    """The sentence for a path that is no model directory, with what may have been meant.

    Args:
        path: as it was given.
        file: the config.json that is not there.
    """
    wanted = "a model directory holds config.json, the tokenizer and the weights"
    if file == resolve_model(path):
        return f"{path} does not exist."
    if file.parent.is_file():
        return f"{path} is a file; {wanted}."
    if not file.parent.exists():
        return f"{path} does not exist; {wanted}. `{STARTER}` is the small model that ships with this package."
    return f"{file} does not exist; {wanted}.{inner_model(file.parent)}"


def inner_model(folder: Path) -> str:
    """The question whether a model directory inside a folder was meant, for the end of a sentence; or nothing."""
    # the model in a run's folder, OmniLive's own, and the files in a hub tool's cache
    inner = next((found.parent for pattern in ("model", "base", "snapshots/*")
                  for found in sorted(folder.glob(f"{pattern}/{CONFIG_FILE}"))), None)
    return f" {inner} has one: is that meant?" if inner else ""


def read_config(path: str | os.PathLike, config_class: type = ModelConfig, **overrides: Any) -> Any:
    """The configuration of a model directory.

    Args:
        path: the directory, or its `config.json`.
        config_class: `ModelConfig`, or MindFormers' `IXC25Config`.
        **overrides: fields of a run (`seq_length`, `compute_dtype`, ...).

    Returns:
        A `config_class`; `to_public_dict` gives back what the file holds, fields this package does not know included.

    Raises:
        CheckpointError: see `read_fields`.
    """
    found = read_fields(path)
    del found["model_type"]
    try:
        config = config_class(**{**found, **overrides})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    config._kept = _unknown(found, FIELDS)
    config.says_tasks = found.get("task_lora_ranks") is not None
    vision = found.get("vision_config")
    if isinstance(vision, dict):
        config.vision_config._kept = _unknown(vision, VISION_FIELDS)
    return config


def _unknown(found: Mapping, table: dict[str, Field]) -> tuple[str, ...]:
    """Names in a file that a table does not have and MindFormers does not take for its own."""
    return tuple(name for name in found if name not in table and name not in ALIASES
                 and name not in (*FRAMEWORK_FIELDS, "architectures", "model_type") and not name.startswith("_"))
