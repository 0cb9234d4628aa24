"""`mindformers convert`, `quantize`, `merge`, `assemble` and `inspect`: checkpoints from the command line."""
from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path

from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.assemble import assemble
from mindformers_ixc.checkpoint.convert import convert, drop_task_loras
from mindformers_ixc.checkpoint.inspection import inspect
from mindformers_ixc.checkpoint.merge import merge
from mindformers_ixc.checkpoint.model_config import config_of
from mindformers_ixc.checkpoint.quantise import quantize
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.checkpoint.writing import SHARD_BYTES
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.planning.check_layout import check_layout
from mindformers_ixc.tables import columns_of

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def read_size(text: str | None) -> int:
    """Bytes of a size such as `5GB` or `512MiB`; the default for `None`.

    Raises:
        CheckpointError: for another form.
    """
    if text is None:
        return SHARD_BYTES
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    try:
        size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except (ValueError, KeyError):
        size = 0
    if size < 1:
        raise CheckpointError(f"--max_shard_size {text!r} is no size; write 5GB or 512MiB.")
    return size


def run_convert(arguments: argparse.Namespace) -> int:
    """Runs `mindformers convert` and prints the target; with `--check_layout` nothing is written before the check."""
    if arguments.check_layout:
        source = open_source(arguments.source, arguments.strategy)
        config = drop_task_loras(config_of(source, arguments.config), arguments.drop)
        with tempfile.TemporaryDirectory() as scratch:
            check_layout(config, arguments.tp, arguments.pp, arguments.mode, Path(scratch))
        terminal.current.say("MindSpore's compiler cuts every parameter as the table of cuts says.")
    target = convert(
        arguments.source, arguments.target, to=arguments.to, format=arguments.format, tensor_parallel=arguments.tp,
        pipeline_stages=arguments.pp, dtype=arguments.dtype, mode=arguments.mode, drop=arguments.drop,
        config=arguments.config, strategy=arguments.strategy, shard_bytes=read_size(arguments.max_shard_size),
        overwrite=arguments.overwrite)
    return _finish(arguments, target)


def run_quantize(arguments: argparse.Namespace) -> int:
    """Runs `mindformers quantize` and prints the target."""
    target = quantize(
        arguments.source, arguments.target, arguments.bits, layout=arguments.layout, calibrate=arguments.calibrate,
        samples=arguments.samples, config=arguments.config, shard_bytes=read_size(arguments.max_shard_size),
        overwrite=arguments.overwrite)
    return _finish(arguments, target)


def run_merge(arguments: argparse.Namespace) -> int:
    """Runs `mindformers merge` and prints the target."""
    target = merge(
        arguments.source, arguments.target, attach=arguments.attach, lora=arguments.lora, alpha=arguments.alpha,
        adapter=arguments.adapter, fold=arguments.fold, extract=arguments.extract, average=arguments.average,
        ema=arguments.ema, to=arguments.to, dtype=arguments.dtype, config=arguments.config,
        shard_bytes=read_size(arguments.max_shard_size), overwrite=arguments.overwrite)
    return _finish(arguments, target)


def run_assemble(arguments: argparse.Namespace) -> int:
    """Runs `mindformers assemble` and prints the target."""
    target = assemble(
        arguments.language, arguments.tower, arguments.target, config=arguments.config, seed=arguments.seed,
        dtype=arguments.dtype, shard_bytes=read_size(arguments.max_shard_size), overwrite=arguments.overwrite)
    return _finish(arguments, target)


def _finish(arguments: argparse.Namespace, target: Path) -> int:
    terminal.current.say(f"{target} is complete.")
    print(target, file=arguments.answers)
    return 0


def run_inspect(arguments: argparse.Namespace) -> int:
    """Runs `mindformers inspect`; 1 when a digest differs or ranks disagree."""
    report = inspect(arguments.source, arguments.config, arguments.strategy, arguments.verify, arguments.tensors)
    text = report.to_json() if arguments.json else report.to_text(columns_of(arguments.answers))
    print(text, file=arguments.answers)
    return 1 if report.damaged or report.differing else 0
