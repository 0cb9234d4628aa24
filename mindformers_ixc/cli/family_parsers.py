"""The words of the subcommands for the model's relatives: what pre-training starts from, and the reward model."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mindformers_ixc.cli.arguments import Help, Parser

if TYPE_CHECKING:
    # what `add_subparsers` gives; argparse has no public name for it
    Commands = argparse._SubParsersAction[Parser]


def add_assemble(commands: Commands) -> None:
    """Adds `mindformers assemble`."""
    assemble = commands.add_parser(
        "assemble", formatter_class=Help, help="a language model and a vision tower as a model to pre-train",
        description="Makes the model directory that stage 1 starts from: InternLM2 and a CLIP tower as they are, the "
                    "tower's positions interpolated for tiles of 560 pixels (bicubic), and projector, separators and "
                    "Partial LoRA new. A few rows of one tensor are in memory at a time; killed at any moment it "
                    "leaves nothing that looks whole, and the same command goes on.",
        epilog="examples:\n  mindformers assemble internlm2-7b clip-vit-large-patch14-336 ixc25_start\n"
               "  mindformers assemble internlm2-7b internlm-xcomposer2d5-clip ixc25_start --dtype bfloat16")
    assemble.add_argument("language", metavar="LANGUAGE", help="InternLM2 as it is published, or a model of this kind, "
                          "of which the language model is taken")
    assemble.add_argument("tower", metavar="TOWER", help="CLIP tower as it is published (internlm-xcomposer2d5-clip, "
                          "clip-vit-large-patch14-336), or a model of this kind")
    assemble.add_argument("target", metavar="DST", help="directory to be made")
    assemble.add_argument("--config", metavar="PATH", help="config.json of the model to be made (default: the sizes of "
                          "both, tiles of 560 pixels, Partial LoRA of rank and alpha 256)")
    assemble.add_argument("--seed", type=int, default=0, metavar="N", help="of the numbers that are drawn")
    assemble.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: as they are)")
    assemble.add_argument("--max_shard_size", metavar="SIZE", help="of a file at most, such as 5GB (the default)")
    assemble.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    assemble.add_argument("--no_verify", action="store_true", help="do not compare weights with the digests that were "
                          "written with them")
