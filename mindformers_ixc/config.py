"""Configuration of IXC2.5: every size the model has, read from and written to the public `config.json`.

`IXC25Config` uses the field names of the public repository (`hidden_size`, `num_hidden_layers`, ...), so a public
`config.json` and the `model_config` section of a YAML file are the same vocabulary. MindFormers' own names for the
same things (`num_layers`, `num_heads`, `n_kv_heads`) work as aliases. Sizes that the public file leaves out, because
its code hard-codes them (the vision tower, the LoRA ranks), default to the values of the 7B model.
"""
from __future__ import annotations

from typing import Any

import mindspore.common.dtype as mstype
from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.models.utils import convert_mstype
from mindformers.modules.transformer import TransformerOpParallelConfig
from mindformers.modules.transformer.transformer import default_transformer_config
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister

# Ranks of the three task LoRAs in the released checkpoint (arXiv 2407.03320: article LoRAs 256, webpage LoRA 512).
TASK_LORA_RANKS = {"sft": 256, "dpo": 256, "web": 512}

# Which task LoRAs act in which mode of the public model (`infer_mode`).
MODE_ADAPTERS = {"base": (), "write": ("sft", "dpo"), "web": ("web",)}

# Runtime fields of this plugin and of MindFormers: they describe a run, not the weights, and stay out of config.json.
RUNTIME_FIELDS = (
    "batch_size", "seq_length", "max_tiles", "compute_dtype", "param_init_type", "layernorm_compute_type",
    "softmax_compute_type", "parallel_config", "checkpoint_name_or_path", "pretrained_model_dir", "pet_config",
    "mindformers_version", "is_sample_acceleration", "quantization_config", "quantization", "is_encoder_decoder",
    "tokenizer_class", "moe_config", "dataset_config", "calculate_per_token_loss", "type", "disable_lazy_inline",
    "use_flash_attention", "apply_rope_fusion", "fused_norm", "vision_parallel", "offset", "adapter_mode", "packing",
    "num_sources", "preference", "use_past", "block_size",
    "num_blocks", "name_or_path", "_name_or_path", "_commit_hash",
)


# What tensor parallel may do with the vision tower.
VISION_PARALLEL = ("heads", "replicated")


class ConfigError(ValueError):
    """A configuration value that is unknown or contradicts another one."""


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class IXC25VisionConfig(PretrainedConfig):
    """Sizes of the CLIP vision tower. Defaults: CLIP ViT-L/14 with positions interpolated to 560 x 560 pixels.

    Args:
        image_size: side of a square tile in pixels (public tile side 560); a multiple of twice `patch_size`, since
            2 x 2 patches merge into one token.
        patch_size: side of a patch in pixels (ViT-L/14).
        hidden_size: width of the tower; must divide by `num_attention_heads`.
        num_hidden_layers: encoder layers.
        num_attention_heads: heads of each layer.
        intermediate_size: width of the MLP.
        hidden_act: only `quick_gelu`, which CLIP was trained with.
        layer_norm_eps: epsilon of every LayerNorm (CLIP's 1e-5).
        **kwargs: fields of the public file that this model does not use (kept, and written back).

    Raises:
        ConfigError: for sizes that do not divide or an activation the tower does not have.
    """

    model_type = "clip_vision_model"

    def __init__(self, image_size: int = 560, patch_size: int = 14, hidden_size: int = 1024,
                 num_hidden_layers: int = 24, num_attention_heads: int = 16, intermediate_size: int = 4096,
                 hidden_act: str = "quick_gelu", layer_norm_eps: float = 1e-5, **kwargs: Any):
        super().__init__(**kwargs)
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        if image_size % (2 * patch_size):
            raise ConfigError(
                f"vision_config.image_size is {image_size}, which is not a multiple of {2 * patch_size} (2 x 2 patches "
                f"of {patch_size} pixels merge into one token); choose a multiple of {2 * patch_size}.")
        if hidden_size % num_attention_heads:
            raise ConfigError(
                f"vision_config.hidden_size {hidden_size} does not divide by vision_config.num_attention_heads "
                f"{num_attention_heads}.")
        if hidden_act != "quick_gelu":
            raise ConfigError(f"vision_config.hidden_act is '{hidden_act}'; the only choice is 'quick_gelu'.")

    @property
    def patches_per_side(self) -> int:
        """Patches along a side of a tile (40 at 560 pixels)."""
        return self.image_size // self.patch_size

    @property
    def tokens_per_side(self) -> int:
        """Merged tokens along a side of a tile (20 at 560 pixels)."""
        return self.patches_per_side // 2

    @property
    def tokens_per_tile(self) -> int:
        """Merged tokens of a tile (400 at 560 pixels)."""
        return self.tokens_per_side ** 2


