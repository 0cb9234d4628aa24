"""The shared library of C kernels: `building` makes it when it is first needed, where a C compiler is at hand.

Without it everything works the same through MindSpore's, Pillow's and NumPy's own operations, more slowly. `kernels`
are operations for inference graphs on the CPU, `images` resizes and cuts images.
"""
from __future__ import annotations

import functools
import logging
import os
import platform
import re
from pathlib import Path

from mindformers_ixc.errors import BuildError
from mindformers_ixc.native.building import build

logger = logging.getLogger(__name__)

# Set to 0 to do without the library, for instance to compare.
SWITCH = "MINDFORMERS_IXC_NATIVE"

# Where Linux says what the processor can do, and what the wide form of products with stored weights needs of an x86
# (`has_avx2` in quantised.c).
PROCESSOR = Path("/proc/cpuinfo")
WIDE = ("avx2", "fma", "f16c")


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


def lacking_instructions() -> list[str]:
    """What an x86 processor lacks for the wide form of products with stored weights; their plain form is taken then."""
    if platform.machine() != "x86_64" or not PROCESSOR.is_file():
        return []
    flags = re.search(r"^flags\s*:(.*)$", PROCESSOR.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return [name.upper() for name in WIDE if name not in flags[1].split()] if flags else []
