"""Answering a file of requests by several processes, each its share; one file in order comes out of it.

Replica i appends what it has answered to `<name>.share_<i>.jsonl`, a JSON line each, which says the request's number
too. Nothing is exchanged otherwise: a replica that is done waits for no collective, whose patience ends after a while,
but looks at the others' files. When every request has its answer the first one writes `<name>.jsonl`, in order, and
removes the shares; until then there is no such file. What an interrupted run has left, of however many replicas, is
taken over.
"""
from __future__ import annotations

import glob
import json
import os
import time
from pathlib import Path
from typing import IO

from mindformers_ixc.errors import DataError
from mindformers_ixc.files import check_target, decode_text, parse_json, read_json, text_lines, write_whole
from mindformers_ixc.generation.requests import Request

ADVICE = "write elsewhere, or delete the file to begin anew."

# Seconds between two looks at what the other replicas have answered.
LOOK_S = 0.5


def result_file(folder: str | os.PathLike, name: str = "predictions") -> Path:
    """Where finished results are."""
    return Path(folder) / f"{name}.jsonl"


def part_files(target: Path) -> tuple[Path, Path]:
    """What is there until all answers are: the first of them in order, and what answered."""
    return target.with_suffix(".part.jsonl"), target.with_suffix(".run.json")


def share_files(target: Path) -> list[Path]:
    """The answers of replicas that were not joined yet."""
    return sorted(target.parent.glob(f"{glob.escape(target.stem)}.share_*.jsonl"))


def normal(run: dict) -> dict:
    """What answered, as it is read from a file."""
    return json.loads(json.dumps(run, default=str))


def check_run(run: dict, run_file: Path, path: Path) -> None:
    """Refuses answers of another run.

    Args:
        run: this one, as of `normal`.
        run_file: says what answered.
        path: the file of answers.

    Raises:
        DataError: when it was something else.
    """
    try:
        same = read_json(run_file) == run
    except (OSError, DataError):
        same = False
    if not same:
        raise DataError(f"{path} holds answers of another model or other options than this run's; {ADVICE}")


def write_run(run: dict, run_file: Path) -> None:
    """Says beside the answers what answered."""
    write_whole(run_file, json.dumps(run, ensure_ascii=False, indent=1) + "\n")


def read_answers(path: Path, requests: list[Request]) -> tuple[list[dict], int]:
    """The answers of a file, in the order of the requests.

    Args:
        path: the file.
        requests: of this run.

    Returns:
        The answers, and the bytes of whole lines: a killed run may have left half a line behind them.

    Raises:
        DataError: for answers to other requests.
    """
    content = path.read_bytes()
    whole = content[:content.rfind(b"\n") + 1]
    answers: list[dict] = []
    for number, line in text_lines(decode_text(whole, str(path))):
        answer = parse_json(line, f"{path}, line {number}")
        known = requests[len(answers)] if len(answers) < len(requests) else None
        if known is not None and not _is_to(answer, known):
            raise DataError(f"{path}, line {number}: an answer to another request than this run's; {ADVICE}")
        answers.append(answer)
    if len(answers) > len(requests):
        raise DataError(f"{path} has {len(answers)} answers to {len(requests)} requests; {ADVICE}")
    return answers, len(whole)


def _is_to(answer: object, request: Request) -> bool:
    """Whether an answer is to a request; lines are compared as written: NaN, which JSON may have, equals nothing."""
    return isinstance(answer, dict) and json.dumps(answer.get("request")) == json.dumps(request.line)


class Share:
    """One replica's part of the answers.

    Args:
        folder: output folder of the run; all replicas see it.
        requests: lines of the request file.
        run: what must be the same for answers to belong together (model, options), JSON-serialisable.
        replica: number of this one; the first, 0, writes the whole file.
        name: of the files.

    Attributes:
        rows: answers that are known, by the number of their request.
        target: the whole file.

    Raises:
        DataError: when the folder holds answers to other requests or of another model or options.
        OSError: when nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike, requests: list[Request], run: dict, replica: int,
                 name: str = "predictions"):
        self.requests, self.replica, self.run = requests, replica, normal(run)
        self.target = result_file(folder, name)
        check_target(self.target, "output_dir", make_folder=True)
        self.part, self.run_file = part_files(self.target)
        self.own = self.target.with_suffix(f".share_{replica}.jsonl")
        self.rows: dict[int, dict] = {}
        self._read: dict[Path, int] = {}
        whole = [path for path in (self.target, self.part) if path.exists()]
        for path in [*whole, *share_files(self.target)]:
            check_run(self.run, self.run_file, path)
        if whole:
            self.rows = dict(enumerate(read_answers(whole[0], requests)[0]))
        elif not replica:       # a run that failed before its first answer may have left what it was
            write_run(self.run, self.run_file)
        self.look()
        if self.own in self._read:
            os.truncate(self.own, self._read[self.own])     # half a line of a killed run

    @property
    def finished(self) -> bool:
        """Whether every request has a known answer."""
        return len(self.rows) == len(self.requests)

    def left(self, size: int, replicas: int) -> list[int]:
        """Numbers of the requests that are this replica's to answer: every so-manieth batch of `size`."""
        return [number for number in range(len(self.requests))
                if number // size % replicas == self.replica and number not in self.rows]

    def add(self, numbers: list[int], results: list[dict]) -> None:
        """Appends answers, `{"answer": text}` or `{"error": sentence}` each."""
        with open(self.own, "a", encoding="utf-8") as file:
            for number, result in zip(numbers, results):
                row = {"number": number, "request": self.requests[number].line, **result}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def look(self) -> int:
        """Reads what all replicas have answered since the last time; how many answers are new."""
        before = len(self.rows)
        for path in share_files(self.target):
            with open(path, "rb") as file:
                self._look_at(path, file)
        return len(self.rows) - before

    def _look_at(self, path: Path, file: IO[bytes]) -> None:
        begin = self._read.setdefault(path, 0)
        file.seek(begin)
        content = file.read()
        whole = content[:content.rfind(b"\n") + 1]
        for _, line in text_lines(decode_text(whole, str(path))):
            row = parse_json(line, str(path))
            number = row.pop("number", None) if isinstance(row, dict) else None
            if not isinstance(number, int) or not 0 <= number < len(self.requests) \
                    or not _is_to(row, self.requests[number]):
                raise DataError(f"{path}: an answer to another request than this run's; {ADVICE}")
            self.rows.setdefault(number, row)
        self._read[path] = begin + len(whole)

    def close(self) -> list[dict]:
        """Answers in order, once all are there; the first replica writes the file, the others wait for it."""
        while self.replica and not self.target.exists():
            time.sleep(LOOK_S)
        if self.replica:
            return read_answers(self.target, self.requests)[0]
        rows = [self.rows[number] for number in range(len(self.requests))]
        if not self.target.exists():
            write_whole(self.target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), sync=True)
        for path in (self.part, *share_files(self.target)):
            path.unlink(missing_ok=True)
        return rows
