"""A run's checkpoint for a run in another parallel layout: joined from its ranks, counters and optimizer states too.

MindFormers then cuts it for the new layout while it loads (`auto_trans_ckpt`), or loads it whole in a stand-alone run.
"""
from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save_file

from mindformers_ixc.checkpoint.sources import OpenedCheckpoint, open_source
from mindformers_ixc.checkpoint.tensor_file import TensorFile
from mindformers_ixc.checkpoint.tensors import LazyTensor
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import whole_folder
from mindformers_ixc.models.report import REPORT_NAME
from mindformers_ixc.parameters import part_of

# What MindFormers writes into a checkpoint beside the parameters, and looks for in this file of a folder.
COUNTERS = ("epoch_num", "step_num", "loss_scale", "global_batch_size", "global_step")
COUNTERS_FILE = "hyper_param.safetensors"

# The joined checkpoint, and what tells MindSpore's parallel loading which of a folder's files has a parameter.
WHOLE_FILE, MAP_FILE = "whole.safetensors", "param_name_map.json"

# Seconds that the other ranks wait for rank 0 to join a checkpoint; 104 GB of a 7B run take minutes.
JOIN_TIMEOUT_S = 3600


def write_counters(folder: Path, checkpoint: Path) -> None:
    """Writes the counters of a checkpoint file where MindFormers reads them."""
    with safe_open(checkpoint, "np") as tensors:
        names = set(tensors.keys())
        save_file({name: tensors.get_tensor(name) for name in COUNTERS if name in names}, folder / COUNTERS_FILE)


def joined(files: list[Path], strategy: Path, folder: Path, start: str | None) -> Path:
    """A folder with a checkpoint of a run as one file; made by rank 0, the others wait.

    Args:
        files: of the checkpoint, by rank; of a stand-alone run one.
        strategy: folder that says how the ranks' files are cut.
        folder: where such folders go; all ranks must see it.
        start: the weights the run began with. A parallel run saves only what its graph uses; the rest is there.

    Raises:
        ConfigError: when parameters are in neither, or rank 0 does not come to an end.
        CheckpointError: when the ranks' files do not make up whole tensors.
    """
    newest = max(files, key=lambda file: file.stat().st_mtime_ns)
    target = folder / f"{newest.stem}_{newest.stat().st_mtime_ns}"
    if target.is_dir() or os.environ.get("MS_ROLE") == "MS_SCHED":      # msrun's scheduler loads nothing
        return target
    if int(os.environ.get("RANK_ID") or 0) > 0:
        return _wait_for(target)
    for old in folder.glob("*"):
        shutil.rmtree(old, ignore_errors=True)
    with whole_folder(target) as unfinished:
        source = open_ranks(files, strategy, unfinished / "ranks")
        _write(source, unfinished / WHOLE_FILE, start)
        shutil.rmtree(unfinished / "ranks", ignore_errors=True)
        _write_map(unfinished)
        write_counters(unfinished, files[0])
    return target


def open_ranks(files: list[Path], strategy: Path, links: Path) -> OpenedCheckpoint:
    """Opens the files of all ranks together, by links to them alone: beside them lie those of other steps."""
    if len(files) == 1:
        return open_source(files[0])
    for rank, file in enumerate(files):
        (links / f"rank_{rank}").mkdir(parents=True)
        (links / f"rank_{rank}" / file.name).symlink_to(file)
    return open_source(links, strategy)


def _write_map(folder: Path) -> None:
    with safe_open(folder / WHOLE_FILE, "np") as tensors:
        names = list(tensors.keys())
    (folder / MAP_FILE).write_text(json.dumps(dict.fromkeys(names, WHOLE_FILE)), encoding="utf-8")


def _wait_for(target: Path) -> Path:
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while not target.is_dir():
        if time.monotonic() > deadline:
            raise ConfigError(f"resume_training: rank 0 has not joined the checkpoint into {target} in "
                              f"{JOIN_TIMEOUT_S} s; look at its log, and give all servers a shared output_dir.")
        time.sleep(0.5)
    return target


def _write(source: OpenedCheckpoint, path: Path, start: str | None) -> None:
    left_out = (*COUNTERS, REPORT_NAME)      # the report of a step that has ended, whose place the layout decides
    tensors: dict[str, LazyTensor] = {name: tensor for name, tensor in source.tensors.items() if name not in left_out}
    tensors.update(_unused(source, start))
    file = TensorFile(path, [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()])
    try:
        file.open()
        for name, tensor in tensors.items():
            for begin, piece in tensor.pieces():
                file.write(name, begin, piece)
        file.sync()
    finally:
        file.close()


def _unused(source: OpenedCheckpoint, start: str | None) -> dict[str, LazyTensor]:
    """Parameters of the model that a parallel run's graph does not use, from where the run began."""
    if not start or not Path(start).exists():
        return {}
    return {name: tensor for name, tensor in open_source(start).tensors.items()
            if part_of(name) is not None and name not in source.tensors}
