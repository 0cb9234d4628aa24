"""What a checkpoint on disk is, and its tensors: public directories, single files, MindSpore's, and ranks of a run."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mindformers_ixc.checkpoint import ckpt_file, safetensors_file, torch_file
from mindformers_ixc.checkpoint.layouts import Strategy, covers
from mindformers_ixc.checkpoint.strategy_file import read_strategy
from mindformers_ixc.checkpoint.tensors import JoinedTensor, LazyTensor
from mindformers_ixc.errors import CheckpointError

CONFIG_FILE = "config.json"
# Index files by preference, all `{"weight_map": {name: file}}`; the last is MindSpore's, which may be the bare map.
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "param_name_map.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "model.ckpt")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

_STEP = re.compile(r"-(\d+)_(\d+)\.\w+$")


@dataclass
class OpenedCheckpoint:
    """A checkpoint whose headers are read; its tensors are read when asked for.

    Attributes:
        path: what was opened.
        kind: `public` (directory or file), `mindspore` or `ranks`.
        tensors: by name, in file order.
        files: that hold them.
        strategy: of `ranks`.
        checksums: SHA-256 by name, where an index gives them.
    """

    path: Path
    kind: str
    tensors: dict[str, LazyTensor]
    files: list[Path]
    strategy: Strategy | None = None
    checksums: dict[str, str] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """Where the files beside the weights are."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def config_file(self) -> Path | None:
        """The checkpoint's `config.json`, if it has one."""
        for folder in (self.directory, self.directory.parent):
            if (folder / CONFIG_FILE).is_file():
                return folder / CONFIG_FILE
        return None


def open_source(path: str | os.PathLike, strategy: str | Path | None = None) -> OpenedCheckpoint:
    """Opens a checkpoint; nothing but headers is read.

    Args:
        path: directory or file.
        strategy: strategy file or folder of a run's ranks, when it is not in the usual place.

    Raises:
        CheckpointError: when it is none, is damaged or a file is missing.
    """
    path = Path(path)
    if path.is_file():
        tensors = read_file(path)
        return OpenedCheckpoint(path, "mindspore" if path.suffix == ".ckpt" else "public", tensors, [path])
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist.")
    for name in INDEX_FILES:
        if (path / name).is_file():
            return _open_index(path, path / name)
    for name in SINGLE_FILES:
        if (path / name).is_file():
            kind = "mindspore" if name.endswith(".ckpt") else "public"
            return OpenedCheckpoint(path, kind, read_file(path / name), [path / name])
    for folder in (path, path / "checkpoint"):
        if any(folder.glob("rank_[0-9]*/*")):
            return _open_ranks(path, folder, strategy)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise CheckpointError(f"{path} holds no checkpoint: neither {', '.join((*INDEX_FILES, *SINGLE_FILES))} nor "
                              "rank_N folders nor other weight files.")
    return OpenedCheckpoint(path, "mindspore", _merge_files(files), files)


