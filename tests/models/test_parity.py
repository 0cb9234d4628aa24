"""The device code against the reference outputs of the public model, through the functions of scripts/parity.py."""
from __future__ import annotations

import parity_device
import parity_wide
import pytest

CASES = [(files, check) for files, checks in parity_device.CHECKS.items() for check in checks]


@pytest.mark.parametrize(("files", "check"), CASES, ids=[check.__name__ for _, check in CASES])
def test_reference_outputs(goldens, files, check):
    assert all((goldens / "t1" / file).is_file() for file in files)
    assert [row for row in check(goldens / "t1") if not row.passed] == []


@pytest.mark.parametrize("folder", ["t1", "t2"])
def test_features_of_pictures(goldens, folder):
    assert [row for row in parity_device.check_vision(goldens / folder) if not row.passed] == []


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "parameters"), [("base", 80), ("write", 120), ("web", 100)])
def test_gradients_of_every_parameter(goldens_more, mode, parameters):
    rows = parity_wide.check_mode(goldens_more / "t1", mode)
    assert [row for row in rows if not row.passed] == []
    assert [row.cases for row in rows if row.check.endswith(f"gradients, mode {mode} (relative)")] == [parameters]
    assert sum("AdamW" in row.check for row in rows) == (2 if mode == "base" else 0)


@pytest.mark.slow
def test_long_sequences_and_a_cache_beyond_the_trained_length(goldens_more):
    rows = parity_wide.check_logits(goldens_more / "t1") + parity_wide.check_cached(goldens_more / "t1")
    assert [row for row in rows if not row.passed] == []
    assert sum(row.cases for row in rows) == 1 + 15


@pytest.mark.slow
def test_generated_ids_beyond_the_trained_length(goldens_more):
    assert parity_wide.generation_errors(goldens_more / "t1", ("_p2",)) == [0] * 15


def test_filters_of_sampling(goldens_more):
    (row,) = parity_wide.check_sampling(goldens_more / "t1")
    assert (row.cases, row.passed) == (7, True)
