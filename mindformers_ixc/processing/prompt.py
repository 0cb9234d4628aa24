"""Prompts, training texts and labels: pure text and ids, by the rules of the public model.

A prompt is a list of `Piece`: the template's own marks, the texts between them and the places of pictures. Where a mark
stands and what carries loss follows from the turns; what a text says changes neither. `control_tokens` asks for what
the public code does instead: it renders one text, in which everything that is spelled like a mark is one
(`public_pieces`), and finds the answers by searching marks among the ids (`mask_labels`).
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mindformers_ixc.errors import PromptError

IMAGE_PLACEHOLDER = "<ImageHere>"
START_OF_TURN = "[UNUSED_TOKEN_146]"
END_OF_TURN = "[UNUSED_TOKEN_145]"

# What a finished conversation ends with, behind `</s>`, when a reward model reads it.
REWARD_TOKEN = "[UNUSED_TOKEN_130]"

# Positions with this label carry no loss.
IGNORE_INDEX = -100

# What stands between a question's end of turn and its answer; its tokens carry no loss.
ANSWER_HEADER = "assistant\n"
ANSWER_PREFIX = f"\n{START_OF_TURN}{ANSWER_HEADER}"

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt.

    Attributes:
        text: of the prompt; empty for a picture.
        kind: `text` (plain text), `mark` (one control piece of the template), `control` (text in which everything that
            is spelled like a control piece is one) or `picture` (the place of the next picture).
        header: beginning of `text` that carries no loss even if the rest does.
        learnt: whether the piece carries loss.
    """

    text: str = ""
    kind: str = "text"
    header: str = ""
    learnt: bool = False


PICTURE = Piece(kind="picture")


def check_text(text: object, name: str) -> str:
    """A text that can be encoded.

    Args:
        text: what was given for one.
        name: what the messages call it.

    Raises:
        PromptError: when it is no `str`, or has half of a surrogate pair.
    """
    if not isinstance(text, str):
        raise PromptError(f"{name} must be a text, found {type(text).__name__} ({text!r:.40}).")
    half = None if text.isascii() else _SURROGATE.search(text)
    if half:
        code = ord(half.group())
        found = f"{name} has \\u{code:04x} at character {half.start()} (counted from 0)"
        if 0xDC80 <= code <= 0xDCFF:    # Python's own stand-in for a byte that it could not decode
            raise PromptError(f"{found}, which stands for the byte 0x{code - 0xDC00:02X} where UTF-8 text was read; "
                              "give it as UTF-8.")
        raise PromptError(f"{found}, half of a surrogate pair, which is no character; write the whole pair or take it "
                          "out.")
    return text


def chat_turns(query: str, history: Iterable[tuple[str, str]] = (), meta_instruction: str = "") -> list[
        tuple[str, str]]:
    """Turns (role, text) of a chat prompt up to the question."""
    turns = [("system", meta_instruction)] if meta_instruction else []
    for question, answer in history:
        turns += [("user", question), ("assistant", answer)]
    return [*turns, ("user", query)]


def turn(role: str, text: str) -> str:
    """One finished turn of a conversation as text; `role` is `user`, `assistant` or `system`."""
    return f"{START_OF_TURN}{role}\n{text}{END_OF_TURN}\n"


def chat_text(query: str, history: Iterable[tuple[str, str]] = (), meta_instruction: str = "") -> str:
    """Text of a chat prompt, open for the assistant's answer."""
    turns = chat_turns(query, history, meta_instruction)
    return "".join(turn(*one) for one in turns) + f"{START_OF_TURN}{ANSWER_HEADER}"


def training_text(turns: Iterable[tuple[str, str]], end: str = "</s>") -> str:
    """Text of a finished conversation, for training."""
    return "".join(turn(role, text.strip()) for role, text in turns) + end


def turn_pieces(turns: Iterable[tuple[str, str]]) -> list[Piece]:
    """Finished turns; the assistant's, with their ends of turn, are what is learnt."""
    pieces: list[Piece] = []
    for role, text in turns:
        answer = role == "assistant"
        header = f"{role}\n"
        texts = [text] if answer else text.split(IMAGE_PLACEHOLDER)
        pieces += [Piece(START_OF_TURN, "mark"), Piece(header + texts[0], header=header, learnt=answer)]
        for part in texts[1:]:
            pieces += [PICTURE, Piece(part)]
        pieces += [Piece(END_OF_TURN, "mark", learnt=answer), Piece("\n")]
    return pieces


