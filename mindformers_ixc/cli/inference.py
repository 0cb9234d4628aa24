"""What the commands that ask a model share."""
from __future__ import annotations

import argparse
import logging

import mindspore as ms

from mindformers_ixc.generation.ascend import prepare_inference
from mindformers_ixc.generation.assistant import Assistant

# Ascend's paged and flash attention take 16 bits; the released weights are bfloat16.
ASCEND_DTYPES = {"compute_dtype": "bfloat16", "param_init_type": "bfloat16"}


def load_assistant(arguments: argparse.Namespace) -> Assistant:
    """Loads `arguments.model` on `arguments.device_target`, in graph mode; `arguments.control_tokens` as in
    `Processor`.
    """
    prepare_device(arguments)
    dtypes = ASCEND_DTYPES if arguments.device_target == "Ascend" else {}
    assistant = Assistant.from_directory(arguments.model, image_options(arguments), **dtypes)
    assert assistant.processor is not None
    assistant.processor.control_tokens = arguments.control_tokens
    return assistant


def image_options(arguments: argparse.Namespace) -> dict:
    """What was said of pictures, as arguments of `ImageProcessor`."""
    return {name: getattr(arguments, name) for name in ("transparency", "exif")
            if getattr(arguments, name, None) is not None}


def prepare_device(arguments: argparse.Namespace) -> None:
    """Graph mode on `arguments.device_target`, with its inference kernels; quiet unless `arguments.verbose`."""
    if not arguments.verbose:
        quiet_mindformers()
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device(arguments.device_target)
    prepare_inference()


def generation_options(arguments: argparse.Namespace) -> dict:
    """The decoding options among the arguments, under the names of `GenerationOptions`."""
    names = ("max_new_tokens", "do_sample", "temperature", "top_p", "num_beams", "repetition_penalty", "seed")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
    if not options.get("do_sample"):
        # greedy and beam search do not sample; their options would only be refused
        options.pop("temperature", None)
        options.pop("top_p", None)
    return options


def quiet_mindformers() -> None:
    """Keeps MindFormers' progress notes off the terminal; they still reach the log folder."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("mindformers"):
            for handler in logging.getLogger(name).handlers:
                if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                    handler.setLevel(logging.ERROR)
