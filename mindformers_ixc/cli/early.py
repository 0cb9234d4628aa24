"""What can be said of a run's YAML before MindFormers is imported, so that a mistake costs no wait."""
from __future__ import annotations

import argparse
import copy
import difflib
import fcntl
import os
from pathlib import Path

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.family import check_kind, refuse_other
from mindformers_ixc.checkpoint.sources import OpenedCheckpoint, open_source
from mindformers_ixc.checkpoint.start import OVERRIDE, begin
from mindformers_ixc.cli.early_device import check_device
from mindformers_ixc.cli.group_config import DATASET
from mindformers_ixc.cli.inputs import read_memory
from mindformers_ixc.cli.run_config import check_fields, top_keys
from mindformers_ixc.cli.yaml_file import SHORT_FORMS, merged_fields
from mindformers_ixc.config import ModelConfig, read_config
from mindformers_ixc.data.conversations import ReadingOptions, named_sources
from mindformers_ixc.data.index.kinds import open_reader
from mindformers_ixc.data.learning import WEIGHTS
from mindformers_ixc.data.rows import bad_share_of
from mindformers_ixc.data.sections import check_shapes
from mindformers_ixc.decoding_options import check_reward
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import LOCK_FILE, RUN_RECORD, check_folder, refuse_used
from mindformers_ixc.interruption import JOB
from mindformers_ixc.parallel.checks import check_run
from mindformers_ixc.processing.tokenizer import check_directory, find_vocab_file
from mindformers_ixc.reading import reading, watch_reads
from mindformers_ixc.resources import resolve_model, resolve_path
from mindformers_ixc.training_options import REWARD_NETWORK

# Data sets that read what `data_loader.dataset_dir` names in this package's way.
OWN_TASKS = ("IXC25SFTDataset", "IXC25PreferenceDataset", DATASET)

# Bytes of a data file up to which it is read at once; what is wrong in larger ones is said when the run reads them.
SMALL = 2 ** 20


def check_early(arguments: argparse.Namespace, devices: int | None = None, server: int = 0) -> None:
    """Refuses a run for what is wrong with its YAML, its overrides, and the files that they name.

    Args:
        arguments: of the `run` subcommand; `rest` holds further words, taken as overrides.
        devices: of the cluster, when they are to be launched.
        server: number of this one; server 0 answers for the output folder.

    Raises:
        ConfigError: for a key, a value, a layout, or an output folder that is used.
        DataError: for the sections of the data.
        CheckpointError: for what a run begins with, and a reward model that is none.
        FileNotFoundError: for a file that is not there.
    """
    fields = merged_fields(arguments)
    if devices is not None:
        fields["use_parallel"] = True
    check_fields(fields, arguments.config)
    alone = JOB not in os.environ and "MS_ROLE" not in os.environ      # of a launch's ranks the launcher has looked
    if alone:
        context = fields.get("context") or {}
        check_device(context.get("device_target"), "context.device_target")
        if context.get("max_device_memory") is not None:
            read_memory(context["max_device_memory"], "context.max_device_memory")
    if fields["run_mode"] == "predict":
        if not fields.get("input_data"):
            raise ConfigError("run_mode is predict, and nothing says what is asked; give the file of requests as "
                              "--predict_data FILE.")
        _check_file(fields["input_data"], "The request file", arguments.config)
        if alone:
            _check_answering(fields)
        return
    folder = Path(fields.get("output_dir") or "output").resolve()
    if alone and not server:
        check_folder(folder, "output_dir")
    start = fields.get("load_checkpoint")
    if not fields.get("resume_training"):
        _check_start(fields, start)
    elif not start and not (folder / RUN_RECORD).is_file():
        raise ConfigError(f"resume_training: {folder / RUN_RECORD} is missing, so there is no run to go on with; name "
                          "the folder of one as --output_dir.")
    if not start and not fields.get("resume_training") and (devices is None or devices > 0):
        check_run(fields, devices)       # of a run that starts with weights the sizes are those of the weights
    reward_model = (fields.get("rollout") or {}).get("reward_model")
    if reward_model is not None:
        checkpoint_of(reward_model, scores=True)
        check_directory(resolve_model(reward_model))
    if (fields.get("train_dataset_task") or {}).get("type") in OWN_TASKS:
        _check_data(fields, alone, arguments.config)
    fresh = alone and not server and not arguments.overwrite and not fields.get("resume_training")
    if fresh and not _in_use(folder):      # whose that is, is said when the folder is to be held
        refuse_used(folder)


