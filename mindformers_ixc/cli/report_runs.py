"""What `mindformers report` reads: the folders of runs, finished or not, and what they wrote down."""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import ANSWERS_FILE, EVALUATIONS_FILE, METRICS_FILE, RUN_RECORD, read_json, read_metrics

# Of a run's record: what is no setting of the YAML.
NO_SETTINGS = ("layout", "run", "finished", "joined", "closing", "starts", "ended")


@dataclass(frozen=True)
class Run:
    """A run as its folder has it.

    Attributes:
        folder: the run's.
        name: of the run among those that are shown together.
        rows: of `metrics.jsonl`, in order.
        evaluations: of `evaluations.jsonl`.
        answers: of `answers.jsonl`.
        record: `run_config.json`, empty if there is none.
        problem: what is wrong with the record, as a sentence.
    """

    folder: Path
    name: str
    rows: list[dict]
    evaluations: list[dict]
    answers: list[dict]
    record: dict
    problem: str = ""

    @property
    def seconds(self) -> float:
        """All steps together; evaluations, checkpoints and the start are not in it."""
        return 3600 * list(self.clock.values())[-1]

    @property
    def clock(self) -> dict[int, float]:
        """Hours that the steps took up to each one. A row that is missing counts like the next one."""
        found, passed, last = {}, 0.0, 0
        for row in self.rows:
            passed += row["seconds"] * max(1, row["step"] - last)
            last = row["step"]
            found[last] = passed / 3600
        return found

    @property
    def devices(self) -> int | None:
        """Devices of the run, if they were written down."""
        layout = self.record.get("layout")
        good = isinstance(layout, list) and all(isinstance(degree, int) for degree in layout)
        return math.prod(layout) if good else None     # type: ignore[arg-type] # a list, as `good` says

    @property
    def starts(self) -> list[dict]:
        """When and how the run was started and gone on with, oldest first."""
        found = self.record.get("starts")
        return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []

    @property
    def elapsed(self) -> float | None:
        """Seconds from its start to its end, of a run that was started once and has ended."""
        if len(self.starts) != 1:
            return None
        try:
            began, ended = (datetime.strptime(str(moment), "%Y-%m-%d %H:%M:%S %z")
                            for moment in (self.starts[0].get("time"), self.record.get("ended")))
        except ValueError:
            return None
        return (ended - began).total_seconds()

    def settings(self) -> dict[str, Any]:
        """What was written down of the YAML, by dotted keys."""
        own = {key: value for key, value in self.record.items() if key not in NO_SETTINGS}
        return dict(_flat(own)) if own else {}


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in some folders.

    Args:
        folders: output folders of runs.

    Raises:
        ConfigError: when one of them has no log of steps, or is named twice.
    """
    paths = [Path(folder) for folder in folders]
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ConfigError(f"{path} is named twice; name every run once.")
        seen.add(path.resolve())
    return [_read_run(path, name) for path, name in zip(paths, _names(paths))]


def _read_run(folder: Path, name: str) -> Run:
    # a row that lacks what every step has is another program's or was edited
    rows = [row for row in read_metrics(folder / METRICS_FILE) if {"step", "loss", "seconds", "overflow"} <= set(row)
            and isinstance(row["step"], int) and is_finite(row["seconds"])]
    if not rows:
        raise ConfigError(f"{folder} has no {METRICS_FILE} with steps in it; name the --output_dir of a run.")
    record, problem = _read_record(folder / RUN_RECORD)
    evaluations, answers = ([row for row in read_metrics(folder / file) if isinstance(row.get("step"), int)]
                            for file in (EVALUATIONS_FILE, ANSWERS_FILE))
    return Run(folder, name, rows, evaluations, answers, record, problem)


def _read_record(path: Path) -> tuple[dict, str]:
    if not path.is_file():
        return {}, ""
    try:
        record = read_json(path, ConfigError)
    except (ConfigError, OSError) as error:
        return {}, f"The settings are not shown: {error}"
    return (record, "") if isinstance(record, dict) else ({}, f"The settings are not shown: {path} holds no object.")


def _names(folders: list[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}{key}.")
    else:
        yield prefix[:-1], value


def is_finite(value: object) -> bool:
    """Whether a value of a row is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def curve(rows: Iterable[dict], key: str) -> list[tuple[int, float]]:
    """Steps and values of a key, where it has one."""
    return [(row["step"], row[key]) for row in rows if is_finite(row.get(key))]
