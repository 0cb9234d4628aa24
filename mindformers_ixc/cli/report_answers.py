"""Sample answers of a run, with their pictures, as they changed from evaluation to evaluation."""
from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mindformers_ixc.cli.report_runs import Run
from mindformers_ixc.errors import ImageError
from mindformers_ixc.pages.page import text
from mindformers_ixc.processing.pictures import load_image
from mindformers_ixc.processing.video import is_video
from mindformers_ixc.resources import resolve_path

# Longest side of a picture on the page, so that a page with a dozen of them stays a few hundred kilobytes.
SIDE = 360

# Pictures of a question that are shown, and versions of its answer: the first, the last and those between them.
PICTURES, VERSIONS = 4, 8


# What a question is told apart by: sample, question, expected answer.
Key = tuple[str, str, str]


def answer_cards(run: Run) -> str:
    """The questions whose answers were written down, one card each; empty if there are none.

    Args:
        run: the run.
    """
    found: dict[Key, list[tuple[int, dict]]] = {}
    for row in run.answers:
        for key, entry in _entries(row):
            found.setdefault(key, []).append((row["step"], entry))
    return _cards([_card(versions[-1][1], [(_steps(first, last), answer) for first, last, answer in _changes(versions)])
                   for versions in found.values()])


def compared_cards(runs: list[Run]) -> str:
    """The last answers of several runs to the questions that at least two of them were asked."""
    found: dict[Key, list[tuple[str, dict]]] = {}
    for run in runs:
        for row in run.answers[-1:]:
            for key, entry in _entries(row):
                found.setdefault(key, []).append((f"{run.name}, step {row['step']}", entry))
    return _cards([_card(answers[-1][1], [(name, _answer(entry)) for name, entry in answers])
                   for answers in found.values() if len(answers) > 1])


def _entries(row: dict) -> Iterator[tuple[Key, dict]]:
    """The questions of one evaluation."""
    entries = row.get("answers")
    for entry in entries if isinstance(entries, list) else []:
        if isinstance(entry, dict):
            yield (str(entry.get("sample")), str(entry.get("question")), str(entry.get("expected"))), entry


def _answer(entry: dict) -> str:
    return str(entry.get("answer", ""))


def _cards(cards: list[str]) -> str:
    return f'<div class="answers">{"".join(cards)}</div>' if cards else ""


def _card(entry: dict, answers: list[tuple[str, str]]) -> str:
    """A question with its pictures and answers, each with what it is of."""
    images = entry.get("images")
    pictures = _pictures([str(image) for image in images]) if isinstance(images, list) and images else ""
    question, expected = str(entry.get("question", "")), str(entry.get("expected", ""))
    lines = "".join(f"<dt>{text(name)}</dt><dd>{_judged(answer, expected)}</dd>" for name, answer in answers)
    return (f'<article class="answer">{pictures}<div class="question">{text(question)}</div><dl>{lines}'
            f'<dt class="expected">expected</dt><dd class="expected">{text(expected)}</dd></dl></article>')


def _changes(versions: list[tuple[int, dict]]) -> list[tuple[int, int, str]]:
    """First step, last step and answer, one for as long as the answer stayed; of very many the outer ones."""
    found: list[tuple[int, int, str]] = []
    for step, entry in versions:
        answer = _answer(entry)
        if found and found[-1][2] == answer:
            found[-1] = (found[-1][0], step, answer)
        else:
            found.append((step, step, answer))
    if len(found) <= VERSIONS:
        return found
    places = [round(number * (len(found) - 1) / (VERSIONS - 1)) for number in range(VERSIONS)]
    return [found[place] for place in places]


def _steps(first: int, last: int) -> str:
    return f"step {first}" if first == last else f"step {first} to {last}"


def _judged(answer: str, expected: str) -> str:
    """An answer, and whether it is what was expected."""
    right = answer.strip() == expected.strip()
    shown = text(answer) if answer.strip() else '<span class="note">(an empty answer)</span>'
    return f'<span class="{"good" if right else "bad"}">{"&#10003;" if right else "&#10007;"}</span> {shown}'


def _pictures(images: list[str]) -> str:
    more = f'<span class="note">and {len(images) - PICTURES} more</span>' if len(images) > PICTURES else ""
    return f'<div class="pictures">{"".join(_picture(image) for image in images[:PICTURES])}{more}</div>'


def _picture(source: str) -> str:
    """A picture in the page itself; of one that cannot be shown its name, and why."""
    name = Path(source).name
    if is_video(source):
        return f'<span class="note">video {text(name)}</span>'
    try:
        image = load_image(resolve_path(source), transparency="white")
    except (ImageError, OSError, ValueError) as error:
        return f'<span class="note" title="{text(error)}">{text(name)} cannot be shown: it is missing or damaged</span>'
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=82)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{text(name)}" title="{text(name)}" src="data:image/jpeg;base64,{data}">'
