"""A parallel run's checkpoint as one file, for a run in another layout."""
from __future__ import annotations

import json

import numpy as np
import pytest
import random_model
from safetensors.numpy import load_file, save_file

from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.training import relayout
from mindformers_ixc.training.relayout import COUNTERS_FILE, MAP_FILE

COUNTERS = {"epoch_num": 3, "step_num": 17, "loss_scale": 1.0, "global_batch_size": 8, "global_step": 41}


def joined(run, folder, start=None):
    """As a resume joins what a run's ranks have saved, or the one file of a run on one device."""
    ranks = sorted(run.glob("checkpoint/rank_*/*.safetensors"))
    return relayout.joined(ranks or [run], run / "strategy", folder, start)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(Whole weights, folder) of a run of two tensor-parallel ranks that has written its counters."""
    folder = tmp_path_factory.mktemp("run")
    source = random_model.make(folder / "source")
    convert(source, folder / "run", tensor_parallel=2)
    for path in (folder / "run").glob("checkpoint/rank_*/*.safetensors"):
        tensors = load_file(path)
        save_file({**tensors, **{name: np.array(value) for name, value in COUNTERS.items()},
                   "train_report": np.zeros(8, np.float32)}, path)
    return source, folder / "run"


def test_ranks_become_one_file_beside_the_counters(run, tmp_path):
    source, folder = run
    target = joined(folder, tmp_path / "resume", None)
    whole, expected = load_file(target / "whole.safetensors"), load_file(source / "model.safetensors")
    assert whole.keys() == expected.keys()
    assert all(whole[name].tobytes() == expected[name].tobytes() for name in expected)
    # MindSpore's parallel loading of a folder with several files needs to be told where a parameter is
    assert json.loads((target / MAP_FILE).read_text()) == dict.fromkeys(whole, "whole.safetensors")
    counters = load_file(target / COUNTERS_FILE)
    assert {name: value.item() for name, value in counters.items()} == COUNTERS


def test_it_is_joined_once_and_the_other_ranks_wait_for_it(run, tmp_path, monkeypatch):
    target = joined(run[1], tmp_path / "resume", None)
    before = (target / "whole.safetensors").stat().st_mtime_ns
    monkeypatch.setenv("RANK_ID", "1")
    assert joined(run[1], tmp_path / "resume", None) == target
    assert (target / "whole.safetensors").stat().st_mtime_ns == before
    monkeypatch.setattr(relayout, "JOIN_TIMEOUT_S", 0.1)
    with pytest.raises(ConfigError, match="rank 0 has not joined the checkpoint"):
        joined(run[1], tmp_path / "nobody", None)


def test_what_the_graph_did_not_use_comes_from_the_start(run, tmp_path):
    """A run saves the parameters of its graph; a mode's unused pairs are in what it began with."""
    source, folder = run
    start = tmp_path / "start"
    start.mkdir()
    more = load_file(source / "model.safetensors")
    unused = {f"model.layers.{i}.attention.wqkv.lora_web_A.weight": np.full((4, 32), i, np.float32) for i in (7, 8)}
    save_file({**{name: value + 1 for name, value in more.items()}, **unused}, start / "model.safetensors")
    whole = load_file(joined(folder, tmp_path / "resume", str(start)) / "whole.safetensors")
    assert set(whole) == {*more, *unused}
    assert all(whole[name].tobytes() == more[name].tobytes() for name in more)
    assert all(whole[name].tobytes() == unused[name].tobytes() for name in unused)


def test_the_scheduler_of_msrun_joins_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    assert not joined(run[1], tmp_path / "resume", None).exists()


def test_the_file_of_a_run_on_one_device_needs_no_strategy(run, tmp_path):
    source, _ = run
    file = tmp_path / "p_rank_0-2_7.safetensors"
    save_file(load_file(source / "model.safetensors"), file)
    whole = load_file(joined(file, tmp_path / "resume", None) / "whole.safetensors")
    assert whole.keys() == load_file(file).keys()
