"""Experiment trackers behind one small interface: Weights & Biases, SwanLab and MLflow.

Each is imported when a run uses it, through the extra of its name. `training/tracking.py` is the callback.
"""
from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mindformers_ixc.errors import ConfigError, TrainingError
from mindformers_ixc.files import read_json, write_whole
from mindformers_ixc.sections import ANYTHING, Rule, check_section, of_type, one_of, whole

# `type` of the callback in a YAML.
CALLBACK = "IXC25Tracker"

# In a run's folder: under which name each tracker knows the run, so that a resumed one goes on there.
IDENTITIES = "tracker.json"

# What trackers leave in a run's folder.
TRACKED = ("wandb", "swanlog", "mlflow.db", "mlruns", IDENTITIES)

MODES = ("online", "offline")


@dataclass(frozen=True)
class TrackerOptions:
    """What a YAML says of a tracker.

    Attributes:
        tracker: `wandb`, `swanlab` or `mlflow`.
        project: under which it files the run (MLflow's experiment).
        name: of the run; by default that of its folder.
        mode: `online`, or `offline`: everything stays in files in the run's folder.
        every: steps between two rows.
        options: further arguments of `wandb.init`, `swanlab.init` or `mlflow.start_run`.
    """

    tracker: str
    project: str = "mindformers_ixc"
    name: str | None = None
    mode: str = "online"
    every: int = 1
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where a tracker is to begin.

    Attributes:
        folder: the run's.
        identity: what the tracker called the run before; `None` for a new one.
        settings: of the run, for the tracker to show.
    """

    folder: Path
    identity: str | None
    settings: dict[str, Any]


class Tracker(Protocol):
    """One run in a tracker.

    Attributes:
        identity: what the tracker calls the run.
        where: where to look at it, as a sentence's end.
    """

    identity: str
    where: str

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the numbers of a step."""

    def close(self, failed: bool) -> None:
        """Ends the run there; what is left to send is sent."""


class Wandb:
    """A run of Weights & Biases; arguments as of `open_tracker`."""

    def __init__(self, options: TrackerOptions, place: Place):
        wandb = importlib.import_module("wandb")
        arguments = {"project": options.project, "name": options.name, "dir": str(place.folder), "mode": options.mode,
                     "id": place.identity, "resume": "allow" if place.identity else None, "config": place.settings,
                     # its banner, and its copy of all that the run prints, are left out
                     "settings": {"silent": True, "console": "off"}}
        self.run = wandb.init(**{**arguments, **options.options})
        # steps that a resumed run does again would be refused as steps of its own
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.identity = self.run.id
        offline = f"in {place.folder / 'wandb'}; `wandb sync {place.folder / 'wandb'}/offline-run-*` sends it"
        self.where = offline if options.mode == "offline" else f"at {self.run.url}"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self.run.log({**values, "step": step})

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self.run.finish(exit_code=int(failed))


class SwanLab:
    """An experiment of SwanLab; arguments as of `open_tracker`."""

    def __init__(self, options: TrackerOptions, place: Place):
        self.swanlab = importlib.import_module("swanlab")
        folder = place.folder / "swanlog"
        arguments = {"project": options.project, "name": options.name, "log_dir": str(folder), "mode": options.mode,
                     "id": place.identity, "resume": "allow" if place.identity else None, "config": place.settings}
        self.run = self.swanlab.init(**{**arguments, **options.options})
        self.identity = self.run.id
        self.where = f"in {folder}; `swanlab sync {folder}/run-*` sends it" if options.mode == "offline" \
            else f"at {self.run.url}"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self.swanlab.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self.swanlab.finish(state="crashed" if failed else "success")


