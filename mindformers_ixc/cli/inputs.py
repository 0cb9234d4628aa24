"""What a command can say about its input at once: looked at before MindFormers is imported, which takes seconds."""
from __future__ import annotations

import argparse
from pathlib import Path

from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.config import read_fields
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.resources import resolve_path


def check_inputs(arguments: argparse.Namespace) -> None:
    """Refuses files and folders that are not there.

    Args:
        arguments: of any subcommand.

    Raises:
        ConfigError: for a missing or malformed YAML file, or a missing `--model`.
        CheckpointError: for a `--model` that is no model directory of this model.
        FileNotFoundError: for a missing image or data file.
    """
    run = arguments.run if arguments.command == "launch" else arguments
    if getattr(run, "config", None) and run.command in ("run", "plan"):
        read_yaml(run.config)
    if getattr(arguments, "model", None):
        if not Path(arguments.model).is_dir():
            raise ConfigError(f"--model {arguments.model} is no folder; name a model directory, such as OUT/model.")
        read_fields(arguments.model)
    for name in ("image", "data", "pairs"):
        given = getattr(arguments, name, None) or []
        for path in [given] if isinstance(given, str) else given:
            if not resolve_path(path).exists():
                raise FileNotFoundError(f"{path} does not exist; give the path of a file.")
