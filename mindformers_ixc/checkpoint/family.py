"""Which member of the model's family a checkpoint is, what it can do here, and what it is refused for."""
from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mindformers_ixc.config import POOLINGS, TASK_LORAS, ModelConfig, names_reward
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.files import read_json
from mindformers_ixc.parameters import SCORE_HEAD, UNUSED

if TYPE_CHECKING:
    from mindformers_ixc.checkpoint.sources import OpenedCheckpoint  # whose import takes numpy's
    from mindformers_ixc.checkpoint.tensors import LazyTensor

logger = logging.getLogger(__name__)

WRITING_HEAD = "output.weight"

# The first side of a task LoRA's pair, whose rows are its rank, whole numbers or not.
_TASK_FIRST = re.compile(rf"\.lora_({'|'.join(TASK_LORAS)})_A\.q?weight$")

# Other models that lie beside this one in public repositories, by `model_type` or the class that `architectures` names,
# and what they are. The values of the two inside OmniLive are those of the models that it was made of.
RELATIVES = {
    "clip_vision_model": "a CLIP vision tower, which `mindformers assemble` joins with a language model",
    "clip": "a CLIP model, whose vision tower `mindformers assemble` joins with a language model",
    "internlm2": "an InternLM2 language model, which `mindformers assemble` joins with a vision tower",
    "GroundQwenForCausalLM": "OmniLive's memory model, which is another model and does nothing here",
    "qwen2_audio": "OmniLive's audio model (a Qwen2-Audio), which is another model and does nothing here",
    "Qwen2AudioForConditionalGeneration": "OmniLive's audio model (a Qwen2-Audio), which is another model and does "
                                          "nothing here",
}

# Whose unused parameters were spoken of; a checkpoint is opened several times.
_SAID: set[str] = set()


def fields_of(source: OpenedCheckpoint) -> dict[str, Any]:
    """A checkpoint's `config.json`; empty where it has none, or none that is an object."""
    if source.config_file is None:
        return {}
    fields = read_json(source.config_file, CheckpointError)
    return fields if isinstance(fields, dict) else {}


def relative_of(fields: Mapping[str, Any]) -> str | None:
    """What another model is that this one has to do with, by its `config.json`; `None` for any other."""
    names = fields.get("architectures")
    keys = [fields.get("model_type"), *(names if isinstance(names, list) else ())]
    # the more telling name first: the memory model calls its type that of what it was made of
    return next((RELATIVES[key] for key in reversed(keys) if isinstance(key, str) and key in RELATIVES), None)


def is_of_family(source: OpenedCheckpoint) -> bool:
    """Whether a `config.json` beside a checkpoint can be this model's."""
    return relative_of(fields_of(source)) is None


def describe_member(source: OpenedCheckpoint) -> str | None:
    """Which member of the family a checkpoint is and what it can do here, as one sentence.

    Returns:
        `None` where nothing says so: of parts of a model, and of states of a run.
    """
    fields = fields_of(source)
    other = relative_of(fields)
    if other is not None:
        return f"It is {other}."
    names = source.tensors
    trains = not any(name.endswith(".qweight") for name in names)       # nothing trains on whole numbers
    if SCORE_HEAD in names and WRITING_HEAD not in names:
        return ("It is a reward model (IXC-2.5-Reward): `mindformers score` and `--best_of N --reward` ask it"
                f"{', arch.type IXC25ForReward trains it' if trains else ''}.")
    if names_reward(fields):
        return f"Its config.json says that it is a reward model, but it has no {SCORE_HEAD}."
    if WRITING_HEAD not in names and f"{WRITING_HEAD.rpartition('.')[0]}.qweight" not in names:
        return None
    if any(UNUSED.match(name) for name in names):
        return (f"It is OmniLive's base: it answers {'and trains ' if trains else ''}as InternLM-XComposer-2.5 without "
                "task LoRAs; its video_mem_proj is for another model and not used.")
    if not any(name.startswith("vit.") for name in names):
        return "It is a language model without a vision tower, which `mindformers assemble` joins with one."
    tasks = [task for task in TASK_LORAS if any(f".lora_{task}_A." in name for name in names)]
    pairs = f"with the task LoRAs {', '.join(tasks)}" if tasks else "without task LoRAs"
    doors = "`mindformers chat`, `eval` and `run`" if trains else "`mindformers chat` and `eval`"
    return f"It is InternLM-XComposer-2.5 {pairs}: {doors} take it."


def say_unused(source: OpenedCheckpoint) -> None:
    """Says once of a checkpoint that it has parameters which nothing here computes with."""
    names = [name for name in source.tensors if UNUSED.match(name)]
    if names and str(source.path) not in _SAID:
        _SAID.add(str(source.path))
        logger.info(f"{source.path}: {len(names)} parameters ({', '.join(sorted(names)[:2])}, ...) are of OmniLive's "
                    "memory; nothing here computes with them, and conversions carry them along.")


def know_member(config: ModelConfig, source: OpenedCheckpoint) -> ModelConfig:
    """Sees by a checkpoint's weights what its `config.json` does not say; in place.

    Public ones say nothing of task LoRAs, which only some members have, and it may not say that it is a reward model's.
    """
    if not config.says_tasks:
        config.task_lora_ranks = task_ranks(source.tensors)
    if config.reward_pooling is None and SCORE_HEAD in source.tensors and WRITING_HEAD not in source.tensors:
        config.reward_pooling = POOLINGS[0]
    return config


def task_ranks(tensors: Mapping[str, LazyTensor]) -> dict[str, int]:
    """Ranks of the task LoRAs that some parameters have."""
    found = (_TASK_FIRST.search(name) for name in tensors)
    return {match[1]: tensors[match.string].shape[0] for match in found if match}


def refuse_other(is_reward: bool, path: str | os.PathLike, scores: bool) -> None:
    """Refuses a reward model where answers are written, and one that writes where answers are scored.

    Args:
        is_reward: whether the model is a reward model.
        path: of the model.
        scores: whether scores are wanted.

    Raises:
        CheckpointError: saying what the model is.
    """
    if is_reward and not scores:
        raise CheckpointError(f"{path} is a reward model: it has a score head ({SCORE_HEAD}) in place of "
                              f"{WRITING_HEAD}, so it scores answers and writes none. `mindformers score --model "
                              f"{path}` asks it, and ixc25_reward.yaml trains it.")
    if scores and not is_reward:
        raise CheckpointError(f"{path} is a model that writes answers: it has no score head ({SCORE_HEAD}), so it "
                              "scores none; internlm-xcomposer2d5-7b-reward is a model that does. `mindformers "
                              f"chat --model {path}` asks this one.")
