"""What it costs and changes that local tiles travel as bytes: sizes, seconds and the largest difference of a logit.

    python benchmarks/tiles.py MODEL_DIRECTORY PICTURE [PICTURE ...] [--hd_num 18] [--dtype float32]

Each picture is encoded with a question, and the network's logits of the columns of a batch are compared with those of
the same tiles normalised by the host.
"""
from __future__ import annotations

import argparse
import sys
import time

import numpy as np

QUESTION = "What is shown?"


def main() -> int:
    """Prints a line for each picture; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="model directory")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--hd_num", type=int, default=18, help="tiles of a picture at most")
    parser.add_argument("--dtype", default="float32", help="of products; CPUs have float32 and float16")
    arguments = parser.parse_args()

    from mindspore import Tensor

    from mindformers_ixc.data.batch import BATCH_COLUMNS, PIXEL_COLUMNS
    from mindformers_ixc.generation.assistant import Assistant
    from mindformers_ixc.generation.causal_lm import IXC25ForCausalLM
    from mindformers_ixc.generation.loading import load_model

    processor = Assistant.from_directory(arguments.model).processor
    for picture in arguments.pictures:
        began = time.perf_counter()
        sample = processor.encode_chat(QUESTION, [picture], hd_num=arguments.hd_num)
        encoded = time.perf_counter()
        tiles = sample.pixel_values
        normalised = time.perf_counter()
        row = sample.pad(len(sample.input_ids), sample.tiles, 1, processor.pad_token_id)
        model = load_model(arguments.model, IXC25ForCausalLM, seq_length=len(sample.input_ids),
                           max_tiles=sample.tiles, compute_dtype=arguments.dtype)
        columns = {name: Tensor(row[name][None]) for name in BATCH_COLUMNS if name != "labels"}
        as_floats = {**columns, "pixel_values": Tensor(tiles[None]), "global_views": None, "view_index": None}
        found = [model(form["input_ids"], None, *(form[name] for name in BATCH_COLUMNS[2:])).asnumpy()
                 for form in (columns, as_floats)]
        size = sum(row[name].nbytes for name in PIXEL_COLUMNS)
        print(f"{picture}: {sample.tiles} tiles, {size / 1e6:.1f} MB instead of {tiles.nbytes / 1e6:.1f}; encoded in "
              f"{1e3 * (encoded - began):.0f} ms, normalised by the host in {1e3 * (normalised - encoded):.0f} ms; "
              f"largest difference of a logit {np.abs(found[0] - found[1]).max():.1e} of "
              f"{np.abs(found[1]).max():.4f} ({arguments.dtype})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
