"""`mindformers eval`: scores over a conversation file."""
from __future__ import annotations

import argparse
import difflib
import importlib
from collections.abc import Sequence

from mindformers_ixc import terminal
from mindformers_ixc.cli.answer_file import AnswerFile, run_of
from mindformers_ixc.cli.heavy import importing
from mindformers_ixc.cli.settings import generation_options
from mindformers_ixc.data.conversations import load_conversations
from mindformers_ixc.data.questions import questions_of, shuffle_images
from mindformers_ixc.scores import CIDER_BEST, check_libraries, each_score

# How each score is called where it is printed.
TITLES = {"exact_match": "exact match", "anls": "ANLS", "relaxed_accuracy": "relaxed accuracy", "cider": "CIDEr"}


def evaluate(arguments: argparse.Namespace) -> int:
    """Answers every question of `arguments.data` and prints the scores, one a line.

    A question that cannot be answered is named on standard error and counts as wrong. Everything that can be refused is
    refused before MindFormers is imported, and where all answers are there already it never is.

    Returns:
        Exit code: 1 when no question could be answered.
    """
    check_libraries(arguments.metrics)
    questions = questions_of(load_conversations(arguments.data, image_folder=arguments.image_folder,
                                                image_root=arguments.image_root, ignore_keys=arguments.ignore_keys))
    if arguments.shuffle_images:
        shuffle_images(questions)
    with AnswerFile(arguments.predictions, questions, run_of(arguments)) as file:
        if file.done:
            terminal.current.say(f"{len(file.done)} of {len(questions)} answers are in {arguments.predictions} "
                                 "already.")
        if len(file.done) < len(questions):
            _answer_rest(file, arguments)
    rows = file.done
    _name_failed(rows)
    scores = each_score([row.get("answer") for row in rows], [row["expected"] for row in rows], arguments.metrics,
                        arguments.ignore_case)
    if arguments.worst:
        terminal.current.say(worst_answers(rows, scores, arguments.worst))
    for name, values in scores.items():
        print(score_line(name, values, arguments.ignore_case), file=arguments.answers)
    return int(all("error" in row for row in rows))


def _answer_rest(file: AnswerFile, arguments: argparse.Namespace) -> None:
    """Answers what has no answer yet."""
    with importing(arguments):
        inference = importlib.import_module("mindformers_ixc.cli.inference")
        answer_questions = importlib.import_module("mindformers_ixc.generation.predict").answer_questions
    with terminal.current.waiting(f"Loading {arguments.model}"):
        assistant = inference.load_assistant(arguments)
    questions, size, options = file.questions, arguments.batch_size, generation_options(arguments)
    with terminal.current.counting(len(questions), "answering", "question", initial=len(file.done)) as bar:
        while len(file.done) < len(questions):
            batch = questions[len(file.done):len(file.done) + size]
            file.add(answer_questions(assistant, [one.request(arguments.hd_num) for one in batch], size,
                                      arguments.mode, options))
            bar.update(len(batch))


def score_line(name: str, values: Sequence[float], ignore_case: bool) -> str:
    """A score as it is printed: the mean in percent, and where each answer is right or wrong, how many are right."""
    mean, title = 100 * sum(values) / len(values), TITLES[name]
    if name == "exact_match" and ignore_case:
        title += " (case ignored)"
    if name == "cider":
        return f"{title}: {mean:.1f}"
    counted = f" ({sum(values):.0f} of {len(values)})" if name in ("exact_match", "relaxed_accuracy") else ""
    return f"{title}: {mean:.1f} %{counted}"


def _name_failed(rows: Sequence[dict]) -> None:
    """Says which questions could not be answered, and why."""
    failed = [row for row in rows if "error" in row]
    for row in failed:
        terminal.current.say(f"sample {row['id']}, question {row['question'][:60]!r}: {row['error']}")
    if failed:
        terminal.current.say(f"{len(failed)} of {len(rows)} questions could not be answered and count as wrong.")


def worst_answers(rows: Sequence[dict], scores: dict[str, list[float]], most: int) -> str:
    """The answers that are furthest from right, worst first, as lines.

    The first score decides, then the others, then how much of the letters is in both texts; what has full marks by the
    first score, or is the expectation itself, is left out.

    Args:
        rows: of `AnswerFile`.
        scores: of `each_score`.
        most: so many at most.
    """
    first, *others = scores
    best = CIDER_BEST if first == "cider" else 1.0
    # of few words not even the expectation itself gets CIDEr's best
    wrong = [number for number, (row, value) in enumerate(zip(rows, scores[first])) if value < best
             and ("error" in row or row["answer"].strip() != row["expected"].strip())]

    def key(number: int) -> tuple:
        row = rows[number]
        alike = difflib.SequenceMatcher(None, row.get("answer", "").lower(), row["expected"].lower()).ratio()
        return ("error" not in row, *(scores[name][number] for name in (first, *others)), alike)

    if not wrong:
        return "No answer is wrong."
    chosen = sorted(wrong, key=key)[:most]
    lines = [f"The {len(chosen)} worst of {len(wrong)} answers without full marks:" if len(chosen) < len(wrong) else
             f"The {len(wrong)} answers without full marks, the worst first:" if len(wrong) > 1 else
             "The only answer without full marks:"]
    for number in chosen:
        row = rows[number]
        lines += [f"  sample {row['id']}{': ' if row['images'] else ''}{', '.join(row['images'])}",
                  f"    question  {_line(row['question'])}", f"    expected  {_line(row['expected'])}",
                  f"    error     {_line(row['error'])}" if "error" in row else
                  f"    answer    {_line(row['answer']) or '(empty)'}"]
    return "\n".join(lines)


def _line(text: str) -> str:
    """A text as one line of a terminal; what is too long is cut."""
    text = " ".join(text.split())
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= 200 else f"{text[:197]}..."
