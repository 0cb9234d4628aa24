"""What a command can say about its input at once: looked at before MindFormers is imported, which takes seconds.

What is said of a YAML stands in `early`, which needs numpy: it is imported when a command has one.
"""
from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.config import read_fields
from mindformers_ixc.files import check_target
from mindformers_ixc.resources import resolve_path


def check_inputs(arguments: argparse.Namespace, options: list[str] | None = None) -> None:
    """Refuses files and folders that are not there, and a run's YAML that is wrong.

    Args:
        arguments: of any subcommand.
        options: of the subcommand, for a word that is nearly one of them.

    Raises:
        ConfigError: for a missing, malformed or wrong YAML file.
        CheckpointError: for a `--model` that is no model directory of this model.
        FileNotFoundError: for a missing image or data file.
        OSError: for a file to be written that cannot be.
    """
    run = arguments.run if arguments.command == "launch" else arguments
    if getattr(run, "register_path", None) and not Path(run.register_path).is_dir():
        raise NotADirectoryError(f"--register_path {run.register_path} is not a folder.")
    if run.command in ("run", "plan") or (run.command == "data" and run.config):
        read_yaml(run.config)
    if run.command in ("run", "launch", "plan"):
        early = importlib.import_module("mindformers_ixc.cli.early")
        if run.command == "plan":
            early.check_words(run.rest, options or [])
        else:
            launched = arguments.devices if run is not arguments else None
            early.check_early(run, options or [], launched, getattr(arguments, "node_rank", 0))
    for name in ("image", "data", "pairs"):
        given = getattr(arguments, name, None) or []
        for path in [given] if isinstance(given, str) else given:
            if not resolve_path(path).exists():
                raise FileNotFoundError(f"{path} does not exist; give the path of a file.")
    for name, target in _targets(arguments).items():
        check_target(target, name)
    if getattr(arguments, "model", None):
        read_fields(arguments.model)


def _targets(arguments: argparse.Namespace) -> dict[str, str]:
    """Single files that a command writes, by what the command line calls them."""
    if arguments.command == "eval" and arguments.predictions:
        return {"--predictions": arguments.predictions}
    if arguments.command == "reference":
        return {"TARGET": arguments.target}
    if arguments.command == "data" and arguments.kind != "plan" and len(arguments.files) > 1:
        return {"the file to be written,": arguments.files[-1]}
    return {}
