"""Rotary tables: closed formulae, and no memory of earlier requests."""
from __future__ import annotations

import numpy as np
import pytest

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
