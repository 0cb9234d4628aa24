"""The device code against the reference outputs of the public model, through the functions of scripts/parity.py."""
from __future__ import annotations

import parity_device
import pytest

CASES = [(folder, file, check) for folder in ("t1", "t2") for file, checks in parity_device.CHECKS.items()
         for check in checks if folder == "t1" or file == "vision.npz"]


@pytest.mark.parametrize(("folder", "file", "check"), CASES, ids=[f"{c[0]}-{c[2].__name__}" for c in CASES])
def test_reference_outputs(goldens, folder, file, check):
    assert (goldens / folder / file).is_file()
    failed = [row for row in check(goldens / folder) if not row.passed]
    assert not failed
