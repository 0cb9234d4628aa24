"""Digests of what is written: every byte counts, and a check that was made is remembered until the file changes."""
from __future__ import annotations

import json
import logging
import os

import numpy as np
import pytest
from random_model import save

from mindformers_ixc.checkpoint import digests
from mindformers_ixc.checkpoint.digests import DIGEST_FILE, verify_files, verify_folder, write_digests
from mindformers_ixc.errors import CheckpointError

ARRAYS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones((), np.float32)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mindformers_ixc" / "verified"


@pytest.fixture(params=["safetensors", "ckpt"])
def folder(tmp_path, request):
    (tmp_path / "x").mkdir()
    save(tmp_path / "x" / f"w.{request.param}", ARRAYS)
    (tmp_path / "x" / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "x" / "config.json").write_text('{"rope_theta": 100}')
    write_digests(tmp_path / "x", rank=1)
    return tmp_path / "x"


def flip(path, place, bit=1):
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def weights(folder):
    return next(path for path in folder.iterdir() if path.name.startswith("w."))


def test_what_was_written_is_right(folder):
    assert verify_folder(folder) and verify_files([weights(folder)])
    (folder / DIGEST_FILE).unlink()
    assert not verify_folder(folder) and not verify_files([weights(folder)])


def test_every_byte_counts(folder):
    path = weights(folder)
    good = path.read_bytes()
    for place in range(len(good)):
        flip(path, place)
        with pytest.raises(CheckpointError, match=path.name):
            verify_folder(folder)
        path.write_bytes(good)
    assert verify_folder(folder)


def test_a_damaged_tensor_is_named(folder):
    path = weights(folder)
    flip(path, path.read_bytes().index(ARRAYS["a.weight"].tobytes()) + 5)
    with pytest.raises(CheckpointError, match=r"a\.weight \(bytes \d+ to \d+\) differs .* --no_verify"):
        verify_folder(folder)


@pytest.mark.parametrize(("change", "words"), [
    (lambda folder: os.truncate(weights(folder), 40), "has 40 bytes, .* says"),
    (lambda folder: weights(folder).write_bytes(weights(folder).read_bytes() + b"\0"), "bytes, .* says"),
    (lambda folder: weights(folder).unlink(), "is missing; .* lists it"),
    (lambda folder: save(folder / "more.safetensors", ARRAYS), r"more\.safetensors is not listed in"),
    (lambda folder: flip(folder / "tokenizer.model", 0), r"tokenizer\.model differs from its digest"),
    (lambda folder: flip(folder / DIGEST_FILE, 90, 4), DIGEST_FILE),
    (lambda folder: os.truncate(folder / DIGEST_FILE, 100), DIGEST_FILE),
    (lambda folder: (folder / DIGEST_FILE).write_text(""), DIGEST_FILE),
    (lambda folder: (folder / DIGEST_FILE).write_text("[" * 100000), DIGEST_FILE)])
def test_other_damage(folder, change, words):
    change(folder)
    with pytest.raises(CheckpointError, match=words):
        verify_folder(folder)


def test_a_configuration_changed_by_hand_is_said(folder, caplog):
    with caplog.at_level(logging.WARNING):
        verify_folder(folder)
        assert not caplog.records
        (folder / "config.json").write_text('{"rope_theta": 200}')
        assert verify_folder(folder)
    assert "rope_theta was 100, is 200" in caplog.text


def test_a_rank_in_another_place(folder, tmp_path):
    folder.rename(tmp_path / "rank_1")
    assert verify_folder(tmp_path / "rank_1")
    (tmp_path / "rank_1").rename(tmp_path / "rank_0")
    with pytest.raises(CheckpointError, match="holds the files of rank 1"):
        verify_files([weights(tmp_path / "rank_0")])


def test_files_that_come_and_go(tmp_path):
    """A run's rank folder: digests are there before a checkpoint takes its name, and go with it."""
    save(tmp_path / "unfinished_x-1_1.safetensors", ARRAYS)
    write_digests(tmp_path, {"x-1_1.safetensors": tmp_path / "unfinished_x-1_1.safetensors"}, rank=0, run="a")
    os.replace(tmp_path / "unfinished_x-1_1.safetensors", tmp_path / "x-1_1.safetensors")
    save(tmp_path / "x-1_2.safetensors", {"c": np.zeros(3, np.float32)})
    write_digests(tmp_path, ["x-1_2.safetensors"])
    assert verify_folder(tmp_path)
    (tmp_path / "x-1_1.safetensors").unlink()
    assert verify_folder(tmp_path, ["x-1_2.safetensors"])
    save(tmp_path / "x-1_3.safetensors", ARRAYS)
    with pytest.raises(CheckpointError, match=r"x-1_3\.safetensors is not listed"):
        verify_files([tmp_path / "x-1_3.safetensors"])
    write_digests(tmp_path, ["x-1_3.safetensors"])
    fields = json.loads((tmp_path / DIGEST_FILE).read_text())
    assert list(fields["files"]) == ["x-1_2.safetensors", "x-1_3.safetensors"]
    assert fields["metadata"] == {"rank": 0, "run": "a"}


def test_an_older_index_is_read(tmp_path):
    path = save(tmp_path / "part0.safetensors", ARRAYS)
    sums = {name: digests.digest(own) for name, own in digests.tensor_stretches(path).items()}
    index = {"weight_map": dict.fromkeys(ARRAYS, path.name), "checksums": sums}
    (tmp_path / "param_name_map.json").write_text(json.dumps(index))
    assert verify_folder(tmp_path)
    flip(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"part0\.safetensors: b .*differs"):
        verify_folder(tmp_path)
    (tmp_path / "param_name_map.json").write_text(json.dumps({**index, "checksums": ["a"]}))
    with pytest.raises(CheckpointError, match="not in the form"):
        verify_folder(tmp_path)


def test_what_was_compared_is_remembered(folder, cache, monkeypatch):
    path = weights(folder)
    monkeypatch.setattr(digests, "SETTLED_S", 3600)
    verify_folder(folder)
    assert not [entry for entry in cache.iterdir() if entry.suffix != ".lock"]       # changed a moment ago
    monkeypatch.setattr(digests, "SETTLED_S", -1)
    verify_folder(folder)
    monkeypatch.setattr(digests, "digest", None)
    assert verify_folder(folder)
    with pytest.raises(TypeError):
        verify_folder(folder, remember=False)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
    status = path.stat()
    flip(path, path.stat().st_size - 1)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))        # the time of the change stays
    with pytest.raises(CheckpointError, match="differs"):
        verify_folder(folder)


def test_a_cache_that_cannot_be_written(folder, tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("no home")

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert verify_folder(folder)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(digests.Path, "home", no_home)
    assert verify_folder(folder)
