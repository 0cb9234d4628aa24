"""Containers against the libraries that own them: safetensors, MindSpore's .ckpt, PyTorch's .bin."""
from __future__ import annotations

import os
import pickle
import sys
import zipfile

import mindspore as ms
import numpy as np
import pytest
import safetensors.numpy
import torch

from mindformers_ixc.checkpoint import tensor_file
from mindformers_ixc.checkpoint.dtypes import MINDSPORE, STORAGE, from_float32
from mindformers_ixc.checkpoint.safetensors_file import read_header
from mindformers_ixc.checkpoint.sources import read_file
from mindformers_ixc.checkpoint.tensor_file import TensorFile
from mindformers_ixc.errors import CheckpointError


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"matrix": rng.standard_normal((100, 30)).astype(np.float32), "none": np.zeros((0, 3), np.float16),
            "scalar": np.array(3.0, np.float32), "row": np.arange(7, dtype=np.int32),
            "half": rng.standard_normal((9, 2, 5)).astype(np.float16)}


FORMATS = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.int32): "I32"}


def write(path, tensors, names=None) -> None:
    file = TensorFile(path, [(name, FORMATS[value.dtype], value.shape) for name, value in tensors.items()])
    file.open()
    for name, value in tensors.items():
        if value.ndim:
            for begin in range(0, len(value), 4):
                file.write(name, begin, value[begin:begin + 4])
        else:
            file.write(name, 0, value)
    file.close()


def assert_same(found, tensors) -> None:
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype and found[name].shape == value.shape


@pytest.mark.parametrize("piece", [1, 64, 500, 2**26])
def test_what_the_safetensors_library_writes_is_read(tmp_path, piece):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(some_tensors(), str(path))
    found = {name: np.concatenate([part for _, part in tensor.pieces(piece)]) if tensor.shape and tensor.shape[0]
             else tensor.whole() for name, tensor in read_file(path).items()}
    assert_same(found, some_tensors())


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    write(tmp_path / "x.safetensors", some_tensors())
    assert_same(safetensors.numpy.load_file(str(tmp_path / "x.safetensors")), some_tensors())


@pytest.mark.parametrize("size", [0, 5, 40, 200, -1])
def test_truncated_safetensors_are_refused(tmp_path, size):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file(some_tensors(), str(path))
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"x\.safetensors .*(cut off|truncated|valid JSON)"):
        read_header(path)


def test_an_unknown_format_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    header = b'{"w":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(CheckpointError, match="holds w in the format F8_E4M3"):
        read_header(path)


def test_mindspore_reads_the_ckpt_that_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "SLICE", 1000)      # the matrix goes into a dozen values
    tensors = {name: value for name, value in some_tensors().items() if value.size}
    write(tmp_path / "x.ckpt", tensors)
    found = ms.load_checkpoint(str(tmp_path / "x.ckpt"))
    assert_same({name: value.asnumpy() for name, value in found.items()},
                {name: value.reshape(value.shape or (1,)) if name == "scalar" and found[name].shape else value
                 for name, value in tensors.items()})


@pytest.mark.parametrize("slice_kilobytes", [1, 512 * 1024])
def test_what_mindspore_writes_is_read(tmp_path, monkeypatch, slice_kilobytes):
    monkeypatch.setattr(ms.train.serialization, "SLICE_SIZE", slice_kilobytes)
    tensors = {"matrix": some_tensors()["matrix"], "row": some_tensors()["row"], "half": some_tensors()["half"]}
    wide = np.linspace(-3, 3, 50, dtype=np.float32)
    entries = [{"name": name, "data": ms.Tensor(value)} for name, value in tensors.items()]
    entries.append({"name": "brain", "data": ms.Tensor(wide).astype(ms.bfloat16)})
    ms.save_checkpoint(entries, str(tmp_path / "x.ckpt"))
    found = read_file(tmp_path / "x.ckpt")
    brain = found.pop("brain")
    assert brain.dtype == "BF16"
    np.testing.assert_array_equal(brain.whole(), from_float32(wide, "BF16"))
    assert_same({name: tensor.whole() for name, tensor in found.items()}, tensors)


def test_truncated_ckpt_is_refused(tmp_path):
    path = tmp_path / "x.ckpt"
    ms.save_checkpoint([{"name": "w", "data": ms.Tensor(np.ones((10, 10), np.float32))}], str(path))
    os.truncate(path, 200)
    with pytest.raises(CheckpointError, match=r"truncated: a value should end at byte \d+, the file has 200"):
        read_file(path)


def test_something_else_is_no_ckpt(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match=r"no MindSpore \.ckpt file"):
        read_file(tmp_path / "x.ckpt")


def test_every_format_has_its_mindspore_name():
    assert MINDSPORE.keys() == STORAGE.keys()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
def test_bin_files_are_read(tmp_path, legacy):
    matrix = torch.randn(50, 8)
    state = {"matrix": matrix, "transposed": matrix.t(), "brain": matrix.to(torch.bfloat16),
             "scalar": torch.tensor(2.0)}
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=not legacy)
    found = read_file(tmp_path / "x.bin")
    assert found["brain"].dtype == "BF16"
    brain = state.pop("brain").view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(found.pop("brain").whole(), brain)
    assert_same({name: tensor.whole() for name, tensor in found.items()},
                {name: tensor.numpy() for name, tensor in state.items()})


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("container", ["zip", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, container):
    path, trace = tmp_path / "x.bin", tmp_path / "it ran"
    state = {"w": torch.ones(2), "extra": Malicious(f"touch '{trace}'")}
    if container == "zip":
        torch.save(state, path)
        assert zipfile.is_zipfile(path)
    else:
        path.write_bytes(pickle.dumps(Malicious(f"touch '{trace}'"), protocol=2))
    with pytest.raises(CheckpointError, match="was refused, because a pickle can run any code"):
        read_file(path)
    assert not trace.exists()


def test_truncated_bin_is_refused(tmp_path):
    torch.save({"w": torch.ones(1000)}, tmp_path / "x.bin")
    os.truncate(tmp_path / "x.bin", 500)
    with pytest.raises(CheckpointError, match=r"x\.bin cannot be read as a PyTorch file"):
        read_file(tmp_path / "x.bin")


def test_without_pytorch_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "x.bin").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match=r'pip install "mindformers_ixc\[torch\]"'):
        read_file(tmp_path / "x.bin")
