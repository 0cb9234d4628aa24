"""What a checkpoint on disk is, and its tensors: public directories, single files, MindSpore's, and ranks of a run."""
from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from mindformers_ixc.checkpoint import ckpt_file, safetensors_file, torch_file
from mindformers_ixc.checkpoint.digests import DIGEST_FILE, read_digests, verification, verify_files, verify_folder
from mindformers_ixc.checkpoint.layouts import Strategy, covers
from mindformers_ixc.checkpoint.safetensors_file import read_metadata
from mindformers_ixc.checkpoint.strategy_file import read_strategy, strategy_files
from mindformers_ixc.checkpoint.tensors import JoinedTensor, LazyTensor
from mindformers_ixc.config import inner_model
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.files import read_json
from mindformers_ixc.hub import not_a_folder
from mindformers_ixc.parameters import base_name
from mindformers_ixc.resources import resolve_model

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
# Index files by preference, all `{"weight_map": {name: file}}`; the last is MindSpore's, which may be the bare map.
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "param_name_map.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "model.ckpt")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

# What MindFormers and the step's cell save beside the parameters, and what averages of weights begin with.
STATE_NAMES = ("epoch_num", "step_num", "loss_scale", "global_batch_size", "global_step", "scale_sense", "train_report",
               "learning_rate", "weight_decay", "beta1_power", "beta2_power", "current_iterator_step",
               "last_overflow_iterator_step", "spike_limits", "was_spike")
AVERAGE_PREFIX = "ema."

# Wrappers of PyTorch that show in names: DistributedDataParallel around a model, torch.compile around any module.
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")

_STEP = re.compile(r"-(\d+)_(\d+)\.\w+$")
_RANK = re.compile(r"_rank_(\d+)(?:_\d+)?-\d+_\d+\.\w+$")


@dataclass
class OpenedCheckpoint:
    """A checkpoint whose headers are read; its tensors are read when asked for.

    Attributes:
        path: what was opened.
        kind: `public` (directory or file), `mindspore` or `ranks`.
        tensors: by name, in file order.
        files: that hold them.
        strategy: of `ranks`.
        strategy_files: that it was read from.
        has_digests: whether all the files have digests, see `digests`; `None` before anybody looked.
        verified: whether the files were compared with them.
        renamed: whether the files have other names, with PyTorch's wrappers in them.
    """

    path: Path
    kind: str
    tensors: dict[str, LazyTensor]
    files: list[Path]
    strategy: Strategy | None = None
    strategy_files: list[Path] = field(default_factory=list)
    has_digests: bool | None = None
    verified: bool = False
    renamed: bool = False

    # Files beside the weights that go with them: tokenizer, further configuration, public code, licence.
    side_suffixes: ClassVar[tuple[str, ...]] = (".json", ".model", ".py", ".txt", ".md")

    @property
    def directory(self) -> Path:
        """The folder that was opened, or the file's."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def config_file(self) -> Path | None:
        """The checkpoint's `config.json`, if it has one; of a run's checkpoint that of the run's model."""
        places = [self.directory, self.directory.parent]
        run = self.run_folder
        if run is not None:
            places += [run, run / "model"]
        return next((folder / CONFIG_FILE for folder in places if (folder / CONFIG_FILE).is_file()), None)

    @property
    def side_folder(self) -> Path:
        """Where tokenizer and further files are that go with the weights."""
        if self.run_folder is not None and self.config_file is not None:
            return self.config_file.parent
        return self.directory

    @property
    def run_folder(self) -> Path | None:
        """The folder above `checkpoint/rank_N`, of a run or of what `convert --tp` made."""
        here = self.directory.absolute()
        return next((folder for folder in (here, *here.parents[:2])
                     if any((folder / "checkpoint").glob("rank_[0-9]*"))), None)

    @property
    def is_training_state(self) -> bool:
        """Whether it is what a run saves to go on: optimizer states and counters beside the weights."""
        return any(is_state(name) for name in self.tensors)

    def verify(self, remember: bool = True) -> None:
        """Compares every byte with the digests that were written with the files, where there are any.

        Args:
            remember: take what was compared before and has not changed since for right.

        Raises:
            CheckpointError: naming file and tensor.
        """
        if self.path.is_dir() and self.kind != "ranks" and read_digests(self.path) is not None:
            self.has_digests = verify_folder(self.path, remember=remember)
        else:
            self.has_digests = verify_files([*self.files, *self.strategy_files], remember)
        self.verified = True


