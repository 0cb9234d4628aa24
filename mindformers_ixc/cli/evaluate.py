"""`mindformers eval`: exact match over a conversation file."""
from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

from tqdm import tqdm

from mindformers_ixc.cli.inference import generation_options, load_assistant
from mindformers_ixc.processing.prompt import IMAGE_PLACEHOLDER


@dataclass
class Question:
    """One question of a conversation, with the rounds before it answered as the file says."""

    sample: str
    query: str
    history: list[tuple[str, str]]
    images: list
    expected: str
    system: str = ""

    def request(self, hd_num: int | None) -> dict:
        """Arguments of `IXC25Processor.encode_chat`."""
        return {"query": self.query, "images": self.images, "history": self.history, "hd_num": hd_num,
                "meta_instruction": self.system}


def questions_of(samples) -> list[Question]:
    """Every question of every conversation.

    Args:
        samples: conversations as `load_conversations` gives them.

    Returns:
        Questions in file order; a question's pictures are those up to its round.
    """
    questions = []
    for sample in samples:
        turns = list(sample.turns)
        system = turns.pop(0)[1] if turns[0][0] == "system" else ""
        placed = any(IMAGE_PLACEHOLDER in text for _, text in turns)
        history, used = [], 0 if placed else len(sample.images)
        for (_, query), (_, expected) in zip(turns[0::2], turns[1::2]):
            used += query.count(IMAGE_PLACEHOLDER)
            pictures = list(sample.images[:used])
            questions.append(Question(str(sample.id), query, list(history), pictures, expected, system))
            history.append((query, expected))
    return questions


def shuffle_images(questions: list[Question]) -> None:
    """Gives every question the pictures of another one that has as many, none its own; in place.

    The order is fixed: question i of a group takes the pictures of the first later question that shows other pictures.
    """
    groups: dict[int, list[Question]] = {}
    for question in questions:
        groups.setdefault(len(question.images), []).append(question)
    for count, group in groups.items():
        if count == 0:
            continue
        originals = [question.images for question in group]
        for i, question in enumerate(group):
            others = (originals[(i + step) % len(group)] for step in range(1, len(group)))
            question.images = next((images for images in others if images != question.images), question.images)


def evaluate(arguments: argparse.Namespace) -> int:
    """Answers every question of `arguments.data` and prints the exact match as the last line.

    Returns:
        Exit code.
    """
    from mindformers_ixc.data.conversations import load_conversations

    questions = questions_of(load_conversations(arguments.data, image_folder=arguments.image_folder))
    if arguments.shuffle_images:
        shuffle_images(questions)
    assistant = load_assistant(arguments)
    answers = []
    size = arguments.batch_size
    for start in tqdm(range(0, len(questions), size), desc="answering", unit="batch", disable=None):
        batch = questions[start:start + size]
        padded = batch + [batch[-1]] * (size - len(batch))   # one batch size, one graph
        replies = assistant.answer([question.request(arguments.hd_num) for question in padded], arguments.mode,
                                   **generation_options(arguments))
        answers += replies[:len(batch)]
    _write_predictions(arguments.predictions, questions, answers)
    right = sum(answer == question.expected.strip() for question, answer in zip(questions, answers))
    print(f"exact match: {100 * right / len(questions):.1f} % ({right} of {len(questions)})", file=arguments.answers)
    return 0


def _write_predictions(path: str | None, questions: list[Question], answers: list[str]) -> None:
    if path is None:
        return
    with open(path, "w", encoding="utf-8") as file:
        for question, answer in zip(questions, answers):
            row = {"id": question.sample, "question": question.query, "images": [str(i) for i in question.images],
                   "expected": question.expected, "answer": answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
