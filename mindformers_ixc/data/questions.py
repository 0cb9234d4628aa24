"""The questions of conversations, one by one, for evaluation."""
from __future__ import annotations

import hashlib
import shlex
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from mindformers_ixc import terminal
from mindformers_ixc.data.conversations import PROGRESS_FROM, Conversation, ConversationReader, raise_errors
from mindformers_ixc.data.forms import count_places
from mindformers_ixc.data.records.base import Place
from mindformers_ixc.errors import DataError
from mindformers_ixc.processing.prompt import IMAGE_PLACEHOLDER
from mindformers_ixc.processing.stored import StoredFile
from mindformers_ixc.resources import shown


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
        """The question as arguments of `IXC25Processor.encode_chat`."""
        return {"query": self.query, "images": self.images, "history": self.history, "hd_num": hd_num,
                "meta_instruction": self.system}


def as_typed(samples: Iterable[Conversation]) -> tuple[str, str]:
    """A picture and a question about it, of the first sample with one picture, as they are typed in a shell.

    Returns:
        Both quoted where a shell needs it; `PICTURE` and `QUESTION` where there is no such sample.
    """
    sample = next((one for one in samples if len(one.images) == 1), None)
    if sample is None:
        return "PICTURE", "QUESTION"
    said = next(text for role, text in sample.turns if role == "user")
    # a picture stands before the text anyway; lines of a text are one in a shell
    text = " ".join(said.strip().removeprefix(IMAGE_PLACEHOLDER).split())
    image = sample.images[0]
    # a file inside another one cannot be named in a shell
    name = "PICTURE" if isinstance(image, StoredFile) else shlex.quote(shown(str(image)))
    return name, shlex.quote(text or "What is shown in the picture?")


def questions_of(samples: Iterable[Conversation]) -> list[Question]:
    """Every question of every conversation.

    Args:
        samples: the conversations.

    Returns:
        Questions in file order; a question's images are those up to its round.
    """
    questions = []
    for sample in samples:
        turns = list(sample.turns)
        system = turns.pop(0)[1] if turns[0][0] == "system" else ""
        placed = count_places(turns) > 0
        history: list[tuple[str, str]] = []
        used = 0 if placed else len(sample.images)
        for (_, query), (_, expected) in zip(turns[0::2], turns[1::2]):
            used += query.count(IMAGE_PLACEHOLDER)
            images = list(sample.images[:used])
            questions.append(Question(str(sample.id), query, list(history), images, expected, system))
            history.append((query, expected))
    return questions


class SourceQuestions:
    """Every question of a source, in order; all samples are looked at once, and read again as they are asked about.

    Args:
        reader: of the source.
        shuffle_images: whether every question gets the pictures of another one that has as many, none its own
            (`other_pictures`).

    Raises:
        DataError: listing what is wrong with which samples.
    """

    def __init__(self, reader: ConversationReader, shuffle_images: bool = False):
        self._reader, self._places = reader, reader.records.places()
        counts, errors = np.zeros(len(self._places), np.int32), list[str]()
        pictures, marks = array("i"), array("q")
        numbers = terminal.current.counted(range(len(counts)), len(counts), "reading questions", "sample",
                                           disable=len(counts) < PROGRESS_FROM or None)
        for number in numbers:
            try:
                questions = self._of_sample(number)
            except DataError as error:
                errors.append(str(error))
                continue
            counts[number] = len(questions)
            if shuffle_images:
                pictures.extend(len(question.images) for question in questions)
                marks.extend(_mark(question.images) for question in questions)
        raise_errors(errors)
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._others = other_pictures(np.array(pictures), np.array(marks)) if shuffle_images else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __iter__(self) -> Iterator[Question]:
        count = 0
        for number in range(len(self._places)):
            for question in self._of_sample(number):
                if self._others is not None and self._others[count] != count:
                    question.images = self._pictures_of(int(self._others[count]))
                yield question
                count += 1

    def _of_sample(self, number: int) -> list[Question]:
        return questions_of([self._reader.read(number, Place(*self._places[number].tolist()))])

    def _pictures_of(self, number: int) -> list:
        sample = int(np.searchsorted(self._ends, number, side="right"))
        return self._of_sample(sample)[number - int(self._ends[sample])].images


def _mark(images: list) -> int:
    """A number that is another one for other pictures."""
    names = "\0".join(image.name if isinstance(image, StoredFile) else str(image) for image in images)
    return int.from_bytes(hashlib.blake2b(names.encode(), digest_size=8).digest(), "little", signed=True)


def other_pictures(counts: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """For every question the number of one that has as many pictures, which are others; itself if there is none.

    The order is fixed: it is the first later one among those of as many pictures, from the last one on the first.

    Args:
        counts: pictures of each question.
        marks: a number for the pictures of each; of the same ones the same.
    """
    found = np.arange(len(counts))
    for count in np.unique(counts[counts > 0]):
        group = np.flatnonzero(counts == count)
        changes = np.flatnonzero(marks[group] != np.roll(marks[group], 1))
        if len(changes):
            following = np.searchsorted(changes, np.arange(len(group)), side="right")
            found[group] = group[changes[following % len(changes)]]
    return found