def is_state(name: str) -> bool:
    """Whether a tensor of a run's checkpoint is none of the model's: optimizer states, averages, counters."""
    return base_name(name) != name or name in STATE_NAMES or name.startswith(AVERAGE_PREFIX)


def open_source(path: str | os.PathLike, strategy: str | Path | None = None,
                verify: bool | None = None) -> OpenedCheckpoint:
    """Opens a checkpoint and, where it has digests, compares every byte with them.

    Args:
        path: directory or file; of a run its folder, `checkpoint`, or a checkpoint's file.
        strategy: strategy file or folder of a run's ranks, when it is not in the usual place.
        verify: whether digests are compared; by default unless `--no_verify` was said. Without, nothing but headers is
            read.

    Raises:
        CheckpointError: when it is none, is damaged or a file is missing.
    """
    source = _without_wrappers(_open(resolve_model(path), strategy))
    if verification() if verify is None else verify:
        source.verify()
    return source


def _without_wrappers(source: OpenedCheckpoint) -> OpenedCheckpoint:
    """Takes what PyTorch's wrappers put into names out of them, and says so.

    Raises:
        CheckpointError: when two parameters then have one name.
    """
    wrapped = [name for name in source.tensors if _WRAPPERS.search(name)]
    if not wrapped:
        return source
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in source.tensors.items():
        bare = _WRAPPERS.sub("", name)
        if bare in tensors:
            raise CheckpointError(f"{source.path} holds {bare} twice, with and without `module.` or `_orig_mod.`; take "
                                  "one of them out.")
        tensors[bare] = tensor
    found = sorted({word for name in wrapped for word in ("module.", "_orig_mod.") if word in name})
    logger.warning(f"{source.path}: {len(wrapped)} names are read without {' and '.join(found)}, which PyTorch's "
                   "wrappers put there.")
    source.tensors, source.renamed = tensors, True
    return source


def _open(path: Path, strategy: str | Path | None) -> OpenedCheckpoint:
    if path.is_file():
        tensors = read_file(path)
        of_run = path.suffix == ".ckpt" or any(is_state(name) for name in tensors)
        return OpenedCheckpoint(path, "mindspore" if of_run else "public", tensors, [path])
    if not path.is_dir():
        raise CheckpointError(not_a_folder(path) or f"{path} does not exist.")
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
    if re.fullmatch(r"rank_\d+", path.name):
        files = [_rank_files(path.parent, [path])[0]]
    else:
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise CheckpointError(f"{path} holds no checkpoint: neither {', '.join((*INDEX_FILES, *SINGLE_FILES))} nor "
                              f"rank_N folders nor other weight files.{inner_model(path)}")
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
    return _merge({file: read_file(file) for file in files})


def _merge(parts: dict[Path, dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    owner: dict[str, Path] = {}
    for file, found in parts.items():
        for name, tensor in found.items():
            if name in tensors:
                raise CheckpointError(f"{name} is in {owner[name]} and in {file}; remove the file that does not belong "
                                      "to this checkpoint.")
            tensors[name], owner[name] = tensor, file
    return tensors


def _open_index(path: Path, index: Path) -> OpenedCheckpoint:
    fields = read_json(index, CheckpointError)
    weight_map = fields.get("weight_map", fields) if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str)
                                                                     for file in weight_map.values()):
        raise CheckpointError(f"{index} is no index of weights: it needs a `weight_map` of parameters' names to files' "
                              "names.")
    names = sorted(set(weight_map.values()))
    outside = next((name for name in names if not _is_inside(name)), None)
    if outside is not None:
        raise CheckpointError(f"{index} names {outside!r:.80}, which is no file inside {path}.")
    missing = [f"{name:.80}" for name in names if not os.path.isfile(path / name)]
    if missing:
        raise CheckpointError(f"{index} names the shards {', '.join(missing[:5])}, which are not in {path}; copy "
                              "them too.")
    files = [path / name for name in names]
    parts = {file: read_file(file) for file in files}
    tensors = _merge(parts)
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise CheckpointError(f"{index} names {len(absent)} parameters that its files do not hold (first: "
                              f"{absent[:3]}); the index belongs to other files.")
    moved = [name for name, file in weight_map.items() if name not in parts[path / file]]
    if moved:
        raise CheckpointError(f"{index} has {len(moved)} parameters in other files than those that hold them (first: "
                              f"{moved[0]} in {weight_map[moved[0]]}); shards were swapped or renamed.")
    kind = "mindspore" if index.name == INDEX_FILES[2] else "public"
    return OpenedCheckpoint(path, kind, tensors, files)


