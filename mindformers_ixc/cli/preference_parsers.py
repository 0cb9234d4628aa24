"""The words of the subcommands that make preference pairs of a model's own answers: `sample` and `label`."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mindformers_ixc.cli.arguments import Help, Parser
from mindformers_ixc.cli.asking_options import add_generation
from mindformers_ixc.cli.family_parsers import add_scoring

if TYPE_CHECKING:
    # what `add_subparsers` gives; argparse has no public name for it
    Commands = argparse._SubParsersAction[Parser]


def add_sample(commands: Commands) -> None:
    """Adds `mindformers sample`."""
    sample = commands.add_parser(
        "sample", formatter_class=Help, help="several sampled answers to every prompt of a file",
        description="Samples answers to every line of a JSON lines file of requests (query, images, history, or "
                    "messages, as for run mode predict; with an `id` of its own, or its number in the file). The "
                    "samples of a prompt are one batch that shares its pictures and cache. samples.jsonl has them all "
                    "with their mean log-probabilities; `mindformers label` makes preference pairs of it. Killed at "
                    "any moment, the same command goes on with what is left.",
        epilog="examples:\n  mindformers sample --model out/model --data q.jsonl --output_dir samples\n"
               "  mindformers sample --model out/model --mode write --data q.jsonl --output_dir samples "
               "--num_samples 4 --temperature 0.8")
    add_generation(sample, samples=True)
    sample.add_argument("--data", required=True, metavar="FILE", help="requests, a JSON object a line")
    sample.add_argument("--output_dir", required=True, metavar="DIR", help="write samples.jsonl there, as they come")
    sample.add_argument("--num_samples", type=int, default=8, metavar="N", help="answers to each prompt, at least 2")
    sample.add_argument("--temperature", type=float, default=1.0, metavar="X", help="divides the scores; above 0")
    sample.add_argument("--top_p", type=float, default=1.0, metavar="X", help="only the likeliest tokens that together "
                        "reach this probability; 1: no limit")
    sample.add_argument("--top_k", type=int, default=50, metavar="N", help="only the N likeliest tokens; 0: no limit")
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="with the id of a prompt it decides the "
                        "random numbers of its answers")


def add_label(commands: Commands) -> None:
    """Adds `mindformers label`."""
    label = commands.add_parser(
        "label", formatter_class=Help, help="preference pairs of sampled answers, by a reward model or a judge",
        description="Makes a preference pair of the best and the worst sample of each prompt, in the form that "
                    "ixc25_dpo.yaml and ixc25_reward.yaml read, and says how many prompts have none and why. Equal "
                    "answers of a prompt count once; empty answers and those cut at max_new_tokens are left out; of "
                    "equal prompts the first one with a pair is taken. The file is whole or not there.",
        epilog="examples:\n"
               "  mindformers label samples/samples.jsonl pairs.json --reward reward_model --min_margin 0.5\n"
               "  mindformers label samples/samples.jsonl pairs.json --judge verdicts.jsonl --max_length_ratio 1.5")
    label.add_argument("sampled", metavar="SAMPLES", help="samples.jsonl of `mindformers sample`, or predictions.jsonl "
                       "of run mode predict with best_of")
    label.add_argument("target", metavar="DST", help="file of pairs to be written, .json or .jsonl; an older one is "
                       "replaced")
    judged_by = label.add_mutually_exclusive_group(required=True)
    judged_by.add_argument("--reward", metavar="DIR", help="directory of the reward model that scores the answers; the "
                           "scores stay beside DST and serve for another --min_margin")
    judged_by.add_argument("--judge", metavar="FILE", help="what a judge says: JSON lines or a JSON list of objects "
                           "with `id`, or one object of ids; of each id `scores` or `ranks` (a number a sample, the "
                           "lowest rank is best), or `preferred` and `rejected` (numbers of two samples, from 0). "
                           "Prompts without a verdict make no pair; an id of no prompt is an error")
    label.add_argument("--min_margin", type=float, default=0.0, metavar="X", help="difference of the best and the "
                       "worst score (or rank) at least; equal ones make no pair in any case")
    label.add_argument("--max_length_ratio", type=float, metavar="X", help="drop pairs whose chosen answer has more "
                       "than X times the characters of the rejected one (default: no limit)")
    add_scoring(label)
