"""Damaged sources and targets that cannot be written: one sentence, nothing half-written, the source untouched."""
from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
from random_model import make, random_arrays, save

from mindformers_ixc.checkpoint import streaming
from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.generation.loading import load_model


@pytest.fixture
def model(tmp_path):
    return make(tmp_path / "model")


def refuse(model, tmp_path, words, **changes):
    """The conversion fails with the words, leaves nothing behind and does not touch the source."""
    before = {file: file.read_bytes() for file in model.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(model, tmp_path / "target", **changes)
    assert "\n" not in str(caught.value)
    assert {entry.name for entry in tmp_path.iterdir()} <= {model.name, "other"}
    assert {file: file.read_bytes() for file in model.rglob("*") if file.is_file()} == before


def test_truncated_file(model, tmp_path):
    os.truncate(model / "model.safetensors", 50000)
    refuse(model, tmp_path, r"model\.safetensors is truncated: .* the file has 50000")


def test_missing_shard(model, tmp_path):
    convert(model, tmp_path / "other", to="hf", shard_bytes=20000)
    shutil.rmtree(model)
    sharded = (tmp_path / "other").rename(tmp_path / "model")
    next(iter(sorted(sharded.glob("model-00002*")))).unlink()
    refuse(sharded, tmp_path, r"names the shards model-00002-of-\d+\.safetensors, which are not in")


def test_shape_mismatch_shows_both_shapes(model, tmp_path):
    arrays = random_arrays(read_config(model))
    arrays["model.norm.weight"] = np.ones(31, np.float32)
    save(model / "model.safetensors", arrays)
    refuse(model, tmp_path, r"holds model\.norm\.weight with shape \(31,\), the configuration asks for \(32,\)")
    with pytest.raises(CheckpointError, match=r"shape \(31,\), the configuration asks for \(32,\)"):
        load_model(model)


def test_quantised_weights(model, tmp_path):
    fields = json.loads((model / "config.json").read_text())
    arrays = random_arrays(read_config(model))
    (model / "model.safetensors").unlink()
    quantised = arrays.pop("output.weight").astype(np.int8)
    save(model / "a.safetensors", arrays)
    save(model / "b.safetensors", {"output.weight": quantised}, "I8")
    assert fields["vocab_size"] == len(quantised)
    refuse(model, tmp_path, "holds output.weight in the format I8; weights are one of .* `mindformers quantize`")


def test_config_of_another_model(model, tmp_path):
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**fields, "model_type": "llama"}))
    refuse(model, tmp_path, "model_type 'llama', expected 'internlmxcomposer2'")


def test_no_config(model, tmp_path):
    (model / "config.json").unlink()
    refuse(model, tmp_path, r"has no config\.json; name the model's with --config")


def test_config_with_more_layers(model, tmp_path):
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 5}))
    refuse(model, tmp_path, r"\d+ parameters are missing \(first: model.layers.4")


def test_config_with_fewer_layers(model, tmp_path):
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": 3}))
    refuse(model, tmp_path, r"0 parameters are missing, 47 are surplus \(first: model.layers.3")


def test_full_disk_is_seen_first(model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    refuse(model, tmp_path, r"needs \d+\.\d\d MB, the disk of .* has \d\.\d\d MB free")


def test_disk_that_fills_up_on_the_way(model, tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def pwrite(*arguments):
        calls.append(1)
        if len(calls) == 60:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(streaming, "SYNC_BYTES", 10000)
    monkeypatch.setattr(streaming.os, "pwrite", pwrite)
    with pytest.raises(CheckpointError, match="is full; make room and run the same command again"):
        convert(model, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    written = len(calls)
    convert(model, tmp_path / "target")
    # it went on where it stopped: every tensor was written once or, if it was in flight, twice
    assert len(calls) - written < len(open_source(model).tensors)
    for name, tensor in open_source(tmp_path / "target").tensors.items():
        np.testing.assert_array_equal(tensor.whole(), open_source(model).tensors[name].whole())


def test_no_permission(model, tmp_path, monkeypatch):
    real = os.open

    def refuse_to_open(path, *arguments):
        if str(path).endswith("lock"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments)

    monkeypatch.setattr(streaming.os, "open", refuse_to_open)
    with pytest.raises(CheckpointError, match=r"cannot be written \(Permission denied\); choose another target"):
        convert(model, tmp_path / "target")


@pytest.mark.parametrize("target", [".", "inside", ".."])
def test_source_and_target_overlap(model, target):
    with pytest.raises(CheckpointError, match="are the same or one inside the other"):
        convert(model, model / target)


def test_target_without_a_folder_to_be_in(model, tmp_path):
    with pytest.raises(CheckpointError, match="is no directory"):
        convert(model, tmp_path / "no" / "target")


def test_bin_is_not_written(model, tmp_path):
    refuse_words = r"\.bin files are not written"
    with pytest.raises(CheckpointError, match=refuse_words):
        convert(model, tmp_path / "model.bin")


def test_two_at_once(model, tmp_path):
    work = tmp_path / ".target.partial"
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="Another process is writing"):
            convert(model, tmp_path / "target")
    convert(model, tmp_path / "target")


def test_ranks_without_their_strategy(tmp_path, model):
    folder = tmp_path / "run" / "checkpoint"
    for rank in range(2):
        (folder / f"rank_{rank}").mkdir(parents=True)
        shutil.copy(model / "model.safetensors", folder / f"rank_{rank}" / f"x_rank_{rank}-1_5.safetensors")
    with pytest.raises(CheckpointError, match=r"no strategy was found .* name it with --strategy"):
        open_source(folder)
    (tmp_path / "run" / "strategy").mkdir()
    (tmp_path / "run" / "strategy" / "ckpt_strategy_rank_0.ckpt").write_bytes(b"\xff\xff")
    with pytest.raises(CheckpointError, match="no MindSpore strategy file"):
        open_source(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        open_source(tmp_path / "no")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_source(tmp_path / "empty")
