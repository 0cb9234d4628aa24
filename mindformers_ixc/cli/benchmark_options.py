"""The options of `mindformers eval --benchmark`, and which of eval's do not go with them."""
from __future__ import annotations

import argparse
import os

from mindformers_ixc.benchmarking.catalogue import BENCHMARKS, NUM_BEAMS
from mindformers_ixc.cli.arguments import Usual
from mindformers_ixc.errors import ConfigError

# Options of eval that a benchmark decides by itself.
_DECIDED = {"metrics": ["exact_match"], "ignore_case": False, "worst": 3, "shuffle_images": False, "predictions": None,
            "ignore_keys": [], "control_tokens": False}

# Options that say how a model in this process computes.
LOCAL = {"prompt_lookup": 0, "reuse_bytes": None, "cache_dtype": None, "device_target": "CPU", "no_verify": False}

# Options that only a benchmark has.
_OWN = {"server": None, "api_key": None, "model_name": None, "output_dir": None, "max_samples": None}


def add_benchmark(evaluate: argparse.ArgumentParser) -> None:
    """Adds the options to the parser of eval."""
    evaluate.add_argument("--benchmark", choices=list(BENCHMARKS), metavar="NAME", help="public benchmark that --data "
                          "is: its published prompt is asked, with its hd_num, num_beams and max_new_tokens unless "
                          f"they are given: {', '.join(BENCHMARKS)}")
    evaluate.add_argument("--server", metavar="URL", help="of --benchmark: ask the model of a server of OpenAI's "
                          "protocol instead of --model, --batch_size questions at once")
    evaluate.add_argument("--api_key", metavar="KEY", help="of --server (default: the variable OPENAI_API_KEY)")
    evaluate.add_argument("--num_beams", type=int, default=Usual(1), metavar="N", help="of --benchmark: beams "
                          "(default: 3, as published)")
    evaluate.add_argument("--max_samples", type=int, metavar="N", help="of --benchmark: the first N questions only")
    evaluate.add_argument("--output_dir", metavar="DIR", help="of --benchmark: answers, which the same command goes on "
                          "from, and result files for VLMEvalKit, in DIR/MODEL (default: benchmarks)")
    evaluate.add_argument("--model_name", metavar="NAME", help="of --benchmark: MODEL in names of files (default: the "
                          "folder of the model or of the run that wrote it, or its name on the server)")


def check_options(arguments: argparse.Namespace) -> None:
    """Refuses options of eval that do not go together, before any file is looked at.

    Raises:
        ConfigError: naming the option.
    """
    def given(options: dict) -> str | None:
        return next((name for name, usual in options.items() if getattr(arguments, name, usual) != usual), None)

    if arguments.benchmark is None:
        name = given(_OWN)
        if name is None and not isinstance(arguments.num_beams, Usual):
            name = "num_beams"
        if name is not None:
            raise ConfigError(f"--{name} is given without --benchmark, which it belongs to.")
        if arguments.model is None:
            raise ConfigError("eval needs --model DIR, or --benchmark NAME with --server URL.")
        return
    if name := given(_DECIDED):
        raise ConfigError(f"--{name} does not go with --benchmark, which asks and scores as published.")
    if (arguments.model is None) == (arguments.server is None):
        raise ConfigError("--benchmark needs --model DIR or --server URL, one of the two.")
    if arguments.server is not None and (name := given(LOCAL)):
        raise ConfigError(f"--{name} is given with --server, which decides that itself.")
    if arguments.server is None and arguments.api_key is not None:
        raise ConfigError("--api_key is given without --server.")
    if arguments.max_samples is not None and arguments.max_samples < 1:
        raise ConfigError(f"--max_samples is {arguments.max_samples}; it must be at least 1.")
    if arguments.prompt_lookup and isinstance(arguments.num_beams, Usual):
        raise ConfigError(f"--prompt_lookup goes with --num_beams 1 only, and benchmarks are asked with {NUM_BEAMS}.")
    if arguments.model_name is not None and not is_name(arguments.model_name):
        raise ConfigError(f"--model_name is {arguments.model_name!r}; it names files, so it may have no slash.")


def is_name(name: str) -> bool:
    """Whether a text can be a part of the name of a file."""
    return bool(name) and name == os.path.basename(name) and name not in (".", "..") and name.isprintable()
