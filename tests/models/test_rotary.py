"""Rotary tables: closed formulae, and no memory of earlier requests."""
from __future__ import annotations

import importlib.util
import logging

import numpy as np
import pytest
from mindspore import Tensor

from mindformers_ixc.device import assume_device
from mindformers_ixc.models import internlm2
from mindformers_ixc.models.configuration import IXC25Config
from mindformers_ixc.models.rotary import rotary_base, rotary_rows, rotary_tables

CONFIG = IXC25Config(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=16, rope_theta=10000.0,
                     rope_scaling={"type": "dynamic", "factor": 2.0})


def test_trained_length_keeps_the_base():
    assert rotary_base(CONFIG, 16) == 10000.0
    cos, sin = rotary_tables(CONFIG, 16)
    angle = 5 * 10000.0 ** (-2 / 8)
    assert cos[5, 1] == pytest.approx(np.cos(angle), abs=1e-7)
    assert sin[5, 5] == pytest.approx(np.sin(angle), abs=1e-7)


def test_beyond_it_the_base_grows_by_the_ntk_formula():
    assert rotary_base(CONFIG, 32) == pytest.approx(10000.0 * 3.0 ** (8 / 6))


def test_a_long_request_leaves_no_trace():
    before = rotary_tables(CONFIG, 8)
    rotary_tables(CONFIG, 64)
    np.testing.assert_array_equal(before, rotary_tables(CONFIG, 8))


def test_each_row_may_have_the_base_of_a_length_of_its_own():
    positions, lengths = np.array([3, 20, 31]), np.array([4, 21, 32])
    for ours, tables in zip(rotary_rows(CONFIG, positions, lengths), (0, 1)):
        expected = [rotary_tables(CONFIG, 32, length)[tables][p] for p, length in zip(positions, lengths)]
        np.testing.assert_array_equal(ours, expected)
    angle = 20 * (10000.0 * (2.0 * 21 / 16 - 1) ** (8 / 6)) ** (-4 / 8)
    assert rotary_rows(CONFIG, positions, lengths)[1][1, 2] == pytest.approx(np.sin(angle), abs=1e-7)


class TestWithoutTheFusedOperator:
    """MindSpore announces that RotaryPositionEmbedding goes after 2.9."""

    @pytest.fixture
    def hidden(self, monkeypatch):
        """The module as it is where there is no such operator."""
        monkeypatch.delattr("mindspore.ops.auto_generate.RotaryPositionEmbedding")
        spec = importlib.util.find_spec("mindformers_ixc.models.internlm2")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def rotated(self, module, **fields) -> np.ndarray:
        config = IXC25Config(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1,
                             num_attention_heads=4, num_key_value_heads=2, **fields)
        cell = module.RotaryEmbedding(config)
        cell.shard(1, 1)
        x = np.random.default_rng(0).standard_normal((1, 5, 2, 3, 8)).astype(np.float32)
        cos, sin = (Tensor(table[None, :, None, None]) for table in rotary_tables(config, 5))
        return cell(Tensor(x), cos, sin).asnumpy()

    def test_the_rotation_is_composed_with_one_warning(self, hidden, caplog):
        assert hidden.RotaryPositionEmbedding is None
        with assume_device("Ascend"), caplog.at_level(logging.WARNING):
            found = [self.rotated(hidden, apply_rope_fusion=True) for _ in range(3)]
        assert caplog.text.count("apply_rope_fusion is True, but this MindSpore has no RotaryPositionEmbedding") == 1
        np.testing.assert_array_equal(found[0], self.rotated(internlm2))

    def test_nothing_is_said_to_those_who_did_not_ask_for_it(self, hidden, caplog):
        with assume_device("Ascend"), caplog.at_level(logging.WARNING):
            self.rotated(hidden)
        self.rotated(hidden, apply_rope_fusion=True)       # on the CPU it was composed all the time
        assert "RotaryPositionEmbedding" not in caplog.text
