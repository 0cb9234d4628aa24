"""`mindformers sample`: several sampled answers to every prompt of a file."""
from __future__ import annotations

import argparse
import importlib

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.weights_mark import weights_mark
from mindformers_ixc.cli.heavy import importing
from mindformers_ixc.decoding_options import GenerationOptions
from mindformers_ixc.generation.requests import Request
from mindformers_ixc.generation.sampled_answers import read_prompts

# Options of the decoder, and settings that an answer depends on besides, the weights aside.
DECODING = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
SETTINGS = ("num_samples", "mode", "hd_num", "transparency", "exif", "device_target", "control_tokens", "cache_dtype")

# Different errors that are said; each stands in its line of the file in any case.
SAID = 3


def sample(arguments: argparse.Namespace) -> int:
    """Samples `arguments.num_samples` answers to every line of `arguments.data`, to samples.jsonl.

    A line that cannot be answered has an error in its place.

    Returns:
        Exit code: 1 when no line could be answered.
    """
    requests = read_prompts(arguments.data)
    options = {name: getattr(arguments, name) for name in DECODING}
    GenerationOptions(**options, do_sample=True)
    with importing(arguments):
        inference = importlib.import_module("mindformers_ixc.cli.inference")
        best_of = importlib.import_module("mindformers_ixc.generation.best_of")
        predict = importlib.import_module("mindformers_ixc.generation.predict")

    def load():
        with terminal.current.waiting(f"Loading {arguments.model}"):
            return inference.load_assistant(arguments)

    def work(assistant, batch):
        return [best_of.sample_request(assistant, request, arguments.num_samples, arguments.mode, options)
                for request in batch]

    run = {"weights": weights_mark(arguments.model), **options,
           **{name: getattr(arguments, name) for name in SETTINGS}}
    rows = predict.work_through(load, work, requests, arguments.output_dir, run, 1, name="samples", doing="sampling")
    failed = say_errors(rows, requests)
    terminal.current.say(f"{len(rows) - failed} of {len(rows)} prompts have {arguments.num_samples} samples.")
    print(predict.result_file(arguments.output_dir, "samples"), file=arguments.answers)
    return int(failed == len(rows))


def say_errors(rows: list[dict], requests: list[Request]) -> int:
    """Says the first different errors of some lines, each with its place; returns how many lines have one.

    Args:
        rows: the results.
        requests: of them, in the same order.
    """
    places: dict[str, str] = {}
    for row, request in zip(rows, requests):
        if "error" in row:
            places.setdefault(row["error"], request.where)
    for sentence, place in list(places.items())[:SAID]:
        terminal.current.say(sentence if sentence.startswith(place) else f"{place}: {sentence}")
    if len(places) > SAID:
        terminal.current.say(f"... and {len(places) - SAID} other errors.")
    return sum("error" in row for row in rows)
