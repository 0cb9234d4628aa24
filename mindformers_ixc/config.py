"""Configuration of IXC2.5: one table of fields, and the classes that hold, check and write them.

A field is written once, in `FIELDS` or `VISION_FIELDS`: its default, whether it belongs in the public `config.json`,
and one line of help. The signature of a YAML's `model_config`, `to_public_dict` and the tables of docs/yaml.md are made
of these tables. Fields have the names of the public repository (`hidden_size`, `num_hidden_layers`, ...), so a public
`config.json` and a YAML's section are the same vocabulary; MindFormers' names for the same things are in `ALIASES`.
Sizes that the public file leaves out, because its code hard-codes them, default to the values of the 7B model.

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
from typing import Any, NamedTuple

from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.files import read_json
from mindformers_ixc.hub import not_a_folder, relative_of
from mindformers_ixc.resources import STARTER, resolve_model
from mindformers_ixc.rope import ROPE_FIELDS, read_rope
from mindformers_ixc.sections import (
    ANYTHING,
    Rule,
    above_0,
    check_keys,
    check_value,
    check_values,
    is_number,
    is_whole,
    of_type,
    one_of,
    whole,
)

CONFIG_FILE = "config.json"


class TaskLoRA(NamedTuple):
    """A low-rank pair of the released checkpoint that acts on all positions.

    Attributes:
        rank: of the pair.
        mode: of the public model (`infer_mode`) in which it acts.
    """

    rank: int
    mode: str


# The one table of task LoRAs, in the order in which they act: a further one is a line here (arXiv 2407.03320: article
# LoRAs of rank 256, webpage LoRA of rank 512).
TASK_LORAS = {"sft": TaskLoRA(256, "write"), "dpo": TaskLoRA(256, "write"), "web": TaskLoRA(512, "web")}

TASK_LORA_RANKS = {task: pair.rank for task, pair in TASK_LORAS.items()}

# Which task LoRAs act in which mode; in `base` none does.
MODE_ADAPTERS: dict[str, tuple[str, ...]] = {
    "base": (), **{mode: tuple(task for task, pair in TASK_LORAS.items() if pair.mode == mode)
                   for mode in dict.fromkeys(pair.mode for pair in TASK_LORAS.values())}}

# Modes of a layout: those above, and `all`, in which every pair is cut.
ALL_MODES = {"all": tuple(TASK_LORAS), **MODE_ADAPTERS}

# Which length sets the dynamic NTK base of a decoded token: the length so far, as in the public code, or that of the
# whole request, prompt and new tokens.
DYNAMIC_NTK = ("public", "request")

# Memory for what requests take over from earlier ones, unless a run says otherwise: keys and values of 4096 positions
# of the 7B model in float32, of hundreds of thousands of a small one.
REUSE_BYTES = 1 << 30

# Formats of products and weights, by MindSpore's names in small letters.
DTYPES = ("float32", "float16", "bfloat16")

# Formats of keys and values, where they are not those of products.
CACHE_DTYPES = ("float32", "bfloat16")

DTYPE_FIELDS = ("compute_dtype", "param_init_type", "layernorm_compute_type", "softmax_compute_type")

# What tensor parallel may do with the vision tower.
VISION_PARALLEL = ("heads", "replicated")

# Ascend's FlashAttentionScore, by MindSpore 2.9's documentation of the operator: the side of a causal mask in its
# compressed form (sparse_mode 2 and 3), whatever the length, and the sequences that one call in layout TND takes.
COMPRESSED_MASK = 2048
MOST_SEGMENTS = 1024

# What lengths had to be a multiple of by the documentation of MindFormers' FlashAttention (1.9). MindSpore 2.9's own
# knows no such rule (lengths from 1 to 512k); `vision_config.pad_positions` is the switch.
PADDED_MULTIPLE = 16


class Field(NamedTuple):
    """One field of a configuration.

    Attributes:
        default: its value when nobody gives one. A value must be of the default's type, if that is a plain one.
        help: one line for docs/yaml.md and messages.
        public: whether it describes the weights and belongs in `config.json`; the others describe a run.
        shown: the default as docs/yaml.md prints it, where that is not the value.
        chosen: whether a recipe chooses it anew although it is public; the other public fields are those of the
            directory that a run starts with.
    """

    default: Any
    help: str
    public: bool = True
    shown: str | None = None
    chosen: bool = False

    @property
    def describes(self) -> bool:
        """Whether it describes the weights, so that the directory they lie in decides it."""
        return self.public and not self.chosen


VISION_FIELDS = {
    "image_size": Field(560, "side of a square tile in pixels; a multiple of twice `patch_size`"),
    "patch_size": Field(14, "side of a patch in pixels"),
    "hidden_size": Field(1024, "width of the tower; a multiple of `num_attention_heads`"),
    "num_hidden_layers": Field(24, "encoder layers"),
    "num_attention_heads": Field(16, "heads of each layer"),
    "intermediate_size": Field(4096, "width of the MLP"),
    "hidden_act": Field("quick_gelu", "only `quick_gelu`, which CLIP was trained with"),
    "layer_norm_eps": Field(1e-5, "epsilon of every LayerNorm"),
    "pad_positions": Field(False, "pad the positions of a tile (1601) to a multiple of 16 for Ascend's fused "
                           "attention, and mask them", False),
}

FIELDS = {
    "vocab_size": Field(92544, "pieces of the tokenizer"),
    "hidden_size": Field(4096, "width of the language model; a multiple of `num_attention_heads`"),
    "intermediate_size": Field(14336, "width of the SwiGLU MLP"),
    "num_hidden_layers": Field(32, "decoder layers"),
    "num_attention_heads": Field(32, "query heads"),
    "num_key_value_heads": Field(8, "key/value heads (grouped-query attention); divide `num_attention_heads`"),
    "hidden_act": Field("silu", "only `silu`"),
    "max_position_embeddings": Field(24576, "trained length; dynamic NTK starts beyond it"),
    "rms_norm_eps": Field(1e-5, "epsilon of every RMSNorm"),
    "rope_theta": Field(1000000.0, "base of the rotary embedding"),
    "rope_scaling": Field(None, "`{type: dynamic, factor: f}`, or none; `rope_type` is read as `type`"),
    "bias": Field(False, "only False: the public linears have none"),
    "tie_word_embeddings": Field(False, "only False: the public head is untied"),
    "initializer_range": Field(0.02, "standard deviation of freshly drawn weights", chosen=True),
    "bos_token_id": Field(1, "id of `<s>`"),
    "eos_token_id": Field(2, "id of `</s>`"),
    "pad_token_id": Field(2, "id of padding; its embedding gets no gradient"),
    "vision_config": Field(None, "sizes of the tower (`type: IXC25VisionConfig`)", shown="ViT-L/14 at 560",
                           chosen=True),
    "plora_rank": Field(256, "rank of Partial LoRA; 0 builds none"),
    "plora_alpha": Field(256, "its alpha; the scale is alpha / rank"),
    "plora_dropout": Field(0.05, "dropout on the input of Partial LoRA in training", chosen=True),
    "task_lora_ranks": Field(None, "rank of each task LoRA pair present, by name; `{}` builds none",
                             shown=", ".join(f"{task} {rank}" for task, rank in TASK_LORA_RANKS.items()), chosen=True),
    "reward_pooling": Field(None, "of a reward model: its score is the head's value at the `last` position, or the "
                            "`mean` over all; with it the model has the head `v_head` in place of `output`",
                            shown="none: the model writes"),
    "hd_num": Field(None, "tiles of the dynamic partition the model was trained with; chat's default from then on",
                    chosen=True),
    "seq_length": Field(4096, "positions of a training sample (static shape of the graph)", False),
    "max_tiles": Field(19, "tiles of a training sample, global views included (static shape of the graph)", False),
    "max_images": Field(None, "pictures of a training sample, or of a packed row (static shape of the column of "
                        "global views); pictures have two tiles at least", False, "half of `max_tiles`"),
    "max_segments": Field(32, "samples of a packed row at most (static shape of their lengths; Ascend's fused "
                          "attention takes 1024)", False),
    # the head's running gradient is read and written once a chunk, so very short chunks cost time: a head of 1024 x
    # 32000 over 2048 positions took 8.9, 7.9, 9.5 and 9.5 s of a CPU with chunks of 256, 512, 1024 and 2048
    "loss_chunk": Field(512, "positions of a device whose logits are in memory at once in training", False),
    "batch_size": Field(1, "samples of a micro batch", False),
    "compute_dtype": Field("float32", "dtype of products, as in MindFormers' models", False),
    "param_init_type": Field("float32", "dtype the parameters are kept in", False),
    "layernorm_compute_type": Field("float32", "dtype of RMSNorm and LayerNorm", False),
    "softmax_compute_type": Field("float32", "dtype of the attention softmax", False),
    "adapter_mode": Field("base", "task LoRAs in use while training: "
                          + ", ".join(f"`{mode}`" for mode in MODE_ADAPTERS), False),
    "packing": Field(False, "training sequences hold several conversations (as `train_dataset.packing`)", False),
    "neftune_alpha": Field(0.0, "NEFTune: uniform noise on the embeddings of text and pictures in training, up to "
                           "alpha / sqrt(positions x width); needs the columns `noise_seed` and `lengths`", False,
                           "0: none"),
    "num_sources": Field(1, "sources that losses are reported for (`loss_form: sources`); set by the trainer", False),
    "preference": Field(None, "with `arch.type: IXC25ForPreference`: `task` (the pair that trains), `loss` (`sigmoid`, "
                        "`ipo`, `simpo`, `orpo`), `beta`, and what the loss has: `label_smoothing`, `rpo_alpha`, "
                        "`gamma`", False, "dpo, sigmoid, 0.1, 0, 0"),
    "reward": Field(None, "with `arch.type: IXC25ForReward`: `loss` (`ranking`, `focal`) and `log_barrier`", False,
                    "ranking, 0"),
    "grpo": Field(None, "with `arch.type: IXC25ForGRPO`: `task` (the pair that trains), `beta` and `clip`", False,
                  "dpo, 0.04, 0.2"),
    "use_past": Field(False, "paged and flash attention in inference on Ascend, the tower's too; must be False in "
                      "training", False, "False (chat, eval and predict: True)"),
    "block_size": Field(128, "positions of a block of Ascend's paged cache: a multiple of 16, at most 16384 / head "
                        "size", False),
    "num_blocks": Field(None, "blocks of the paged cache, shared by the rows of a batch, and by all answers of a "
                        "server; fewer than a request needs are refused", False, "what the rows need"),
    "cache_dtype": Field(None, "dtype of keys and values in the cache: `bfloat16` halves its memory; on a CPU in "
                         "float32, in a single process, with the kernels of `native`", False, "`compute_dtype`"),
    "reuse_bytes": Field(REUSE_BYTES, "bytes of what earlier requests computed, rows of pictures, keys and values, "
                         "kept in memory for the next ones; 0 keeps nothing. On a CPU, in a single process; a server "
                         "on Ascend keeps rows of pictures so", False,
                         "1073741824, 1 GiB"),
    "use_flash_attention": Field(False, "train with Ascend's fused attention (float16 or bfloat16); other devices "
                                 "compose it. Inference goes by `use_past`", False),
    "rope_parameters": Field(None, "newer spelling of `rope_theta` and `rope_scaling`, read as these: `{rope_type: "
                             "dynamic, factor: f, rope_theta: t}`", False),
    "dynamic_ntk": Field("public", "rotary base of decoding beyond the trained length: `public` (each new key by the "
                         "length so far, cached keys as they are), or `request` (one base, of prompt and new tokens)",
                         False),
    "apply_rope_fusion": Field(False, "train with Ascend's fused rotary embedding", False),
    "fused_norm": Field(True, "take Ascend's fused RMSNorm", False),
    "vision_parallel": Field("heads", "the tower under tensor parallel: cut by `heads`, or `replicated`", False),
    "offset": Field(None, "layers more or fewer of each pipeline stage, as in MindFormers; `auto` balances their work",
                    False, "0"),
    "loss_form": Field("mean", "what training returns: the `mean` over labelled positions, `sums` of losses and "
                       "labelled positions, or `sources`, the mean and those sums by source; the trainer sets it",
                       False),
    "calculate_per_token_loss": Field(False, "MindFormers' name for `loss_form: sums`, which several micro batches of "
                                      "a parallel step need", False),
    "disable_lazy_inline": Field(False, "compile every micro batch by itself; by default Ascend's graphs share one",
                                 False),
    "parallel_config": Field(None, "MindFormers' parallel configuration; `run` fills it in", False, ""),
}

# Forms of the training loss.
LOSS_FORMS = ("mean", "sums", "sources")

# MindFormers' names for fields.
ALIASES = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads"}

# What MindFormers' own base class keeps in a configuration or its trainer puts there; never in `config.json`.
FRAMEWORK_FIELDS = (
    "checkpoint_name_or_path", "pretrained_model_dir", "pet_config", "mindformers_version", "is_sample_acceleration",
    "quantization_config", "quantization", "is_encoder_decoder", "tokenizer_class", "moe_config", "dataset_config",
    "type", "name_or_path", "_name_or_path", "_commit_hash")

# What a model directory names as the class of its weights. The second is by analogy with the public InternLM2 reward
# models: any name with `REWARD` in it is read as a reward model's.
ARCHITECTURES = ["InternLMXComposer2ForCausalLM"]
REWARD_ARCHITECTURES = ["InternLMXComposer2ForRewardModel"]
REWARD = "Reward"

# Where a reward model's score is read.
POOLINGS = ("last", "mean")


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


# Whole numbers that may be 0; all others count something there must be.
MAY_BE_0 = ("plora_rank", "bos_token_id", "eos_token_id", "pad_token_id", "reuse_bytes")

# What a damaged file may not ask for: sizes are 32-bit numbers in graphs, and every layer is a cell.
MOST = 2**31 - 1
AT_MOST = {"num_hidden_layers": 4096, "max_segments": MOST_SEGMENTS, "reuse_bytes": 2**50}


def field_rule(name: str, field: Field) -> Rule:
    """What a field's value must be, by the type of its default."""
    if isinstance(field.default, (bool, str)):
        return of_type(type(field.default)) if name not in DTYPE_FIELDS else ANYTHING
    if name in ROPE_FIELDS:       # read_rope refuses what they must not be
        return ANYTHING
    if name in ("plora_alpha", "rms_norm_eps"):
        return above_0()
    if isinstance(field.default, int) or name in ("hd_num", "max_images", "num_blocks"):
        least, most = 0 if name in MAY_BE_0 else 1, AT_MOST.get(name, MOST)
        return Rule(lambda value: is_whole(value, least) and value <= most, f"a whole number from {least} to {most}")
    if name == "cache_dtype":
        return one_of(CACHE_DTYPES)
    if name == "plora_dropout":
        return Rule(lambda value: is_number(value) and 0 <= value < 1, "a number of at least 0 and below 1")
    if isinstance(field.default, float):
        return Rule(lambda value: is_number(value) and value >= 0, "a number of at least 0")
    return ANYTHING


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
