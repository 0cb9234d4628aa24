"""Conversion: bit-equal there and back through every container and layout, and as MindSpore's own functions see it."""
from __future__ import annotations

import json
import shutil

import mindspore as ms
import numpy as np
import pytest
from mindformers.tools.register import MindFormerConfig
from mindformers.utils import load_checkpoint_utils
from random_model import make, random_arrays, save

from mindformers_ixc import ConfigError
from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.dtypes import from_float32
from mindformers_ixc.checkpoint.inspection import inspect
from mindformers_ixc.checkpoint.layouts import Layout
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.config import read_config
from mindformers_ixc.convert_weight import main as convert_weight
from mindformers_ixc.errors import CheckpointError


def content(path, strategy=None) -> dict:
    """Format, shape and bytes of every tensor."""
    return {name: (tensor.dtype, tensor.shape, tensor.whole().tobytes())
            for name, tensor in open_source(path, strategy).tensors.items()}


@pytest.mark.parametrize("container", ["", "bin"])
@pytest.mark.parametrize("format", ["safetensors", "ckpt"])
def test_goldens_there_and_back(tmp_path, goldens, container, format):
    source = goldens / "t1" / container
    convert(source, tmp_path / "ms", format=format)
    convert(tmp_path / "ms", tmp_path / "hf")
    assert content(tmp_path / "ms") == content(tmp_path / "hf") == content(source)
    fields = read_config(tmp_path / "hf").to_public_dict()
    assert fields.pop("torch_dtype") == "float32"
    assert fields == read_config(source).to_public_dict()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("convert") / "model", "BF16")


@pytest.fixture(scope="module")
def cut(model, tmp_path_factory):
    """The model cut for several layouts, each compiled once for the whole module."""
    folder, made = tmp_path_factory.mktemp("cut"), {}

    def get(tensor_parallel: int, pipeline_stages: int):
        key = (tensor_parallel, pipeline_stages)
        if key not in made:
            made[key] = convert(model, folder / f"tp{tensor_parallel}_pp{pipeline_stages}",
                                tensor_parallel=tensor_parallel, pipeline_stages=pipeline_stages)
        return made[key]

    return get


LAYOUTS = pytest.mark.parametrize(("tensor_parallel", "pipeline_stages"), [(2, 1), (4, 1), (1, 2), (2, 2), (4, 2)])


@pytest.mark.slow
@LAYOUTS
def test_split_then_joined_is_bit_equal(model, cut, tmp_path, tensor_parallel, pipeline_stages):
    ranks = cut(tensor_parallel, pipeline_stages)
    assert len(list((ranks / "checkpoint").iterdir())) == tensor_parallel * pipeline_stages
    convert(ranks, tmp_path / "joined", to="hf")
    assert content(tmp_path / "joined") == content(model)
    fields = json.loads((tmp_path / "joined" / "config.json").read_text())
    assert fields["a_public_field"] == 7 and fields["torch_dtype"] == "bfloat16"
    assert (tmp_path / "joined" / "tokenizer.model").read_bytes() == b"tokenizer"


@pytest.mark.slow
@LAYOUTS
def test_mindspore_joins_the_ranks_to_the_same_bytes(model, cut, tmp_path, tensor_parallel, pipeline_stages):
    ranks = cut(tensor_parallel, pipeline_stages)
    ms.merge_pipeline_strategys(str(ranks / "strategy"), str(tmp_path / "merged.ckpt"))
    ms.unified_safetensors(str(ranks / "checkpoint"), str(tmp_path / "merged.ckpt"), str(tmp_path / "unified"))
    assert content(tmp_path / "unified") == content(model)
    (tmp_path / "full").mkdir()
    ms.transform_checkpoints(str(ranks / "checkpoint"), str(tmp_path / "full"), "full",
                             src_strategy_file=str(tmp_path / "merged.ckpt"), output_format="safetensors")
    file, = (tmp_path / "full" / "rank_0").iterdir()
    assert content(file) == content(model)


@pytest.mark.slow
@pytest.mark.parametrize(("tensor_parallel", "pipeline_stages"), [(4, 1), (2, 2)])
def test_mindspore_cuts_the_whole_checkpoint_to_the_same_ranks(model, cut, tmp_path, tensor_parallel, pipeline_stages):
    # what MindFormers does with auto_trans_ckpt and a whole checkpoint
    ranks = cut(tensor_parallel, pipeline_stages)
    convert(model, tmp_path / "ms")
    ms.merge_pipeline_strategys(str(ranks / "strategy"), str(tmp_path / "merged.ckpt"))
    for rank in range(tensor_parallel * pipeline_stages):
        ms.load_distributed_checkpoint(
            None, predict_strategy=str(tmp_path / "merged.ckpt"), unified_safetensors_dir=str(tmp_path / "ms"),
            dst_safetensors_dir=str(tmp_path / "out"), rank_id=rank, format="safetensors", output_format="safetensors")
        theirs, = (tmp_path / "out" / f"rank_{rank}").iterdir()
        ours, = (ranks / "checkpoint" / f"rank_{rank}").iterdir()
        assert content(theirs) == content(ours)


