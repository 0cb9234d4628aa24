"""The answers of `mindformers eval` on disk: written as they come, gone on from, and never mixed with others."""
from __future__ import annotations

import argparse
import fcntl
import json
import os
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import IO, Protocol

from mindformers_ixc.checkpoint.weights_mark import weights_mark
from mindformers_ixc.data.questions import Question
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import decode_text, parse_json
from mindformers_ixc.processing.stored import StoredFile
from mindformers_ixc.resources import model_name

# Settings that an answer depends on, beside the weights. How many are answered at once is none of them.
SETTINGS = ("mode", "hd_num", "max_new_tokens", "control_tokens", "transparency", "exif", "shuffle_images",
            "device_target")


def run_of(arguments: argparse.Namespace) -> dict:
    """What must be the same for answers to belong together: `model`, its `weights`, and `SETTINGS`."""
    return {"model": model_name(arguments.model), "weights": weights_mark(arguments.model),
            **{name: getattr(arguments, name, None) for name in SETTINGS}}


class Questions(Protocol):
    """Questions in order, a list of them or `mindformers_ixc.data.questions.SourceQuestions`."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Question]: ...


class Answers:
    """The answers in a file, read as they are asked for, by one loop at a time.

    Attributes:
        file: opened for reading and writing; `None` before there is one.
        count: whole lines that hold an answer.
    """

    def __init__(self) -> None:
        self.file: IO[bytes] | None = None
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict]:
        if self.file is None:
            return
        self.file.seek(0)
        for line in self.file:
            if line.strip():
                yield json.loads(line)


class AnswerFile:
    """One JSON object a line: a question with its `answer` or `error`, and the `run` that answered.

    Neither the questions nor the answers are held in memory.

    Args:
        path: the file; an earlier run's answers in it stay, and are `done`. `None`: a temporary one.
        questions: all that are asked, in order.
        run: of `run_of`.

    Raises:
        DataError: when the file has answers to other questions, of another model or with other settings.
        OSError: when it cannot be written, or another process is writing it.
    """

    def __init__(self, path: str | None, questions: Questions, run: dict):
        self.path, self.questions, self.run = path, questions, run
        self.done = Answers()
        self._upcoming, self._waiting = iter(questions), deque[Question]()
        if path is None:
            self.done.file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `__exit__`
        elif os.path.exists(path):
            self.done.file = open(path, "r+b")  # noqa: SIM115 - closed by `__exit__`
            try:
                self._take(path, self.done.file)
            except BaseException:
                self.done.file.close()
                raise

    def _take(self, path: str, file: IO[bytes]) -> None:
        """Reads the answers that are there, and goes to their end."""
        _lock(file, path)
        end = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):         # a killed run may have left half a line
                if not end and not line.startswith(b'{"id": '):
                    raise DataError(f"{path} holds something else than answers of eval; choose another file.")
                break
            if line.strip():
                self._check(decode_text(line, path, before=(end, number - 1)), f"{path}, line {number}")
            end += len(line)
        if end < os.fstat(file.fileno()).st_size:
            file.truncate(end)

    def _check(self, line: str, where: str) -> None:
        advice = "choose another file, or delete this one to begin anew."
        try:
            row = parse_json(line, where)
        except DataError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("run"), dict) or ("answer" in row) == ("error" in row):
            raise DataError(f"{where}: no answer of eval that can be gone on from; {advice}")
        differing = [name for name in self.run if name != "model" and row["run"].get(name) != self.run[name]]
        if differing:
            pairs = ", ".join(f"{name} {_short(row['run'].get(name))} (now {_short(self.run[name])})"
                              for name in differing)
            what = "of other weights or settings than this run's" if "weights" in differing else \
                "with other settings than this run's"
            raise DataError(f"{where}: an answer {what}: {pairs}; {advice}")
        if len(self.done) == len(self.questions):
            raise DataError(f"{where}: the data has {len(self.questions)} questions only; {advice}")
        if _identity(row) != _identity(_row(next(self._upcoming))):
            raise DataError(f"{where}: an answer to another question than number {len(self.done) + 1} of the data; "
                            f"{advice}")
        self.done.count += 1

    def ahead(self, count: int) -> list[Question]:
        """So many of the next questions without an answer, or all that are left."""
        while len(self._waiting) < min(count, len(self.questions) - len(self.done)):
            self._waiting.append(next(self._upcoming))
        return list(self._waiting)[:count]

    def add(self, results: Sequence[dict]) -> None:
        """Appends the next answers, `{"answer": text}` or `{"error": sentence}` each."""
        rows = [{**_row(question), **result, "run": self.run}
                for question, result in zip(self.ahead(len(results)), results)]
        file = self.done.file or self._make_file(str(self.path))
        file.seek(0, os.SEEK_END)
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        for _ in rows:
            self._waiting.popleft()
        self.done.count += len(rows)

    def _make_file(self, path: str) -> IO[bytes]:
        """Made only when there is an answer: a model that does not load leaves no file."""
        try:
            file = self.done.file = open(path, "x+b")  # noqa: SIM115 - closed by `__exit__`
        except FileExistsError as error:
            raise OSError(f"{path} has come into being meanwhile; choose another file.") from error
        _lock(file, path)
        return file

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self.done.file is not None:
            self.done.file.close()


def _lock(file: IO[bytes], path: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(f"Another eval is writing {path}; wait for its end or choose another file.") from error


def _row(question: Question) -> dict:
    return {"id": question.sample, "question": question.query, "images": [_named(image) for image in question.images],
            "expected": question.expected}


def _named(image: object) -> str:
    """What a picture is called; one within another file is told from a later one in its place by its bytes."""
    return f"{image} {image.mark}" if isinstance(image, StoredFile) and image.mark else str(image)


def _identity(row: dict) -> tuple:
    """What tells questions apart; pictures by their names, since their folder may have moved."""
    images = row.get("images")
    names = [os.path.basename(str(image)) for image in images] if isinstance(images, list) else None
    return row.get("id"), row.get("question"), row.get("expected"), names


def _short(value: object) -> str:
    return "none" if value is None else f"{value!s:.40}"