def chat_pieces(turns: Iterable[tuple[str, str]]) -> list[Piece]:
    """A chat prompt of `chat_turns`, open for the assistant's answer."""
    return [*turn_pieces(turns), Piece(START_OF_TURN, "mark"), Piece(ANSWER_HEADER)]


def training_pieces(turns: Iterable[tuple[str, str]], end: str) -> list[Piece]:
    """A finished conversation; the newline behind the last answer is learnt too (public rule), and so is `end`."""
    pieces = turn_pieces((role, text.strip()) for role, text in turns)
    return [*pieces[:-1], Piece("\n", learnt=True), Piece(end, "mark", learnt=True)]


def public_pieces(text: str) -> list[Piece]:
    """A rendered prompt as the public code reads it: split at every placeholder, control text as control pieces."""
    first, *rest = text.split(IMAGE_PLACEHOLDER)
    pieces = [Piece(first, "control")]
    for part in rest:
        pieces += [PICTURE, Piece(part, "control")]
    return pieces


def check_asked(query: str, pictured: bool) -> None:
    """Refuses a question that asks nothing.

    Args:
        query: its text.
        pictured: whether there is a picture, which may be all of it.

    Raises:
        PromptError: for an empty text without one.
    """
    if not query.strip() and not pictured:
        raise PromptError("The query is empty and there is no picture; ask something.")


def check_places(places: int, images: int, where: str = "") -> bool:
    """Compares the places of a prompt with its pictures.

    Args:
        places: of the prompt.
        images: pictures that come with it.
        where: what the prompt belongs to, for the message.

    Returns:
        Whether the only picture has no place; it then goes in front of everything.

    Raises:
        PromptError: when they differ in number.
    """
    if places == 0 and images == 1:
        return True
    if places != images:
        prefix = f"{where}: " if where else ""
        raise PromptError(f"{prefix}the questions have {places} {IMAGE_PLACEHOLDER} for {images} pictures; give every "
                          f"picture its place in a question (only a single picture may go without; in an answer "
                          f"{IMAGE_PLACEHOLDER} is text).")
    return False


def placed_by_public_rule(pieces: Sequence[Piece], images: int) -> list[Piece]:
    """Pieces of which as many as there are pictures are places, by what the public code does with a wrong number.

    Surplus places vanish; the first picture without a place goes to the end, further ones are not shown.
    """
    places = 0
    kept = []
    for piece in pieces:
        if piece is not PICTURE or places < images:
            kept.append(piece)
        places += piece is PICTURE
    return [*kept, PICTURE] if places < images else kept


def mask_labels(ids: np.ndarray, end_of_turn: int, eos: int, prefix_length: int = 5) -> np.ndarray:
    """Training labels of a conversation's ids, not shifted, by the public rule.

    Questions are masked from the answer before them up to the start of the next answer; the answer with its end of
    turn carries loss, and so does everything after the last answer up to and including the first `eos`. A text that was
    cut inside a question carries no loss there. The rule counts ends of turn: one that stands inside a question makes
    questions and answers change places, and so does a system turn.

    Args:
        ids: int `(n,)`; image positions hold -100.
        end_of_turn: id of the end-of-turn token.
        eos: id of `</s>`.
        prefix_length: tokens of `ANSWER_PREFIX` (5 in the public tokenizer).

    Returns:
        int32 `(n,)`.
    """
    labels = np.array(ids, np.int32)
    ends, answer_end = 0, 0
    for i in np.flatnonzero((labels == end_of_turn) | (labels == eos)):
        if labels[i] == eos and eos != end_of_turn:
            labels[i + 1:] = IGNORE_INDEX
            return labels
        if ends % 2 == 0:
            labels[answer_end:i + 1 + prefix_length] = IGNORE_INDEX
        else:
            answer_end = i + 1
        ends += 1
    if ends % 2 == 0:
        labels[answer_end + 1:] = IGNORE_INDEX
    return labels


def shift_labels(labels: np.ndarray) -> np.ndarray:
    """Targets of each position: the label of the next one; the last position has none."""
    return np.append(labels[1:], IGNORE_INDEX).astype(np.int32)
