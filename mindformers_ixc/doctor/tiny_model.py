"""The program of the self test: a tiny model learns one picture of the demo, is written, read, and asked about it.

Run by `self_test` in a process of its own; each line on standard output is a JSON object, a step that is done.
"""
from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import psutil
from mindformers.core.optim import AdamW
from mindspore import Tensor

from mindformers_ixc.checkpoint.model_directory import save_model_directory
from mindformers_ixc.data.batch import BATCH_COLUMNS
from mindformers_ixc.data.conversations import load_conversations
from mindformers_ixc.data.rows import ConversationTable
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.parameters import part_of
from mindformers_ixc.processing.processor import ImageProcessor, Processor
from mindformers_ixc.processing.tokenizer import Tokenizer
from mindformers_ixc.resources import resolve_path
from mindformers_ixc.training.wrapper import IXC25TrainOneStepCell

LENGTH, STEPS, RATE, SEED = 48, 40, 3e-3, 42
ASCEND_DTYPES = {"compute_dtype": "bfloat16", "param_init_type": "bfloat16"}
SIZES = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "plora_rank": 4,
         "plora_alpha": 4, "plora_dropout": 0.0, "task_lora_ranks": {}, "seq_length": LENGTH, "max_tiles": 2,
         "vision_config": {"image_size": 56, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 1,
                           "num_attention_heads": 2, "intermediate_size": 64}}


def main() -> None:
    """Learns, writes, reads and answers; raises when an answer is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device_target", default="CPU")
    parser.add_argument("--output", type=int, default=1, help="descriptor that the steps are written to")
    arguments = parser.parse_args()
    target, started = arguments.device_target, psutil.Process().create_time()
    answers = os.fdopen(arguments.output, "w", encoding="utf-8")

    def done(step: str) -> None:
        print(json.dumps({"step": step, "seconds": round(time.time() - started, 1)}), file=answers, flush=True)

    done("import")
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(target)
    ms.set_seed(SEED)
    tokenizer = resolve_path("pkg:mindformers_ixc/demo/tokenizer.model")
    sample = load_conversations(resolve_path("pkg:mindformers_ixc/demo/train.json"))[0]
    processor = Processor(ImageProcessor.from_config(SIZES), Tokenizer(str(tokenizer)))
    table = ConversationTable(processor, [sample], LENGTH, 2, 1)
    model, first, last = train([Tensor(np.asarray(column)[None]) for column in table[0]], target)
    if not last < 0.2 * first:      # a NaN is not less either
        raise ValueError(f"the loss went from {first:.3f} to {last:.3f} in {STEPS} steps; it must fall below a fifth")
    done("train")
    with tempfile.TemporaryDirectory() as folder:
        save_model_directory(model, Path(folder) / "model", tokenizer, hd_num=1)
        dtypes: dict[str, Any] = ASCEND_DTYPES if target == "Ascend" else {}      # as `chat` has them
        assistant = Assistant.from_directory(Path(folder) / "model", **dtypes)
        question = {"query": sample.turns[0][1], "images": list(sample.images)}
        answer, = assistant.answer([question], max_new_tokens=12)
    if answer != sample.turns[1][1]:
        raise ValueError(f"the model answers {answer!r}, but learnt {sample.turns[1][1]!r}")
    done("answer")


def train(batch: list[Tensor], target: str) -> tuple[IXC25ForCausalLM, float, float]:
    """A model that has learnt one batch, its first loss and its last."""
    assert len(batch) == len(BATCH_COLUMNS)
    dtypes = {"compute_dtype": "bfloat16"} if target == "Ascend" else {}
    model = IXC25ForCausalLM(IXC25Config(**SIZES, **dtypes))
    names = [parameter.name for parameter in model.get_parameters()]
    for parameter in model.get_parameters():
        if part_of(parameter.name) == "vision":      # its backward pass would take a second more to compile
            parameter.requires_grad = False
    step = IXC25TrainOneStepCell(model, AdamW(model.trainable_params(), learning_rate=RATE), use_clip_grad=True,
                                 max_grad_norm=1.0)
    step.set_train()
    losses = [float(np.ravel(step(*batch)[0].asnumpy())[0]) for _ in range(STEPS)]
    for parameter, name in zip(model.get_parameters(), names):      # the cell put its own name before frozen ones
        parameter.name = name
    return model, losses[0], losses[-1]


if __name__ == "__main__":
    main()