@MindFormerRegister.register(MindFormerModuleType.CONFIG)
class IXC25Config(PretrainedConfig):
    """Configuration of IXC2.5, with the defaults of the 7B model.

    Args:
        vocab_size: pieces of the tokenizer (public 92544).
        hidden_size: width of the language model; must divide by `num_attention_heads`.
        intermediate_size: width of the SwiGLU MLP.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads (grouped-query attention); must divide `num_attention_heads`.
        hidden_act: only `silu`.
        max_position_embeddings: trained length; dynamic NTK starts beyond it (public 24576).
        rms_norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary embedding.
        rope_scaling: `None` or `{"type": "dynamic", "factor": f}`.
        bias: only `False`: the public linears have none.
        tie_word_embeddings: only `False`: the public head is untied.
        initializer_range: standard deviation of freshly drawn weights.
        vision_config: an `IXC25VisionConfig` or the dict to make one.
        plora_rank: rank of Partial LoRA (public code 256).
        plora_alpha: its alpha; the scale is alpha / rank (public 256, so 1).
        plora_dropout: dropout on the input of Partial LoRA in training (public 0.05).
        task_lora_ranks: rank of each task LoRA pair present, by name (`sft`, `dpo`, `web`); `{}` builds none.
        seq_length: positions of a training sample (static graph shape).
        max_tiles: tiles of a training sample, global views included (static graph shape).
        batch_size: samples of a micro batch.
        compute_dtype: dtype of matrix products, by name (`float32`, `float16`, `bfloat16`).
        param_init_type: dtype the parameters are kept in.
        layernorm_compute_type: dtype of RMSNorm and LayerNorm.
        softmax_compute_type: dtype of the attention softmax.
        adapter_mode: task LoRAs in use while training: `base`, `write` or `web`.
        packing: whether training sequences hold several conversations (as `train_dataset.packing`).
        num_sources: sources that losses are reported for, when the batches name them; the trainer sets it.
        use_past: on Ascend, decode with MindFormers' paged and flash attention instead of the contiguous cache; must be
            False in training (MindFormers checks it).
        block_size: positions of a block of the paged cache (MindFormers' default 16).
        num_blocks: blocks of the paged cache, shared by the rows of a batch (MindFormers' default 1024).
        use_flash_attention: on Ascend, train with its fused attention (float16 or bfloat16); other devices have none
            and compose it, whatever this says.
        apply_rope_fusion: on Ascend, train with its fused rotary embedding.
        fused_norm: on Ascend, take its fused RMSNorm.
        vision_parallel: how tensor parallel treats the vision tower: cut by `heads`, or `replicated`, whole on every
            device of a tensor-parallel group.
        offset: decoder layers that pipeline stages have more or fewer than an even share, as in MindFormers (one
            number a stage, summing to what the even share leaves over); `auto` balances the stages by their work.
        calculate_per_token_loss: return the sum of losses and the number of labelled positions instead of their
            quotient, as MindFormers' key of this name; the trainer sets it where a step has several micro batches.
        disable_lazy_inline: compile every micro batch by itself, as MindFormers' key of this name; by default Ascend's
            graphs share one.
        parallel_config: MindFormers' parallel configuration.
        **kwargs: other fields of the public file or of MindFormers; kept as attributes.

    Raises:
        ConfigError: for a value that is not available or sizes that contradict each other.
    """

    model_type = "internlmxcomposer2"
    attribute_map = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
                     "n_kv_heads": "num_key_value_heads"}

    def __init__(self, vocab_size: int = 92544, hidden_size: int = 4096, intermediate_size: int = 14336,
                 num_hidden_layers: int = 32, num_attention_heads: int = 32, num_key_value_heads: int = 8,
                 hidden_act: str = "silu", max_position_embeddings: int = 24576, rms_norm_eps: float = 1e-5,
                 rope_theta: float = 1000000.0, rope_scaling: dict | None = None, bias: bool = False,
                 tie_word_embeddings: bool = False, initializer_range: float = 0.02,
                 bos_token_id: int = 1, eos_token_id: int = 2, pad_token_id: int = 2,
                 vision_config: IXC25VisionConfig | dict | None = None,
                 plora_rank: int = 256, plora_alpha: int = 256, plora_dropout: float = 0.05,
                 task_lora_ranks: dict[str, int] | None = None,
                 seq_length: int = 4096, max_tiles: int = 19, batch_size: int = 1,
                 compute_dtype: str = "float32", param_init_type: str = "float32",
                 layernorm_compute_type: str = "float32", softmax_compute_type: str = "float32",
                 adapter_mode: str = "base", packing: bool = False,
                 num_sources: int = 1, use_past: bool = False, block_size: int = 16, num_blocks: int = 1024,
                 use_flash_attention: bool = False, apply_rope_fusion: bool = False, fused_norm: bool = True,
                 vision_parallel: str = "heads", offset: int | list[int] | str | None = None,
                 calculate_per_token_loss: bool = False, disable_lazy_inline: bool = False,
                 parallel_config: dict | TransformerOpParallelConfig = default_transformer_config, **kwargs: Any):
        kwargs = {self.attribute_map.get(key, key): value for key, value in kwargs.items()}
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)
        if isinstance(parallel_config, dict):
            parallel_config = TransformerOpParallelConfig(**parallel_config)
        self.parallel_config = parallel_config
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = kwargs.get("num_hidden_layers", num_hidden_layers)
        self.num_attention_heads = kwargs.get("num_attention_heads", num_attention_heads)
        self.num_key_value_heads = kwargs.get("num_key_value_heads", num_key_value_heads)
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = float(rms_norm_eps)
        self.rope_theta = float(rope_theta)
        self.rope_scaling = dict(rope_scaling) if rope_scaling else None
        self.bias = bias
        self.tie_word_embeddings = tie_word_embeddings
        self.initializer_range = initializer_range
        self.vision_config = self._vision_config(vision_config)
        self.plora_rank = plora_rank
        self.plora_alpha = plora_alpha
        self.plora_dropout = plora_dropout
        self.task_lora_ranks = dict(TASK_LORA_RANKS if task_lora_ranks is None else task_lora_ranks)
        self.seq_length = seq_length
        self.max_tiles = max_tiles
        self.batch_size = batch_size
        self.compute_dtype = convert_mstype(compute_dtype)
        self.param_init_type = convert_mstype(param_init_type)
        self.layernorm_compute_type = convert_mstype(layernorm_compute_type)
        self.softmax_compute_type = convert_mstype(softmax_compute_type)
        self.adapter_mode = adapter_mode
        self.packing = packing
        self.num_sources = num_sources
        self.use_past, self.block_size, self.num_blocks = use_past, block_size, num_blocks
        self.use_flash_attention, self.apply_rope_fusion = use_flash_attention, apply_rope_fusion
        self.fused_norm = fused_norm
        self.vision_parallel, self.offset = vision_parallel, 0 if offset is None else offset
        self.calculate_per_token_loss, self.disable_lazy_inline = calculate_per_token_loss, disable_lazy_inline
        self._check()
        self._check_parallel()

    @staticmethod
    def _vision_config(value: IXC25VisionConfig | dict | None) -> IXC25VisionConfig:
        if isinstance(value, IXC25VisionConfig):
            return value
        fields = {key: item for key, item in dict(value or {}).items() if key not in ("type", "model_type")}
        return IXC25VisionConfig(**fields)

    def _check(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"hidden_size {self.hidden_size} does not divide by num_attention_heads "
                              f"{self.num_attention_heads}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(f"num_attention_heads {self.num_attention_heads} does not divide by num_key_value_heads "
                              f"{self.num_key_value_heads}.")
        if self.hidden_act != "silu":
            raise ConfigError(f"hidden_act is '{self.hidden_act}'; the only choice is 'silu'.")
        if self.bias or self.tie_word_embeddings:
            raise ConfigError(f"bias is {self.bias} and tie_word_embeddings is {self.tie_word_embeddings}; IXC2.5 has "
                              "neither, set both to False.")
        if self.rope_scaling is not None and self.rope_scaling.get("type") != "dynamic":
            raise ConfigError(f"rope_scaling.type is '{self.rope_scaling.get('type')}'; the only choice is 'dynamic' "
                              "(or no rope_scaling at all).")
        unknown = sorted(set(self.task_lora_ranks) - set(TASK_LORA_RANKS))
        if unknown:
            raise ConfigError(f"task_lora_ranks names {unknown}; the choices are {sorted(TASK_LORA_RANKS)}.")
        if self.adapter_mode not in MODE_ADAPTERS:
            raise ConfigError(f"adapter_mode is '{self.adapter_mode}'; the choices are {sorted(MODE_ADAPTERS)}.")
        missing = [name for name in MODE_ADAPTERS[self.adapter_mode] if name not in self.task_lora_ranks]
        if missing:
            raise ConfigError(f"adapter_mode '{self.adapter_mode}' needs the task LoRA pairs {missing}, but "
                              f"task_lora_ranks has only {sorted(self.task_lora_ranks)}.")

    def _check_parallel(self) -> None:
        if self.use_flash_attention and self.compute_dtype not in (mstype.float16, mstype.bfloat16):
            raise ConfigError(f"use_flash_attention is True, but Ascend's fused attention takes float16 and bfloat16 "
                              f"only and compute_dtype is {str(self.compute_dtype).lower()}; set compute_dtype to "
                              "bfloat16 or use_flash_attention to False.")
        if self.vision_parallel not in VISION_PARALLEL:
            raise ConfigError(f"vision_parallel is '{self.vision_parallel}'; the choices are "
                              f"{', '.join(VISION_PARALLEL)}.")
        if isinstance(self.offset, str) and self.offset != "auto":
            raise ConfigError(f"offset is '{self.offset}'; it takes 0, a list with one number a pipeline stage, or "
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
            JSON-serialisable dict. Fields of a run (lengths, dtypes, parallel layout) are left out.
        """
        fields = {key: value for key, value in self.to_dict().items()
                  if key not in RUNTIME_FIELDS and not key.startswith("_")}
        vision = {key: value for key, value in self.vision_config.to_dict().items()
                  if key not in RUNTIME_FIELDS and not key.startswith("_") and value is not None}
        fields.update(vision_config=vision, model_type=self.model_type,
                      architectures=["InternLMXComposer2ForCausalLM"])
        return {key: value for key, value in fields.items() if value is not None}
