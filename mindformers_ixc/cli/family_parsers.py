"""The words of the subcommands for the model's relatives: what pre-training starts from, and the reward model."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mindformers_ixc.cli.arguments import Help, Parser, add_no_verify, add_writing

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
    assemble.add_argument("--seed", type=int, default=0, metavar="N", help="of the numbers that are drawn")
    add_writing(assemble, "config.json of the model to be made (default: the sizes of both, tiles of 560 pixels, "
                "Partial LoRA of rank and alpha 256)")


def add_score(commands: Commands) -> None:
    """Adds `mindformers score`."""
    score = commands.add_parser(
        "score", formatter_class=Help, help="scores of answers by a reward model",
        description="Scores the answers of a JSON lines file. A line is a request of run mode predict (query, images, "
                    "history, or messages) with `answer` or a list `answers`, messages that end with the "
                    "assistant's, or a line of predictions.jsonl. Each gets `score` or `scores`, or `error` where it "
                    "cannot be scored. Killed at any moment, the same command goes on with what is left.",
        epilog="examples:\n  mindformers score --model internlm-xcomposer2d5-7b-reward --data answers.jsonl\n"
               "  mindformers score --model out/model --data out_predict/predictions.jsonl --output_dir out_scores")
    score.add_argument("--model", required=True, metavar="DIR", help="directory of a reward model")
    score.add_argument("--data", required=True, metavar="FILE", help="JSON lines with answers")
    score.add_argument("--output_dir", metavar="DIR", help="write scores.jsonl there, as they come (default: standard "
                       "output, at the end)")
    add_scoring(score)


def add_scoring(parser: argparse.ArgumentParser) -> None:
    """Adds how a reward model reads what it scores."""
    parser.add_argument("--hd_num", type=int, metavar="N", help="tiles of each picture at most (default: the model "
                       "directory's, else 9)")
    parser.add_argument("--max_length", type=int, metavar="N", help="refuse conversations of more positions (default: "
                       "what the model takes)")
    parser.add_argument("--batch_size", type=int, default=4, metavar="N", help="conversations scored at once")
    parser.add_argument("--control_tokens", action="store_true", help="text that is spelled like <s> or "
                       "[UNUSED_TOKEN_145] becomes that control token, as in the public code")
    parser.add_argument("--transparency", choices=["white", "public"], help="as in chat")
    parser.add_argument("--exif", choices=["ignore", "apply"], help="as in chat")
    parser.add_argument("--device_target", choices=["CPU", "GPU", "Ascend"], default="CPU", help="where to compute")
    add_no_verify(parser)


def add_best_of(parser: argparse.ArgumentParser) -> None:
    """Adds the options of best-of-N."""
    parser.add_argument("--best_of", type=int, metavar="N", help="sample N answers and give the best: by --reward, or "
                        "that of the highest mean log-probability")
    parser.add_argument("--reward", metavar="DIR", help="directory of the reward model that chooses")
