"""Conversations as callers give them, as the arguments of `IXC25Processor.encode_chat`: messages and histories."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Union

from mindformers_ixc.errors import PromptError
from mindformers_ixc.processing.prompt import IMAGE_PLACEHOLDER, check_text

# Finished rounds, in a form of `read_history`.
History = Union[Sequence[Sequence[str]], Sequence[Mapping[str, Any]], None]

# Keys of a message or round that chat interfaces keep for themselves and that say nothing to the model.
_SILENT = ("id", "metadata", "options", "timestamp")


def read_history(history: Any) -> list[tuple[str, str]]:
    """Finished rounds as pairs (question, answer).

    Args:
        history: pairs, `{"query": question, "response": answer}`, or messages `{"role": "user" | "assistant",
            "content": text}` in turn; `None` is none. The pictures of all rounds are given with the question.

    Raises:
        PromptError: naming the item and what is wrong with it.
    """
    if history is None:
        return []
    if not isinstance(history, (list, tuple)):
        raise PromptError("history must be a list of pairs (question, answer) or of messages with 'role' and "
                          f"'content', found {type(history).__name__}.")
    rounds: list[tuple[str, str]] = []
    asked: str | None = None
    for number, item in enumerate(history):
        where = f"history[{number}]"
        if isinstance(item, Mapping) and "role" in item:
            _check_keys(item, ("role", "content"), where)
            role, text = item["role"], _read_content(item["content"], where, pictures=False)[0]
            if role == "system":
                raise PromptError(f"{where}: the system turn is no round; give it as meta_instruction.")
            if role != ("user" if asked is None else "assistant"):
                raise PromptError(f"{where}: expected a message of the {'user' if asked is None else 'assistant'}, "
                                  f"found role {role!r:.40}; questions and answers must alternate.")
            if asked is None:
                asked = text
            else:
                rounds.append((asked, text))
                asked = None
        elif asked is not None:
            raise PromptError(f"{where}: expected the assistant's message, found {type(item).__name__}.")
        else:
            rounds.append(_read_pair(item, where))
    if asked is not None:
        raise PromptError(f"history[{len(history) - 1}]: the question has no answer; the question to be answered is "
                          "given as query.")
    return rounds


def _read_pair(item: Any, where: str) -> tuple[str, str]:
    if isinstance(item, Mapping):
        _check_keys(item, ("query", "response"), where)
        return check_text(item["query"], f"{where}, query"), check_text(item["response"], f"{where}, response")
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        count = f" of {len(item)}" if isinstance(item, (list, tuple)) else ""
        raise PromptError(f"{where}: must be a pair (question, answer) or a message with 'role' and 'content', found "
                          f"{type(item).__name__}{count}.")
    question, answer = item
    return check_text(question, f"{where}, question"), check_text(answer, f"{where}, answer")


def _check_keys(item: Mapping, needed: Sequence[str], where: str) -> None:
    """Refuses a mapping that lacks a key, or has one whose content would be lost."""
    missing = [key for key in needed if key not in item]
    if missing:
        raise PromptError(f"{where}: has no '{missing[0]}'; it needs '{needed[0]}' and '{needed[1]}', found "
                          f"{item!r:.80}.")
    for key, value in item.items():
        empty = value is None or (isinstance(value, (str, list, tuple, dict)) and not value)
        if key not in needed and key not in _SILENT and not empty:
            raise PromptError(f"{where}: the key {key!r:.40} is not read, and what it holds would be lost; take it "
                              "out.")


def read_messages(messages: Sequence[dict]) -> dict:
    """Turns messages into query, images and history.

    Args:
        messages: `{"role": "user" | "assistant" | "system", "content": text or list}` in order, the last one from the
            user. A content list holds `{"type": "text", "text": ...}` and, in the user's messages, `{"type": "image",
            "image": ...}`; images stand where they are in the list.

    Returns:
        `query`, `images`, `history` and `meta_instruction`.

    Raises:
        PromptError: naming the message and what is wrong with it.
    """
    if not isinstance(messages, (list, tuple)):
        raise PromptError(f"messages must be a list, found {type(messages).__name__}.")
    system = ""
    images: list = []
    texts: list[str] = []
    for number, message in enumerate(messages):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise PromptError(f"{where}: needs 'role' and 'content', found {message!r:.80}.")
        _check_keys(message, ("role", "content"), where)
        text, added = _read_content(message["content"], where, pictures=message["role"] == "user")
        if message["role"] == "system":
            if number:
                raise PromptError(f"{where}: the system message comes first.")
            system = text
            continue
        expected = ("user", "assistant")[len(texts) % 2]
        if message["role"] != expected:
            raise PromptError(f"{where}: expected one of the {expected}, found role {message['role']!r:.40}; questions "
                              "and answers must alternate.")
        texts.append(text)
        images += added
    if len(texts) % 2 == 0:
        raise PromptError("The last message must be the user's question.")
    return {"query": texts[-1], "images": images, "history": list(zip(texts[:-1:2], texts[1::2])),
            "meta_instruction": system}


def read_answer(message: Mapping[str, Any], where: str) -> str:
    """The text of a message of the assistant's.

    Args:
        message: `role` and `content`, a text or a list of parts of text.
        where: what the messages call it.

    Raises:
        PromptError: naming what is wrong with it.
    """
    _check_keys(message, ("role", "content"), where)
    return _read_content(message["content"], where, pictures=False)[0]


def before_answer(messages: Sequence[Any], where: str) -> list:
    """The messages before the last one, which is the assistant's and is to be judged.

    Args:
        messages: at least one.
        where: what the last one is called.

    Raises:
        PromptError: when no question comes right before it.
    """
    *before, _ = messages
    previous = before[-1] if before else None
    if not before or (isinstance(previous, Mapping) and previous.get("role") in ("assistant", "system")):
        found = f"a message of the {previous['role']}" if previous else "nothing"
        raise PromptError(f"{where}: an answer that is judged follows a question of the user's, found {found} before "
                          "it.")
    return before


def _read_content(content: object, where: str, pictures: bool) -> tuple[str, list]:
    if not isinstance(content, (list, tuple)):
        if not isinstance(content, str):
            raise PromptError(f"{where}: 'content' must be text or a list of parts, found {type(content).__name__}.")
        return check_text(content, f"{where}, content"), []
    text, images = "", []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image") or kind not in part:
            raise PromptError(f"{where}: a part must be {{'type': 'text', 'text': ...}} or {{'type': 'image', 'image': "
                              f"...}}, found {part!r:.80}.")
        _check_keys(part, ("type", kind), f"{where}, content[{number}]")
        if kind == "text":
            text += check_text(part["text"], f"{where}, content[{number}]")
        elif pictures:
            text += IMAGE_PLACEHOLDER
            images.append(part["image"])
        else:
            raise PromptError(f"{where}, content[{number}]: a picture stands here; only the user's messages have "
                              "pictures, and those of a history are given in images, with <ImageHere> in its text.")
    return text, images
