"""Peak memory of a chat about a picture, against the weights and the key/value cache.

    python benchmarks/memory.py

Writes a random float32 model to a temporary folder, the 7B model's widths with 6 of its 32 decoder layers (10 GB),
loads it in another process and asks about a picture of 2 x 2 tiles of 560 pixels. Printed are the resident memory that
the imports take, and how much is added at most while the model is loaded and while it answers, against weights plus
cache.
"""
from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {"num_hidden_layers": 6, "task_lora_ranks": {}}


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """Resident memory of this process now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def write_model(folder: str) -> None:
    """A random model in `folder`."""
    from mindformers_ixc import IXC25Config, IXC25ForCausalLM
    from mindformers_ixc.checkpoint.model_directory import save_model_directory
    from mindformers_ixc.demo import demo_path

    model = IXC25ForCausalLM(IXC25Config(**SIZES))
    save_model_directory(model, folder, tokenizer_file=str(demo_path("tokenizer.model")))


def ask(folder: str) -> None:
    """Loads the model, asks, prints."""
    import numpy as np

    from mindformers_ixc.generation.assistant import Assistant
    from mindformers_ixc.generation.engine import bucket

    base, new = resident(), 64
    assistant = Assistant.from_directory(folder)
    config = assistant.model.config
    weights = sum(parameter.nbytes for parameter in assistant.model.get_parameters())
    loaded = peak() - base
    picture = np.random.default_rng(0).integers(0, 255, (1120, 1120, 3), dtype=np.uint8)
    question = {"query": "What is shown?", "images": [picture], "hd_num": 4}
    assistant.answer([question], max_new_tokens=new)
    positions = bucket(len(assistant.encode(question).input_ids) + new)
    cache = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * positions
    added = peak() - base
    print(f"imports {base / 2**20:.0f} MiB; weights {weights / 2**20:.0f} MiB, cache of {positions} positions "
          f"{cache / 2**20:.0f} MiB")
    for name, value in (("loading", loaded), ("loading and answering", added)):
        print(f"{name}: at most {value / 2**20:.0f} MiB added, {value / (weights + cache):.2f} x (weights + cache)")


def main() -> None:
    """Writes the model here, asks in another process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", help="ask this model directory instead of making one")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_model(arguments.write)
    elif arguments.model:
        ask(arguments.model)
    else:
        with tempfile.TemporaryDirectory() as folder:
            target = str(Path(folder) / "model")
            for words in (["--write", target], ["--model", target]):
                subprocess.run([sys.executable, __file__, *words], check=True)


if __name__ == "__main__":
    main()
