"""`mindformers run`: MindFormers' Trainer from a YAML file."""
from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import mindspore as ms
import yaml
from mindformers.core.context import build_context
from mindformers.tools.register import MindFormerConfig
from mindformers.trainer import Trainer

from mindformers_ixc import interruption, terminal
from mindformers_ixc.cli.run_config import check_fields
from mindformers_ixc.cli.yaml_file import merged_fields
from mindformers_ixc.cpu_cluster.groups import install
from mindformers_ixc.cpu_cluster.loading import load_on_cpu
from mindformers_ixc.parallel.checks import check_run, complete_parallel
from mindformers_ixc.training import kept_graphs, progress
from mindformers_ixc.training.resume import COMMAND, is_complete, prepare_resume, record_run
from mindformers_ixc.training.run_folder import answers, claimed, in_job, locked
from mindformers_ixc.training.starting import adopt_start


def run(arguments: argparse.Namespace) -> int:
    """Runs a YAML file.

    Args:
        arguments: of the `run` subcommand; `rest` holds further words, taken as overrides.

    Returns:
        Exit code: 0, or 128 and the signal's number when it was asked to stop and has saved a checkpoint. A rank's is 0
        then: msrun would take it for a failure and end the others while they save.

    Raises:
        ConfigError: for a wrong key or value, or an output folder that is in use or used. Nothing was written then.
    """
    if arguments.register_path:
        _use_register_path(arguments.register_path)
    progress.recipe = arguments.config
    fields = merged_fields(arguments)
    check_fields(fields, arguments.config)
    adopt_start(fields, say=reports())
    check_run(fields)
    complete_parallel(fields)
    output_dir = Path(fields.setdefault("output_dir", "output")).resolve()
    fields["output_dir"] = str(output_dir)
    with _folder(output_dir, fields, arguments):
        training = fields["run_mode"] != "predict"
        if training and is_complete(fields):
            terminal.current.say(f"The run in {output_dir} has come to its end, and all it left is there; nothing is "
                                 "done.")
            return 0
        if training:
            wanted = dict(fields)
            if fields.get("resume_training"):
                prepare_resume(fields)
            if reports():
                record_run(wanted, os.environ.get(COMMAND) or shlex.join(["mindformers", *arguments.words]))
        _run_trainer(fields)
    return 0 if fields.get("use_parallel") else interruption.current.exit_code


@contextlib.contextmanager
def _folder(output_dir: Path, fields: dict, arguments: argparse.Namespace) -> Iterator[None]:
    """The output folder, held as far as it is this process's to hold it."""
    if answers(fields):
        with claimed(output_dir, fields, arguments.overwrite):
            yield
    elif in_job() and os.environ.get("MS_ROLE") != "MS_SCHED":
        output_dir.mkdir(parents=True, exist_ok=True)
        with locked(output_dir, int(os.environ.get("RANK_ID", "0"))):
            yield
    else:
        output_dir.mkdir(parents=True, exist_ok=True)
        yield


def reports() -> bool:
    """Whether this process says and writes what all ranks of a run would say and write alike."""
    return os.environ.get("RANK_ID", "0") == "0" and os.environ.get("MS_ROLE") != "MS_SCHED"


def _use_register_path(path: str) -> None:
    """What MindFormers' launcher does with --register_path: its auto_register reads the variable."""
    os.environ["REGISTER_PATH"] = str(Path(path).resolve())
    sys.path.append(os.environ["REGISTER_PATH"])


def _run_trainer(fields: dict) -> None:
    fields = kept_graphs.use(fields)
    # MindFormers fills in its defaults only when it reads a file itself
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as merged:
        yaml.safe_dump(fields, merged)
        merged.flush()
        config = MindFormerConfig(merged.name)
    build_context(config)
    # frozen parameters have slices too, and MindFormers loads what the strategy file names
    ms.set_auto_parallel_context(strategy_ckpt_config={"only_trainable_params": False})
    if config.use_parallel and config.context.device_target == "CPU":
        install()
        load_on_cpu()
    trainer = Trainer(config)
    if config.run_mode == "predict":
        trainer.predict(predict_checkpoint=config.load_checkpoint, input_data=config.input_data)
    elif config.run_mode == "finetune" or config.load_checkpoint:     # Trainer.train takes no notice of a checkpoint
        trainer.finetune(finetune_checkpoint=config.load_checkpoint)
    else:
        trainer.train()