@pytest.mark.slow
def test_mindformers_auto_trans_unifies_the_ranks(model, cut, tmp_path, monkeypatch):
    monkeypatch.setattr(load_checkpoint_utils, "barrier", lambda: None)      # there is one process only
    # what MindFormers' trainer does with `auto_trans_ckpt: True` and rank folders, up to the device
    config = MindFormerConfig(load_checkpoint=str(cut(2, 2) / "checkpoint"), output_dir=str(tmp_path),
                              load_ckpt_format="safetensors", auto_trans_ckpt=True, use_parallel=True)
    config.checkpoint = MindFormerConfig(load_path=config.load_checkpoint)
    assert load_checkpoint_utils._get_checkpoint_mode(config) == "multi_checkpoint_file_with_rank_id"
    load_checkpoint_utils.validate_config_with_file_mode("multi_checkpoint_file_with_rank_id", True, True)
    folder, suffix = load_checkpoint_utils._get_src_file_suffix(config)
    load_checkpoint_utils.unify_safetensors(folder, load_checkpoint_utils.get_merged_src_strategy_path(config),
                                            str(tmp_path / "unified"), file_suffix=suffix)
    assert content(tmp_path / "unified") == content(model)


@pytest.mark.slow
def test_ranks_that_hold_different_copies_are_named(cut, tmp_path):
    ranks = shutil.copytree(cut(2, 1), tmp_path / "ranks")
    assert inspect(ranks, verify=True).differing == []
    file, = (ranks / "checkpoint" / "rank_1").iterdir()
    where = open_source(file).tensors["model.norm.weight"].stretches[0]
    with open(file, "r+b") as raw:
        raw.seek(where.offset)
        raw.write(b"\x01\x02")
    report = inspect(ranks, verify=True)
    assert report.differing == ["model.norm.weight"] and len(report.damaged) == 1
    assert "copies of 1 tensors are not equal (the first rank's is taken): model.norm.weight" in report.to_text()


@pytest.mark.slow
def test_one_layout_becomes_another(model, cut, tmp_path):
    convert(cut(4, 1), tmp_path / "other", tensor_parallel=1, pipeline_stages=2)
    for rank in range(2):
        name = f"checkpoint/rank_{rank}/ixc25_rank_{rank}-0_0.safetensors"
        assert (tmp_path / "other" / name).read_bytes() == (cut(1, 2) / name).read_bytes()


@pytest.mark.slow
def test_optimizer_states_are_cut_like_their_parameter(model, tmp_path):
    arrays = random_arrays(read_config(model))
    arrays |= {f"adam_m.{name}": value + 1 for name, value in list(arrays.items()) if "attention.wo" in name}
    arrays["global_step"] = np.array([7], np.int32)
    (tmp_path / "run").mkdir()
    shutil.copy(model / "config.json", tmp_path / "run")
    counters = {"global_step": arrays.pop("global_step")}
    save(tmp_path / "run" / "weights.safetensors", arrays)
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(value)} for name, value in counters.items()],
                       str(tmp_path / "run" / "counters.ckpt"))
    before = content(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "cut", tensor_parallel=2)
    assert content(tmp_path / "cut") == before
    weight, moment = (open_source(tmp_path / "cut").strategy.layouts[prefix + "model.layers.1.attention.wo.weight"]
                      for prefix in ("", "adam_m."))
    assert weight == moment == Layout((2,), (-1, 0))
    # the public layout has no place for them
    convert(tmp_path / "cut", tmp_path / "hf", to="hf")
    assert content(tmp_path / "hf").keys() == content(model).keys()


@pytest.mark.slow
def test_pairs_outside_the_mode_stay_whole(model, tmp_path):
    convert(model, tmp_path / "base", tensor_parallel=2, mode="base")
    source = open_source(model).tensors
    file, = (tmp_path / "base" / "checkpoint" / "rank_1").iterdir()
    rank = open_source(file).tensors
    linear = "model.layers.0.attention.wqkv"
    assert rank[f"{linear}.lora_web_B.weight"].shape == source[f"{linear}.lora_web_B.weight"].shape
    rows = source[f"{linear}.Plora_B.weight"].shape[0]
    assert rank[f"{linear}.Plora_B.weight"].shape == (rows // 2, 2)


def test_a_rank_of_the_consolidated_qkv_is_a_block_of_whole_groups():
    layout = Layout((4,), (0, -1))
    assert layout.slices((48, 8), 2) == (slice(24, 36), slice(0, 8))


@pytest.mark.parametrize(("layout", "shape", "regions"), [
    (Layout((2, 2), (0, -1)), (4, 3), [(0, 2), (2, 4), (0, 2), (2, 4)]),             # data parallel outside: copies
    (Layout((2, 2), (0, -1), optimizer_shards=2), (8, 3), [(0, 2), (4, 6), (2, 4), (6, 8)]),
    (Layout((2, 2), (-1, -1), optimizer_shards=-1), (8, 3), [(0, 2), (2, 4), (4, 6), (6, 8)]),
    (Layout((2, 2), (-1, -1), optimizer_shards=2), (8, 3), [(0, 4), (4, 8), (0, 4), (4, 8)]),
    (Layout((2, 2), ((1, 0), -1)), (8, 3), [(0, 2), (2, 4), (4, 6), (6, 8)])])
def test_slices_by_hand(layout, shape, regions):
    found = [layout.slices(shape, device)[0] for device in range(4)]
    assert [(part.start, part.stop) for part in found] == regions


def test_formats_are_rounded_once(tmp_path):
    source = make(tmp_path / "model")
    convert(source, tmp_path / "half", to="hf", dtype="bf16")
    before, after = open_source(source).tensors, open_source(tmp_path / "half").tensors
    for name, tensor in after.items():
        assert tensor.dtype == "BF16"
        np.testing.assert_array_equal(tensor.whole(), from_float32(before[name].whole(), "BF16"))
    convert(tmp_path / "half", tmp_path / "wide", to="hf", dtype="float32")
    convert(tmp_path / "wide", tmp_path / "again", to="hf", dtype="bfloat16")
    assert content(tmp_path / "again") == content(tmp_path / "half")


def test_shards_are_of_limited_size(model, tmp_path):
    convert(model, tmp_path / "hf", to="hf", shard_bytes=20000)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
                                             for i in range(len(files))]
    assert len(files) > 3
    assert content(tmp_path / "hf") == content(model)


