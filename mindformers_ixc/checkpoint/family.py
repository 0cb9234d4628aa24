"""Which member of the model's family a checkpoint is, what it can do here, and what it is refused for."""
from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mindformers_ixc.config import ModelConfig, names_reward
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.fields import POOLINGS, TASK_LORAS
from mindformers_ixc.files import read_json
from mindformers_ixc.hub import relative_of
from mindformers_ixc.parameters import SCORE_HEAD, UNUSED

if TYPE_CHECKING:
    from mindformers_ixc.checkpoint.sources import OpenedCheckpoint  # whose import takes numpy's
    from mindformers_ixc.checkpoint.tensors import LazyTensor

logger = logging.getLogger(__name__)

WRITING_HEAD = "output.weight"

# The first side of a task LoRA's pair, whose rows are its rank, whole numbers or not.
_TASK_FIRST = re.compile(rf"\.lora_({'|'.join(TASK_LORAS)})_A\.q?weight$")

# Whose unused parameters were spoken of; a checkpoint is opened several times.
_SAID: set[str] = set()


def fields_of(source: OpenedCheckpoint) -> dict[str, Any]:
    """A checkpoint's `config.json`; empty where it has none, or none that is an object."""
    if source.config_file is None:
        return {}
    fields = read_json(source.config_file, CheckpointError)
    return fields if isinstance(fields, dict) else {}


def is_of_family(source: OpenedCheckpoint) -> bool:
    """Whether a `config.json` beside a checkpoint can be this model's."""
    return relative_of(fields_of(source), ModelConfig.model_type) is None


def describe_member(source: OpenedCheckpoint) -> str | None:
    """Which member of the family a checkpoint is and what it can do here, as one sentence.

    Returns:
        `None` where nothing says so: of parts of a model, and of states of a run.
    """
    fields = fields_of(source)
    other = relative_of(fields, ModelConfig.model_type)
    if other is not None:
        return f"It is {other}."
    names = source.tensors
    if SCORE_HEAD in names and WRITING_HEAD in names:
        return (f"It has two heads, {SCORE_HEAD} of a reward model and {WRITING_HEAD} of a model that writes, so it is "
                "neither: take out the one that does not belong to it.")
    trains = not any(name.endswith(".qweight") for name in names)       # nothing trains on whole numbers
    if SCORE_HEAD in names:
        return ("It is a reward model (IXC-2.5-Reward): `mindformers score` and `--best_of N --reward` ask it"
                f"{', arch.type IXC25ForReward trains it' if trains else ''}.")
    if names_reward(fields):
        return f"Its config.json says that it is a reward model, but it has no {SCORE_HEAD}."
    if WRITING_HEAD not in names and f"{WRITING_HEAD.rpartition('.')[0]}.qweight" not in names:
        return None
    if any(name in UNUSED for name in names):
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
    names = [name for name in UNUSED if name in source.tensors]
    if not names or str(source.path) in _SAID:
        return
    _SAID.add(str(source.path))
    logger.info(f"{source.path}: {len(names)} parameters ({', '.join(names[:2])}, ...) are of OmniLive's memory; "
                "nothing here computes with them, and conversions carry them along.")
    lacking = unused_missing(source)
    if lacking:
        logger.warning(f"{source.path} lacks {', '.join(lacking)}, which belong to these, so it is not OmniLive's base "
                       "as it was published: what is made of it lacks them too.")


def unused_missing(source: OpenedCheckpoint) -> list[str]:
    """What a checkpoint lacks of the parameters that nothing here computes with, if it has some of them."""
    missing = [name for name in UNUSED if name not in source.tensors]
    return missing if len(missing) < len(UNUSED) else []


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


def check_kind(config: ModelConfig, source: OpenedCheckpoint, path: str | os.PathLike, scores: bool) -> None:
    """`know_member`, and refuses a checkpoint of the other kind, or one that is not what it is taken for.

    Args:
        config: of the model, completed in place.
        source: the checkpoint.
        path: of the model.
        scores: whether scores are wanted.

    Raises:
        CheckpointError: saying what the model is.
    """
    is_reward = know_member(config, source).reward_pooling is not None
    if is_reward and WRITING_HEAD in source.tensors and SCORE_HEAD not in source.tensors:
        raise CheckpointError(f"{path} is taken for a reward model (reward_pooling, or the name in architectures), but "
                              f"it has {WRITING_HEAD} and no {SCORE_HEAD}, so it writes answers; correct its "
                              "config.json.")
    refuse_other(is_reward, path, scores)


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
