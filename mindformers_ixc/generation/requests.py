"""Requests: questions as callers and files give them, checked by name before anything is computed."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mindformers_ixc import errors
from mindformers_ixc.errors import DataError, PromptError
from mindformers_ixc.files import decode_text, parse_json, text_lines
from mindformers_ixc.processing.messages import read_history, read_messages
from mindformers_ixc.resources import resolve_path
from mindformers_ixc.sections import hint, is_whole

REQUEST_KEYS = ("query", "images", "history", "meta_instruction", "hd_num")
MESSAGES_KEYS = ("messages", "hd_num")

# Lists and objects in one another that a line may have; a request needs five.
DEEPEST = 50

# What a picture may be; a JSON file has paths only.
_PICTURES = (str, os.PathLike, bytes, bytearray, np.ndarray, Image.Image)

_OWN_ERRORS = tuple(one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, Exception))


@dataclass
class Request:
    """One line of a request file.

    Attributes:
        line: the line as it was read, a JSON value where it is one, else its text.
        question: arguments of `IXC25Processor.encode_chat`, or `None` when the line is no request.
        error: what is wrong with the line.
        where: file and line, for messages.
    """

    line: object
    question: dict | None = None
    error: str = ""
    where: str = ""


def result_or_error(work: Callable[[], dict]) -> dict:
    """What a piece of work gives, or `{"error": sentence}` where it fails.

    Raises:
        MemoryError: when there is none left; no single request is to blame.
    """
    try:
        return work()
    except MemoryError:
        raise
    except Exception as error:
        return {"error": error_sentence(error)}


def read_requests(path: str | os.PathLike, read: Callable[[object], dict] | None = None) -> list[Request]:
    r"""Reads requests; a bad line is reported in its place, so that the others can be answered.

    A line is `{"query": text}` with, optionally, `images` (a path or a list), `history` (pairs of question and answer,
    or messages), `meta_instruction` and `hd_num`; or `{"messages": [...]}` in the message form, with `hd_num` if need
    be. Lines end at \n only.

    Args:
        path: the file.
        read: reads a line's JSON value, as `read_request` does, and raises `PromptError`; by default that.

    Raises:
        DataError: when the file is not UTF-8 text or holds no line at all.
        FileNotFoundError: when the file is missing.
        OSError: when it cannot be read.
    """
    file = resolve_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"The request file {path} does not exist.")
    lines = text_lines(decode_text(file.read_bytes(), str(path)))
    if not lines:
        raise DataError(f"{path} holds no requests.")
    return [_read_line(line.strip(), f"{path}, line {number}", read or read_request) for number, line in lines]


def _read_line(line: str, where: str, read: Callable[[object], dict]) -> Request:
    try:
        value = parse_json(line, where)
        if _deeper_than(value, DEEPEST):
            raise DataError(f"{where}: lists and objects are nested more than {DEEPEST} deep; a request needs five.")
    except DataError as error:
        return Request(line, error=error_sentence(error), where=where)
    try:
        if not isinstance(value, dict):
            raise PromptError(f"a request must be an object with 'query' or 'messages', found {_found(value)}.")
        return Request(value, read(value), where=where)
    except PromptError as error:
        return Request(value, error=error_sentence(type(error)(f"{where}: {error}")), where=where)


def _deeper_than(value: object, levels: int) -> bool:
    inner = [value]
    for _ in range(levels):
        inner = [item for one in inner if isinstance(one, (dict, list))
                 for item in (one.values() if isinstance(one, dict) else one)]
    return any(isinstance(one, (dict, list)) for one in inner)


def read_request(value: object) -> dict:
    """A request as arguments of `IXC25Processor.encode_chat`.

    Args:
        value: a question, an object with `query` or `messages`, or a list of messages.

    Raises:
        PromptError: naming the key and what was found, for everything that has not the right type.
    """
    if isinstance(value, str):
        value = {"query": value}
    if isinstance(value, (list, tuple)):
        value = {"messages": value}
    if not isinstance(value, Mapping):
        raise PromptError(f"a request must be a question, a dict or a list of messages, found {_found(value)}.")
    known = MESSAGES_KEYS if "messages" in value else REQUEST_KEYS
    for key in value:
        if key not in known:
            raise PromptError(f"unknown key {str(key)[:60]} (value {_found(value[key])}); {hint(key, known)}")
    given = {key: item for key, item in value.items() if item is not None or key in ("query", "messages")}
    if not is_whole(given.get("hd_num", 1), 1):
        raise PromptError(f"hd_num must be a whole number of at least 1, found {_found(given['hd_num'])}.")
    if "messages" in given:
        _check_messages(given["messages"])
        return {**read_messages(given.pop("messages")), **given}
    if "query" not in given:
        found = ", ".join(map(str, given)) or "nothing"
        raise PromptError(f"a request needs the key 'query' with a text, or 'messages' with a list; found {found}.")
    for key in ("query", "meta_instruction"):
        _check_text(given.get(key, ""), key)
    history = {"history": read_history(given["history"])} if "history" in given else {}
    return {**given, "images": _read_images(given.get("images", [])), **history}


def _read_images(images: Any) -> list:
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    for number, image in enumerate(images):
        if not isinstance(image, _PICTURES):
            raise PromptError(f"images[{number}] must be a path, bytes, a PIL image or an array, found "
                              f"{_found(image)}.")
    return images


def _check_text(value: object, name: str) -> None:
    if not isinstance(value, str):
        raise PromptError(f"{name} must be a text, found {_found(value)}.")
    half = next((letter for letter in value if "\ud800" <= letter <= "\udfff"), "") if not value.isascii() else ""
    if half:
        raise PromptError(f"{name} has \\u{ord(half):04x}, half of a surrogate pair, which is no character; write the "
                          "whole pair or take it out.")


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise PromptError(f"messages must be a list with at least one message, found {_found(messages)}.")
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise PromptError(f"{name} must be an object with 'role' and 'content', found {_found(message)}.")
        for key in ("role", "content"):
            if key not in message:
                raise PromptError(f"{name} has no '{key}'.")
        _check_text(message["role"], f"{name}.role")
        content = message["content"]
        if isinstance(content, str):
            _check_text(content, f"{name}.content")
        elif isinstance(content, (list, tuple)):
            _check_parts(content, f"{name}.content")
        else:
            raise PromptError(f"{name}.content must be a text or a list of parts, found {_found(content)}.")


def _check_parts(parts: Any, where: str) -> None:
    for number, part in enumerate(parts):
        name = f"{where}[{number}]"
        if not isinstance(part, Mapping):
            raise PromptError(f"{name} must be an object with 'type', found {_found(part)}.")
        kind = part.get("type")
        _check_text(kind, f"{name}.type")
        if kind == "text":
            _check_text(part.get("text"), f"{name}.text")
        elif kind == "image" and not isinstance(part.get("image"), _PICTURES):
            raise PromptError(f"{name}.image must be a path, bytes, a PIL image or an array, found "
                              f"{_found(part.get('image'))}.")


def _found(value: object) -> str:
    """A value for a message: short, in JSON's words where there are some."""
    if value is None:
        return "null"
    if isinstance(value, (dict, list, tuple)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, (str, bool)):
        text = json.dumps(value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, (int, float)) and not (isinstance(value, int) and value.bit_length() > 200):
        return f"the {type(value).__name__} {value}"
    return f"a value of type {type(value).__name__}"


def error_sentence(error: Exception) -> str:
    """What the caller of one request is told about its error; text that any file and terminal takes."""
    text = str(error)
    if not isinstance(error, (*_OWN_ERRORS, OSError)):
        text = f"The request failed with {type(error).__name__}: {text}"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
