"""Answering a file of requests: in order, in batches, resumable."""
from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mindspore.mint.distributed import barrier

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.weights_mark import weights_mark
from mindformers_ixc.data.batch import full_batches
from mindformers_ixc.device import is_parallel, rank
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import check_target
from mindformers_ixc.generation.requests import Request, error_sentence
from mindformers_ixc.generation.shares import (
    LOOK_S,
    Share,
    check_run,
    normal,
    part_files,
    read_answers,
    result_file,
    share_files,
    write_run,
)
from mindformers_ixc.processing.encoded import EncodedSample

if TYPE_CHECKING:
    from mindformers_ixc.generation.assistant import Assistant
    from mindformers_ixc.generation.best_of import BestOf


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
        self.requests, self.run = requests, normal(run)
        self.done: list[dict] = []
        self.writes = writes and folder is not None
        if folder is None:
            return
        self.target = result_file(folder, name)
        if writes:
            check_target(self.target, "output_dir", make_folder=True)
        self.part, self.run_file = part_files(self.target)
        present = next((path for path in (self.target, self.part) if path.exists()), None)
        if present is not None:
            self.done = self._earlier(present)
        elif writes:       # a run that failed before its first answer may have left what it was
            write_run(self.run, self.run_file)

    def _earlier(self, path: Path) -> list[dict]:
        check_run(self.run, self.run_file, path)
        answers, whole = read_answers(path, self.requests)
        if self.writes and path == self.part:
            os.truncate(path, whole)
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


def predict_run(model: str | os.PathLike, options: Mapping[str, Any]) -> dict:
    """What must be the same for predictions to belong together (`run` of `Predictions`).

    Args:
        model: directory of the model that answers.
        options: of the section `generation`.
    """
    run = {"model": str(Path(model).resolve()), "weights": weights_mark(model), "generation": dict(options)}
    if options.get("reward") is not None:
        run["reward_weights"] = weights_mark(options["reward"])
    return run


def predict(assistant: Callable[[], Assistant], requests: list[Request], folder: str | os.PathLike, run: dict,
            size: int, mode: str, options: dict, replicas: int = 1) -> list[dict]:
    """Answers all requests that an earlier, interrupted run of the same kind has not answered yet.

    Args:
        assistant: called for an `Assistant` when something is left to do.
        requests: lines of the request file.
        folder: output folder.
        run: see `Predictions`.
        size: requests answered at once.
        mode: task LoRAs in use.
        options: decoding options.
        replicas: see `work_through`.

    Returns:
        `{"request": line, "answer": text}` or `{"request": line, "error": sentence}` for each request, in order.

    Raises:
        DataError: as `Predictions`.
    """
    return work_through(assistant, lambda one, batch: answer_batch(one, batch, size, mode, options), requests, folder,
                        run, size, replicas=replicas)


# What results are made with: an `Assistant`, a `Scorer`.
Worker = TypeVar("Worker")


def work_through(load: Callable[[], Worker], work: Callable[[Worker, list[Request]], list[dict]],
                 requests: list[Request], folder: str | os.PathLike | None, run: dict, size: int,
                 name: str = "predictions", doing: str = "answering", replicas: int = 1) -> list[dict]:
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
        replicas: processes that work on a share each, of which this is the one of its rank's number.

    Returns:
        `{"request": line, ...result}` for each request, in order.

    Raises:
        DataError: as `Predictions`.
    """
    left = [] if folder is None else share_files(result_file(folder, name))
    if replicas > 1 or (left and not is_parallel()):
        assert folder is not None, "replicas meet in a folder"
        share = Share(folder, requests, run, rank() if replicas > 1 else 0, name)
        return _work_on_share(load, work, share, size, doing, replicas)
    if left:
        raise DataError(f"{left[0]} holds answers of a run of several replicas; go on with one (parallel_config: "
                        "data_parallel), or by `mindformers run` in a single process.")
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


def _work_on_share(load: Callable[[], Worker], work: Callable[[Worker, list[Request]], list[dict]], share: Share,
                   size: int, doing: str, replicas: int) -> list[dict]:
    """`work_through` for one of several replicas; the first one shows how far all are, and waits for all."""
    if replicas > 1:
        barrier()       # all must have read what is there before one of them writes
    numbers = share.left(size, replicas)
    working = load() if numbers else None
    with terminal.current.counting(len(share.requests), doing, "request", initial=len(share.rows),
                                   disable=True if share.replica else None) as bar:
        while working is not None and numbers:
            batch, numbers = numbers[:size], numbers[size:]
            share.add(batch, work(working, [share.requests[number] for number in batch]))
            bar.update(0 if share.replica else share.look())
        while not share.replica and not share.finished:
            time.sleep(LOOK_S)
            bar.update(share.look())
    return share.close()
