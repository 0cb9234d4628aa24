"""One rank of parallel inference, started by msrun: `rank_generate.py MODEL IMAGE TENSOR STAGES RESULT.npz [BEAMS]`.

Answers two questions, one about a picture, and saves the logits of the prompts and of every step, and the new ids.
"""
from __future__ import annotations

import sys
from dataclasses import replace

import mindspore as ms
import numpy as np
from mindspore.communication import get_group_size, get_rank, init

from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.sampling import GenerationOptions
from mindformers_ixc.parallel import cpu


def start(stages: int) -> int:
    """Joins the ranks; this one's number."""
    init()
    cpu.install()
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", full_batch=True, device_num=get_group_size(),
                                 global_rank=get_rank(), pipeline_stages=stages, pipeline_result_broadcast=stages > 1)
    return get_rank()


def answer(model: str, image: str, layout: dict) -> dict[str, np.ndarray]:
    """Logits of all steps, and ids, greedy and with two beams."""
    assistant = Assistant.from_directory(model, **({"parallel_config": layout} if layout else {}))
    questions = [{"query": "What does the picture show?", "images": [image], "hd_num": 2}, {"query": "Who are you?"}]
    samples = [assistant.encode(question) for question in questions]
    decoder = assistant.engine.decoder(samples, 6, "web")
    logits = [decoder.prefill()]
    for _ in range(5):
        logits.append(decoder.step(logits[-1].argmax(-1)))
    options = GenerationOptions(max_new_tokens=6)
    greedy = assistant.generate(samples, options, "web")
    beams = assistant.generate(samples, replace(options, num_beams=2), "web")
    return {"logits": np.stack(logits), "greedy": np.array(greedy), "beams": np.array(beams)}


def main(model: str, image: str, tensor: str, stages: str, result: str) -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    rank, layout = 0, {}
    if int(tensor) * int(stages) > 1:
        rank = start(int(stages))
        layout = {"data_parallel": 1, "model_parallel": int(tensor), "pipeline_stage": int(stages),
                  "vocab_emb_dp": False}
    found = answer(model, image, layout)
    if rank == 0:
        np.savez(result, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