def _check_answering(fields: dict) -> None:
    """Refuses a model that writes no answers, a reward model that is none, and options of best-of-N."""
    options = fields.get("generation") or {}
    check_reward(options.get("best_of"), options.get("reward"), options)
    for model, scores in ((fields.get("load_checkpoint"), False), (options.get("reward"), True)):
        if model:
            checkpoint_of(model, scores)


def checkpoint_of(model: str, scores: bool) -> OpenedCheckpoint | None:
    """The checkpoint of a model directory, which must be of the kind that is asked.

    Args:
        model: the directory, as it was given.
        scores: whether it is asked for scores.

    Returns:
        The checkpoint; `None` for one whose reading takes PyTorch, whose import takes seconds.
    """
    folder = resolve_model(model)
    config = read_config(folder)
    if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        if config.reward_pooling is not None:
            refuse_other(True, model, scores)
        return None
    with terminal.to_be_said_later():
        source = open_source(folder, verify=False)
    check_kind(config, source, model, scores)
    return source


def _check_start(fields: dict, start: str | None) -> None:
    """Refuses a checkpoint that is none, one of another model, or sizes that no model can have."""
    section = copy.deepcopy((fields.get("model") or {}).get("model_config") or {})
    if section.get("type") != "IXC25Config":
        return
    if start and not resolve_model(start).exists():
        raise FileNotFoundError(f"load_checkpoint: {start} does not exist.")
    if start:
        with terminal.to_be_said_later():
            begin(section, open_source(start, verify=False), fields.get(OVERRIDE) or ())
    try:
        ModelConfig(**{key: value for key, value in section.items() if key not in ("type", "parallel_config")})
    except ConfigError as error:
        raise ConfigError(f"model.model_config: {error}") from error
    if (fields.get("train_dataset_task") or {}).get("type") in OWN_TASKS:
        check_shapes(section, fields["train_dataset"])


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


def _check_data(fields: dict, reads: bool, config: str) -> None:
    """Refuses data files that are not there and, where it takes no time, what is wrong inside."""
    section = fields["train_dataset"]
    find_vocab_file(section["tokenizer"].get("vocab_file"))
    loader, held_out = section["data_loader"], fields.get("evaluation") or {}
    watch_reads(loader.get("read_timeout"))
    trained_on = "pair" if fields["train_dataset_task"]["type"] == "IXC25PreferenceDataset" else "sample"
    # each as the run will read it, which refuses held-out samples for any that is wrong
    scored = (fields["model"].get("arch") or {}).get("type") == REWARD_NETWORK
    for part, kind, share in ((loader, trained_on, bad_share_of(section)),
                              (held_out, "pair" if scored else "sample", 0.0)):
        places = part.get("dataset_dir")
        for path in places if isinstance(places, list) else [places]:
            is_list = str(path).endswith(".txt")
            with reading(path):
                _check_file(path, "The list file" if is_list else "The data file", config)
            if not reads or is_list or loader.get("fetch") or not isinstance(path, str) or not path:
                continue
            path = next(iter(named_sources(path)))[0]          # of a folder its table
            if resolve_path(path).stat().st_size <= SMALL:
                options = ReadingOptions(part.get("image_folder"), image_root=loader.get("image_root"),
                                         ignore_keys=loader.get("ignore_keys") or (), kind=kind,
                                         weighs=loader.get("loss_on") == WEIGHTS)
                open_reader(path, options).load(share)


def _check_file(path: object, what: str, config: str) -> None:
    if not isinstance(path, str) or not path or resolve_path(path).exists():
        return
    beside = Path(config).parent.resolve()
    meant = f" It is in {beside}, beside the YAML: paths start where the command is typed, so type it there." \
        if (beside / path).is_file() else ""
    raise FileNotFoundError(f"{what} {path} does not exist.{meant}")
