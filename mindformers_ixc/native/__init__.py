"""The shared library of C kernels: `building` makes it when it is first needed, where a C compiler is at hand.

Without it everything works the same through MindSpore's, Pillow's and NumPy's own operations, more slowly. `kernels`
are operations for inference graphs on the CPU, `images` resizes and cuts images.
"""
from __future__ import annotations

import functools
import logging
import os

from mindformers_ixc.errors import BuildError
from mindformers_ixc.native.building import build

logger = logging.getLogger(__name__)

# Set to 0 to do without the library, for instance to compare.
SWITCH = "MINDFORMERS_IXC_NATIVE"


@functools.cache
def library() -> str | None:
    """Path of the library, built now if it has not been; `None` where that is not possible."""
    try:
        return str(build())
    except BuildError as error:
        logger.info(f"{error} Without them answers are slower, not different.")       # `mindformers doctor` says it
        return None


def is_switched_on() -> bool:
    """Whether the library is not switched off and there."""
    return os.environ.get(SWITCH, "1") != "0" and library() is not None
