"""Files of sampled answers: the prompts that are sampled from, a line for each with its samples, and that line read.

`mindformers sample` writes `{"request": prompt, "id": ..., "samples": [...]}` with `answer`, `logp`, `tokens` and
`finished` of each sample, or `error` in place of `samples`; `mindformers label` reads them. Predictions of run mode
predict with `best_of` are read as well: they have `request` and `samples`.
"""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mindformers_ixc.errors import DataError, PromptError
from mindformers_ixc.files import parse_json, read_text, text_lines
from mindformers_ixc.generation.requests import Request, read_request, read_requests
from mindformers_ixc.sections import is_whole

# Samples of a prompt at least: of fewer none is better than another.
LEAST_SAMPLES = 2


@dataclass
class SampledPrompt:
    """A prompt and the answers that were sampled to it.

    Attributes:
        id: its own, or its number in the file, from 1.
        line: the request, as it was written.
        question: arguments of `Processor.encode_chat`.
        answers: texts, in the order in which they were drawn; none where sampling failed.
        finished: whether the model ended each answer.
    """

    id: str | int
    line: object
    question: dict = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    finished: list[bool] = field(default_factory=list)

    def usable(self) -> list[int]:
        """Numbers of the answers that can be learnt from: ended by the model, with a text, the first of equal ones."""
        texts: set[str] = set()
        found = []
        for number, (answer, finished) in enumerate(zip(self.answers, self.finished)):
            if finished and answer.strip() and answer.strip() not in texts:
                texts.add(answer.strip())
                found.append(number)
        return found


def read_prompt(value: object) -> dict:
    """A request of `requests.read_request` that may have an `id`, a text or a whole number.

    Raises:
        PromptError: naming the key and what was found.
    """
    if not isinstance(value, Mapping) or "id" not in value:
        return read_request(value)
    identity = value["id"]
    if not is_identity(identity):
        raise PromptError(f"id must be a text that is not empty or a whole number, found {identity!r:.60}.")
    return {**read_request({key: item for key, item in value.items() if key != "id"}), "id": identity}


def is_identity(value: object) -> bool:
    """Whether a value can name a prompt."""
    return is_whole(value) or (isinstance(value, str) and bool(value.strip()))


def read_prompts(path: str | os.PathLike) -> list[Request]:
    """The prompts of a file, each question with an `id`: its own, or its number among the requests, from 1.

    Raises:
        DataError: when two prompts have the same id; other errors as of `requests.read_requests`.
    """
    requests = read_requests(path, read_prompt)
    for number, request in enumerate(requests, 1):
        if request.question is not None:
            request.question.setdefault("id", number)
    check_identities([one.question["id"] for one in requests if one.question is not None], path)
    return requests


def check_identities(identities: Sequence[str | int], path: str | os.PathLike) -> None:
    """Refuses ids that are written alike: a judge's file could not tell them apart.

    Raises:
        DataError: naming one.
    """
    seen: set[str] = set()
    for identity in identities:
        if str(identity) in seen:
            raise DataError(f"{path} has two prompts with the id {identity!r:.60}; a prompt without an id has its "
                            "number, from 1. Give each an id of its own.")
        seen.add(str(identity))


def read_samples(path: str | os.PathLike) -> list[SampledPrompt]:
    """The prompts of a file of samples.

    Raises:
        DataError: naming the line that is no such line, a prompt with too few samples, or an id that comes twice.
        FileNotFoundError: when the file is missing.
    """
    lines = text_lines(read_text(path))
    if not lines:
        raise DataError(f"{path} holds no samples; `mindformers sample` makes such a file.")
    prompts = [_read_line(parse_json(line, where), number, where) for number, (where, line) in
               enumerate(((f"{path}, line {place}", line) for place, line in lines), 1)]
    check_identities([prompt.id for prompt in prompts if prompt.answers], path)
    return prompts


def _read_line(row: Any, number: int, where: str) -> SampledPrompt:
    """One line of a file of samples."""
    if not isinstance(row, dict) or "request" not in row or ("samples" in row) == ("error" in row):
        found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where}: no line of `mindformers sample`, which has 'request' and 'samples' (or 'error'); "
                        f"found {found or 'nothing'}.")
    identity = row.get("id", number)
    if not is_identity(identity):
        raise DataError(f"{where}: id must be a text that is not empty or a whole number, found {identity!r:.60}.")
    prompt = SampledPrompt(identity, row["request"])
    if "error" in row:
        return prompt
    try:
        prompt.question = read_prompt(row["request"])
    except PromptError as error:
        raise DataError(f"{where}, request: {error}") from error
    prompt.question.pop("id", None)
    samples = row["samples"]
    if not isinstance(samples, list) or not all(map(_is_sample, samples)):
        raise DataError(f"{where}: samples must be a list of objects with a text 'answer', found {samples!r:.80}.")
    if len(samples) < LEAST_SAMPLES:
        raise DataError(f"{where}: samples has {len(samples)}; of fewer than {LEAST_SAMPLES} none is better than "
                        "another, so sample more.")
    prompt.answers = [sample["answer"] for sample in samples]
    prompt.finished = [sample.get("finished", True) is not False for sample in samples]
    return prompt


def _is_sample(sample: object) -> bool:
    return isinstance(sample, dict) and isinstance(sample.get("answer"), str)
