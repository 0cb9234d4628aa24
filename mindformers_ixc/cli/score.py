"""`mindformers score`: scores of answers by a reward model."""
from __future__ import annotations

import argparse
import importlib
import json

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.weights_mark import weights_mark
from mindformers_ixc.cli.heavy import importing
from mindformers_ixc.cli.sample import say_errors

# Settings that a score depends on, beside the weights.
SETTINGS = ("hd_num", "max_length", "transparency", "exif", "device_target", "control_tokens")


def score(arguments: argparse.Namespace) -> int:
    """Scores every line of `arguments.data`, to a file of `arguments.output_dir` or to standard output.

    A line that cannot be scored has an error in its place; the first different ones are named on standard error.

    Returns:
        Exit code: 1 when no line could be scored.
    """
    with importing(arguments):
        inference = importlib.import_module("mindformers_ixc.cli.inference")
        predict = importlib.import_module("mindformers_ixc.generation.predict")
        judged = importlib.import_module("mindformers_ixc.generation.judged_requests")
        read_requests = importlib.import_module("mindformers_ixc.generation.requests").read_requests
    requests = read_requests(arguments.data, judged.read_judged)

    def load():
        with terminal.current.waiting(f"Loading {arguments.model}"):
            return inference.load_scorer(arguments, arguments.model)

    def work(scorer, batch):
        return judged.score_requests(scorer, batch, arguments.batch_size, arguments.hd_num, arguments.max_length)

    run = {"weights": weights_mark(arguments.model), **{name: getattr(arguments, name) for name in SETTINGS}}
    rows = predict.work_through(load, work, requests, arguments.output_dir, run, arguments.batch_size,
                                name="scores", doing="scoring")
    failed = say_errors(rows, requests)
    if arguments.output_dir is None:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), file=arguments.answers)
    else:
        terminal.current.say(f"{len(rows) - failed} of {len(rows)} lines have scores.")
        print(predict.result_file(arguments.output_dir, "scores"), file=arguments.answers)
    return int(failed == len(rows))

