"""Which cells compute their activations again in the backward pass, by MindFormers' `recompute_config`."""
from __future__ import annotations

from typing import TYPE_CHECKING

from mindspore import nn

from mindformers_ixc.config import recomputed_layers
from mindformers_ixc.device import is_parallel

if TYPE_CHECKING:
    from mindformers.modules.transformer import TransformerRecomputeConfig

# Keys of MindFormers' `recompute_config` that MindSpore's `Cell.recompute` takes in parallel runs: whether sums over
# tensor-parallel devices, or the gathering of parameters that optimizer parallel cuts, are done again as well.
COMMUNICATION_KEYS = ("mp_comm_recompute", "parallel_optimizer_comm_recompute", "recompute_slice_activation")


def apply_recompute(model: nn.Cell, section: TransformerRecomputeConfig) -> None:
    """Marks cells for recomputation.

    `recompute` takes whole decoder layers, and with all of them the layers of the vision tower: only their inputs are
    kept. `select_recompute` takes the attention cores and the gates of the feed-forward, whose activations are the
    largest for the least work. A layer is taken by one of the two, whole layers first.

    Args:
        model: `IXC25ForCausalLM`.
        section: MindFormers' `TransformerRecomputeConfig`.

    Raises:
        ConfigError: see `recomputed_layers`.
    """
    layers = list(model.model.layers)     # a slice of a CellList would rename its parameters
    whole = recomputed_layers(section.recompute, len(layers), "recompute")
    selected = recomputed_layers(section.select_recompute, len(layers), "select_recompute")
    communication = {key: getattr(section, key) for key in COMMUNICATION_KEYS if is_parallel()}
    for layer in layers[:whole]:
        layer.recompute(**communication)
    for layer in layers[whole:max(whole, selected)]:
        layer.attention.core.recompute()
        for primitive in layer.feed_forward.gates():
            primitive.recompute()
    if whole == len(layers):
        for layer in model.vit.vision_tower.vision_model.encoder.layers:
            layer.recompute(**communication)
