"""A conversion that is killed at any moment and run again ends with the right bytes."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill_convert.py"


@pytest.mark.slow
def test_twenty_random_moments():
    result = subprocess.run([sys.executable, str(SCRIPT), "--trials", "20", "--megabytes", "60"], capture_output=True,
                            text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("20 of 20 ended with the right bytes\n")
