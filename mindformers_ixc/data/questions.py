"""The questions of conversations, one by one, for evaluation."""
from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from mindformers_ixc.data.conversations import Conversation
from mindformers_ixc.data.forms import count_places
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
        samples: conversations as `load_conversations` gives them.

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


def shuffle_images(questions: list[Question]) -> None:
    """Gives every question the images of another one that has as many, none its own; in place.

    The order is fixed: question i of a group takes the images of the first later question that shows other images.
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
