"""Packed rows of mixed conversations have the loss and the gradients of the conversations apart, in every layout."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import packed_gradients
import pytest
from parallel_answers import run_ranks

SCRIPT = Path(__file__).parents[1] / "helpers" / "packed_gradients.py"


def largest_difference(found: dict, expected: dict, rank: int = 0) -> float:
    """Of a gradient, relative to its largest number."""
    # what is added to every key alike changes no attention: the gradient of a key's bias is rounding only
    return max(np.abs(value - packed_gradients.slice_of(expected[name], value.shape, rank)).max()
               / np.abs(expected[name]).max() for name, value in found.items()
               if np.abs(expected[name]).max() > 0 and not name.endswith("k_proj.bias"))


@pytest.fixture(scope="module")
def apart():
    return packed_gradients.loss_and_gradients(1, 1, False)


@pytest.mark.slow
def test_alone(apart):
    assert len(apart) > 50 and sum(bool(np.any(value)) for value in apart.values()) > 50
    found = packed_gradients.loss_and_gradients(1, 1, True)
    assert found["loss"] == pytest.approx(apart["loss"], rel=1e-5)
    assert largest_difference(found, apart) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 1)], ids=["tp2", "dp2"])
def test_over_processes(apart, tmp_path, data, tensor):
    run_ranks(2, tmp_path, SCRIPT, data, tensor, "packed", tmp_path)
    for rank in range(2):
        found = dict(np.load(tmp_path / f"{rank}.npz"))
        assert found.keys() == apart.keys()
        assert found["loss"] == pytest.approx(apart["loss"], rel=1e-5)
        assert largest_difference(found, apart, rank % tensor) < 1e-5
