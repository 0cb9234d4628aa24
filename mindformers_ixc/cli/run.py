"""`mindformers run`: MindFormers' Trainer from a YAML file."""
from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import mindspore as ms
import yaml

import mindformers_ixc  # noqa: F401 - importing it registers the model
from mindformers_ixc.cli.run_config import apply_overrides, check_fields, parse_overrides, read_yaml
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


def merged_fields(arguments: argparse.Namespace) -> dict:
    """The YAML file's fields with everything the command line says on top."""
    fields = read_yaml(arguments.config)
    overrides = parse_overrides(arguments.rest)
    for name in ("run_mode", "output_dir", "load_checkpoint"):
        if getattr(arguments, name) is not None:
            overrides[name] = getattr(arguments, name)
    if arguments.use_parallel is not None:
        overrides["use_parallel"] = yaml.safe_load(arguments.use_parallel)
    if arguments.predict_data is not None:
        overrides["input_data"] = arguments.predict_data
    apply_overrides(fields, overrides)
    # MindFormers reads the data section through this reference; a YAML anchor no longer ties them once it is overridden
    if isinstance(fields.get("train_dataset_task"), dict) and "train_dataset" in fields:
        fields["train_dataset_task"]["dataset_config"] = fields["train_dataset"]
    return fields


def _use_register_path(path: str) -> None:
    """What MindFormers' launcher does with --register_path: its auto_register reads the variable."""
    if not Path(path).is_dir():
        raise NotADirectoryError(f"--register_path {path} is not a folder.")
    os.environ["REGISTER_PATH"] = str(Path(path).resolve())
    sys.path.append(os.environ["REGISTER_PATH"])


def _run_trainer(fields: dict) -> None:
    from mindformers.core.context import build_context
    from mindformers.tools.register import MindFormerConfig
    from mindformers.trainer import Trainer

    # MindFormers fills in its defaults only when it reads a file itself
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as merged:
        yaml.safe_dump(fields, merged)
        merged.flush()
        config = MindFormerConfig(merged.name)
    build_context(config)
    # frozen parameters have slices too, and MindFormers loads what the strategy file names
    ms.set_auto_parallel_context(strategy_ckpt_config={"only_trainable_params": False})
    if config.use_parallel and config.context.device_target == "CPU":
        from mindformers_ixc import cpu_cluster as cpu
        from mindformers_ixc.cpu_cluster.loading import load_on_cpu

        cpu.install()
        load_on_cpu()
    trainer = Trainer(config)
    if config.run_mode == "predict":
        trainer.predict(predict_checkpoint=config.load_checkpoint, input_data=config.input_data)
    elif config.run_mode == "finetune":
        trainer.finetune(finetune_checkpoint=config.load_checkpoint)
    else:
        trainer.train()
