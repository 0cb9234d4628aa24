"""Prompts, training texts and labels: pure text and ids, by the rules of the public model."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mindformers_ixc.errors import PromptError

IMAGE_PLACEHOLDER = "<ImageHere>"
START_OF_TURN = "[UNUSED_TOKEN_146]"
END_OF_TURN = "[UNUSED_TOKEN_145]"

# Positions with this label carry no loss.
IGNORE_INDEX = -100

# What stands between a question's end of turn and its answer; its tokens carry no loss.
ANSWER_PREFIX = f"\n{START_OF_TURN}assistant\n"


def turn(role: str, text: str) -> str:
    """One finished turn of a conversation; `role` is `user`, `assistant` or `system`."""
    return f"{START_OF_TURN}{role}\n{text}{END_OF_TURN}\n"


def chat_text(query: str, history: Sequence[tuple[str, str]] = (), meta_instruction: str = "") -> str:
    """Text of a chat prompt, open for the assistant's answer."""
    text = turn("system", meta_instruction) if meta_instruction else ""
    for question, answer in history:
        text += turn("user", question) + turn("assistant", answer)
    return text + turn("user", query) + f"{START_OF_TURN}assistant\n"


def training_text(turns: Sequence[tuple[str, str]], end: str = "</s>") -> str:
    """Text of a finished conversation, for training."""
    return "".join(turn(role, text.strip()) for role, text in turns) + end


def split_at_placeholders(text: str, images: int, where: str = "") -> tuple[list[str], bool]:
    """Text parts around the placeholders of a prompt.

    Args:
        text: rendered prompt.
        images: images that come with it.
        where: what the prompt belongs to, for the message.

    Returns:
        Parts, one more than there are images in the text, and whether the one image has no placeholder (it then
        goes in front of the whole text).

    Raises:
        PromptError: when placeholders and images differ in number.
    """
    parts = text.split(IMAGE_PLACEHOLDER)
    if len(parts) == 1 and images == 1:
        return parts, True
    if len(parts) - 1 != images:
        prefix = f"{where}: " if where else ""
        raise PromptError(f"{prefix}the text has {len(parts) - 1} {IMAGE_PLACEHOLDER} for {images} pictures; give "
                          "every picture its place (only a single picture may go without).")
    return parts, False


def mask_labels(ids: np.ndarray, end_of_turn: int, eos: int, prefix_length: int = 5) -> np.ndarray:
    """Training labels of a conversation's ids, not shifted.

    Questions are masked from the answer before them up to the start of the next answer; the answer with its end of
    turn carries loss, and so does everything after the last answer up to and including the first `eos`. A text that was
    cut inside a question carries no loss there.

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
