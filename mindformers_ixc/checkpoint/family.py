"""Which member of the model's family a checkpoint is, and what it is refused for."""
from __future__ import annotations

import os
from typing import TYPE_CHECKING

from mindformers_ixc.config import POOLINGS, ModelConfig
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.parameters import SCORE_HEAD

if TYPE_CHECKING:
    from mindformers_ixc.checkpoint.sources import OpenedCheckpoint  # whose import takes numpy's

WRITING_HEAD = "output.weight"


def know_reward(config: ModelConfig, source: OpenedCheckpoint) -> ModelConfig:
    """Sees by its weights that a checkpoint is a reward model's where its `config.json` does not say so."""
    if config.reward_pooling is None and SCORE_HEAD in source.tensors and WRITING_HEAD not in source.tensors:
        config.reward_pooling = POOLINGS[0]
    return config


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
