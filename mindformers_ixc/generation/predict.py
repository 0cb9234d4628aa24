"""Answering a file of requests: in order, in batches, resumable."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mindspore.mint.distributed import barrier

from mindformers_ixc import terminal
from mindformers_ixc.data.batch import full_batches
from mindformers_ixc.device import is_parallel, rank
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import check_target, decode_text, parse_json, read_json, text_lines, write_whole
from mindformers_ixc.generation.requests import Request, error_sentence
from mindformers_ixc.processing.processor import EncodedSample

if TYPE_CHECKING:
    from mindformers_ixc.generation.assistant import Assistant
    from mindformers_ixc.generation.best_of import BestOf


def result_file(folder: str | os.PathLike, name: str = "predictions") -> Path:
    """Where finished results are."""
    return Path(folder) / f"{name}.jsonl"


class Predictions:
    """The answers of a run, one JSON line each, in `<folder>/predictions.jsonl`.

    Until all are there they are in `predictions.part.jsonl`, beside which `predictions.run.json` says what answered.

    Args:
        folder: output folder of the run; `None` writes nothing.
        requests: lines of the request file.
        run: what must be the same for answers to belong together (model, options), JSON-serialisable.
        writes: whether this process writes; in a parallel run all know all answers and one of them does.
        name: of the files, in place of `predictions`.

    Attributes:
        done: answers that an earlier run has left.

    Raises:
        DataError: when the folder holds answers to other requests or of another model or options.
        OSError: when nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike | None, requests: list[Request], run: dict, writes: bool = True,
                 name: str = "predictions"):
        self.requests, self.run = requests, json.loads(json.dumps(run, default=str))
        self.done: list[dict] = []
        self.writes = writes and folder is not None
        if folder is None:
            return
        self.target = result_file(folder, name)
        if writes:
            check_target(self.target, "output_dir", make_folder=True)
        self.part, self.run_file = self.target.with_suffix(".part.jsonl"), self.target.with_suffix(".run.json")
        present = next((path for path in (self.target, self.part) if path.exists()), None)
        if present is not None:
            self.done = self._earlier(present)
        elif writes and not self.run_file.exists():
            write_whole(self.run_file, json.dumps(self.run, ensure_ascii=False, indent=1) + "\n")

    def _earlier(self, path: Path) -> list[dict]:
        advice = "write elsewhere (another output_dir), or delete the file to begin anew."
        try:
            same = read_json(self.run_file) == self.run
        except (OSError, DataError):
            same = False
        if not same:
            raise DataError(f"{path} holds answers of another model or other options than this run's; {advice}")
        content = path.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]          # a killed run may have left half a line
        answers: list[dict] = []
        for number, line in text_lines(decode_text(whole, str(path))):
            answer = parse_json(line, f"{path}, line {number}")
            known = self.requests[len(answers)] if len(answers) < len(self.requests) else None
            if known is not None and not (isinstance(answer, dict) and _same(answer.get("request"), known.line)):
                raise DataError(f"{path}, line {number}: an answer to another request than this run's; {advice}")
            answers.append(answer)
        if len(answers) > len(self.requests):
            raise DataError(f"{path} has {len(answers)} answers to {len(self.requests)} requests; {advice}")
        if self.writes and path == self.part and len(whole) < len(content):
            os.truncate(path, len(whole))
        return answers

    @property
    def finished(self) -> bool:
        """Whether every request has its answer."""
        return len(self.done) == len(self.requests)

    def add(self, results: list[dict]) -> None:
        """Appends the next answers, `{"answer": text}` or `{"error": sentence}` each."""
        rows = [{"request": request.line, **result}
                for request, result in zip(self.requests[len(self.done):], results)]
        if self.writes:
            with open(self.part, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
        self.done += rows

    def close(self) -> None:
        """Gives the finished file its name."""
        if self.writes and self.part.exists():
            self.part.replace(self.target)


def _same(one: object, other: object) -> bool:
    """Whether two JSON values are written alike; NaN, which JSON files may have, equals nothing."""
    return json.dumps(one) == json.dumps(other)


def answer_batch(assistant: Assistant, requests: list[Request], size: int, mode: str, options: dict) -> list[dict]:
    """Answers requests as one batch of `size` rows; those that fail get their error in place of an answer."""
    good = [request.question for request in requests if request.question is not None]
    answers = iter(answer_questions(assistant, good, size, mode, options))
    return [{"error": request.error} if request.question is None else next(answers) for request in requests]


def answer_questions(assistant: Assistant, questions: Sequence[dict], size: int, mode: str,
                     options: dict) -> list[dict]:
    """Answers questions as one batch of `size` rows, whatever may be wrong with some of them.

    Args:
        assistant: who answers.
        questions: arguments of `Processor.encode_chat`, `size` at most.
        size: rows of the batch, so that one graph serves all batches.
        mode: task LoRAs in use.
        options: decoding options.

    Returns:
        `{"answer": text}` or `{"error": sentence}` for each question.

    Raises:
        MemoryError: when there is none left while decoding; no single question is to blame.
    """
    results: list[dict] = [{} for _ in questions]
    samples: dict[int, EncodedSample] = {}
    for i, question in enumerate(questions):
        try:
            samples[i] = assistant.encode(question)
        except Exception as error:
            results[i] = {"error": error_sentence(error)}
    groups = [list(samples)] if samples else []
    while groups:
        group = groups.pop()
        rows, _ = next(full_batches([samples[i] for i in group], size))
        try:
            texts = assistant.answer_samples(rows, mode, **options)
        except MemoryError:
            raise
        except Exception as error:
            if len(group) == 1:
                results[group[0]] = {"error": error_sentence(error)}
            groups += [[i] for i in group if len(group) > 1]        # one of them is at fault: each by itself
        else:
            for i, text in zip(group, texts):
                results[i] = {"answer": text}
    return results


def best_batch(best: BestOf, requests: list[Request], mode: str, options: dict) -> list[dict]:
    """Best answers to requests; those that fail get their error in place of an answer."""
    answers = iter(best.results([one.question for one in requests if one.question is not None], mode, options))
    return [{"error": one.error} if one.question is None else next(answers) for one in requests]


def predict(assistant: Callable[[], Assistant], requests: list[Request], folder: str | os.PathLike, run: dict,
            size: int, mode: str, options: dict) -> list[dict]:
    """Answers all requests that an earlier, interrupted run of the same kind has not answered yet.

    Args:
        assistant: called for an `Assistant` when something is left to do.
        requests: lines of the request file.
        folder: output folder.
        run: see `Predictions`.
        size: requests answered at once.
        mode: task LoRAs in use.
        options: decoding options.

    Returns:
        `{"request": line, "answer": text}` or `{"request": line, "error": sentence}` for each request, in order.

    Raises:
        DataError: as `Predictions`.
    """
    return work_through(assistant, lambda one, batch: answer_batch(one, batch, size, mode, options), requests, folder,
                        run, size)


# What results are made with: an `Assistant`, a `Scorer`.
Worker = TypeVar("Worker")


def work_through(load: Callable[[], Worker], work: Callable[[Worker, list[Request]], list[dict]],
                 requests: list[Request], folder: str | os.PathLike | None, run: dict, size: int,
                 name: str = "predictions", doing: str = "answering") -> list[dict]:
    """Works on all requests that an earlier, interrupted run of the same kind has left.

    Args:
        load: called for what works, when something is left to do.
        work: gives the results of a batch.
        requests: lines of the request file.
        folder: output folder; `None` writes nothing.
        run: see `Predictions`.
        size: requests at once.
        name: of the files.
        doing: what is done, for whoever waits.

    Returns:
        `{"request": line, ...result}` for each request, in order.

    Raises:
        DataError: as `Predictions`.
    """
    writes = rank() == 0
    predictions = Predictions(folder, requests, run, writes, name)
    if is_parallel():
        barrier()       # all must have read what is there before one of them writes
    working = None if predictions.finished else load()
    with terminal.current.counting(len(requests), doing, "request", initial=len(predictions.done),
                                   disable=None if writes else True) as bar:
        while working is not None and not predictions.finished:
            start = len(predictions.done)
            batch = requests[start:start + size]
            predictions.add(work(working, batch))
            bar.update(len(batch))
    predictions.close()
    return predictions.done
