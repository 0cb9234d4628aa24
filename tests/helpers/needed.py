"""Programs that a test needs: it is left out where one is missing, and fails where all of them must be there."""
from __future__ import annotations

import os
import shutil

import pytest

# Set by .ci/run, which installs them: a test that is left out there would be missed by nobody.
ALL_THERE = "MINDFORMERS_IXC_ALL_PROGRAMS"


def program(*names: str) -> str:
    """The first of some names that is the one of an installed program."""
    found = next((found for name in names if (found := shutil.which(name))), None)
    if found is None and os.environ.get(ALL_THERE):
        pytest.fail(f"{names[0]} is not installed, and {ALL_THERE} says that it is; .ci/run names its package.")
    if found is None:
        pytest.skip(f"{names[0]} is not installed")
    return found


def chromium() -> str:
    """A browser to look at pages with."""
    return program("chromium", "chromium-browser", "google-chrome")
