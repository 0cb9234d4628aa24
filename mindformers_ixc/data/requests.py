"""Files of questions for run_mode predict: one JSON object a line."""
from __future__ import annotations

import json
import os

from mindformers_ixc.data.conversations import DataError
from mindformers_ixc.resources import resolve_path

REQUEST_KEYS = ("query", "images", "history", "meta_instruction", "hd_num")


def read_requests(path: str | os.PathLike) -> list[dict]:
    """Reads requests.

    A line is `{"query": text}` with, optionally, `images` (a path or a list), `history` (pairs of question and answer),
    `meta_instruction` and `hd_num`.

    Raises:
        DataError: naming file and line.
        FileNotFoundError: when the file is missing.
    """
    file = resolve_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"The request file {path} does not exist.")
    requests = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            request = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON ({error}).") from error
        if not isinstance(request, dict) or not isinstance(request.get("query"), str):
            raise DataError(f"{where}: a request needs the key 'query' with a text.")
        unknown = sorted(set(request) - set(REQUEST_KEYS))
        if unknown:
            raise DataError(f"{where}: unknown keys {unknown}; the choices are {', '.join(REQUEST_KEYS)}.")
        images = request.get("images") or []
        request["images"] = [images] if isinstance(images, str) else images
        requests.append(request)
    if not requests:
        raise DataError(f"{path} holds no requests.")
    return requests
