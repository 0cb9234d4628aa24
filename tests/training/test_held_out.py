"""Held-out samples: the loss does not depend on the batch size, every question gets its own answer."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindformers.tools.register import MindFormerConfig
from mindspore import Tensor
from PIL import Image

from mindformers_ixc.data.batch import full_batches
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import DataError
from mindformers_ixc.training import held_out as held_out_module
from mindformers_ixc.training.held_out import HeldOut
from mindformers_ixc.training_options import evaluation_options


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 5))
def test_batches_are_of_one_size_and_lose_nothing(items, size):
    batches = list(full_batches(iter(items), size))
    assert all(len(batch) == size and 0 < real <= size for batch, real in batches)
    assert [item for batch, real in batches for item in batch[:real]] == items
    assert all(set(batch[real:]) <= {batch[real - 1]} for batch, real in batches)
    assert all(batch[real:] == [-batch[real - 1]] * (size - real)
               for batch, real in full_batches(items, size, lambda last: -last))


@pytest.fixture
def data(tmp_path):
    rows = [{"id": i, "conversations": [{"from": "human", "value": f"what is {i}?"},
                                        {"from": "bot", "value": "x" * (i + 1)}]} for i in range(5)]
    (tmp_path / "held_out.json").write_text(json.dumps(rows))
    return MindFormerConfig(tokenizer={"type": "InternLM2Tokenizer", "vocab_file": str(demo_path("tokenizer.model"))},
                            seq_length=96, max_tiles=2, hd_num=1, image_size=56, patch_size=14)


def held_out(data, tmp_path, **options) -> HeldOut:
    return HeldOut(data, evaluation_options({"dataset_dir": str(tmp_path / "held_out.json"), **options}))


def mean_id(ids, labels, *_):
    """A model whose loss of a position is the id there."""
    ids, labels = ids.asnumpy(), labels.asnumpy()
    return Tensor(np.float32(ids[labels != -100].mean()))


def test_the_loss_is_the_mean_over_labelled_positions_for_any_batch_size(data, tmp_path):
    shapes = []

    def model(*columns):
        shapes.append(columns[0].shape)
        return mean_id(*columns)

    losses = [held_out(data, tmp_path, batch_size=size).loss(model) for size in (1, 2, 3, 5, 8)]
    assert losses == pytest.approx([losses[0]] * 5)
    assert set(shapes) == {(size, 96) for size in (1, 2, 3, 5, 8)}


def test_a_picture_damaged_behind_its_header_is_found_before_the_run(data, tmp_path):
    Image.radial_gradient("L").resize((60, 60)).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    rows = [{"query": "what?", "response": "a cat", "image": "a.png"}]
    (tmp_path / "held_out.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"sample 0 .*a\.png is damaged and cannot be decoded"):
        held_out(data, tmp_path)


def test_every_question_gets_its_answer(data, tmp_path):
    sizes = []

    def answer(requests, mode, max_new_tokens):
        sizes.append(len(requests))
        assert (mode, max_new_tokens) == ("base", 64)
        return [request["query"] for request in requests]

    found, expected = held_out(data, tmp_path, batch_size=2, max_samples=3).answers(SimpleNamespace(answer=answer))
    assert found == ["what is 0?", "what is 1?", "what is 2?"]
    assert expected == ["x", "xx", "xxx"]
    assert sizes == [2, 2]


def test_the_answers_that_are_shown_are_spread_over_all_and_name_their_pictures(data, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out_module, "SHOWN", 2)
    held = held_out(data, tmp_path)
    held.samples[2].images = ["pictures/a.png"]
    monkeypatch.chdir(tmp_path)
    first, second = held.shown([f"answer {i}" for i in range(5)])
    assert first == {"sample": "0", "question": "what is 0?", "images": [], "expected": "x", "answer": "answer 0"}
    assert (second["question"], second["answer"]) == ("what is 2?", "answer 2")
    assert second["images"] == [str(tmp_path / "pictures" / "a.png")]
    monkeypatch.setattr(held_out_module, "SHOWN", 100)
    assert len(held.shown([""] * 5)) == 5
