"""`mindformers eval`: exact match over a conversation file."""
from __future__ import annotations

import argparse
import json

from tqdm import tqdm

from mindformers_ixc.cli.inference import generation_options, load_assistant
from mindformers_ixc.data.batch import full_batches
from mindformers_ixc.data.conversations import load_conversations
from mindformers_ixc.files import write_whole
from mindformers_ixc.generation.questions import Question, questions_of, shuffle_images


def evaluate(arguments: argparse.Namespace) -> int:
    """Answers every question of `arguments.data` and prints the exact match as the last line.

    Returns:
        Exit code.
    """
    questions = questions_of(load_conversations(arguments.data, image_folder=arguments.image_folder,
                                                image_root=arguments.image_root, ignore_keys=arguments.ignore_keys))
    if arguments.shuffle_images:
        shuffle_images(questions)
    assistant = load_assistant(arguments)
    answers, size = [], arguments.batch_size
    for batch, real in tqdm(full_batches(questions, size), total=-(-len(questions) // size), desc="answering",
                            unit="batch", disable=None):
        replies = assistant.answer([question.request(arguments.hd_num) for question in batch], arguments.mode,
                                   **generation_options(arguments))
        answers += replies[:real]
    _write_predictions(arguments.predictions, questions, answers)
    right = sum(answer == question.expected.strip() for question, answer in zip(questions, answers))
    print(f"exact match: {100 * right / len(questions):.1f} % ({right} of {len(questions)})", file=arguments.answers)
    return 0


def _write_predictions(path: str | None, questions: list[Question], answers: list[str]) -> None:
    if path is None:
        return
    rows = [{"id": question.sample, "question": question.query, "images": [str(i) for i in question.images],
             "expected": question.expected, "answer": answer} for question, answer in zip(questions, answers)]
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