def _is_inside(name: str) -> bool:
    """Whether a name is that of a file below the folder it stands in."""
    return bool(name) and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts


def _open_ranks(path: Path, folder: Path, strategy: str | Path | None) -> OpenedCheckpoint:
    folders = sorted(folder.glob("rank_[0-9]*"), key=lambda found: (len(found.name), found.name))
    places = [Path(strategy)] if strategy else [path / "strategy", folder.parent / "strategy", folder / "strategy"]
    # a stand-alone run leaves the folder empty
    place = next((place for place in places if place.exists() and (strategy or strategy_files(place))), None)
    if place is None and [found.name for found in folders] == ["rank_0"]:      # a stand-alone run cuts nothing
        files = _rank_files(folder, folders)
        return OpenedCheckpoint(path, "mindspore", read_file(files[0]), files)
    if place is None:
        raise CheckpointError(f"{folder} holds the slices of ranks, but no strategy was found that says how they are "
                              f"cut ({', '.join(map(str, places))}); name it with --strategy.")
    layouts = read_strategy(place)
    known = {f"rank_{rank}" for rank in range(layouts.ranks)}
    surplus = [found.name for found in folders if found.name not in known]
    if surplus:
        raise CheckpointError(f"{folder} holds {', '.join(surplus[:3])}, but the strategy in {place} speaks of "
                              f"{layouts.ranks} ranks; they belong to different runs.")
    files = _rank_files(folder, [folder / f"rank_{rank}" for rank in range(layouts.ranks)])
    parts = [read_file(file) for file in files]
    names = list(dict.fromkeys(name for part in parts for name in part))
    tensors = {name: _join(name, parts, layouts, folder) for name in names}
    return OpenedCheckpoint(path, "ranks", tensors, files, layouts, strategy_files(place))


def _rank_files(folder: Path, ranks: list[Path]) -> list[Path]:
    """The file of each rank; of several, the one of the latest step that every rank has."""
    steps: list[dict[tuple[int, ...], Path]] = []
    for rank in ranks:
        found = sorted(file for file in rank.glob("*") if file.suffix in (".safetensors", ".ckpt")
                       and not file.name.startswith((".", "unfinished_")))
        if not found:
            raise CheckpointError(f"{rank} holds no weights; the strategy speaks of {len(ranks)} ranks.")
        keys = [_STEP.search(file.name) for file in found]
        steps.append({tuple(map(int, key.groups())) if key else (): file for key, file in zip(keys, found)})
    common = set(steps[0]).intersection(*steps[1:])
    if not common:
        raise CheckpointError(f"The ranks in {folder} have no step in common; a run was cut off while it saved.")
    files = [found[max(common)] for found in steps]
    for file in files:
        _check_rank(file)
        _say_lost(file, max(common))
    return files


def _say_lost(file: Path, step: tuple[int, ...]) -> None:
    """Says when a later checkpoint than the one that is read was written, and is gone."""
    digests = read_digests(file.parent)
    listed = [name for name in digests.files if not (file.parent / name).exists()] if digests is not None else []
    lost = [name for name in listed if (key := _STEP.search(name)) and tuple(map(int, key.groups())) > step]
    if lost:
        logger.warning(f"{file.parent / lost[-1]} is gone or was never finished, although {DIGEST_FILE} lists it; "
                       f"{file.name} is read, which is older.")


def _check_rank(file: Path) -> None:
    """Refuses a file that says, by its name or in its header, that it is another rank's."""
    named = _RANK.search(file.name)
    found = {named[1]} if named else set()
    if file.suffix == ".safetensors" and "rank" in (metadata := read_metadata(file)):
        found.add(metadata["rank"])
    own = file.parent.name.removeprefix("rank_")
    other = sorted(found - {own})
    if other:
        raise CheckpointError(f"{file} is the file of rank {other[0]}, by its name or header, not of rank {own}; the "
                              "files of ranks were swapped or renamed.")


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
    if len(layout.tensor_map) != len(local):
        raise CheckpointError(f"{folder}: {name} has shape {local} in rank {first}, the strategy cuts "
                              f"{len(layout.tensor_map)} axes; it belongs to another run, or is damaged.")
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
