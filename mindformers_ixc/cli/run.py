"""`mindformers run`: MindFormers' Trainer from a YAML file."""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import mindspore as ms
import yaml
from mindformers.core.context import build_context
from mindformers.tools.register import MindFormerConfig
from mindformers.trainer import Trainer

from mindformers_ixc.cli.run_config import check_fields
from mindformers_ixc.cli.yaml_file import merged_fields
from mindformers_ixc.cpu_cluster.groups import install
from mindformers_ixc.cpu_cluster.loading import load_on_cpu
from mindformers_ixc.parallel.checks import check_run
from mindformers_ixc.training.checkpoints import prepare_resume, record_run


def run(arguments: argparse.Namespace) -> int:
    """Runs a YAML file.

    Args:
        arguments: of the `run` subcommand; `rest` holds further words, taken as overrides.

    Returns:
        Exit code.

    Raises:
        ConfigError: for a wrong key or value; nothing has been written then.
    """
    if arguments.register_path:
        _use_register_path(arguments.register_path)
    fields = merged_fields(arguments)
    check_fields(fields, arguments.config)
    check_run(fields)
    output_dir = Path(fields.setdefault("output_dir", "output")).resolve()
    fields["output_dir"] = str(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if fields["run_mode"] != "predict":
        wanted = dict(fields)
        if fields.get("resume_training"):
            prepare_resume(fields)
        record_run(wanted)
    _run_trainer(fields)
    return 0


def _use_register_path(path: str) -> None:
    """What MindFormers' launcher does with --register_path: its auto_register reads the variable."""
    os.environ["REGISTER_PATH"] = str(Path(path).resolve())
    sys.path.append(os.environ["REGISTER_PATH"])


def _run_trainer(fields: dict) -> None:
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
    elif config.run_mode == "finetune":
        trainer.finetune(finetune_checkpoint=config.load_checkpoint)
    else:
        trainer.train()
