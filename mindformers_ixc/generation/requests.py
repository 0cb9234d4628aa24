"""Files of questions for run_mode predict: one JSON object a line."""
from __future__ import annotations

import json
import os
from dataclasses import dataclass

from mindformers_ixc.errors import DataError, PromptError
from mindformers_ixc.processing.messages import read_messages
from mindformers_ixc.resources import resolve_path
from mindformers_ixc.sections import check_keys

REQUEST_KEYS = ("query", "images", "history", "meta_instruction", "hd_num")


@dataclass
class Request:
    """One line of a request file.

    Attributes:
        line: the line as it was read, a JSON value where it is one, else its text.
        question: arguments of `IXC25Processor.encode_chat`, or `None` when the line is no request.
        error: what is wrong with the line.
    """

    line: object
    question: dict | None = None
    error: str = ""


def read_requests(path: str | os.PathLike) -> list[Request]:
    """Reads requests; a bad line is reported in its place, so that the others can be answered.

    A line is `{"query": text}` with, optionally, `images` (a path or a list), `history` (pairs of question and answer),
    `meta_instruction` and `hd_num`; or `{"messages": [...]}` in the message form.

    Raises:
        DataError: when the file holds no line at all.
        FileNotFoundError: when the file is missing.
    """
    file = resolve_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"The request file {path} does not exist.")
    requests = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if line.strip():
            requests.append(_read_line(line, f"{path}, line {number}"))
    if not requests:
        raise DataError(f"{path} holds no requests.")
    return requests


def _read_line(line: str, where: str) -> Request:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return Request(line, error=f"{where}: not valid JSON ({error}).")
    try:
        return Request(value, _question(value, where))
    except (DataError, PromptError) as error:
        return Request(value, error=str(error))


def _question(value: object, where: str) -> dict:
    if isinstance(value, dict) and set(value) == {"messages"}:
        try:
            return read_messages(value["messages"])
        except PromptError as error:
            raise PromptError(f"{where}: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("query"), str):
        raise DataError(f"{where}: a request needs the key 'query' with a text, or 'messages' with a list.")
    check_keys(value, REQUEST_KEYS, error=DataError, source=where)
    images = value.get("images") or []
    return {**value, "images": [images] if isinstance(images, str) else images}
