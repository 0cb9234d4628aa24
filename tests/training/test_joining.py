"""Whole directories of a parallel run: joined by rank 0 from checkpoints or slices, refused where parts are missing."""
from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import random_model
from mindspore import Parameter, Tensor

from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.model_directory import write_tensors
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.checkpoint.strategy_file import write_strategies
from mindformers_ixc.checkpoint.unused import UNUSED_FILE
from mindformers_ixc.checkpoint.writing import expected_layouts
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.models.report import REPORT_NAME
from mindformers_ixc.training import joining
from mindformers_ixc.training.joining import Joiner, PartsElsewhere
from mindformers_ixc.training.resume import checkpoints_in
from mindformers_ixc.training.run_folder import SLICES, sweep

RANKS = 4        # tensor parallel 2 in two stages


class FakeRun:
    """A run's folder as its ranks have left it, and each rank's memory; `whole` is what they have parts of."""

    def __init__(self, folder: Path, monkeypatch, start: bool):
        public = random_model.make(folder / "public")
        self.folder = folder / "run"
        convert(public, self.folder, tensor_parallel=2, pipeline_stages=2, mode="base")
        for name in ("config.json", "digests.json"):         # of convert, not of a run
            (self.folder / name).unlink()
        self.whole = {name: tensor.whole() for name, tensor in open_source(public).tensors.items()}
        self.unused = {name for name in self.whole if "post_layernorm" in name or ".lora_" in name}
        layouts = {name: layout for name, layout in expected_layouts(read_config(public), 2, 2, "base").items()
                   if name not in self.unused}          # MindSpore's files name what is in the graph
        write_strategies(self.folder / "strategy", layouts, set(layouts), 2, {})
        self.own = []
        for rank in range(RANKS):
            path = checkpoints_in(self.folder / "checkpoint" / f"rank_{rank}")[0]
            tensors = {name: tensor for name, tensor in open_source(path, verify=False).tensors.items()
                       if name not in self.unused}
            self.own.append({name: tensor.whole() for name, tensor in tensors.items()})
            (path.parent / "digests.json").unlink(missing_ok=True)
            write_tensors(path.with_name("kept"), tensors)          # as a rank saves it: what its graph uses
            path.with_name("kept").rename(path)
        record = {"layout": [1, 2, 2], "start": str(public) if start else None,
                  "model": {"model_config": {"type": "IXC25Config", **random_model.SIZES}}}
        (self.folder / "run_config.json").write_text(json.dumps(record))
        monkeypatch.setattr(joining, "group_size", lambda: RANKS)
        monkeypatch.setattr(joining, "barrier", lambda: None)
        self.monkeypatch = monkeypatch

    def joiner(self, rank: int) -> Joiner:
        """What a rank makes; parameters that are not its stage's are whatever they were drawn as."""
        self.monkeypatch.setattr(joining, "rank", lambda: rank)
        parameters = [Parameter(Tensor(self.own[rank].get(name, value)), name) for name, value in self.whole.items()]
        parameters.append(Parameter(Tensor(np.zeros((2, 3), np.float32)), REPORT_NAME))       # what a step reports
        return Joiner(self.folder, SimpleNamespace(get_parameters=lambda: parameters))

    @contextmanager
    def joined(self, checkpoints: bool, lacking: tuple[int, ...] = ()):
        """Lets every rank put down its part, rank 0 last."""
        for rank in reversed(range(RANKS)):
            if rank in lacking:
                continue
            checkpoint = checkpoints_in(self.folder / "checkpoint" / f"rank_{rank}")[0] if checkpoints else None
            with self.joiner(rank).joined("model", checkpoint) as found:
                if rank == 0:
                    yield found
                else:
                    assert found is None


@pytest.mark.parametrize("start", [True, False], ids=["start", "from_nothing"])
@pytest.mark.parametrize("checkpoints", [True, False], ids=["checkpoints", "slices"])
def test_the_parts_are_the_whole_model_unused_parameters_among_it(tmp_path, monkeypatch, checkpoints, start):
    run = FakeRun(tmp_path, monkeypatch, start)
    with run.joined(checkpoints) as whole:
        assert list(whole.weights) == list(run.whole) and not whole.averages
        for name, tensor in whole.weights.items():
            np.testing.assert_array_equal(tensor.whole(), run.whole[name], err_msg=name)
    assert not list(run.folder.glob(".slices*"))


def test_a_rank_on_another_disk_is_told_from_one_that_has_written_nothing(tmp_path, monkeypatch):
    run = FakeRun(tmp_path, monkeypatch, True)
    checkpoint = checkpoints_in(run.folder / "checkpoint" / "rank_3")[0]
    checkpoint.unlink()
    with pytest.raises(FileNotFoundError, match="rank 3 has written no part of the model"), \
            run.joined(True, lacking=(3,)):
        pass
    checkpoint.parent.rmdir()
    with pytest.raises(PartsElsewhere, match=r"What ranks 3 have saved is on other servers' disks, not in .*: copy"), \
            run.joined(True, lacking=(3,)):
        pass


def test_slices_of_a_killed_run_are_swept(tmp_path, monkeypatch):
    run = FakeRun(tmp_path, monkeypatch, True)
    run.joiner(1)._save_slices(run.folder / SLICES.format("best") / "rank_1", {})
    assert list(run.folder.glob(".slices_best/rank_1/*.safetensors"))
    sweep(run.folder)
    assert not list(run.folder.glob(".slices*"))


@pytest.mark.parametrize("start", [True, False], ids=["start", "from_nothing"])
def test_joining_by_hand_gives_the_same(tmp_path, monkeypatch, start):
    run = FakeRun(tmp_path, monkeypatch, start)
    if not start:
        with pytest.raises(CheckpointError, match="122 parameters are missing"):
            convert(run.folder, tmp_path / "early", to="hf")
    run.joiner(0).leave_unused()
    assert (run.folder / UNUSED_FILE).exists() != start
    convert(run.folder, tmp_path / "whole", to="hf")
    found = open_source(tmp_path / "whole").tensors
    assert set(found) == set(run.whole)
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor.whole(), run.whole[name], err_msg=name)