def test_task_loras_can_be_left_out(model, tmp_path):
    convert(model, tmp_path / "small", drop=["web", "dpo"])
    assert read_config(tmp_path / "small").task_lora_ranks == {"sft": 2}
    assert not any("lora_web" in name or "lora_dpo" in name for name in open_source(tmp_path / "small").tensors)
    with pytest.raises(CheckpointError, match=r"\['video'\], are not in this model"):
        convert(model, tmp_path / "x", drop=["video"])


def test_buffers_of_the_public_code_are_left_out(model, tmp_path):
    source = shutil.copytree(model, tmp_path / "model")
    extra = {"model.layers.0.attention.rotary_emb.inv_freq": np.ones(2, np.float32)}
    (source / "model.safetensors").rename(source / "a.safetensors")
    save(source / "b.safetensors", extra)
    convert(source, tmp_path / "ms")
    assert content(tmp_path / "ms") == content(model)


def test_one_file(model, tmp_path):
    convert(model, tmp_path / "all.ckpt")
    assert content(tmp_path / "all.ckpt") == content(model)
    convert(tmp_path / "all.ckpt", tmp_path / "all.safetensors", config=model)
    assert content(tmp_path / "all.safetensors") == content(model)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["all.ckpt", "all.safetensors"]


def test_mindformers_calling_convention(model, tmp_path):
    arguments = ["--model", "ixc25", "--config_path", str(model)]
    assert convert_weight([*arguments, "--input_path", str(model), "--output_path", str(tmp_path / "x.ckpt"),
                           "--dtype", "fp32"]) == 0
    assert set(map(str, {p.dtype for p in ms.load_checkpoint(str(tmp_path / "x.ckpt")).values()})) == {"Float32"}
    assert convert_weight([*arguments, "--reversed", "--input_path", str(tmp_path / "x.ckpt"), "--output_path",
                           str(tmp_path / "hf"), "--dtype", "bf16"]) == 0
    assert content(tmp_path / "hf") == content(model)
    assert convert_weight([*arguments, "--input_path", str(tmp_path / "no"), "--output_path", str(tmp_path / "y")]) == 1


def test_the_same_command_again_does_nothing(model, tmp_path):
    convert(model, tmp_path / "ms")
    stamp = (tmp_path / "ms" / "part0.safetensors").stat().st_mtime_ns
    leftover = tmp_path / ".ms.partial"      # a run that is killed after the target appeared leaves its folder
    leftover.mkdir()
    convert(model, tmp_path / "ms")
    assert (tmp_path / "ms" / "part0.safetensors").stat().st_mtime_ns == stamp
    assert not leftover.exists()
    with pytest.raises(CheckpointError, match="exists; choose another target or say --overwrite"):
        convert(model, tmp_path / "ms", dtype="float32")
    convert(model, tmp_path / "ms", dtype="float32", overwrite=True)
    assert open_source(tmp_path / "ms").tensors["output.weight"].dtype == "F32"


@pytest.mark.parametrize(("changes", "words"), [
    ({"tensor_parallel": 3}, "degrees that do are 1, 2, 4"), ({"pipeline_stages": 5}, "choose 1 to 4"),
    ({"tensor_parallel": 0}, "counted from 1"), ({"to": "hf", "tensor_parallel": 2}, "belong to --to ms"),
    ({"dtype": "int8"}, "choices are float32"), ({"to": "pt"}, "choices are ms, hf"),
    ({"mode": "chat"}, "choices are all, base, write, web")])
def test_wrong_options_leave_nothing(model, tmp_path, changes, words):
    with pytest.raises((CheckpointError, ConfigError), match=words):
        convert(model, tmp_path / "x", **changes)
    assert list(tmp_path.iterdir()) == []
