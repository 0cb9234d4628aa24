"""Graphs for what is likely asked next, compiled while nobody waits for them."""
from __future__ import annotations

import numpy as np
from mindspore import Tensor

from mindformers_ixc.checkpoint.model_directory import numpy_type
from mindformers_ixc.generation.continuing import REST
from mindformers_ixc.generation.engine import InferenceEngine, bucket
from mindformers_ixc.generation.extending import FEW_POSITIONS, takes_images
from mindformers_ixc.generation.turns import TURNS
from mindformers_ixc.models.rotary import rotary_rows


class Nobody:
    """Owns contents that nothing is to be learnt from."""

    closed = True


def prepare(engine: InferenceEngine, positions: int, mode: str) -> None:
    """Compiles what the next question of a chat needs, if it is about what was asked before.

    Args:
        engine: whose graphs.
        positions: of prompt and answer together at most.
        mode: which task LoRAs are in use.
    """
    with TURNS:
        slot, nobody = engine.slot(1, bucket(positions), mode), Nobody()
        if engine.reuse is None or (mode, FEW_POSITIONS, REST) in slot.extensions:
            return
        engine.caches.begin(slot, nobody)
        none, first = np.zeros((1, FEW_POSITIONS), np.int32), np.zeros(1, np.int32)
        angles = rotary_rows(engine.config, np.arange(FEW_POSITIONS), 1)
        graph = engine.extension(slot, mode, FEW_POSITIONS, REST)
        images: tuple[Tensor, np.ndarray] | None = None
        if takes_images(engine.config, FEW_POSITIONS):
            embeds = np.zeros((*none.shape, engine.config.hidden_size), numpy_type(engine.config.compute_dtype))
            images = (Tensor(embeds), none)
        graph(*graph.inputs(none, (angles[0][None], angles[1][None]), first, first, images, first))
        engine.run_decode(slot, mode, first, first, first + 1)
        engine.caches.lose(nobody)
