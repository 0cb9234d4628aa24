"""Kills a conversion at random moments and runs it again: it must always end with the right bytes.

    python scripts/kill_convert.py                  # 20 conversions of 200 MB
    python scripts/kill_convert.py --tp 2 --trials 5

Each conversion runs in a process of its own (forked, so that nothing has to be imported again) and gets SIGKILL, twice
in every third trial. After each kill the target must not exist, unless it is whole; after the last run it must equal
the source, and the work folder must be gone.
"""
from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mindformers_ixc.checkpoint import streaming
from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.checkpoint.tensor_file import TensorFile
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.parameters import parameter_table


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--trials", type=int, default=20, help="conversions that are killed")
    parser.add_argument("--megabytes", type=int, default=200, help="size of the checkpoint")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel degree of the target")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args()


def make(folder: Path, megabytes: int) -> None:
    """Writes a random checkpoint of about a size."""
    import json

    layers = max(1, round(megabytes / 10))
    config = IXC25Config(vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=layers,
                         num_attention_heads=8, num_key_value_heads=4, plora_rank=64,
                         task_lora_ranks={"sft": 64, "dpo": 64, "web": 128},
                         vision_config={"image_size": 56, "hidden_size": 32, "num_hidden_layers": 1,
                                        "num_attention_heads": 4, "intermediate_size": 64})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_public_dict()))
    table, rng = parameter_table(config).values(), np.random.default_rng(0)
    file = TensorFile(folder / "model.safetensors", [(entry.name, "F32", entry.shape) for entry in table])
    file.open()
    for entry in table:
        file.write(entry.name, 0, rng.standard_normal(entry.shape, np.float32))
    file.close()
    print(f"{sum(math.prod(entry.shape) for entry in table) * 4 / 1e6:.0f} MB in {len(table)} tensors", flush=True)


def start(source: Path, target: Path, degree: int) -> int:
    """Forks a conversion and returns its process id."""
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)     # no progress bar
        code = 1
        try:
            streaming.SYNC_BYTES = 2**20                 # a small checkpoint, but many entries in the journal
            convert(source, target, tensor_parallel=degree)
            code = 0
        finally:
            os._exit(code)
    return process


def equal(source: Path, target: Path) -> bool:
    """Whether two checkpoints hold the same names and bytes."""
    one, other = open_source(source).tensors, open_source(target).tensors
    return one.keys() == other.keys() and all(np.array_equal(one[name].whole(), other[name].whole()) for name in one)


def trial(source: Path, target: Path, degree: int, seconds: float, kills: int, moments: random.Random) -> str:
    """Runs, kills, runs to the end; says what happened, or exits."""
    done = []
    for _ in range(kills):
        process = start(source, target, degree)
        moment = moments.uniform(0, seconds)
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        journal = target.parent / f".{target.name}.partial" / "journal.jsonl"
        lines = len(journal.read_text().splitlines()) - 1 if journal.exists() else 0
        done.append(f"{moment:.2f} s ({lines} tensors noted)")
        if target.exists() and not equal(source, target):
            sys.exit(f"killed at {moment:.3f} s, {target} looks whole and is not")
    _, status = os.waitpid(start(source, target, degree), 0)
    if status or not equal(source, target) or (target.parent / f".{target.name}.partial").exists():
        sys.exit(f"after {done} the target is wrong (exit status {status})")
    return " and ".join(done)


def main() -> None:
    """Measures one undisturbed conversion, then runs the trials."""
    arguments, moments = parse(), random.Random(parse().seed)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        make(source, arguments.megabytes)
        begin = time.perf_counter()
        _, status = os.waitpid(start(source, target, arguments.tp), 0)
        seconds = time.perf_counter() - begin
        if status or not equal(source, target):
            sys.exit("the undisturbed conversion failed")
        print(f"undisturbed: {seconds:.2f} s", flush=True)
        for index in range(arguments.trials):
            shutil.rmtree(target)
            kills = 2 if index % 3 == 2 else 1
            print(f"trial {index + 1}: killed at", trial(source, target, arguments.tp, seconds, kills, moments),
                  flush=True)
    print(f"{arguments.trials} of {arguments.trials} ended with the right bytes")


if __name__ == "__main__":
    main()
