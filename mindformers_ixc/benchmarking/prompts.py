"""What is asked: a row of a table as the prompt that the published measurements had."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mindformers_ixc.benchmarking.catalogue import Benchmark
from mindformers_ixc.processing.prompt import (
    ANSWER_HEADER,
    END_OF_TURN,
    IMAGE_PLACEHOLDER,
    PICTURE,
    START_OF_TURN,
    Piece,
)

# A value of a table as it was read.
Value = object

OPTIONS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")

# What is said where a word is enough.
PHRASE = "Answer the question using a single word or phrase."

# "(A)" to "(J)" are written "A." to "J." everywhere in a prompt.
_BRACKETED = re.compile(r"\(([A-J])\)")

_START, _END = Piece(START_OF_TURN, "mark"), Piece(END_OF_TURN, "mark")
_USER, _NEWLINE, _ANSWER = Piece("user\n"), Piece("\n"), Piece(ANSWER_HEADER)

# What MME's questions end in, which the adapter cuts off.
_MME_END, _MME_PHRASE = "Please answer", " Answer this question briefly"

# Blanks that a line of the adapter's source leaves before the end of a doubled turn.
_LEFT_BLANKS = " " * 15


@dataclass(frozen=True)
class Prompt:
    """A question as it is asked.

    Attributes:
        content: what stands in the user's turn: texts, places of pictures and, where the published prompt has them,
            marks of turns.
    """

    content: tuple[Piece, ...]

    @property
    def has_marks(self) -> bool:
        """Whether a mark of a turn stands in the question itself."""
        return any(piece.kind == "mark" for piece in self.content)

    @property
    def text(self) -> str:
        """The user's turn as one text."""
        return "".join(IMAGE_PLACEHOLDER if piece is PICTURE else piece.text for piece in self.content)

    def pieces(self) -> list[Piece]:
        """The whole prompt behind `<s>`, open for the answer."""
        return joined([_START, _USER, *self.content, _END, _NEWLINE, _START, _ANSWER])


def joined(pieces: list[Piece]) -> list[Piece]:
    """The same with texts that follow one another in one piece, as they are encoded together."""
    found: list[Piece] = []
    for piece in pieces:
        if found and piece.kind == found[-1].kind == "text":
            found[-1] = Piece(found[-1].text + piece.text)
        elif piece.text or piece is PICTURE:
            found.append(piece)
    return found


def make_prompt(benchmark: Benchmark, row: Mapping[str, Value], pictures: int) -> Prompt:
    """The prompt of a row.

    Args:
        benchmark: the data set.
        row: its columns; what is missing is `None`.
        pictures: that come with it.
    """
    question = _BRACKETED.sub(r"\1.", PROMPTS[benchmark.prompt](row))
    asked = [*_places(pictures), Piece(question)]
    if benchmark.prompt == "doubled":
        asked = [Piece(PHRASE), *_whole(asked), Piece(_LEFT_BLANKS)]
    elif benchmark.prompt == "mme":
        asked = _of_mme(pictures, question)
    return Prompt(tuple(joined(asked)))


def _places(pictures: int) -> list[Piece]:
    """Where the pictures stand: in front of the question, several of them with their numbers."""
    if pictures < 2:
        return [PICTURE] * pictures
    found: list[Piece] = []
    for number in range(1, pictures + 1):
        found += [Piece(f"{'' if number == 1 else ' '}Image{number}: "), PICTURE, Piece(";")]
    return found


def _whole(asked: list[Piece]) -> list[Piece]:
    """A user's turn and the beginning of an answer, inside another turn."""
    return [_START, _USER, *asked, _END, _NEWLINE, _START, _ANSWER]


def _of_mme(pictures: int, question: str) -> list[Piece]:
    """MME's: the adapter cuts a whole prompt at the words that ask for yes or no, and puts it into another turn."""
    question, cut, _ = question.partition(_MME_END)
    if not cut:         # then the end of the whole prompt stays, without its last line break
        return [_START, _USER, *_places(pictures), Piece(question), _END, _NEWLINE, _START,
                Piece(f"{ANSWER_HEADER.rstrip()}{_MME_PHRASE}")]
    return [_START, _USER, *_places(pictures), Piece(f"{question.rstrip()}{_MME_PHRASE}")]


def _with_options(row: Mapping[str, Value]) -> str:
    """A question with its options; one without any asks for a word.

    The adapter writes "The answer is" at the beginning of the answer too, and loses it again before the model is asked.
    """
    options = choices_of(row)
    if not options:
        return _with_phrase(row)
    hint = row.get("hint")
    return (f"Question: {row['question']}\nContext: {'N/A' if hint is None else hint}\n"
            f"Options: {' '.join(f'{name}. {text}' for name, text in options.items()).strip()}")


def choices_of(row: Mapping[str, Value]) -> dict[str, Value]:
    """The options of a row by their letters."""
    return {name: row[name] for name in OPTIONS if row.get(name) is not None}


def _with_phrase(row: Mapping[str, Value]) -> str:
    return f"{PHRASE}{row['question']}"


def _bare(row: Mapping[str, Value]) -> str:
    return str(row["question"])


def _in_detail(row: Mapping[str, Value]) -> str:
    return f"{row['question']} Answer this question in detail."


# What is asked of a row, by the name of a prompt.
PROMPTS: dict[str, Callable[[Mapping[str, Value]], str]] = {
    "options": _with_options, "phrase": _with_phrase, "question": _bare, "detail": _in_detail, "doubled": _bare,
    "mme": _bare}


def final_answer(benchmark: Benchmark, answer: str) -> str:
    """What of an answer counts, and goes into the result files."""
    answer = answer.split(END_OF_TURN)[0].strip().split("<|im_end|>")[0].strip().split("The answer is")[-1].strip()
    if benchmark.letter:
        letter = re.search("[A-Z]", answer)
        return letter.group() if letter else "Z"
    return answer
