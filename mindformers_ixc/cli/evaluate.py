"""`mindformers eval`: exact match over a conversation file."""
from __future__ import annotations

import argparse
import json
import sys

from tqdm import tqdm

from mindformers_ixc.cli.inference import generation_options, load_assistant
from mindformers_ixc.data.conversations import load_conversations
from mindformers_ixc.files import write_whole
from mindformers_ixc.generation.predict import answer_questions
from mindformers_ixc.generation.questions import Question, questions_of, shuffle_images


def evaluate(arguments: argparse.Namespace) -> int:
    """Answers every question of `arguments.data` and prints the exact match as the last line.

    A question that cannot be answered is named on standard error and counts as wrong.

    Returns:
        Exit code: 1 when no question could be answered.
    """
    questions = questions_of(load_conversations(arguments.data, image_folder=arguments.image_folder,
                                                image_root=arguments.image_root, ignore_keys=arguments.ignore_keys))
    if arguments.shuffle_images:
        shuffle_images(questions)
    assistant, size = load_assistant(arguments), arguments.batch_size
    results: list[dict] = []
    for start in tqdm(range(0, len(questions), size), desc="answering", unit="batch", disable=None):
        batch = [question.request(arguments.hd_num) for question in questions[start:start + size]]
        results += answer_questions(assistant, batch, size, arguments.mode, generation_options(arguments))
    _write_predictions(arguments.predictions, questions, results)
    failed = _name_failed(questions, results)
    right = sum(result.get("answer") == question.expected.strip() for question, result in zip(questions, results))
    print(f"exact match: {100 * right / len(questions):.1f} % ({right} of {len(questions)})", file=arguments.answers)
    return int(failed == len(questions))


def _name_failed(questions: list[Question], results: list[dict]) -> int:
    """Says which questions could not be answered, and why; how many these are."""
    failed = [(question, result["error"]) for question, result in zip(questions, results) if "error" in result]
    for question, error in failed:
        print(f"sample {question.sample}, question {question.query[:60]!r}: {error}", file=sys.stderr)
    if failed:
        print(f"{len(failed)} of {len(questions)} questions could not be answered and count as wrong.",
              file=sys.stderr)
    return len(failed)


def _write_predictions(path: str | None, questions: list[Question], results: list[dict]) -> None:
    if path is None:
        return
    rows = [{"id": question.sample, "question": question.query, "images": [str(i) for i in question.images],
             "expected": question.expected, **result} for question, result in zip(questions, results)]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
