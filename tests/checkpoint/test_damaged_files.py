"""Files that contradict themselves are refused with one sentence that names file and tensor; nothing else comes out."""
from __future__ import annotations

import io
import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_model import SIZES, random_arrays, save

from mindformers_ixc import IXC25Config, IXC25ForCausalLM
from mindformers_ixc.checkpoint import torch_file
from mindformers_ixc.checkpoint.layouts import Layout
from mindformers_ixc.checkpoint.model_directory import load_weights
from mindformers_ixc.checkpoint.protobuf import encode_field, encode_varint
from mindformers_ixc.checkpoint.sources import open_source, read_file
from mindformers_ixc.checkpoint.strategy_file import read_strategy, write_strategies
from mindformers_ixc.errors import CheckpointError

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def safetensors(path, header: object, size: int = 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    return path


@pytest.mark.parametrize(("header", "words"), [
    ({"a": 5}, "has a, which is no tensor"), ({"a": None}, "has a, which is no tensor"), ({"a": []}, "no tensor"),
    ({"a": {"dtype": "F32", "shape": [2]}}, "no tensor"), ({"a": {**GOOD, "shape": 2}}, "no tensor"),
    ({"a": {**GOOD, "shape": [-2]}}, "no tensor"), ({"a": {**GOOD, "shape": [2.0]}}, "no tensor"),
    ({"a": {**GOOD, "shape": [True]}}, "no tensor"), ({"a": {**GOOD, "data_offsets": [0]}}, "no tensor"),
    ({"a": {**GOOD, "data_offsets": [-8, 0]}}, "no tensor"), ({"a": {**GOOD, "dtype": 3}}, "no tensor"),
    ({"a": {**GOOD, "dtype": "F8_E4M3"}}, "format F8_E4M3"), ({"a": {**GOOD, "data_offsets": [8, 0]}}, "-8 bytes"),
    ({"a": {**GOOD, "data_offsets": [0, 12]}}, "12 bytes"), ({"a": {**GOOD, "data_offsets": [16, 24]}}, "truncated"),
    ({"a": {**GOOD, "shape": [10**30], "data_offsets": [0, 4 * 10**30]}}, "truncated"),
    ({"a": {**GOOD, "shape": [0, 10**30], "data_offsets": [0, 0]}}, "which no weight has"),
    ({"a": {**GOOD, "shape": [2] + [1] * 60}}, "which no weight has"),
    ({"a": GOOD, "b": GOOD}, "b begins at byte .* overlaps a"),
    ({"a": GOOD, "b": {**GOOD, "data_offsets": [4, 12]}}, "overlaps a"),
    ({"a": {**GOOD, "data_offsets": [8, 16]}}, "leaves 8 bytes of no tensor after the header"),
    ({"a": GOOD}, "8 bytes behind its last tensor"), ([], "is a list, not a map"), (b"[" * 100000, "nested too deeply"),
    (b'{"a": 1, "a": 2}', "names a 2 times"), (b"\xff\xfe{}", "UTF-16"), (b'{"\xff": 1}', "not UTF-8"),
    (b'{"\\ud800": {}}', "half of a surrogate pair"), (b"", "not valid JSON"), (b"{", "not valid JSON"),
    ({"__metadata__": 5, "a": {**GOOD, "shape": [4], "data_offsets": [0, 16]}}, None)])
def test_safetensors(tmp_path, header, words):
    path = safetensors(tmp_path / "x.safetensors", header)
    if words is None:
        assert list(read_file(path)) == ["a"]
        return
    with pytest.raises(CheckpointError, match=rf"x\.safetensors.*{words}|{words}") as caught:
        read_file(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_a_tensor_without_numbers_is_read(tmp_path):
    header = {"a": GOOD, "b": {**GOOD, "shape": [0, 3], "data_offsets": [8, 8]},
              "c": {**GOOD, "data_offsets": [8, 16]}}
    assert read_file(safetensors(tmp_path / "x.safetensors", header))["b"].whole().shape == (0, 3)


@given(st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_any_bytes_are_refused(tmp_path_factory, suffix, content):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content if suffix == ".ckpt" else struct.pack("<Q", len(content)) + content)
    try:
        read_file(path)
    except CheckpointError as error:
        assert "\n" not in str(error)


def value(name: bytes = b"w", dims=(2,), kind: bytes = b"Float32", content: bytes = bytes(8), more: bytes = b"",
          dims_type: int = 0) -> bytes:
    """One value of a .ckpt file."""
    tensor = b"".join(encode_field(1, size) for size in dims)
    if dims_type:
        tensor = encode_field(1, b"".join(map(encode_varint, dims)))
    tensor += encode_field(2, kind) + encode_field(3, content) + more
    return encode_field(1, encode_field(1, name) + encode_field(2, tensor))


def test_a_ckpt_by_hand_is_read(tmp_path):
    values = value(), value(b"n", (0,), content=bytes(4)), value(b"s", (), content=bytes(4))
    (tmp_path / "x.ckpt").write_bytes(b"".join(values))
    found = read_file(tmp_path / "x.ckpt")
    assert {name: tensor.shape for name, tensor in found.items()} == {"w": (2,), "n": (), "s": ()}


@pytest.mark.parametrize(("content", "words"), [
    (b"", "holds no tensors"), (encode_field(1, 5), "unexpected field 1 of wire type 0"),
    (encode_field(2, b""), "unexpected field 2"), (b"\x0d" + bytes(4), "wire type 5"),
    (b"\x09" + bytes(8), "wire type 1"),
    (encode_field(1, encode_field(1, 7)), "unexpected field 1 of wire type 0"),
    (encode_field(1, encode_field(2, 7)), "unexpected field 2 of wire type 0"),
    (value(dims_type=1), "unexpected field 1 of wire type 2"), (value(dims=(-2,)), r"w has shape \(-2,\)"),
    (value(dims=(3,)), "8 bytes, it needs 12"), (value(dims=(2**62, 2**62)), "which no weight has"),
    (value(kind=b"Float33"), "format Float33"), (value(kind=b"\xff"), "is no text"),
    (value(name=b"\xff"), "is no text"),
    (value(more=encode_field(4, 1)), "unexpected field 4"), (value(more=encode_field(2, b"Int32")), "stands twice"),
    (value() + value(dims=(1,), content=bytes(4)), "parts of w are"), (value() + value(), "16 bytes, it needs 8"),
    (value()[:-1], "truncated"), (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "truncated"),
    (b"\x0a" + b"\xff" * 11, "truncated or no MindSpore"),
    # a tensor that claims to be longer than the value that holds it
    (encode_field(1, encode_field(1, b"w") + b"\x12\x7f") + bytes(200), "what holds it ends at"),
    (b"\x0a\x02\x0a\x80" + b"\x01", "end")])
def test_ckpt(tmp_path, content, words):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_file(tmp_path / "x.ckpt")
    assert "x.ckpt" in str(caught.value)


def zipped(compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("x/data.pkl", bytes(10**6))
    return buffer.getvalue()


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is empty"), (b"\x80\x02}q\x00.", "cannot be read as a PyTorch file"), (b"PK\x05\x06" + bytes(18), "x.bin"),
    (zipped(zipfile.ZIP_DEFLATED), r"part x/data\.pkl is packed \(1000000 bytes in \d+\)"),
    (zipped(zipfile.ZIP_STORED), "x.bin"), (b"PK" + bytes(50), "x.bin"), (b"\x00", "x.bin")])
