"""The options of every command that asks a model: who answers, how pictures are read, how long an answer may be."""
from __future__ import annotations

import argparse

from mindformers_ixc.cli.arguments import Usual, add_no_verify
from mindformers_ixc.fields import CACHE_DTYPES, MODE_ADAPTERS


def add_generation(parser: argparse.ArgumentParser, or_server: bool = False, samples: bool = False) -> None:
    """Adds the options of every command that asks a model.

    Args:
        parser: of the command.
        or_server: a server may stand in the model's place.
        samples: answers are sampled in any case, so there is no prompt lookup, which verifies the likeliest one.
    """
    parser.add_argument("--model", required=not or_server, metavar="DIR", help="model directory, such as OUT/model, or "
                        "starter, the small one of this package")
    parser.add_argument("--mode", choices=list(MODE_ADAPTERS), default="base", help="task LoRAs in use")
    parser.add_argument("--hd_num", type=int, metavar="N", help="tiles of the dynamic partition at most (default: the "
                        "model directory's, else 24, and 6 with several pictures)")
    parser.add_argument("--control_tokens", action="store_true", help="text that is spelled like <s> or "
                        "[UNUSED_TOKEN_145] becomes that control token, as in the public code")
    add_image_options(parser)
    parser.add_argument("--max_new_tokens", type=int, default=Usual(1024), metavar="N", help="length of an answer at "
                        "most")
    if not samples:
        parser.add_argument("--prompt_lookup", type=int, default=0, metavar="N", help="propose up to N tokens at a "
                            "time, as they follow the last ones in the prompt or the answer, and verify them in one "
                            "pass: the same answer, sooner where it repeats its input; greedy decoding on a CPU "
                            "(default: 0, off)")
    parser.add_argument("--reuse_bytes", type=int, metavar="BYTES", help="memory for what earlier questions computed "
                        "of pictures and prompts, taken over by the next ones; 0: none (default: 1 GiB)")
    parser.add_argument("--cache_dtype", choices=list(CACHE_DTYPES), help="dtype of keys and values; bfloat16 halves "
                        "their memory, on a CPU (default: that of products)")
    parser.add_argument("--device_target", choices=["CPU", "GPU", "Ascend"], default="CPU", help="where to compute")
    add_no_verify(parser)


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Adds how pictures are read."""
    parser.add_argument("--transparency", choices=["white", "public"],
                        help="put transparent pixels on white, or drop the alpha channel as the public code does "
                        "(default: the model directory's, else white)")
    parser.add_argument("--exif", choices=["ignore", "apply"],
                        help="turn pictures upright by their EXIF orientation, or not, as the public code "
                        "(default: the model directory's, else ignore)")
