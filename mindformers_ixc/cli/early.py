"""What can be said of a run's YAML before MindFormers is imported, so that a mistake costs no wait."""
from __future__ import annotations

import argparse
import difflib
import fcntl
import os
from pathlib import Path

from mindformers_ixc.cli.run_config import check_fields, top_keys
from mindformers_ixc.cli.yaml_file import SHORT_FORMS, merged_fields
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import LOCK_FILE, refuse_used
from mindformers_ixc.interruption import JOB
from mindformers_ixc.parallel.checks import check_run
from mindformers_ixc.processing.tokenizer import find_vocab_file
from mindformers_ixc.resources import resolve_model, resolve_path

# Data sets that read what `data_loader.dataset_dir` names in this package's way.
OWN_TASKS = ("IXC25SFTDataset", "IXC25PreferenceDataset")


def check_early(arguments: argparse.Namespace, devices: int | None = None, server: int = 0) -> None:
    """Refuses a run for what is wrong with its YAML, its overrides, and the files that they name.

    Args:
        arguments: of the `run` subcommand; `rest` holds further words, taken as overrides.
        devices: of the cluster, when they are to be launched.
        server: number of this one; server 0 answers for the output folder.

    Raises:
        ConfigError: for a key, a value, a layout, or an output folder that is used.
        DataError: for the sections of the data.
        FileNotFoundError: for a file that is not there.
    """
    fields = merged_fields(arguments)
    if devices is not None:
        fields["use_parallel"] = True
    check_fields(fields, arguments.config)
    if fields["run_mode"] == "predict":
        _check_file(fields.get("input_data"), "The request file")
        return
    start = fields.get("load_checkpoint")
    if start and not fields.get("resume_training") and not resolve_model(start).exists():
        raise FileNotFoundError(f"load_checkpoint: {start} does not exist.")
    if not start and not fields.get("resume_training") and (devices is None or devices > 0):
        check_run(fields, devices)       # of a run that starts with weights the sizes are those of the weights
    if (fields.get("train_dataset_task") or {}).get("type") in OWN_TASKS:
        _check_data(fields)
    answers = JOB not in os.environ and "MS_ROLE" not in os.environ and not server
    if answers and not arguments.overwrite and not fields.get("resume_training"):
        folder = Path(fields.get("output_dir") or "output").resolve()
        if not _in_use(folder):      # whose that is, is said when the folder is to be held
            refuse_used(folder)


def _in_use(folder: Path) -> bool:
    """Whether a run holds its folder just now."""
    try:
        with open(folder / LOCK_FILE, "r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def check_words(words: list[str], options: list[str]) -> None:
    """Refuses words of the command line that are meant to be options and are misspelt.

    Args:
        words: what was taken as overrides of the YAML.
        options: of the subcommand.

    Raises:
        ConfigError: naming the option that may be meant.
    """
    for word in words:
        name = word[2:].partition("=")[0]
        if not word.startswith("--") or "." in name or name in SHORT_FORMS or name in top_keys():
            continue
        close = difflib.get_close_matches(f"--{name}", options, n=1, cutoff=0.75)
        if close:
            raise ConfigError(f"--{name} is neither an option nor a key of the YAML; did you mean {close[0]}?")


def _check_data(fields: dict) -> None:
    section = fields["train_dataset"]
    find_vocab_file(section["tokenizer"].get("vocab_file"))
    places = [section["data_loader"].get("dataset_dir"), (fields.get("evaluation") or {}).get("dataset_dir")]
    for place in places:
        for path in place if isinstance(place, list) else [place]:
            _check_file(path, "The list file" if str(path).endswith(".txt") else "The data file")


def _check_file(path: object, what: str) -> None:
    if isinstance(path, str) and path and not resolve_path(path).is_file():
        raise FileNotFoundError(f"{what} {path} does not exist.")
