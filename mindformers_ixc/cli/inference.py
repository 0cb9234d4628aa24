"""What the commands that ask a model share."""
from __future__ import annotations

import argparse
import logging
from collections.abc import Callable

import mindspore as ms

from mindformers_ixc.cli.settings import image_options
from mindformers_ixc.generation.ascend import prepare_inference
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.generation.best_of import BestOf
from mindformers_ixc.generation.scoring import Scorer

# Ascend's paged and flash attention take 16 bits; the released weights are bfloat16.
ASCEND_DTYPES = {"compute_dtype": "bfloat16", "param_init_type": "bfloat16"}


def load_assistant(arguments: argparse.Namespace, join: Callable[[], dict] = dict) -> Assistant:
    """Loads `arguments.model` on `arguments.device_target`, in graph mode; `arguments.control_tokens` as in
    `Processor`. `join` is called when the device is ready and gives further fields of a run, a layout say.
    """
    prepare_device(arguments)
    layout = join()
    dtypes = ASCEND_DTYPES if arguments.device_target == "Ascend" else {}
    given = {name: value for name in ("reuse_bytes", "cache_dtype")
             if (value := getattr(arguments, name, None)) is not None}
    assistant = Assistant.from_directory(arguments.model, image_options(arguments), **given, **dtypes, **layout)
    assert assistant.processor is not None
    assistant.processor.control_tokens = arguments.control_tokens
    return assistant


def load_scorer(arguments: argparse.Namespace, directory: str) -> Scorer:
    """Loads a reward model as `load_assistant` does a model that writes."""
    prepare_device(arguments)
    return _scorer_of(directory, arguments)


def load_best_of(arguments: argparse.Namespace, assistant: Assistant) -> BestOf:
    """What gives the best of `arguments.best_of` samples, by the reward model `arguments.reward` if there is one; it
    reads pictures and text as the assistant does.
    """
    scorer = None if arguments.reward is None else _scorer_of(arguments.reward, arguments)
    return BestOf(assistant, arguments.best_of, scorer)


def _scorer_of(directory: str, arguments: argparse.Namespace) -> Scorer:
    dtypes = ASCEND_DTYPES if arguments.device_target == "Ascend" else {}
    scorer = Scorer.from_directory(directory, image_options(arguments), **dtypes)
    scorer.processor.control_tokens = arguments.control_tokens
    return scorer


def prepare_device(arguments: argparse.Namespace) -> None:
    """Graph mode on `arguments.device_target`, with its inference kernels; quiet unless `arguments.verbose`."""
    if not arguments.verbose:
        quiet_mindformers()
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(arguments.device_target)
    prepare_inference()


def quiet_mindformers() -> None:
    """Keeps MindFormers' progress notes off the terminal; they still reach the log folder.

    Handlers of the root's are the program's own, even where MindFormers' loggers have them too.
    """
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("mindformers"):
            for handler in logging.getLogger(name).handlers:
                if (isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
                        and handler not in logging.root.handlers):
                    handler.setLevel(logging.ERROR)
