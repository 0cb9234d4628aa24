"""`inspect`: counts, what is missing or surplus, checksums; and the three commands as a user types them."""
from __future__ import annotations

import argparse
import io
import json

import numpy as np
import pytest
from random_model import make

import mindformers_ixc_cli
from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.inspection import inspect
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.checkpoint.tensor_file import TensorFile
from mindformers_ixc.cli import checkpoints
from mindformers_ixc.errors import CheckpointError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("inspect") / "model", "BF16")


def test_parts_are_counted(model):
    report = inspect(model)
    # 4 layers x 5 linears x 2 matrices; the rank is 2 and a layer's linears have 32+64, 32+32, 2 (32+48), 48+32 sides
    part = report.parts["partial_lora"]
    assert (part.tensors, part.parameters) == (40, 4 * 2 * (96 + 64 + 80 + 80 + 80))
    assert part.bytes == 2 * part.parameters and part.formats == {"BF16": 40}
    assert (report.missing, report.surplus, report.wrong_shapes) == ([], [], [])
    assert "It holds exactly what its configuration asks for." in report.to_text()
    lines = report.to_text(40).splitlines()
    place = lines.index("partial_lora")
    assert lines[place + 1].startswith("  tensors 40, parameters ") and max(map(len, lines[place:])) <= 40


def test_missing_surplus_and_shapes_for_a_configuration(model, tmp_path):
    fields = json.loads((model / "config.json").read_text())
    fields.update(num_hidden_layers=5, task_lora_ranks={"sft": 2, "dpo": 2}, vocab_size=65)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    report = inspect(model, config=tmp_path)
    assert len(report.missing) == 37 and all("layers.4" in name for name in report.missing)
    assert len(report.surplus) == 40 and all("lora_web" in name for name in report.surplus)
    assert sorted(report.wrong_shapes) == [("model.tok_embeddings.weight", (64, 32), (65, 32)),
                                           ("output.weight", (64, 32), (65, 32))]
    text = report.to_text()
    assert "output.weight has shape (64, 32), the configuration asks for (65, 32)." in text
    assert "37 parameters are missing: model.layers.4.attention.wqkv.weight" in text


def test_a_format_that_is_not_read_is_named(tmp_path):
    odd = make(tmp_path / "odd")
    tensors = {name: (tensor.dtype, tensor.whole()) for name, tensor in open_source(odd).tensors.items()}
    tensors["output.weight"] = "I8", tensors["output.weight"][1].astype(np.int8)
    shapes = [(name, dtype, value.shape) for name, (dtype, value) in tensors.items()]
    file = TensorFile(odd / "model.safetensors", shapes)
    file.open()
    for name, (_, value) in tensors.items():
        file.write(name, 0, value)
    file.close()
    text = inspect(odd).to_text()
    assert "1 weights are in a format that is not read: output.weight (I8)" in text and "exactly" not in text


def test_json_says_the_same(model):
    fields = json.loads(inspect(model, list_tensors=True).to_json())
    assert fields["kind"] == "public" and fields["parts"]["separators"]["tensors"] == 2
    assert ["model.norm.weight", "BF16", [32]] in fields["tensors"]


def test_a_changed_byte_is_found(model, tmp_path):
    convert(model, tmp_path / "ms")
    assert inspect(tmp_path / "ms", verify=True).damaged == []
    with open(tmp_path / "ms" / "part0.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    report = inspect(tmp_path / "ms", verify=True)
    assert report.damaged == ["output.weight"] and report.verified > 100
    arguments = argparse.Namespace(source=str(tmp_path / "ms"), config=None, strategy=None, verify=True, tensors=False,
                                   json=False, answers=io.StringIO())
    assert checkpoints.run_inspect(arguments) == 1
    assert "checksums compared, 1 differ: output.weight" in arguments.answers.getvalue()


def test_without_checksums_there_is_nothing_to_verify(model):
    with pytest.raises(CheckpointError, match="has no digests to compare with"):
        inspect(model, verify=True)


@pytest.mark.parametrize(("words", "expected"), [
    (["convert", "a", "b", "--tp", "8", "--drop", "web", "dpo"], {"tp": 8, "drop": ["web", "dpo"], "pp": 1}),
    (["merge", "a", "b", "--fold", "sft", "dpo"], {"fold": ["sft", "dpo"], "ema": None}),
    (["inspect", "a", "--json", "--verify"], {"json": True, "verify": True})])
def test_arguments(words, expected):
    arguments = vars(mindformers_ixc_cli.build_parser().parse_args(words))
    assert expected.items() <= arguments.items()


def test_commands_run_and_print_their_target(model, tmp_path):
    for words in (["convert", str(model), str(tmp_path / "ms"), "--max_shard_size", "20KB"],
                  ["merge", str(tmp_path / "ms"), str(tmp_path / "web"), "--fold", "web"]):
        arguments = mindformers_ixc_cli.build_parser().parse_args(words)
        arguments.answers = io.StringIO()
        assert getattr(checkpoints, f"run_{words[0]}")(arguments) == 0
        assert arguments.answers.getvalue() == f"{words[2]}\n"
    assert inspect(tmp_path / "web").missing == []


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("512MiB", 512 * 2**20), ("1000", 1000)])
def test_sizes(text, size):
    assert checkpoints.read_size(text) == size


@pytest.mark.parametrize("text", ["five", "5XB", "", "0"])
def test_wrong_sizes(text):
    with pytest.raises(CheckpointError, match="is no size"):
        checkpoints.read_size(text)
