"""Loss and gradients of mixed conversations, packed or apart, alone or as one rank of a layout.

`packed_gradients.py DATA TENSOR ROWS RESULTS`: DATA and TENSOR are the degrees; ROWS is `packed`, two rows of several
conversations with and without pictures, or `apart`, one row each. Every rank writes `RESULTS/RANK.npz`: `loss`, and by
name the gradient of its slice of every weight that trains. `model` and `rows` are for tests without ranks.
"""
from __future__ import annotations

import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell

from mindformers_ixc.data.batch import BATCH_COLUMNS, PACKING_COLUMNS
from mindformers_ixc.data.packing import join_samples
from mindformers_ixc.demo import demo_path
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.registration import InternLM2Tokenizer, IXC25ImageProcessor, IXC25Processor

# More than one block of queries, so that conversations lie across the edge of one.
LENGTH, TILES, SEGMENTS = 640, 6, 6
SIZES = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "plora_rank": 4, "plora_alpha": 4, "plora_dropout": 0.0,
         "task_lora_ranks": {}, "seq_length": LENGTH, "max_tiles": TILES, "max_segments": SEGMENTS, "packing": True,
         "vision_config": {"image_size": 56, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "intermediate_size": 32}}

# Conversations of two rows: words of the answer, and whether there is a picture.
MIXED = [[(150, True), (90, False), (40, True)], [(20, False), (200, False), (30, True), (5, False)]]


def rows(packed: bool) -> list[dict[str, np.ndarray]]:
    """Columns of the rows."""
    processor = IXC25Processor(IXC25ImageProcessor(56), InternLM2Tokenizer(str(demo_path("tokenizer.model"))))
    rng, members = np.random.default_rng(0), []
    for row in MIXED:
        members.append([])
        for words, picture in row:
            answer = " ".join(rng.choice(["red", "blue", "a dog", "two", "of it", "seen"], words))
            pictures = [rng.integers(0, 255, (50, 70, 3), np.uint8)] if picture else []
            members[-1].append(processor.encode_conversation([("user", "what is it?"), ("assistant", answer)], pictures,
                                                             hd_num=1))
    if not packed:
        members = [[sample] for row in members for sample in row]
    return [join_samples(row, LENGTH, TILES, 2, max_segments=SEGMENTS) for row in members]


class Step(nn.Cell):
    """Loss and gradients of a network."""

    def __init__(self, network, weights):
        super().__init__(auto_prefix=False)
        self.network, self.weights = network, ms.ParameterTuple(weights)
        self.grad = ms.ops.GradOperation(get_by_list=True)

    def construct(self, *inputs):
        return self.network(*inputs), self.grad(self.network, self.weights)(*inputs)


def slice_of(whole: np.ndarray, shape: tuple[int, ...], part: int) -> np.ndarray:
    """What a tensor-parallel device has of an array."""
    for axis, (size, own) in enumerate(zip(whole.shape, shape)):
        if own != size:
            return np.take(whole, range(part * own, part * own + own), axis)
    return whole


def loss_and_gradients(data: int, tensor: int, packed: bool, rank: int = 0) -> dict[str, np.ndarray]:
    """Loss and gradients of this rank's weights."""
    config = IXC25Config(**SIZES, parallel_config={"data_parallel": data, "model_parallel": tensor,
                                                   "vocab_emb_dp": False})
    model = IXC25ForCausalLM(config)
    rng = np.random.default_rng(1)
    values = {one.name: rng.normal(0, 0.1, one.shape).astype(np.float32)
              for one in sorted(model.get_parameters(), key=lambda one: one.name)}
    batch = [Tensor(np.stack([row[name] for row in rows(packed)])) for name in (*BATCH_COLUMNS, *PACKING_COLUMNS)]
    step = Step(_VirtualDatasetCell(model) if data * tensor > 1 else model, model.trainable_params())
    step.set_train()
    step.compile(*batch)        # from here on the parameters have the rank's shapes
    for one in model.get_parameters():
        one.set_data(Tensor(slice_of(values[one.name], one.shape, rank % tensor)))
    loss, gradients = step(*batch)
    found = {one.name: gradient.asnumpy() for one, gradient in zip(model.trainable_params(), gradients)}
    return {**found, "loss": loss.asnumpy()}


def main(data: int, tensor: int, packed: bool, results: Path) -> None:
    from mindspore.communication import get_rank, init

    from mindformers_ixc.cpu_cluster.groups import install

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    init()
    install()
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", full_batch=True, device_num=data * tensor,
                                 global_rank=get_rank())
    np.savez(results / f"{get_rank()}.npz", **loss_and_gradients(data, tensor, packed, get_rank()))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "packed", Path(sys.argv[4]))
