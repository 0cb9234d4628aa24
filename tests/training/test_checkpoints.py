"""Writing checkpoints: on a full disk, and which older ones are let go of in a parallel run."""
from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindformers.core.callback.callback import CheckpointMonitor
from mindspore import Parameter, Tensor, nn
from safetensors import SafetensorError

from mindformers_ixc.checkpoint.digests import read_digests
from mindformers_ixc.errors import TrainingError
from mindformers_ixc.training import checkpoints
from mindformers_ixc.training.checkpoints import SafeCheckpointMonitor
from mindformers_ixc.training.resume import checkpoints_in


class Parameters(SimpleNamespace):
    """What callbacks are told of a run."""

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)


class FakeRun:
    """Steps of a run whose monitor saves after each of them."""

    def __init__(self, folder: Path, keep: int = 1):
        self.monitor = SafeCheckpointMonitor(prefix="t", directory=str(folder), keep_checkpoint_max=keep,
                                             save_checkpoint_steps=1, checkpoint_format="safetensors",
                                             integrated_save=True, async_save=False,
                                             append_info=[{"step_num": 0, "epoch_num": 0, "loss_scale": 1}])
        self.folder = Path(self.monitor._directory)
        network = nn.TrainOneStepCell(nn.Dense(2, 2), nn.SGD([Parameter(Tensor([1.0]), "w")]))
        outputs = (Tensor(np.float32(1)), Tensor(False), Tensor(1.0), Tensor(np.float32(0.1)), None)
        self.parameters = Parameters(net_outputs=outputs, cur_step_num=0, cur_epoch_num=1, batch_num=9,
                                     epoch_num=2, train_network=network, network=network, optimizer=None,
                                     dataset_sink_mode=False)

    def original_args(self):
        return self.parameters

    def step(self) -> list[int]:
        """Does a step; returns those whose checkpoints are there afterwards."""
        self.parameters.cur_step_num += 1
        self.monitor.step_end(self)
        return self.saved()

    def saved(self) -> list[int]:
        return [int(path.stem.rpartition("_")[2]) for path in checkpoints_in(self.folder)]


@pytest.fixture
def full_disk(monkeypatch):
    """Lets writing fail by half while `error` is set."""
    switch = {"error": None}
    write = CheckpointMonitor.remove_redundancy

    def half(self, network, cur_file, *rest):
        write(self, network, cur_file, *rest)
        if switch["error"]:
            Path(cur_file).chmod(0o600)
            Path(cur_file).write_bytes(Path(cur_file).read_bytes()[:20])
            Path(cur_file).with_suffix(".tmp").write_bytes(b"half")
            raise switch["error"]

    monkeypatch.setattr(CheckpointMonitor, "remove_redundancy", half)
    monkeypatch.setattr(SafeCheckpointMonitor, "on_error", "stop")
    return switch


ERRORS = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
          SafetensorError("I/O error: No space left on device (os error 28)"), RuntimeError("cannot write")]


@pytest.mark.parametrize("error", ERRORS)
def test_a_full_disk_ends_the_run_and_keeps_the_older_checkpoint(tmp_path, full_disk, error):
    run = FakeRun(tmp_path)
    assert run.step() == [1]
    full_disk["error"] = error
    with pytest.raises(TrainingError) as told:
        run.step()
    assert str(told.value).startswith("Step 2: the checkpoint could not be written to ")
    assert str(error) in str(told.value) and "1_1.safetensors" in str(told.value)
    assert run.parameters.run_failed
    assert run.saved() == [1] and not list(run.folder.glob("unfinished_*"))


def test_with_continue_the_next_one_is_saved_again(tmp_path, full_disk, monkeypatch, capsys):
    monkeypatch.setattr(SafeCheckpointMonitor, "on_error", "continue")
    run = FakeRun(tmp_path)
    run.step()
    full_disk["error"] = ERRORS[0]
    assert run.step() == [1]
    assert "Step 2: the checkpoint could not be written" in capsys.readouterr().err
    full_disk["error"] = None
    assert run.step() == [3]
    assert not hasattr(run.parameters, "run_failed")
    assert set(read_digests(run.folder).files) >= {"t_rank_0-1_3.safetensors"}
    assert ms.load_checkpoint(str(checkpoints_in(run.folder)[0]), format="safetensors")["step_num"].asnumpy() == 3


def test_a_rank_lets_go_of_a_step_when_every_rank_has_a_newer_one(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "is_parallel", lambda: True)
    monkeypatch.setattr(checkpoints, "group_size", lambda: 2)
    run = FakeRun(tmp_path)
    other = run.folder.with_name("rank_1")
    other.mkdir(parents=True)

    def other_saves(step: int) -> None:
        (other / f"t_rank_1-1_{step}.safetensors").touch()

    assert run.step() == [1]
    other_saves(1)
    assert run.step() == [1, 2]           # the other rank may be writing still
    other_saves(2)
    assert run.step() == [2, 3]
    assert run.step() == [2, 3, 4]        # it could not write 3: only 2 is everywhere
    other_saves(4)
    assert run.step() == [4, 5]


@pytest.mark.parametrize("fails", [False, True])
def test_the_checkpoint_of_the_last_step_is_known_at_the_end_if_there_is_one(tmp_path, full_disk, monkeypatch, fails):
    with checkpoints.safe_checkpoints("continue") as saved:
        run = FakeRun(tmp_path)
        run.step()
        full_disk["error"] = ERRORS[0] if fails else None
        run.step()
        run.monitor.end(run)          # nothing new to save, or again in vain
    assert saved.final == (None if fails else run.folder / "t_rank_0-1_2.safetensors")
    monkeypatch.setattr(SafeCheckpointMonitor, "on_error", "stop")
    monkeypatch.setattr(SafeCheckpointMonitor, "saved", None)
