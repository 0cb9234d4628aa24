"""One line of the parity table, and how it is made."""
from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """One line of the parity table."""

    check: str
    cases: int
    error: float
    bar: float
    passed: bool


def row(check: str, errors, bar: float = 0.0) -> Row:
    """A row from the errors of its cases; a check without cases fails."""
    errors = [float(error) for error in errors]
    worst = max(errors) if errors else float("nan")
    return Row(check, len(errors), worst, bar, bool(errors) and all(error <= bar for error in errors))


def differs(ours, theirs) -> int:
    """0 when equal, else 1: the error of a case that must be equal."""
    return int(ours != theirs)


def output(reference, name: str) -> np.ndarray:
    """A reference output of an npz file, in the highest precision that the file has."""
    return next(reference[key] for key in (f"{name}_f64", name, f"{name}_f32") if key in reference.files)
