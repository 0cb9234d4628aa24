"""Whole model directories of a parallel run, joined by rank 0 from what every rank has put down.

A rank's part is its checkpoint of the last step, or, where none was saved, a file of its slices made for the purpose.
The strategy files of the training step say how parts make up a whole, as for `mindformers convert`.
"""
from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mindspore import Parameter
from mindspore.mint.distributed import barrier

from mindformers_ixc.checkpoint.model_directory import ParameterTensor, write_tensors
from mindformers_ixc.checkpoint.sources import AVERAGE_PREFIX, is_state
from mindformers_ixc.checkpoint.strategy_file import STRATEGY_FILE, read_layouts, strategy_files
from mindformers_ixc.checkpoint.tensors import LazyTensor
from mindformers_ixc.checkpoint.unused import UNUSED_FILE, unused_parameters
from mindformers_ixc.device import group_size, rank
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.files import whole_file
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.training.relayout import open_ranks
from mindformers_ixc.training.resume import checkpoints_in, read_record, step_of
from mindformers_ixc.training.run_folder import RECORD, SLICES


@dataclass
class Whole:
    """A joined model; nothing of it is read yet.

    Attributes:
        weights: by the model's names.
        averages: the moving averages, of what has one.
    """

    weights: dict[str, LazyTensor]
    averages: dict[str, LazyTensor]


class PartsElsewhere(Exception):
    """Parts of other ranks are on disks that this server does not see; the sentence says which and what to do."""


class Joiner:
    """Joins a run's model; every rank makes one and calls the same methods.

    Args:
        run: folder of the run.
        model: the trained model, of which this rank has slices.
    """

    def __init__(self, run: Path, model: IXC25Model):
        self.run = run
        # beside them the network may keep a step's report, which is none of a model's parameters
        self.parameters = {parameter.name: parameter for parameter in model.get_parameters()
                           if not is_state(parameter.name)}

    @contextmanager
    def joined(self, name: str, checkpoint: Path | None = None,
               averages: dict[str, Parameter] | None = None) -> Iterator[Whole | None]:
        """Lets every rank put down its part, and gives rank 0 what they make up; its files go when the block ends.

        Args:
            name: of what is made of it, no other's at the same time.
            checkpoint: this rank's checkpoint of this very step, if it has one.
            averages: moving averages by the model's names.

        Yields:
            The whole, for rank 0; nothing for the others.

        Raises:
            PartsElsewhere: for rank 0, when parts of other ranks are not to be seen.
            CheckpointError: for rank 0, when the parts do not make up whole tensors of this model.
            OSError: when slices cannot be written, or a rank has not written its own.
        """
        folder = self.run / SLICES.format(name)
        try:
            if checkpoint is None:
                self._save_slices(folder / f"rank_{rank()}", averages or {})
        finally:
            barrier()      # all ranks have put theirs down, or failed to
        if rank():
            yield None
            return
        try:
            yield self._whole(self._files(folder, checkpoint), folder / "links")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _save_slices(self, folder: Path, averages: dict[str, Parameter]) -> None:
        """Writes the slices that this rank's graph uses."""
        folder.mkdir(parents=True, exist_ok=True)
        _, layouts = read_layouts(self.run / "strategy" / STRATEGY_FILE.format(rank()))
        held = {**self.parameters, **{f"{AVERAGE_PREFIX}{name}": average for name, average in averages.items()}}
        write_tensors(folder / f"slices_rank_{rank()}-1_1.safetensors",
                      {name: ParameterTensor(parameter) for name, parameter in held.items() if name in layouts})

    def _files(self, slices: Path, checkpoint: Path | None) -> list[Path]:
        """The parts by rank: of the same step as this rank's checkpoint, or slices."""
        files, hidden = [], []
        for number in range(group_size()):
            own = self.run / "checkpoint" / f"rank_{number}"
            found = sorted((slices / f"rank_{number}").glob("slices_*.safetensors"))
            if checkpoint is not None:
                found += [path for path in checkpoints_in(own) if step_of(path) == step_of(checkpoint)]
            if found:
                files.append(found[0])
            elif own.is_dir() or (slices / f"rank_{number}").is_dir():
                raise FileNotFoundError(2, f"rank {number} has written no part of the model", str(own))
            else:
                hidden.append(number)
        strategies = [number for number in range(group_size())
                      if not (self.run / "strategy" / STRATEGY_FILE.format(number)).is_file()]
        if hidden or strategies:
            raise PartsElsewhere(f"What ranks {_numbers(hidden or strategies)} have saved is on other servers' disks, "
                                 f"not in {self.run}: copy their checkpoint/rank_N and strategy folders there.")
        return files

    def _whole(self, files: list[Path], links: Path) -> Whole:
        source = open_ranks(files, self.run / "strategy", links)
        names = list(self.parameters)
        found = {**self._unused(name for name in names if name not in source.tensors), **source.tensors}
        lacking = [name for name in names if name not in found]
        if lacking:
            raise CheckpointError(f"The ranks' parts in {self.run} and the weights that the run began with lack "
                                  f"{len(lacking)} parameters (first: {lacking[:3]}).")
        averages = {name: source.tensors[AVERAGE_PREFIX + name] for name in names
                    if AVERAGE_PREFIX + name in source.tensors}
        odd = [name for name, tensor in averages.items() if tensor.shape != found[name].shape]
        if odd:
            raise CheckpointError(f"{self.run / 'strategy'} does not say how the averages are cut (first: {odd[0]}).")
        return Whole({name: found[name] for name in names}, averages)

    @property
    def _start(self) -> str | None:
        """The weights that the run began with."""
        record = self.run / RECORD
        return read_record(record).get("start") if record.is_file() else None

    def _unused(self, names: Iterable[str]) -> dict[str, LazyTensor]:
        """Parameters that no rank's graph uses: from where the run began, or as they were drawn."""
        if self._start:
            return unused_parameters(self.run, self._start, names)
        return {name: ParameterTensor(self.parameters[name]) for name in names}

    def leave_unused(self) -> None:
        """Puts down what joining by hand needs beside the ranks' files and would find nowhere; rank 0 calls it."""
        if self._start:
            return
        used: set[str] = set()
        for file in strategy_files(self.run / "strategy"):
            used.update(read_layouts(file)[1])
        unused: dict[str, LazyTensor] = {name: ParameterTensor(parameter)
                                         for name, parameter in self.parameters.items() if name not in used}
        with whole_file(self.run / UNUSED_FILE) as path:
            write_tensors(path, unused)


def _numbers(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:4]))
    return f"{shown} and {len(ranks) - 4} more" if len(ranks) > 4 else shown