def read_file(path: Path) -> dict[str, LazyTensor]:
    """Tensors of one file, by its suffix."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist.")
    if path.suffix == ".safetensors":
        return dict(safetensors_file.read_header(path))
    if path.suffix == ".ckpt":
        return dict(ckpt_file.read_tensors(path))
    if path.suffix in (".bin", ".pt", ".pth"):
        return torch_file.read_tensors(path)
    raise CheckpointError(f"{path} is no weight file; the choices are {', '.join(SUFFIXES)}.")


def _merge_files(files: Iterable[Path]) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    owner: dict[str, Path] = {}
    for file in files:
        for name, tensor in read_file(file).items():
            if name in tensors:
                raise CheckpointError(f"{name} is in {owner[name]} and in {file}; remove the file that does not belong "
                                      "to this checkpoint.")
            tensors[name], owner[name] = tensor, file
    return tensors


def _open_index(path: Path, index: Path) -> OpenedCheckpoint:
    try:
        fields = json.loads(index.read_text(encoding="utf-8"))
        weight_map = fields.get("weight_map", fields)
        names = sorted(set(weight_map.values()))
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is no index of weights ({error}).") from error
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names the shards {missing}, which are not in {path}; copy them too.")
    files = [path / name for name in names]
    tensors = _merge_files(files)
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(f"{index} names {len(absent)} parameters that its files do not hold (first: "
                              f"{absent[:3]}); the index belongs to other files.")
    kind = "mindspore" if index.name == INDEX_FILES[2] else "public"
    return OpenedCheckpoint(path, kind, tensors, files, checksums=fields.get("checksums", {}))


def _open_ranks(path: Path, folder: Path, strategy: str | Path | None) -> OpenedCheckpoint:
    places = [Path(strategy)] if strategy else [path / "strategy", folder.parent / "strategy", folder / "strategy"]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise CheckpointError(f"{folder} holds the slices of ranks, but no strategy was found that says how they are "
                              f"cut ({', '.join(map(str, places))}); name it with --strategy.")
    layouts = read_strategy(place)
    files = _rank_files(folder, layouts.ranks)
    parts = [read_file(file) for file in files]
    names = list(dict.fromkeys(name for part in parts for name in part))
    tensors = {name: _join(name, parts, layouts, folder) for name in names}
    return OpenedCheckpoint(path, "ranks", tensors, files, layouts)


def _rank_files(folder: Path, ranks: int) -> list[Path]:
    """The file of each rank; of several, the one of the latest step that every rank has."""
    steps: list[dict[tuple[int, ...], Path]] = []
    for rank in range(ranks):
        found = sorted(file for file in (folder / f"rank_{rank}").glob("*") if file.suffix in (".safetensors", ".ckpt"))
        if not found:
            raise CheckpointError(f"{folder}/rank_{rank} holds no weights; the strategy speaks of {ranks} ranks.")
        keys = [_STEP.search(file.name) for file in found]
        steps.append({tuple(map(int, key.groups())) if key else (): file for key, file in zip(keys, found)})
    common = set(steps[0]).intersection(*steps[1:])
    if not common:
        raise CheckpointError(f"The ranks in {folder} have no step in common; a run was cut off while it saved.")
    return [files[max(common)] for files in steps]


def _join(name: str, parts: list[dict[str, LazyTensor]], strategy: Strategy, folder: Path) -> LazyTensor:
    layout = strategy.layouts.get(name)
    if layout is None:      # counters and the like: the same everywhere
        return next(part[name] for part in parts if name in part)
    first = strategy.stages[name][0] * strategy.devices
    ranks = range(first, first + strategy.devices)
    lacking = [rank for rank in ranks if name not in parts[rank]]
    if lacking:
        raise CheckpointError(f"{folder}: {name} is missing in the files of ranks {lacking}.")
    owners = {rank: parts[rank][name] for rank in ranks}
    local = owners[first].shape
    shape = tuple(length * count for length, count in zip(local, layout.counts()))
    found: dict[tuple, tuple[tuple[slice, ...], LazyTensor]] = {}
    held: dict[tuple, list[LazyTensor]] = {}
    for rank, tensor in owners.items():
        if tensor.shape != local:
            raise CheckpointError(f"{folder}: {name} has shape {tensor.shape} in rank {rank} and {local} in rank "
                                  f"{first}.")
        region = layout.slices(shape, rank - first)
        key = tuple((part.start, part.stop) for part in region)
        found.setdefault(key, (region, tensor))      # of copies the first, as MindSpore takes it
        held.setdefault(key, []).append(tensor)
    regions = list(found.values())
    if not covers(shape, [region for region, _ in regions]):
        raise CheckpointError(f"{folder}: the slices of {name} do not make up {shape}; the strategy belongs to another "
                              "run.")
    return JoinedTensor(shape, regions, list(held.values()))