def test_bin(tmp_path, content, words):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_file(tmp_path / "x.bin")


@pytest.mark.parametrize(("state", "words"), [
    ([torch.ones(2)], "no dict of tensors"), ({1: torch.ones(2)}, "no dict of tensors by name"),
    ({"w": 5}, "no dict of tensors"), ({"w": torch.ones(2).to_sparse()}, "sparse"),
    ({"w": torch.ones(1).expand(10**6)}, "more bytes than the whole file"),
    ({"w": torch.ones(2, dtype=torch.complex64)}, "w as torch.complex64")])
def test_bin_of_other_things(tmp_path, state, words):
    torch.save(state, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=words):
        read_file(tmp_path / "x.bin")


@pytest.mark.parametrize("version", ["2.5.1", "1.13.0+cpu", "unknown"])
def test_an_old_pytorch_is_refused(tmp_path, monkeypatch, version):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.bin")
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(CheckpointError, match=rf"PyTorch {version.split('+')[0]}.*before 2\.6 .* can run code"):
        torch_file.read_tensors(tmp_path / "x.bin")


@pytest.mark.parametrize(("index", "words"), [
    ({"weight_map": []}, "no index of weights"), ({"weight_map": {"a": 5}}, "no index of weights"), ([], "no index"),
    ({}, "no index of weights"), ({"weight_map": {"a": "/etc/passwd"}}, "no file inside"),
    ({"weight_map": {"a": "../x.safetensors"}}, "no file inside"), ({"weight_map": {"a": ""}}, "no file inside"),
    ({"weight_map": {"a": "no.safetensors"}}, "names the shards"), ({"weight_map": {"a": "x\0"}}, "no file inside"),
    ({"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}, "shards were swapped or renamed"),
    ({"weight_map": {"a": "1.safetensors", "c": "2.safetensors"}}, "do not hold"), ("[" * 100000, "nested too deeply"),
    ("\ufeff{", "not valid JSON")])
def test_index(tmp_path, index, words):
    save(tmp_path / "1.safetensors", {"a": np.ones(2, np.float32)})
    save(tmp_path / "2.safetensors", {"b": np.ones(2, np.float32)})
    text = index if isinstance(index, str) else json.dumps(index)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        open_source(tmp_path)


def test_an_index_may_begin_with_a_byte_order_mark(tmp_path):
    save(tmp_path / "1.safetensors", {"a": np.ones(2, np.float32)})
    (tmp_path / "model.safetensors.index.json").write_text('\ufeff{"weight_map": {"a": "1.safetensors"}}')
    assert list(open_source(tmp_path).tensors) == ["a"]


@pytest.mark.parametrize("layout", [
    Layout((), (-1, -1)), Layout((0,), (-1, -1)), Layout((-2,), (0, -1)), Layout((2,), (1, -1)), Layout((2,), (-2, -1)),
    Layout((2, 2), (0, 0)), Layout((2**40,), (0, -1)), Layout((2,), (0, -1), 5), Layout((2,), (0, -1), -3)])
def test_strategies_that_cut_nothing(tmp_path, layout):
    numbers = [encode_field(1, b"".join(encode_field(1, number) for number in group))
               for group in (layout.device_matrix, layout.tensor_map)]
    content = numbers[0] + b"\x12" + numbers[1][1:] + encode_field(7, layout.optimizer_shards)
    item = encode_field(1, b"w") + encode_field(2, content)
    (tmp_path / "x.ckpt").write_bytes(encode_field(3, item))
    with pytest.raises(CheckpointError, match=r"x\.ckpt is no MindSpore strategy file"):
        read_strategy(tmp_path / "x.ckpt")


def test_a_strategy_by_hand_is_read(tmp_path):
    item = encode_field(1, b"w") + encode_field(2, encode_field(1, encode_field(1, 2))
                                                + encode_field(2, encode_field(1, 0) + encode_field(1, -1)))
    (tmp_path / "x.ckpt").write_bytes(encode_field(3, item))
    assert read_strategy(tmp_path / "x.ckpt").layouts == {"w": Layout((2,), (0, -1))}


def test_strategies_of_different_runs(tmp_path):
    for folder, cut in (("a", (0, -1)), ("b", (-1, 0))):
        write_strategies(tmp_path / folder, {"w": (Layout((2,), cut), 0)}, {"w"}, 1, {})
    (tmp_path / "b" / "ckpt_strategy_rank_1.ckpt").replace(tmp_path / "a" / "ckpt_strategy_rank_1.ckpt")
    with pytest.raises(CheckpointError, match="gives two layouts of w"):
        read_strategy(tmp_path / "a")


@pytest.mark.parametrize("dtype", ["I32", "BOOL", "I8"])
def test_the_loader_refuses_whole_numbers(tmp_path, dtype):
    sizes = {**SIZES, "num_hidden_layers": 1, "task_lora_ranks": {}}
    model = IXC25ForCausalLM(IXC25Config(**sizes))
    arrays = random_arrays(IXC25Config(**sizes))
    head = arrays.pop("output.weight")
    save(tmp_path / "a.safetensors", arrays)
    storage = {"I32": np.int32, "BOOL": np.bool_, "I8": np.int8}[dtype]
    save(tmp_path / "b.safetensors", {"output.weight": head.astype(storage)}, dtype)
    with pytest.raises(CheckpointError, match=rf"output\.weight in the format {dtype}"):
        load_weights(model, tmp_path)
