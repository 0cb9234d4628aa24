"""Every key of a YAML but those of the model: what this package reads, and what MindFormers reads in the recipes.

One table of sections for docs/yaml.md. What a key must be and its default come from where they are checked and used:
the rules of the package, and MindFormers' own list of keys; here stand the meanings, and what neither of them says.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from mindformers_ixc.checkpoint.start import OVERRIDE
from mindformers_ixc.cli.run_config import NUMBERS, OWN_RULES, RUN_MODES, TENSORBOARD_RULES
from mindformers_ixc.cli.templates import section_templates
from mindformers_ixc.config import RecomputeOptions
from mindformers_ixc.data.conversations import CAPTION_PROMPTS
from mindformers_ixc.data.mixture import MIXTURE_RULES
from mindformers_ixc.data.rows import MAX_BAD_SHARE
from mindformers_ixc.data.sections import DATASET_RULES, LOADER_RULES
from mindformers_ixc.decoding_options import BEST_RULES, PREDICT_BATCH_SIZE, GenerationOptions
from mindformers_ixc.decoding_options import RULES as DECODING_RULES
from mindformers_ixc.fields import FIELDS, MODE_ADAPTERS
from mindformers_ixc.grpo_options import GRPO, GRPO_RULES, REWARD_MODEL, ROLLOUT, ROLLOUT_RULES, RULES
from mindformers_ixc.parameters import PARTS
from mindformers_ixc.planning.workload import SHARD_THRESHOLD_KIB
from mindformers_ixc.preference_options import BETA, LOSS, LOSSES, TASK
from mindformers_ixc.preference_options import RULES as PREFERENCE_RULES
from mindformers_ixc.processing.image import HD_NUM_TRAINING
from mindformers_ixc.reading import LIMIT
from mindformers_ixc.reward_options import DEFAULTS as REWARD_DEFAULTS
from mindformers_ixc.reward_options import RULES as REWARD_RULES
from mindformers_ixc.scores import SCORES
from mindformers_ixc.sections import ANYTHING, Rule, like, one_of
from mindformers_ixc.trackers import CALLBACK, TrackerOptions
from mindformers_ixc.trackers import RULES as TRACKER_RULES
from mindformers_ixc.training_options import (
    BELOW_1,
    EARLY_STOPPING,
    EARLY_STOPPING_RULES,
    EVALUATION,
    EVALUATION_RULES,
    PAIR_METRICS,
    PART_RULES,
    PET_RULES,
    SPIKE_RULES,
    SPIKES,
)
from mindformers_ixc.training_options import LOSSES as MEASURED_LOSSES


class Key(NamedTuple):
    """One key of a section.

    Attributes:
        meaning: what it does, one line of Markdown.
        default: as the page shows it; `None` leaves it to the section's defaults.
        kind: what the value must be, where no rule of the section says it.
    """

    meaning: str
    default: str | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Section:
    """One section of a YAML, or the entries of a list that have one `type`.

    Attributes:
        keys: by name; those of sections inside stand with their dotted name where they have no table of their own.
        rules: what values must be.
        defaults: values that a key has when nobody gives one.
        template: MindFormers' name of its list of keys; rules and defaults of keys that the two above lack.
    """

    keys: Mapping[str, Key]
    rules: Mapping[str, Rule] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    template: str = ""


SAME = "; the same in `model_config`"
_LAYERS = "true, false, a number, or one for each stage"

_TOP = Section({
    "base_config": Key("another YAML, or the name of a recipe, that this one changes", "none", "text"),
    "run_mode": Key("`train` and `finetune` both train, from `load_checkpoint` where it names something; `predict` "
                    "answers a file of requests ([inference.md](inference.md#files-of-requests))", "required"),
    "seed": Key("of everything that is drawn but the order of the data, which has `train_dataset.seed`"),
    "output_dir": Key("the run's folder ([training.md](training.md#the-output-folder)); also `--output_dir`"),
    "load_checkpoint": Key("what the run begins with: a model directory, a checkpoint file, what `convert` made, a "
                           "run's folder, or `starter` ([training.md](training.md#what-a-run-starts-with))", "none"),
    "load_ckpt_format": Key("format in which MindFormers looks for the files of a parallel run; the recipes say "
                            "`safetensors`"),
    "auto_trans_ckpt": Key("MindFormers cuts a whole checkpoint for a parallel run's layout while it loads it"),
    "resume_training": Key("goes on from the newest undamaged checkpoint of `load_checkpoint` (a run's folder, or one "
                           "of its checkpoints), by default of `output_dir`"),
    "use_parallel": Key("several devices; `mindformers launch` sets it ([parallel.md](parallel.md))"),
    "micro_batch_interleave_num": Key("only 1: this model has no such degree"),
    "train_parts": Key("parts that train: " + ", ".join(f"`{part}`" for part in PARTS) + " (as `mindformers inspect` "
                       "counts them); everything else is frozen ([training.md](training.md#what-trains))",
                       "all but task LoRAs outside `adapter_mode`", "a list of parts"),
    "part_learning_rates": Key("for each part a section, see [below](#part_learning_rates)", "no factors", "a section"),
    "evaluation": Key("held-out samples, see [below](#evaluation)", "none", "a section"),
    "rollout": Key("GRPO: what is sampled and how it is rewarded, see [below](#rollout)", "the defaults", "a section"),
    "skip_spikes": Key("steps that are not taken because of their loss or gradient norm, see [below](#skip_spikes)",
                       "none", "a section"),
    "generation": Key("run mode predict, see [below](#generation)", "`max_new_tokens` 64", "a section"),
    "input_data": Key("run mode predict: the file of requests; also `--predict_data`", "none", "text"),
    "predict_batch_size": Key("requests answered at once", str(PREDICT_BATCH_SIZE), "a whole number of at least 1"),
    OVERRIDE: Key("fields of `model_config` (`vision_config.NAME` for the tower's) whose values hold against the "
                  "config.json of `load_checkpoint`", "none"),
    "on_save_error": Key("when a checkpoint or a row of `metrics.jsonl` cannot be written", "stop"),
    "no_join": Key("leaves what the ranks of a parallel run have saved as it is, without a whole model in "
                   "`OUTPUT/model`; also `--no_join`", "False"),
    "device_tflops": Key("dense peak of a device in the dtype of the products, for MFU in the log and as `plan`'s "
                         "assumption (Ascend 910B: 320 by its makers)", "0"),
    "tensorboard": Key("True: the numbers of every step go to `OUTPUT/tensorboard`; a section is MindFormers' own, "
                       "with its scalars, see [below](#tensorboard)", "False"),
    "register_path": Key("folder of further modules for `auto_register`; also `--register_path`", "none", "text"),
    "auto_register": Key("`module.Class` to be imported for a section's `type`; MindFormers' own, beside any `type`",
                         "none", "text"),
}, {"run_mode": one_of(RUN_MODES), **OWN_RULES}, template="general_config")

_DATASET = Section({
    "data_loader": Key("where samples come from, see [below](#train_datasetdata_loader)"),
    "tokenizer": Key("`{type: InternLM2Tokenizer, vocab_file: ...}`: the `tokenizer.model` of the model directory, a "
                     "path or `pkg:package/file`"),
    "seq_length": Key(f"positions of a sample, or of a packed row{SAME}"),
    "max_tiles": Key(f"tiles of a sample or row, global views included{SAME}"),
    "max_images": Key(f"pictures of a sample or row{SAME}, where both name it", "half of `max_tiles`"),
    "max_segments": Key(f"samples and segments of padding of a packed row{SAME}", str(FIELDS["max_segments"].default)),
    "packing": Key("several conversations in a row, of any source ([data.md](data.md#packing))" + SAME, "False"),
    "hd_num": Key("tiles of the dynamic partition of a picture at most", str(HD_NUM_TRAINING)),
    "image_transform": Key("`training` (public: scaled by 1.5, padding split) or `inference` (what chat uses)",
                           "training",
                           "training, inference"),
    "transparency": Key("transparent pixels on `white`, or without their alpha channel as in the `public` code "
                        "([data.md](data.md#pictures-and-videos))", "white"),
    "exif": Key("`apply` the pictures' EXIF orientation, or `ignore` it as the public code does", "ignore"),
    "image_size": Key("side of a tile in pixels; the same in `vision_config`", "560"),
    "patch_size": Key("side of a patch in pixels; the same in `vision_config`", "14"),
    "input_columns": Key("the seven of a batch, and `position_ids`, `segment_ends` (packing), `noise_seed` (dropout by "
                         "sample), `lengths` (with it noise on embeddings), `source` (loss by source), `loss_weights` "
                         "(`data_loader.loss_on: weights`), `reference_logps` (preferences), `score_positions` "
                         "(reward models); GRPO takes the seven, `rewards`, `matches` and `sampled_logps`",
                         "the seven"),
    "group_size": Key("GRPO: answers sampled to each prompt", "none"),
    "control_tokens": Key("text spelled like `</s>` or `[UNUSED_TOKEN_145]` becomes that token, labels by the public "
                          "rule ([data.md](data.md#checks-lengths-batches))", "False"),
    "max_bad_share": Key("share of a source's samples that may be wrong, and of all that may have damaged pictures or "
                         "change; above it the run stops ([data.md](data.md#bad-samples))", str(MAX_BAD_SHARE)),
    "seed": Key("of the order of epochs, of mixtures, of caption questions and of packing", "0"),
    "batch_size": Key("rows of a micro batch; `runner_config.batch_size` is what counts, and the same"),
    "drop_remainder": Key("what does not fill a batch is left out; False: its last batch is filled with samples of the "
                          "same kind", "True"),
    "repeat": Key("how often MindSpore goes through an epoch; leave it at 1, `runner_config.epochs` counts", "1"),
    "num_parallel_workers": Key("processes that decode and cut pictures, no more than there are cores", "1"),
    "python_multiprocessing": Key("they are processes, and not threads", "False"),
    "prefetch_size": Key("MindSpore: batches ahead", "1"),
    "numa_enable": Key("MindSpore: processes are bound to their memory's cores", "False"),
    "construct_args_key": Key("MindFormers' own; unused here", "none"),
}, DATASET_RULES)

_LOADER = Section({
    "type": Key("`IXC25DataLoader`"),
    "dataset_dir": Key("a source ([its kinds](data.md#kinds-of-sources)), a `.txt` list file, or a list of them; "
                       "`pkg:package/file` is a file of an installed package; also `--train_dataset_dir`", "required"),
    "image_folder": Key("where relative paths of pictures and videos start, and the only place they are looked for",
                        "the file's folder, then the working directory"),
    "image_root": Key("folder that every picture and video must lie in, links followed; for held-out samples too",
                      "any readable file may be named"),
    "ignore_keys": Key("keys of samples and turns that are not read; for held-out samples too",
                       "none: a key that is not known is an error"),
    "shuffle": Key("another order each epoch", "True"),
    "loss_on": Key("answers that are learnt: `all`, the `last` one of each conversation, or `weights`: each counts as "
                   "often as its turn's `weight` says ([data.md](data.md#which-answers-are-learnt))", "all"),
    "caption_prompts": Key("questions that captions answer, one at random for each",
                           ", ".join(f'"{prompt}"' for prompt in CAPTION_PROMPTS)),
    "mixture": Key("sources drawn by weight, see [below](#train_datasetdata_loadermixture)",
                   "every sample once an epoch"),
    "fetch": Key("whether pictures and videos at http(s) addresses are fetched, into the user's cache", "False"),
    "index_dir": Key("where the [indices](data.md#the-index) of the sources lie", "the user's cache"),
    "read_timeout": Key("seconds that opening or reading a source, picture or video may take before the run ends "
                        "([slow and dead file systems](data.md#slow-and-dead-file-systems)); for held-out samples too",
                        str(LIMIT)),
}, LOADER_RULES)

_MIXTURE = Section({
    "weights": Key("of the sources, a list in their order or a section by their names; this or `temperature`"),
    "temperature": Key("T weighs a source of n samples by n ** (1 / T): 1 is by size, more is flatter"),
    "samples_per_epoch": Key("length of an epoch", "0"),
}, MIXTURE_RULES)

_TASK = Section({
    "type": Key("`IXC25SFTDataset`, `IXC25PreferenceDataset` for preference pairs, `IXC25GroupDataset` for GRPO",
                "required", "text"),
    "dataset_config": Key("`*train_dataset`: what MindFormers reads; `mindformers run` ties changes in",
                          "`train_dataset`", "a section"),
})

_PREFERENCE = Section({
    "task": Key("the task LoRA that trains; the reference is the model without it", TASK),
    "loss": Key("see [stages.md](stages.md#stage-3-preferences)", LOSS),
    "beta": Key("strength of the tie to the reference, or of the margin",
                ", ".join(f"{value:g} ({', '.join(name for name in BETA if BETA[name] == value)})"
                          for value in dict.fromkeys(BETA.values()))),
    "label_smoothing": Key("share of pairs whose order is taken to be wrong, below 0.5; " +
                           "for " + ", ".join(name for name in LOSSES if "label_smoothing" in LOSSES[name]), "0"),
    "rpo_alpha": Key("adds so many times the chosen answer's negative log-likelihood a token; for "
                     + ", ".join(name for name in LOSSES if "rpo_alpha" in LOSSES[name]), "0"),
    "gamma": Key("by so much the two answers shall differ; for "
                 + ", ".join(name for name in LOSSES if "gamma" in LOSSES[name]), f"{LOSSES['simpo']['gamma']:g}"),
}, PREFERENCE_RULES)

_REWARD = Section({
    "loss": Key("see [reward.md](reward.md#training-one)"),
    "log_barrier": Key("weight of what keeps scores within (-5, 5)"),
}, REWARD_RULES, REWARD_DEFAULTS)

_GRPO = Section({
    "task": Key("the task LoRA that trains; the reference is the model without it"),
    "beta": Key("weight of the distance to the reference; 0 computes none"),
    "clip": Key("by so much the ratio of an answer's probability to that when it was sampled may leave 1"),
}, GRPO_RULES, GRPO)

_ROLLOUT = Section({
    "rewards": Key("rules with their weights: " + ", ".join(f"`{name}`" for name in (*RULES, REWARD_MODEL))
                   + " ([stages.md](stages.md#rewards-instead-of-pairs-grpo))", "`exact_match` 1"),
    "reward_model": Key("directory of the reward model of the rule of that name"),
    "max_new_tokens": Key("of an answer; also no more than `seq_length` leaves behind the longest prompt of a batch"),
    "updates": Key("steps over the answers of a round; from the second on the clip acts"),
}, ROLLOUT_RULES, ROLLOUT)

_PET = Section({
    "pet_type": Key("which pairs train; everything else is frozen. Not together with `train_parts`", "none"),
    "task": Key("of `task_lora`: the pair that trains", "web"),
    "rank": Key("of `partial_lora` and `task_lora`: must be the model's; a model without the pairs gets them of this "
                "rank", "the model's, or 256 for Partial LoRA"),
    "alpha": Key("of the same: must be the model's; of fresh pairs of Partial LoRA the rank unless it is given",
                 "the model's"),
    "dropout": Key("on the input of Partial LoRA while it trains, in place of the model's", "the model's"),
    "lora_rank": Key("of `lora`, an ordinary LoRA", "8"),
    "lora_alpha": Key("of `lora`: the scale is alpha / rank", "16"),
    "lora_dropout": Key("of `lora`: on the input of the pairs", "0.01"),
    "use_rslora": Key("of `lora`: the scale is alpha / sqrt(rank) (rsLoRA)", "False"),
    "use_dora": Key("of `lora`: every row of a weight has a magnitude that trains too (DoRA); in runs of one process",
                    "False"),
    "target_modules": Key("over the paths of cells; only linears that match train",
                          "all five linears; of `lora` required"),
    "freeze_include": Key("further patterns to freeze", "none"),
    "freeze_exclude": Key("further patterns that train", "none"),
}, {"pet_type": one_of(PET_RULES), **PET_RULES["task_lora"], **PET_RULES["lora"]})

_MODEL = Section({
    "model_config": Key("the model, see [below](#model_config)", "required", "a section"),
    "arch.type": Key("`IXC25ForCausalLM`, for pairs `IXC25ForPreference` and `IXC25ForReward`, or `IXC25ForGRPO`",
                     "required", "text"),
})

_TRAINER = Section({
    "type": Key("`IXC25Trainer`", "required", "text"),
    "model_name": Key("MindFormers' name for the recipe; only in its logs", "none", "text"),
})

_RUNNER = Section({
    "epochs": Key("of training; also `--epochs`"),
    "batch_size": Key("samples (rows, where they are packed) of a micro batch of a replica; also `--batch_size`"),
    "gradient_accumulation_steps": Key("micro batches of a step, stand-alone too. With pipeline stages "
                                       "`parallel_config.micro_batch_num` counts"),
    "sink_mode": Key("batches go to the device by MindSpore's data sink; False on the CPU, which has none"),
    "sink_size": Key("steps of a sink: the log has a row for each step with 1 only"),
}, NUMBERS["runner_config"], template="runner_config")

# MindFormers' own lists of keys have other defaults for these three, which count only where a whole section is missing.
_OPTIMIZER = Section({
    "type": Key("a registered optimizer, such as `AdamW`, whose defaults these are", "required"),
    "betas": Key("decay of both moments"),
    "eps": Key("added to the root of the second moment"),
    "weight_decay": Key("decoupled; norms, biases, and separators get none where `part_learning_rates` groups them"),
    "learning_rate": Key("constant rate; with `lr_schedule` that one counts"),
}, NUMBERS["optimizer"], {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "learning_rate": 1e-3}, "optimizer")

_SCHEDULE = Section({
    "type": Key("a registered schedule, such as `CosineWithWarmUpLR`, whose defaults these are", "required"),
    "learning_rate": Key("the highest rate", "required"),
    "lr_end": Key("the last one"),
    "warmup_lr_init": Key("the first one, from which it rises"),
    "warmup_ratio": Key("share of the run in which the rate rises"),
    "warmup_steps": Key("steps in which it rises, in place of the share"),
    "total_steps": Key("-1: the whole run", "-1"),
}, NUMBERS["lr_schedule"], defaults={"lr_end": 0.0, "warmup_ratio": None}, template="lr_schedule")

_WRAPPER = Section({
    "type": Key("a registered step cell; `MFTrainOneStepCell`, whose defaults these are, becomes the one of this "
                "package where it has to", "required"),
    "scale_sense": Key("loss scale: a number (1.0: none), or a section of MindFormers'", kind="a number or a section"),
    "use_clip_grad": Key("clip gradients by their global norm"),
    "max_grad_norm": Key("the norm that is kept"),
    "ema_decay": Key("share of the moving average of the weights that a step keeps; leaves `OUTPUT/model_ema`",
                     "no average", BELOW_1.wanted),
}, NUMBERS["runner_wrapper"], {"scale_sense": 1.0, "use_clip_grad": False, "max_grad_norm": 1.0}, "runner_wrapper")

_RECOMPUTE = Section({
    "recompute": Key("all decoder layers and the tower's, or how many decoder layers, keep only their inputs",
                     kind=_LAYERS),
    "select_recompute": Key("the same for attention cores and gates", kind=_LAYERS),
    "mp_comm_recompute": Key("sums over tensor-parallel devices are done again, too"),
    "parallel_optimizer_comm_recompute": Key("weights that optimizer sharding cuts are gathered again, where micro "
                                             "batches share no graph"),
    "recompute_slice_activation": Key("inputs that are kept are cut over the tensor-parallel devices"),
}, defaults=asdict(RecomputeOptions()), template="recompute_config")

_PARALLEL = Section({
    "parallel_mode": Key("1: semi-auto, the graph is cut; 0: data parallel, every device has the whole model. 2 is "
                         "here the same as 1, 3 the same as 0; MindSpore's names are taken too"),
    "full_batch": Key("True: every device reads the global batch. False: each replica reads its own samples"),
    "dataset_strategy": Key("with `full_batch: False`: `[dp, 1, ...]` for each input column", "from the columns",
                            "a list"),
    "gradients_mean": Key("False in mode 1, where the loss is a mean over the global batch already; True in mode 0. "
                          "Anything else is refused"),
    "enable_parallel_optimizer": Key("cuts parameters, gradients and moments over the replicas too"),
    "parallel_optimizer_config": Key("how that is done, see the section of its name", "none", "a section"),
}, template="parallel")

_SHARDING = Section({
    "parallel_optimizer_threshold": Key(
        "KiB of a parameter below which it is left whole", str(SHARD_THRESHOLD_KIB), "a whole number"),
    "optimizer_weight_shard_size": Key(
        "devices of a shard group", "all that hold a copy", "a whole number"),
    "gradient_accumulation_shard": Key(
        "accumulated gradients are spread too, for a scatter with every micro batch", "False", "true or false"),
    "optimizer_level": Key(
        "`level2` spreads accumulated gradients; `level3` does not compile where micro batches share a graph "
        "(MindSpore 2.9)", "level1", "text"),
})

_PARALLEL_CONFIG = Section({
    "data_parallel": Key("replicas; the product of the three degrees is the number of devices"),
    "model_parallel": Key("tensor-parallel devices; cuts between key/value groups"),
    "pipeline_stage": Key("pipeline stages, no more than decoder layers"),
    "micro_batch_num": Key("micro batches of a pipelined step, as many as stages at least. Without stages "
                           "`runner_config.gradient_accumulation_steps` counts"),
    "use_seq_parallel": Key("between the linears positions are cut over the tensor-parallel devices: scatters and "
                            "gathers instead of sums, and a share of the activations. `seq_length` must divide"),
    "vocab_emb_dp": Key("keeps the embedding whole on every device"),
    "context_parallel": Key("only 1: this model has no such degree"),
    "expert_parallel": Key("only 1"),
    "seq_split_num": Key("only 1"),
}, template="parallel_config")

_CONTEXT = Section({
    "mode": Key("0: graph mode, the only one that is tried; also `--mode`"),
    "device_target": Key("`Ascend` or `CPU`; also `--device_target`"),
    "device_id": Key("which device of the machine; also `--device_id`"),
    "max_device_memory": Key("of a device for MindSpore, such as `58GB`; `plan` compares with it"),
    "max_call_depth": Key("MindSpore: how deep calls in a graph may be"),
    "enable_compile_cache": Key("on the CPU, in one process: the compiled step is kept, and a later run of the same "
                                "step begins with it; elsewhere MindSpore's", "False"),
    "compile_cache_path": Key("where it is kept", "`~/.cache/mindformers_ixc/graphs`"),
    "jit_config.jit_level": Key("MindSpore: `O0` runs kernel by kernel, `O1` fuses", "MindSpore's", "text"),
}, NUMBERS["context"], template="context")

_PART_RATES = Section({
    "factor": Key("the part's rate is that of `lr_schedule`, times this", "1"),
    "layer_decay": Key("d, of `vision` only: times d ^ k for a parameter k steps below the top of the tower (1 for the "
                       "last layer, the number of layers + 1 for the embeddings)", "1"),
}, PART_RULES)

_SPIKES = Section({
    "loss": Key("a step whose loss is above this is skipped", "no limit"),
    "grad_norm": Key("the same of the norm of its gradients, before they are clipped (`runner_wrapper.use_clip_grad`)",
                     "no limit"),
    "loss_times": Key("the same of a loss above so many times the median of the last `window` steps", "no limit"),
    "grad_norm_times": Key("the same of the norm", "no limit"),
    "window": Key("steps that were taken, of which the median is"),
    "most_in_a_row": Key("steps that may be skipped one after another; one more ends the run with an error"),
}, SPIKE_RULES, SPIKES)

_EVALUATION = Section({
    "dataset_dir": Key("held-out samples, in the forms of `data_loader.dataset_dir`; of a reward model pairs",
                       "required"),
    "image_folder": Key("as in `data_loader`"),
    "every": Key("steps between two evaluations"),
    "metrics": Key(", ".join(f"`{name}`" for name in (*MEASURED_LOSSES, *SCORES)) + "; the scores are those of "
                   "[evaluation.md](evaluation.md), and `shuffled_loss` gives every sample another one's pictures. "
                   "Of a reward model " + ", ".join(f"`{name}`" for name in PAIR_METRICS)),
    "keep_best": Key("one of the metrics of which more or less is better: the model that is best by it stays in "
                     "`OUTPUT/best`; a value that is no number is not the best"),
    "early_stopping": Key("ends the run when it gets no better, see [its keys](yaml.md#evaluationearly_stopping)"),
    "batch_size": Key("samples at once"),
    "max_new_tokens": Key("of an answer; not of a reward model"),
    "max_samples": Key("so many samples at most, the first ones", "all"),
    "mode": Key("task LoRAs in use; not of a reward model"),
}, EVALUATION_RULES, EVALUATION)

_EARLY_STOPPING = Section({
    "metric": Key("one of `evaluation.metrics`; of losses less is better, of scores more"),
    "patience": Key("measurements in a row without a better one after which the run ends"),
    "min_delta": Key("a measurement is better only if it beats the best one by more than this"),
}, EARLY_STOPPING_RULES, EARLY_STOPPING)

_GENERATION = Section({
    "mode": Key("task LoRAs in use"),
    "max_new_tokens": Key("new tokens at most"),
    "do_sample": Key("sample instead of taking the likeliest token"),
    "temperature": Key("divides the scores before sampling"),
    "top_k": Key("only so many likeliest tokens are sampled"),
    "top_p": Key("only the likeliest tokens that together reach this probability are sampled"),
    "repetition_penalty": Key("lowers the scores of tokens that were generated already; never those of the prompt"),
    "num_beams": Key("beams"),
    "length_penalty": Key("a finished beam's score is divided by its length to this power"),
    "early_stopping": Key("when beam search ends: as soon as `num_beams` beams have ended (True), when no running beam "
                          "can be expected to get better (False), or when none can at all (`never`)"),
    "stop_token_ids": Key("ids that end an answer", "the end of a turn, `</s>`"),
    "stop_strings": Key("texts that end an answer"),
    "prompt_lookup": Key("greedy decoding: so many tokens at a time are proposed, as they follow the last ones in the "
                         "prompt or the answer, and verified in one pass; the same answer, sooner where it repeats its "
                         "input"),
    "seed": Key("of sampling; an answer depends on its prompt and the seed, not on its place in a batch"),
    "best_of": Key("so many answers are sampled and the best is given ([reward.md](reward.md#best-of-n))",
                   "none"),
    "reward": Key("directory of the reward model that chooses the best; without one the mean log-probability does",
                  "none"),
}, {"mode": one_of(MODE_ADAPTERS), **DECODING_RULES, **BEST_RULES}, {"mode": "base", **asdict(GenerationOptions())})

_TENSORBOARD = Section({
    "tensorboard_dir": Key("folder of the files"),
    "tensorboard_queue_size": Key("rows that wait to be written", "10"),
    "log_loss_scale_to_tensorboard": Key("the loss scale too", "False"),
    "log_timers_to_tensorboard": Key("times of the steps too", "False"),
    "log_expert_load_to_tensorboard": Key("of models with experts; nothing here", "False"),
}, TENSORBOARD_RULES)

_LOSS_MONITOR = Section({"per_print_times": Key("steps between two lines of the log, MindFormers' and this package's",
                                                "1", "a whole number")})

_CHECKPOINT_MONITOR = Section({
    "save_checkpoint_steps": Key("steps between two checkpoints", "1", "a whole number"),
    "keep_checkpoint_max": Key("how many stay; 0: all", "5", "a whole number"),
    "prefix": Key("of the files' names", "CKP", "text"),
    "checkpoint_format": Key("`safetensors` in all recipes", "ckpt", "safetensors, ckpt"),
    "integrated_save": Key("MindSpore puts parameters that are cut together before it saves them; the recipes of "
                           "parallel runs say False: each rank saves its slices", "True", "true or false"),
    "async_save": Key("MindSpore writes in a thread while the next steps run", "False", "true or false"),
})

_TRACKER = Section({
    "tracker": Key("where to; each comes with the extra of its name: `pip install \".[wandb]\"`"),
    "project": Key("under which the run is filed (MLflow: the experiment)"),
    "name": Key("of the run", "that of the output folder"),
    "mode": Key("`offline`: nothing leaves the machine, everything is in the output folder"),
    "every": Key("steps between two rows; the last one is always sent"),
    "options": Key("further arguments of `wandb.init`, `swanlab.init` or `mlflow.start_run` (`tags`, `group`, ...)",
                   "none"),
}, TRACKER_RULES, asdict(TrackerOptions("")))

# By the section's dotted name; "" is the top level. Those of model_config and vision_config are `fields.FIELDS`.
SECTIONS: dict[str, Section] = {
    "": _TOP, "trainer": _TRAINER, "runner_config": _RUNNER, "optimizer": _OPTIMIZER, "lr_schedule": _SCHEDULE,
    "part_learning_rates": _PART_RATES, "runner_wrapper": _WRAPPER, "skip_spikes": _SPIKES, "train_dataset": _DATASET,
    "train_dataset.data_loader": _LOADER, "train_dataset.data_loader.mixture": _MIXTURE, "train_dataset_task": _TASK,
    "model": _MODEL, "model.model_config.preference": _PREFERENCE, "model.model_config.reward": _REWARD,
    "model.model_config.grpo": _GRPO, "model.model_config.pet_config": _PET,
    "evaluation": _EVALUATION, "evaluation.early_stopping": _EARLY_STOPPING, "rollout": _ROLLOUT,
    "generation": _GENERATION, "callbacks.MFLossMonitor": _LOSS_MONITOR,
    "callbacks.CheckpointMonitor": _CHECKPOINT_MONITOR, f"callbacks.{CALLBACK}": _TRACKER, "tensorboard": _TENSORBOARD,
    "recompute_config": _RECOMPUTE, "parallel": _PARALLEL,
    "parallel.parallel_optimizer_config": _SHARDING, "parallel_config": _PARALLEL_CONFIG, "context": _CONTEXT}


def shown_value(value: Any) -> str:
    """A default as a YAML file would have it: 0.00001, since YAML 1.1 takes 1e-05 for text."""
    if value is None or value == "" or value == {}:
        return "none"
    if isinstance(value, float):
        return format(Decimal(repr(value)), "f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown_value, value))}]" if value else "none"
    return str(value)


class Row(NamedTuple):
    """A key as the page shows it: what it must be, its default and its meaning."""

    key: str
    wanted: str
    default: str
    meaning: str


def rows_of(section: Section) -> list[Row]:
    """The keys of a section, in its order.

    Raises:
        ConfigError: when MindFormers, whose defaults some sections have, is not installed.
    """
    template = section_templates()[section.template] if section.template else None
    rows = []
    for name, key in section.keys.items():
        rule, default = section.rules.get(name), section.defaults.get(name)
        if template is not None and hasattr(template, name):
            default = default if name in section.defaults else getattr(template, name)
            rule = rule or like(default)
        wanted = key.kind or (ANYTHING if rule is None else rule).wanted
        if wanted == ANYTHING.wanted:
            wanted = "text" if isinstance(default, str) else ""
        shown = key.default
        if shown is None:
            shown = "required" if rule is not None and rule.required else shown_value(default)
        rows.append(Row(name, wanted, shown, key.meaning))
    return rows
