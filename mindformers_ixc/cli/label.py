"""`mindformers label`: preference pairs of sampled answers, by a reward model or a judge's file."""
from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.weights_mark import weights_mark
from mindformers_ixc.cli.heavy import importing
from mindformers_ixc.cli.sample import say_errors
from mindformers_ixc.cli.score import SETTINGS
from mindformers_ixc.errors import DataError
from mindformers_ixc.generation import preference_pairs
from mindformers_ixc.generation.judge_file import Verdict, read_judge
from mindformers_ixc.generation.requests import Request
from mindformers_ixc.generation.sampled_answers import SampledPrompt, read_samples


def label(arguments: argparse.Namespace) -> int:
    """Writes the pairs of `arguments.sampled` to `arguments.target`, and says what was left out.

    Returns:
        Exit code.

    Raises:
        DataError: for files of another form, verdicts on other samples, or when no pair is left; nothing is written
            then.
    """
    prompts = read_samples(arguments.sampled)
    verdicts = _scores(arguments, prompts) if arguments.judge is None else read_judge(arguments.judge, prompts)
    options = preference_pairs.PairOptions(arguments.min_margin, arguments.max_length_ratio)
    labelled = preference_pairs.label(prompts, verdicts, arguments.target, options)
    if not labelled.rows:
        raise DataError(f"{arguments.sampled} gives no pair, so {arguments.target} is not written.\n"
                        f"{labelled.report()}")
    preference_pairs.write_pairs(labelled.rows, arguments.target)
    terminal.current.say(labelled.report())
    print(arguments.target, file=arguments.answers)
    return 0


def _scores(arguments: argparse.Namespace, prompts: list[SampledPrompt]) -> dict[str, Verdict]:
    """What the reward model says of the answers that can be learnt from, gone on from where it was stopped."""
    judged = [prompt for prompt in prompts if len(prompt.usable()) > 1]
    if not judged:
        return {}
    with importing(arguments):
        inference = importlib.import_module("mindformers_ixc.cli.inference")
        predict = importlib.import_module("mindformers_ixc.generation.predict")
        score_requests = importlib.import_module("mindformers_ixc.generation.judged_requests").score_requests

    def load():
        with terminal.current.waiting(f"Loading {arguments.reward}"):
            return inference.load_scorer(arguments, arguments.reward)

    def work(scorer, batch):
        return score_requests(scorer, batch, arguments.batch_size, arguments.hd_num, arguments.max_length)

    target = Path(arguments.target)
    run = {"weights": weights_mark(arguments.reward), **{name: getattr(arguments, name) for name in SETTINGS}}
    requests = [to_be_scored(prompt) for prompt in judged]
    rows = predict.work_through(load, work, requests, target.parent, run, 1, name=f"{target.stem}.scores",
                                doing="scoring")
    if say_errors(rows, requests) == len(rows):
        raise DataError(f"{arguments.reward} gave none of {len(rows)} prompts' answers a score, so {target} is not "
                        "written.")
    verdicts = {}
    for prompt, row in zip(judged, rows):
        if "scores" in row:
            merits = dict(zip(prompt.usable(), row["scores"]))
            verdicts[str(prompt.id)] = Verdict(tuple(merits.get(number, 0.0) for number in range(len(prompt.answers))))
    return verdicts


def to_be_scored(prompt: SampledPrompt) -> Request:
    """A prompt and its usable answers as `score_requests` takes them.

    `hd_num` of a prompt is for the model that answered; the reward model cuts pictures by its own, as with best of N.
    """
    answers = [prompt.answers[number] for number in prompt.usable()]
    question = {key: value for key, value in prompt.question.items() if key != "hd_num"}
    return Request({"id": prompt.id, "request": prompt.line, "answers": answers},
                   {**question, "answers": answers, "several": True}, where=f"prompt {prompt.id!r:.60}")
