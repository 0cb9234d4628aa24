"""Answers questions in a parallel layout over CPU processes, and keeps logits and ids, to be compared.

    python scripts/parallel_answers.py MODEL PICTURE TENSOR STAGES RESULT.npz

Two questions in one batch, one about the picture: the logits of the prompts and of five more steps, the ids of greedy
decoding and of two beams. Started without a launcher it starts the ranks itself; with 1 1 it answers alone.
"""
from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

STEPS = 6
STARTED = "PARALLEL_ANSWERS"         # told to ranks, which would otherwise start others


def run_ranks(count: int, folder: Path, script: Path, *arguments) -> None:
    """Runs a script under msrun, with a mailbox of its own; with a single rank, alone.

    Raises:
        RuntimeError: with the ends of the ranks' logs when one fails.
    """
    from mindformers_ixc.cpu_cluster.build import preload_environment

    words, environment = [str(script), *map(str, arguments)], {**os.environ, STARTED: "1"}
    command = [sys.executable, *words]
    if count > 1:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        # msrun starts the first `python` of the path
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment.update(preload_environment(), PATH=path, CPU_PARALLEL_TIMEOUT_S="120",
                           CPU_PARALLEL_MAILBOX=str(folder / "mailbox"))
        command = [str(Path(sys.executable).with_name("msrun")), "--worker_num", str(count), "--local_worker_num",
                   str(count), "--master_port", str(port), "--log_dir", str(folder / "log"), "--join", "True", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode:
        logs = [log.read_text(errors="replace")[-2000:] for log in sorted((folder / "log").glob("worker_*.log"))]
        raise RuntimeError("\n".join(logs or [done.stderr[-3000:]]))


def launch(model: Path, picture: Path, tensor: int, stages: int, result: Path) -> None:
    """Starts the ranks of a layout and waits for them."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(tensor * stages, Path(folder), Path(__file__).resolve(), model, picture, tensor, stages, result)


def join_ranks(stages: int) -> int:
    """Joins the ranks that msrun started; this one's number."""
    import mindspore as ms
    from mindspore.communication import get_group_size, get_rank, init

    from mindformers_ixc.cpu_cluster.groups import install
    from mindformers_ixc.device import share_results

    init()
    install()
    ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", full_batch=True, device_num=get_group_size(),
                                 global_rank=get_rank(), pipeline_stages=stages)
    share_results()
    return get_rank()


def answer(model: str, picture: str, layout: dict) -> dict[str, np.ndarray]:
    """Logits `(STEPS, 2, V)` and ids of both questions."""
    from mindformers_ixc.generation.assistant import Assistant
    from mindformers_ixc.generation.options import GenerationOptions

    assistant = Assistant.from_directory(model, **({"parallel_config": layout} if layout else {}))
    questions = [{"query": "What does the picture show?", "images": [picture], "hd_num": 2}, {"query": "Who are you?"}]
    samples = [assistant.encode(question) for question in questions]
    decoder = assistant.engine.decoder(samples, STEPS, "web")
    logits = [decoder.prefill()]
    while len(logits) < STEPS:
        logits.append(decoder.step(logits[-1].argmax(-1)))
    options = GenerationOptions(max_new_tokens=STEPS)
    greedy = assistant.generate(samples, options, "web")
    beams = assistant.generate(samples, replace(options, num_beams=2), "web")
    return {"logits": np.stack(logits), "greedy": np.array(greedy), "beams": np.array(beams)}


def main(model: str, picture: str, tensor: str, stages: str, result: str) -> None:
    """One rank, or the start of all."""
    if STARTED not in os.environ:
        launch(Path(model), Path(picture), int(tensor), int(stages), Path(result))
        return
    import mindspore as ms

    from mindformers_ixc.parallel.degrees import Degrees, inference_layout

    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    rank, layout = 0, {}
    if int(tensor) * int(stages) > 1:
        rank = join_ranks(int(stages))
        layout = inference_layout(Degrees(1, int(tensor), int(stages)))
    found = answer(model, picture, layout)
    if rank == 0:
        np.savez(result, **found)


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    main(*sys.argv[1:])
