"""Damage is noticed wherever digests are, in whatever reads them, and never gets fresh digests."""
from __future__ import annotations

import io
import json
import logging
import shutil

import corrupt_checkpoints
import numpy as np
import pytest
from random_model import make, random_arrays, save

import mindformers_ixc_cli
from mindformers_ixc.checkpoint import digests
from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.digests import DIGEST_FILE, set_verification, write_digests
from mindformers_ixc.checkpoint.inspection import inspect
from mindformers_ixc.checkpoint.merge import merge
from mindformers_ixc.checkpoint.model_directory import load_weights
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.cli import checkpoints
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import CheckpointError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    set_verification(True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return convert(make(folder / "model"), folder / "ranks", tensor_parallel=2)


@pytest.fixture
def model(tmp_path):
    folder = make(tmp_path / "model")
    write_digests(folder)
    return folder


def content(path) -> dict:
    return {name: (tensor.dtype, tensor.shape, tensor.whole().tobytes())
            for name, tensor in open_source(path).tensors.items()}


def flip(path, tensor: str):
    """Changes one bit of a tensor, and nothing else."""
    stretch = open_source(path, verify=False).tensors[tensor].stretches[0]
    with open(path, "r+b") as file:
        file.seek(stretch.offset)
        byte = file.read(1)[0]
        file.seek(stretch.offset)
        file.write(bytes([byte ^ 1]))


def command(*words: str) -> tuple[int, str]:
    arguments = mindformers_ixc_cli.build_parser().parse_args([*words])
    arguments.answers = io.StringIO()
    set_verification(not getattr(arguments, "no_verify", False))
    return getattr(checkpoints, f"run_{words[0]}")(arguments), arguments.answers.getvalue()


def test_corruptions_of_every_form(tmp_path):
    outcomes = corrupt_checkpoints.run(66, 11, tmp_path)
    found = sum(outcomes.values(), corrupt_checkpoints.Counter())
    assert found["silently wrong"] == found["traceback"] == 0, outcomes
    assert found["refused"] > 30


NORM = "model.norm.weight"


def test_a_flipped_bit_is_refused_by_everything_that_reads(model, tmp_path):
    flip(model / "model.safetensors", NORM)
    words = r"model\.safetensors: model\.norm\.weight \(bytes \d+ to \d+\) differs from its digest"
    for read in (lambda: open_source(model), lambda: open_source(model / "model.safetensors"),
                 lambda: load_weights(None, model), lambda: convert(model, tmp_path / "x"),
                 lambda: merge(model, tmp_path / "x", fold=["web"]), lambda: command("convert", str(model), "x")):
        with pytest.raises(CheckpointError, match=words):
            read()
    assert not (tmp_path / "x").exists()
    code, text = command("inspect", str(model), "--verify")
    assert code == 1 and f"1 differ: {NORM}" in text


def test_no_verify_reads_it_as_it_is(model, tmp_path):
    flip(model / "model.safetensors", NORM)
    words = ("convert", str(model), str(tmp_path / "x"), "--to", "hf", "--no_verify")
    assert command(*words) == (0, f"{tmp_path / 'x'}\n")
    set_verification(True)
    changed = [name for name, value in content(tmp_path / "x").items()
               if value[2] != open_source(model, verify=False).tensors[name].whole().tobytes()]
    assert changed == []


@pytest.mark.parametrize("words", [["chat", "--model", "m", "q"], ["eval", "--model", "m", "--data", "d"],
                                   ["run", "--config", "c"], ["convert", "a", "b"], ["merge", "a", "b"],
                                   ["reference", "a", "b", "--model", "m"]])
def test_every_command_that_reads_weights_has_the_switch(words):
    assert mindformers_ixc_cli.build_parser().parse_args([*words, "--no_verify"]).no_verify


def test_the_switch_is_set_before_the_command_runs(model, tmp_path, monkeypatch, capfd):
    flip(model / "model.safetensors", NORM)
    monkeypatch.setenv("LOG_MF_PATH", str(tmp_path / "log"))
    words = ["inspect", str(model)]
    monkeypatch.setattr(mindformers_ixc_cli, "claim_stdout", io.StringIO)
    assert mindformers_ixc_cli.main(words) == 0 and digests.verification()
    assert mindformers_ixc_cli.main(["convert", str(model), str(tmp_path / "x")]) == 1
    assert "differs from its digest" in capfd.readouterr().err
    assert mindformers_ixc_cli.main(["convert", str(model), str(tmp_path / "x"), "--no_verify"]) == 0
    assert not digests.verification()


def test_inspect_says_what_was_not_compared(model, tmp_path):
    assert "Not verified: " in inspect(model).to_text()
    assert "checksums compared, 0 differ." in inspect(model, verify=True).to_text()
    (model / DIGEST_FILE).unlink()
    assert "It has no digests" in inspect(model).to_text()


def rank_file(ranks, rank):
    return next((ranks / "checkpoint" / f"rank_{rank}").iterdir())


@pytest.mark.parametrize("with_digests", [True, False])
def test_swapped_ranks_are_refused(ranks, tmp_path, with_digests):
    """By the digests; without them by the rank in each file's header, whatever the file is called."""
    folder = shutil.copytree(ranks, tmp_path / "ranks")
    if not with_digests:
        (folder / DIGEST_FILE).unlink()
    one, other = (rank_file(folder, rank) for rank in (0, 1))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    with pytest.raises(CheckpointError, match=r"rank_0.* is the file of rank 1"):
        convert(folder, tmp_path / "x", to="hf")
    one.write_bytes(first)
    other.write_bytes(second)
    (folder / "checkpoint" / "rank_0").rename(tmp_path / "aside")
    (folder / "checkpoint" / "rank_1").rename(folder / "checkpoint" / "rank_0")
    (tmp_path / "aside").rename(folder / "checkpoint" / "rank_1")
    with pytest.raises(CheckpointError, match="is the file of rank"):
        open_source(folder)


@pytest.mark.parametrize("damage", ["rank", "strategy", "tokenizer.model", "a third rank"])
def test_damage_in_rank_folders(ranks, tmp_path, damage):
    folder = shutil.copytree(ranks, tmp_path / "ranks")
    if damage == "a third rank":
        shutil.copytree(folder / "checkpoint" / "rank_1", folder / "checkpoint" / "rank_2")
    elif damage == "rank":
        flip(rank_file(folder, 1), NORM)
    else:
        path = folder / damage if damage == "tokenizer.model" else folder / "strategy" / "ckpt_strategy_rank_1.ckpt"
        raw = bytearray(path.read_bytes())
        raw[-3] ^= 1
        path.write_bytes(raw)
    words = {"rank": "differs from its digest", "a third rank": "speaks of 2 ranks"}.get(damage, "strategy|tokenizer")
    with pytest.raises(CheckpointError, match=words):
        convert(folder, tmp_path / "x", to="hf")


def test_every_target_has_digests(model, ranks, tmp_path):
    merge(model, tmp_path / "merged", fold=["web"])
    convert(model, tmp_path / "ckpt", format="ckpt")
    for folder in (ranks, tmp_path / "merged", tmp_path / "ckpt"):
        source = open_source(folder)
        assert source.has_digests and source.verified
        assert inspect(folder, verify=True).damaged == []
        fields = json.loads((folder / DIGEST_FILE).read_text())
        assert "tokenizer.model" in fields["files"] and fields["config"]["model_type"] == "internlmxcomposer2"
    assert open_source(rank_file(ranks, 1)).has_digests


def test_a_finished_target_is_compared_when_it_is_asked_for_again(model, tmp_path):
    convert(model, tmp_path / "x", to="hf")
    convert(model, tmp_path / "x", to="hf")
    right = content(tmp_path / "x")
    file, = (tmp_path / "x").glob("*.safetensors")
    flip(file, NORM)
    with pytest.raises(CheckpointError, match="differs from its digest"):
        convert(model, tmp_path / "x", to="hf")
    convert(model, tmp_path / "x", to="hf", overwrite=True)
    assert content(tmp_path / "x") == right


def test_a_run_that_wrote_no_model(tmp_path):
    """Its newest checkpoint becomes a model directory: parameters only, the configuration from the run's record."""
    root = tmp_path / "root"
    root.mkdir()
    arrays = corrupt_checkpoints.make_public(root / "public")
    run = corrupt_checkpoints.make_run(root / "run", arrays)
    file = run / "checkpoint" / "rank_0" / "x_rank_0-1_10.safetensors"
    for number, source in enumerate((run, run / "checkpoint", run / "checkpoint" / "rank_0", file)):
        convert(source, tmp_path / f"x{number}")
        found = content(tmp_path / f"x{number}")
        assert found.keys() == arrays.keys()
        assert all(found[name][2] == (value + 10).tobytes() for name, value in arrays.items())
        fields = read_config(tmp_path / f"x{number}").to_public_dict()
        assert fields.pop("torch_dtype") == "float32"
        assert fields == read_config(root / "public").to_public_dict()
    merge(run, tmp_path / "merged", fold=["web"], to="hf")
    assert "model.norm.weight" in content(tmp_path / "merged")
    merge(root / "public", tmp_path / "attached", attach=run)
    assert content(tmp_path / "attached")[NORM][2] == (arrays[NORM] + 10).tobytes()


def test_what_is_no_parameter_is_counted(tmp_path, caplog):
    run = corrupt_checkpoints.make_run(tmp_path / "run", corrupt_checkpoints.make_public(tmp_path / "public"))
    with caplog.at_level(logging.INFO):
        convert(run, tmp_path / "x", to="hf")
    states = sum(name.startswith("adam_m.") for name in open_source(run).tensors)
    assert states and f"{states + 2} tensors are no parameters" in caplog.text


def test_the_configuration_of_a_run_that_began_elsewhere(tmp_path):
    arrays = corrupt_checkpoints.make_public(tmp_path / "public")
    run = corrupt_checkpoints.make_run(tmp_path / "run", arrays)
    record = json.loads((run / "run_config.json").read_text())
    record["start"] = str(tmp_path / "public")
    record["train_dataset"] = {"hd_num": 7, "tokenizer": {"vocab_file": "pkg:mindformers_ixc/demo/tokenizer.model"}}
    (run / "run_config.json").write_text(json.dumps(record))
    convert(run, tmp_path / "x", to="hf")
    assert read_config(tmp_path / "x").hd_num == 7 and (tmp_path / "x" / "tokenizer.model").is_file()
    record["model"]["model_config"]["rope_theta"] = 5.0
    (run / "run_config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"differ in rope_theta.* name the model's"):
        convert(run, tmp_path / "y", to="hf")


def test_a_checkpoint_that_is_gone_is_said(tmp_path, caplog):
    run = corrupt_checkpoints.make_run(tmp_path / "run", corrupt_checkpoints.make_public(tmp_path / "public"))
    (run / "checkpoint" / "rank_0" / "x_rank_0-1_10.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        open_source(run)
    assert "x_rank_0-1_10.safetensors is gone" in caplog.text


@pytest.mark.parametrize(("dtype", "value"), [("F32", np.nan), ("F32", -np.inf), ("BF16", 0x7F80), ("BF16", 0x7FC1)])
def test_numbers_that_are_not_finite_are_said(tmp_path, caplog, dtype, value):
    model = make(tmp_path / "model", dtype)
    arrays = random_arrays(read_config(model), dtype)
    arrays[NORM][3:5] = value
    save(model / "model.safetensors", arrays, dtype)
    with caplog.at_level(logging.WARNING):
        convert(model, tmp_path / "x")
    assert f"1 tensors hold NaN or infinities: {NORM} (2)" in caplog.text
