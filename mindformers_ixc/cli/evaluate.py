"""`mindformers eval`: scores over a conversation file."""
from __future__ import annotations

import argparse
import difflib
import heapq
import importlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Union

from mindformers_ixc import terminal
from mindformers_ixc.cli.answer_file import AnswerFile, Answers, run_of
from mindformers_ixc.cli.heavy import importing
from mindformers_ixc.cli.settings import generation_options
from mindformers_ixc.data.conversations import ConversationReader, ReadingOptions
from mindformers_ixc.data.questions import SourceQuestions
from mindformers_ixc.scores import CIDER_BEST, check_libraries, each_score

# Rows of answers.
Rows = Union[Answers, Sequence[dict]]

# Answers that are scored together.
TOGETHER = 4096

# How each score is called where it is printed.
TITLES = {"exact_match": "exact match", "anls": "ANLS", "relaxed_accuracy": "relaxed accuracy", "cider": "CIDEr"}


def evaluate(arguments: argparse.Namespace) -> int:
    """Answers every question of `arguments.data` and prints the scores, one a line.

    A question that cannot be answered is named on standard error and counts as wrong. Everything that can be refused is
    refused before MindFormers is imported, and where all answers are there already it never is.

    Returns:
        Exit code: 1 when no question could be answered.
    """
    if arguments.benchmark is not None:
        return importlib.import_module("mindformers_ixc.cli.benchmark").run_benchmark(arguments)
    check_libraries(arguments.metrics)
    options = ReadingOptions(arguments.image_folder, image_root=arguments.image_root,
                             ignore_keys=arguments.ignore_keys)
    questions = SourceQuestions(ConversationReader(arguments.data, options), arguments.shuffle_images)
    with AnswerFile(arguments.predictions, questions, run_of(arguments)) as file:
        if file.done:
            terminal.current.say(f"{len(file.done)} of {len(questions)} answers are in {arguments.predictions} "
                                 "already.")
        if len(file.done) < len(questions):
            _answer_rest(file, arguments)
        _name_failed(file.done)
        scores = _scores(file.done, arguments.metrics, arguments.ignore_case)
        if arguments.worst:
            terminal.current.say(worst_answers(file.done, scores, arguments.worst))
        for name, values in scores.items():
            print(score_line(name, values, arguments.ignore_case), file=arguments.answers)
        return int(all("error" in row for row in file.done))


def _scores(rows: Rows, names: Sequence[str], ignore_case: bool) -> dict[str, Sequence[float]]:
    """The scores of every answer. CIDEr takes all texts at once: it counts words over all of them."""
    found: dict[str, array] = {name: array("d") for name in names}
    for name in names:
        answers = iter(rows)
        while some := list(islice(answers, len(rows) if name == "cider" else TOGETHER)):
            found[name].extend(each_score([row.get("answer") for row in some], [row["expected"] for row in some],
                                          [name], ignore_case)[name])
    return dict(found)


def _answer_rest(file: AnswerFile, arguments: argparse.Namespace) -> None:
    """Answers what has no answer yet."""
    with importing(arguments):
        inference = importlib.import_module("mindformers_ixc.cli.inference")
        answer_questions = importlib.import_module("mindformers_ixc.generation.predict").answer_questions
    with terminal.current.waiting(f"Loading {arguments.model}"):
        assistant = inference.load_assistant(arguments)
    size, options = arguments.batch_size, generation_options(arguments)
    with terminal.current.counting(len(file.questions), "answering", "question", initial=len(file.done)) as bar:
        while batch := file.ahead(size):
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


def _name_failed(rows: Rows) -> None:
    """Says which questions could not be answered, and why."""
    failed = 0
    for row in rows:
        if "error" in row:
            failed += 1
            terminal.current.say(f"sample {row['id']}, question {row['question'][:60]!r}: {row['error']}")
    if failed:
        terminal.current.say(f"{failed} of {len(rows)} questions could not be answered and count as wrong.")


def worst_answers(rows: Rows, scores: Mapping[str, Sequence[float]], most: int) -> str:
    """The answers that are furthest from right, worst first, as lines.

    The first score decides, then the others, then how much of the letters is in both texts; what has full marks by the
    first score, or is the expectation itself, is left out.

    Args:
        rows: of `AnswerFile`, or a list of such.
        scores: of `each_score`.
        most: so many at most.
    """
    first, *others = scores
    best = CIDER_BEST if first == "cider" else 1.0
    count = 0

    def key(number: int, row: dict) -> tuple:
        alike = difflib.SequenceMatcher(None, row.get("answer", "").lower(), row["expected"].lower()).ratio()
        return ("error" not in row, *(scores[name][number] for name in (first, *others)), alike)

    def wrong() -> Iterator[tuple[tuple, int, dict]]:
        nonlocal count
        for number, (row, value) in enumerate(zip(rows, scores[first])):
            # of few words not even the expectation itself gets CIDEr's best
            if value < best and ("error" in row or row["answer"].strip() != row["expected"].strip()):
                count += 1
                yield key(number, row), number, row

    chosen = heapq.nsmallest(most, wrong())
    if not count:
        return "No answer is wrong."
    lines = [f"The {len(chosen)} worst of {count} answers without full marks:" if len(chosen) < count else
             f"The {count} answers without full marks, the worst first:" if count > 1 else
             "The only answer without full marks:"]
    for _, _, row in chosen:
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
