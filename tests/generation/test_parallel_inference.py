"""Inference in parallel layouts: what a rank loads, and answers over processes against those of one."""
from __future__ import annotations

import json

import numpy as np
import parallel_answers
import pytest
from parallel_parity import Layout as Run
from parallel_parity import predict, write_start

from mindformers_ixc import ConfigError, IXC25Config
from mindformers_ixc.checkpoint.tensors import ArrayTensor, PartOfTensor
from mindformers_ixc.checkpoint.writing import expected_layouts
from mindformers_ixc.demo import demo_path
from mindformers_ixc.parallel.degrees import Degrees, are_replicas, inference_layout
from mindformers_ixc.parallel.slices import layers_of_rank, slices_of_rank
from mindformers_ixc.parameters import parameter_table


def config(tensor: int, stages: int, **fields) -> IXC25Config:
    return IXC25Config(**fields, parallel_config=inference_layout(Degrees(1, tensor, stages)))


@pytest.mark.parametrize(("tensor", "stages"), [(1, 4), (4, 1), (2, 3)])
def test_ranks_load_what_convert_would_give_them(tensor, stages):
    sizes = config(tensor, stages)
    shapes = {name: entry.shape for name, entry in parameter_table(sizes).items()}
    found = {rank: slices_of_rank(shapes, sizes, rank) for rank in range(tensor * stages)}
    expected = expected_layouts(sizes, tensor, stages)
    for name, entry in parameter_table(sizes).items():
        layout, stage = expected[name]
        for rank, slices in found.items():
            if rank // tensor != stage:
                assert name not in slices
            else:
                assert slices[name] == layout.slices(entry.shape, rank % tensor)


def test_a_replicated_tower_is_whole_and_an_offset_moves_layers():
    tower = "vit.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    shapes = {tower: (4096, 1024)}
    replicated = slices_of_rank(shapes, config(4, 1, vision_parallel="replicated"), 3)
    assert replicated == {tower: (slice(0, 4096), slice(0, 1024))}
    assert slices_of_rank(shapes, config(4, 1), 3) == {tower: (slice(3072, 4096), slice(0, 1024))}
    sizes = config(2, 2, offset=[-3, 3])
    norms = {f"model.layers.{layer}.ffn_norm.weight": (4096,) for layer in (12, 13)}
    assert slices_of_rank(norms, sizes, 2) == {"model.layers.13.ffn_norm.weight": (slice(0, 4096),)}
    assert layers_of_rank(sizes, 2) == list(range(13, 32))


def test_replicas_are_of_one_device():
    assert are_replicas(Degrees(2)) and not are_replicas(Degrees(2, 2)) and not are_replicas(Degrees(1, 2))
    with pytest.raises(ConfigError, match="data_parallel is 2 and each replica has 2 devices, but in run_mode predict"):
        inference_layout(Degrees(2, 2, 1))


def test_a_part_of_a_tensor():
    values = np.arange(60, dtype=np.float32).reshape(6, 5, 2)
    part = PartOfTensor(ArrayTensor(values, "F32"), (slice(1, 5), slice(2, 4), slice(0, 2)))
    assert part.shape == (4, 2, 2)
    np.testing.assert_array_equal(part.whole(), values[1:5, 2:4])
    np.testing.assert_array_equal(part.rows(1, 3), values[2:4, 2:4])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model whose pairs all do something, and what it answers alone."""
    folder = tmp_path_factory.mktemp("start")
    write_start(folder / "model")
    picture = demo_path("images/astronaut.jpg")
    parallel_answers.launch(folder / "model", picture, 1, 1, folder / "single.npz")
    return folder / "model", picture, np.load(folder / "single.npz")


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "stages"), [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_answers_equal_the_single_process(start, tmp_path, tensor, stages):
    model, picture, alone = start
    parallel_answers.launch(model, picture, tensor, stages, tmp_path / "found.npz")
    found = np.load(tmp_path / "found.npz")
    # sums over devices are taken in another order: float32's resolution of the largest logit
    np.testing.assert_allclose(found["logits"], alone["logits"], atol=1e-5 * np.abs(alone["logits"]).max(), rtol=0)
    np.testing.assert_array_equal(found["greedy"], alone["greedy"])
    np.testing.assert_array_equal(found["beams"], alone["beams"])


@pytest.mark.slow
def test_the_command_writes_the_file_of_the_single_process(start, tmp_path):
    pictures = [str(demo_path(f"images/{name}.jpg")) for name in ("astronaut", "cameraman")]
    alone = predict(Run(), tmp_path / "alone", start[0], pictures)
    assert predict(Run(tp=2), tmp_path / "two", start[0], pictures) == alone
    assert predict(Run(dp=2), tmp_path / "replicas", start[0], pictures) == alone
    for folder in ("two", "replicas"):
        assert not [*(tmp_path / folder).glob("predictions.part*"), *(tmp_path / folder).glob("predictions.share*")]
    answers = [json.loads(line) for line in alone.decode().splitlines()]
    assert ["error" in answer for answer in answers] == [False, False, True, False]
