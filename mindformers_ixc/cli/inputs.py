"""What a command can say about its input at once: looked at before MindFormers is imported, which takes seconds.

What is said of a YAML stands in `early`, which needs numpy: it is imported when a command has one.
"""
from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

from mindformers_ixc.cli.older_files import check_version
from mindformers_ixc.cli.yaml_file import apply_overrides, parse_overrides, read_yaml
from mindformers_ixc.config import read_fields
from mindformers_ixc.errors import ConfigError, DataError
from mindformers_ixc.files import check_folder, check_target
from mindformers_ixc.hub import not_a_folder
from mindformers_ixc.resources import resolve_path
from mindformers_ixc.trackers import require_packages

# As vendors and MindSpore count memory, G is 2^30 whether an i follows or not.
_UNITS = {"M": 2 ** 20, "G": 2 ** 30, "T": 2 ** 40}

# Arguments of commands that name files to be read.
FILES = ("image", "data", "pairs", "sampled", "judge")

# What the commands that go on where they were stopped write to `--output_dir`.
RESULT_FILES = {"sample": "samples", "score": "scores"}


def check_inputs(arguments: argparse.Namespace, options: list[str] | None = None) -> None:
    """Refuses files and folders that are not there, and what cannot be of a YAML file and its overrides.

    Args:
        arguments: of any subcommand.
        options: of the subcommand, for a word that is nearly one of them.

    Raises:
        ConfigError: for a YAML file that is missing, malformed, wrong or of an earlier version, a malformed override,
            or a tracker whose package is missing.
        CheckpointError: for a `--model` that is no model directory of this model.
        FileNotFoundError: for a missing image or data file, or a hub's name in place of a checkpoint.
        OSError: for a file to be written that cannot be.
    """
    run = arguments.run if arguments.command == "launch" else arguments
    if run is not arguments and arguments.devices < 1:
        raise ConfigError(f"-n is {arguments.devices}; it must be at least 1, one process a device.")
    if run is not arguments and run.command == "serve":
        check_inputs(run, options)
        return
    if getattr(run, "register_path", None) and not Path(run.register_path).is_dir():
        raise NotADirectoryError(f"--register_path {run.register_path} is not a folder.")
    if run.command in ("run", "plan") or (run.command == "data" and run.config):
        fields = read_yaml(run.config)
        _check_start(run, fields)
        if run.command != "data":
            importlib.import_module("mindformers_ixc.cli.early").check_words(run.rest, options or [])
        apply_overrides(fields, parse_overrides(run.rest))
        check_version(fields, run.config)
    if run.command == "run":
        require_packages(fields, run.config)
        launched = arguments.devices if run is not arguments else None
        importlib.import_module("mindformers_ixc.cli.early").check_early(
            run, launched, getattr(arguments, "node_rank", 0))
    if arguments.command == "eval" and "benchmark" in arguments:
        importlib.import_module("mindformers_ixc.cli.benchmark_options").check_options(arguments)
    for name in FILES if arguments.command != "init" else ():     # which takes folders, and asks
        given = getattr(arguments, name, None) or []
        for path in [given] if isinstance(given, str) else given:
            if not resolve_path(path).is_file():
                raise FileNotFoundError(_no_file(path))
    for name, target in _targets(arguments).items():
        check_target(target, name)
    if arguments.command in RESULT_FILES and arguments.output_dir is not None:
        _check_output_dir(arguments.output_dir, arguments.data, RESULT_FILES[arguments.command])
    if getattr(arguments, "model", None):
        read_fields(arguments.model)
    if arguments.command == "serve":
        importlib.import_module("mindformers_ixc.cli.early_serve").check_serve(arguments)
    if arguments.command in ("chat", "eval", "label", "reference", "sample", "score", "serve"):
        importlib.import_module("mindformers_ixc.cli.early_device").check_device(
            arguments.device_target, "--device_target")
        questions = importlib.import_module("mindformers_ixc.cli.early_questions")
        (questions.check_label if arguments.command == "label" else questions.check_question)(arguments)


def _check_output_dir(folder: str, data: str, name: str) -> None:
    """Refuses a folder that nothing can be written to, or in which results would take the place of what is read."""
    if not folder:
        raise ConfigError("--output_dir is empty; name a folder, or . for this one.")
    check_folder(Path(folder), "--output_dir")
    if resolve_path(data).resolve() in (Path(folder, f"{name}{end}").resolve() for end in (".jsonl", ".part.jsonl")):
        raise ConfigError(f"--data is {data}, which this command writes; give another --output_dir.")


def _no_file(path: str) -> str:
    """The sentence for a path that is no file; of a folder with one table or conversation file, that one is named."""
    if not resolve_path(path).exists():
        return f"{path} does not exist; give the path of a file."
    if not resolve_path(path).is_dir():        # a pipe of the shell's <(...), for one
        return str(importlib.import_module("mindformers_ixc.data.paths").missing_file(path, resolve_path(path)))
    try:
        meant = importlib.import_module("mindformers_ixc.data.folders").find_data(path)
    except (DataError, OSError):
        return f"{path} is a folder; give the path of a file."
    return f"{path} is a folder; give the path of a file: is {meant} meant?"


def _check_start(run: argparse.Namespace, fields: dict) -> None:
    """Refuses a hub's name for the checkpoint that a run begins with."""
    start = getattr(run, "load_checkpoint", None) or fields.get("load_checkpoint")
    on_a_hub = not_a_folder(start, "load_checkpoint") if isinstance(start, str) and start else None
    if on_a_hub:
        raise FileNotFoundError(on_a_hub)


def _targets(arguments: argparse.Namespace) -> dict[str, str]:
    """Single files that a command writes, by what the command line calls them."""
    if arguments.command == "eval" and arguments.predictions:
        return {"--predictions": arguments.predictions}
    if arguments.command == "plan" and arguments.html:
        return {"--html": arguments.html}
    if arguments.command == "label":
        return {"DST": arguments.target}
    if arguments.command == "reference":
        return {"TARGET": arguments.target}
    if arguments.command == "data" and arguments.kind == "preview":
        return {"--output": arguments.output} if arguments.output else {}
    if arguments.command == "data" and arguments.kind not in ("plan", "index", "check") and len(arguments.files) > 1:
        return {"the file to be written,": arguments.files[-1]}
    return {}


def read_memory(text: str, option: str = "--device_memory") -> int:
    """Bytes of a device's memory such as `64GB`, `64GiB` or `32000MB`; G is 2^30 in all of them.

    Args:
        text: the size.
        option: where it stands, for the message.

    Raises:
        ConfigError: for another form.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT])(?:i?B)?\s*", str(text), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ConfigError(f"{option} {str(text)!r} is no size of memory; write 64GB, 64GiB or 32000MB.")
    return size
