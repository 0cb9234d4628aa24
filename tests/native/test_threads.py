"""How threads of OpenMP wait: said before MindSpore loads it, unless somebody has said it already."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHOWS = "import os, mindformers_ixc; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(("given", "expected"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"),
                                                 ({"OMP_WAIT_POLICY": "active"}, "None")])
def test_they_look_for_work_for_microseconds(given, expected):
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    shown = subprocess.run([sys.executable, "-c", SHOWS], env={**plain, **given}, capture_output=True, text=True,
                           check=True)
    assert shown.stdout.strip() == expected