class MLflow:
    """A run of MLflow; arguments as of `open_tracker`."""

    def __init__(self, options: TrackerOptions, place: Place):
        offline = options.mode == "offline"
        if offline:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")      # read while it is imported
        self.mlflow = importlib.import_module("mlflow")
        logging.getLogger("mlflow").setLevel(logging.WARNING)      # not that it makes tables
        server = f"sqlite:///{place.folder.resolve() / 'mlflow.db'}"
        if offline:
            self.mlflow.set_tracking_uri(server)
            if self.mlflow.get_experiment_by_name(options.project) is None:
                self.mlflow.create_experiment(options.project, (place.folder / "mlruns").resolve().as_uri())
        self.mlflow.set_experiment(options.project)
        arguments = {"run_id": place.identity, "run_name": options.name}
        self.run = self.mlflow.start_run(**{**arguments, **options.options})
        self.identity = self.run.info.run_id
        if place.identity is None:      # parameters of a run cannot be changed
            self.mlflow.log_params({_allowed(name): str(value)[:_LONGEST]
                                    for name, value in _flat(place.settings).items()})
        self.where = f"in {place.folder}; `mlflow ui --backend-store-uri {server}` shows it" if offline \
            else f"at {self.mlflow.get_tracking_uri()}"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self.mlflow.log_metrics({_allowed(name): value for name, value in values.items()}, step=step)

    def close(self, failed: bool) -> None:
        """See `Tracker`."""
        self.mlflow.end_run(status="FAILED" if failed else "FINISHED")


# By the name in the YAML, which is also that of the Python package and of the extra.
TRACKERS: dict[str, Callable[[TrackerOptions, Place], Tracker]] = {"wandb": Wandb, "swanlab": SwanLab, "mlflow": MLflow}

# Characters of a parameter's value that every version of MLflow takes.
_LONGEST = 500

RULES = {"type": ANYTHING, "tracker": Rule(one_of(TRACKERS).test, ", ".join(TRACKERS), True, "the choices are"),
         "project": of_type(str), "name": of_type(str), "mode": one_of(MODES), "every": whole(1),
         "options": of_type(dict)}


def check_tracker(section: dict, where: str, source: str) -> None:
    """Refuses wrong keys and values of the callback.

    Args:
        section: of the YAML's `callbacks`.
        where: its name, for the messages.
        source: file it stands in.

    Raises:
        ConfigError: naming the key, its value and what is wanted.
    """
    check_section(section, RULES, where, source=source)


def require_packages(fields: dict, source: str) -> None:
    """Refuses trackers that cannot be used here; nothing is imported.

    Args:
        fields: of the YAML; need not be checked.
        source: name of the file, for the messages.

    Raises:
        ConfigError: when a tracker's package is missing, or MLflow is not told its server.
    """
    callbacks = fields.get("callbacks")
    for place, section in enumerate(callbacks if isinstance(callbacks, list) else ()):
        if not isinstance(section, dict) or section.get("type") != CALLBACK or section.get("tracker") not in TRACKERS:
            continue
        name = section["tracker"]
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{source}: callbacks[{place}] tracks the run with {name}, which is not installed; run "
                              f"`pip install \"mindformers_ixc[{name}]\"`, or take the callback out.")
        if name == "mlflow" and section.get("mode") != "offline" and not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError(f"{source}: callbacks[{place}] tracks the run with mlflow, but MLFLOW_TRACKING_URI does "
                              "not say where its server is; set the variable, or write mode: offline, which keeps "
                              "everything in the run's folder.")


def open_tracker(options: TrackerOptions, folder: Path, settings: Any, goes_on: bool) -> Tracker:
    """Begins a run in a tracker, or goes on with it.

    Args:
        options: what the YAML says.
        folder: of the run; keeps the tracker's name of it.
        settings: of the run, shown by the tracker.
        goes_on: whether the run is resumed.

    Raises:
        TrainingError: when the tracker cannot begin, with its own words.
    """
    path = folder / IDENTITIES
    known = read_json(path, TrainingError) if path.is_file() else {}
    options = replace(options, name=options.name or folder.resolve().name)
    place = Place(folder, known.get(options.tracker) if goes_on else None, plain(settings))
    try:
        tracker = TRACKERS[options.tracker](options, place)
    except Exception as error:      # each has errors of its own
        raise TrainingError(f"{options.tracker} cannot begin to track the run: {in_one_line(error)}. Log in or mend "
                            f"the connection as its documentation says, write mode: offline for {CALLBACK}, which "
                            "keeps everything in the run's folder, or take that callback out.") from error
    write_whole(path, json.dumps({**known, options.tracker: tracker.identity}, indent=1))
    return tracker


def in_one_line(error: Exception) -> str:
    """An error's text, short and without a full stop."""
    return " ".join((str(error) or type(error).__name__).split())[:300].rstrip(".")


def plain(value: Any) -> Any:
    """Settings as plain values; objects are their text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _flat(settings: Mapping, above: str = "") -> dict[str, Any]:
    """Settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found.update(_flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value})
    return found


def _allowed(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name)
