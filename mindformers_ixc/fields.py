"""The one table of a configuration's fields: what each is by default, what it may be, and one line of help.

A field is written once, in `FIELDS` or `VISION_FIELDS`: its default, whether it belongs in the public `config.json`,
and one line of help. The signature of a YAML's `model_config`, `to_public_dict` and the tables of docs/yaml.md are made
of these tables. Fields have the names of the public repository (`hidden_size`, `num_hidden_layers`, ...), so a public
`config.json` and a YAML's section are the same vocabulary; MindFormers' names for the same things are in `ALIASES`.
Sizes that the public file leaves out, because its code hard-codes them, default to the values of the 7B model.
The table of task LoRAs is here too, and what fields that name a choice may be.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from mindformers_ixc.rope import ROPE_FIELDS
from mindformers_ixc.sections import ANYTHING, Rule, above_0, is_number, is_whole, of_type, one_of


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
