"""The shared library of C kernels, built where the package was installed with a C compiler at hand.

Without it everything works the same through MindSpore's, Pillow's and NumPy's own operations, more slowly. `kernels`
are operations for inference graphs on the CPU, `images` resizes and cuts images.
"""
from __future__ import annotations

import functools
import os
from pathlib import Path

# Set to 0 to do without the library, for instance to compare.
SWITCH = "MINDFORMERS_IXC_NATIVE"


@functools.cache
def library() -> str | None:
    """Path of the library, or `None` if the installation has none."""
    found = sorted(Path(__file__).parent.glob("_kernels*.so"))
    return str(found[0]) if found else None


def is_switched_on() -> bool:
    """Whether the library is there and not switched off."""
    return os.environ.get(SWITCH, "1") != "0" and library() is not None
