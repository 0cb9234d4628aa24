"""The answers of `mindformers eval` on disk: written as they come, gone on from, and never mixed with others."""
from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
from collections.abc import Sequence
from types import TracebackType
from typing import IO

from mindformers_ixc.config import CONFIG_FILE
from mindformers_ixc.data.questions import Question
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import decode_text, parse_json, text_lines
from mindformers_ixc.resources import resolve_model

# Settings that an answer depends on, beside the weights. How many are answered at once is none of them.
SETTINGS = ("mode", "hd_num", "max_new_tokens", "control_tokens", "transparency", "exif", "shuffle_images",
            "device_target")

# Suffixes of what a model directory answers by.
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".model")


def run_of(arguments: argparse.Namespace) -> dict:
    """What must be the same for answers to belong together: `model`, its `weights`, and `SETTINGS`."""
    return {"model": os.path.basename(os.path.realpath(arguments.model)) or str(arguments.model),
            "weights": weights_mark(arguments.model),
            **{name: getattr(arguments, name, None) for name in SETTINGS}}


def weights_mark(directory: str | os.PathLike) -> str:
    """Twelve letters that change with the weights of a model directory, without reading them.

    A directory that this package has written has digests, which move with it; of others the sizes and times of the
    files are taken.
    """
    folder, total = resolve_model(directory), hashlib.sha256()
    digests = folder / "digests.json"
    total.update((folder / CONFIG_FILE).read_bytes())
    if digests.is_file():
        total.update(digests.read_bytes())
    else:
        for path in sorted(folder.iterdir()):
            if path.suffix in _WEIGHTS:
                found = path.stat()
                total.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return total.hexdigest()[:12]


class AnswerFile:
    """One JSON object a line: a question with its `answer` or `error`, and the `run` that answered.

    Args:
        path: the file; an earlier run's answers in it stay, and are `done`. `None`: nothing is written.
        questions: all that are asked, in order.
        run: of `run_of`.

    Raises:
        DataError: when the file has answers to other questions, of another model or with other settings.
        OSError: when it cannot be written, or another process is writing it.
    """

    def __init__(self, path: str | None, questions: Sequence[Question], run: dict):
        self.path, self.questions, self.run = path, questions, run
        self.done: list[dict] = []
        self._file: IO[bytes] | None = None
        if path is not None and os.path.exists(path):
            self._file = open(path, "r+b")  # noqa: SIM115 - closed by `__exit__`
            try:
                self._take(path, self._file)
            except BaseException:
                self._file.close()
                raise

    def _take(self, path: str, file: IO[bytes]) -> None:
        """Reads the answers that are there, and goes to their end."""
        _lock(file, path)
        content = file.read()
        whole = content[:content.rfind(b"\n") + 1]          # a killed run may have left half a line
        if content and not whole and not content.startswith(b'{"id": '):
            raise DataError(f"{path} holds something else than answers of eval; choose another file.")
        for number, line in text_lines(decode_text(whole, path)):
            self._check(line, f"{path}, line {number}")
        if len(whole) < len(content):
            file.truncate(len(whole))
        file.seek(len(whole))

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
        if _identity(row) != _identity(_row(self.questions[len(self.done)])):
            raise DataError(f"{where}: an answer to another question than number {len(self.done) + 1} of the data; "
                            f"{advice}")
        self.done.append(row)

    def add(self, results: Sequence[dict]) -> None:
        """Appends the next answers, `{"answer": text}` or `{"error": sentence}` each."""
        rows = [{**_row(question), **result, "run": self.run}
                for question, result in zip(self.questions[len(self.done):], results)]
        if self.path is not None and self._file is None:        # made now: a model that does not load leaves no file
            try:
                self._file = open(self.path, "xb")  # noqa: SIM115 - closed by `__exit__`
            except FileExistsError as error:
                raise OSError(f"{self.path} has come into being meanwhile; choose another file.") from error
            _lock(self._file, self.path)
        if self._file is not None:
            self._file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            self._file.flush()
        self.done += rows

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()


def _lock(file: IO[bytes], path: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(f"Another eval is writing {path}; wait for its end or choose another file.") from error


def _row(question: Question) -> dict:
    return {"id": question.sample, "question": question.query, "images": [str(image) for image in question.images],
            "expected": question.expected}


def _identity(row: dict) -> tuple:
    """What tells questions apart; pictures by their names, since their folder may have moved."""
    images = row.get("images")
    names = [os.path.basename(str(image)) for image in images] if isinstance(images, list) else None
    return row.get("id"), row.get("question"), row.get("expected"), names


def _short(value: object) -> str:
    return "none" if value is None else f"{value!s:.40}"
