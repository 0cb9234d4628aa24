"""A neighbour that keeps one core busy, for benchmarks that say what a shared machine feels."""
from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def neighbour(there: bool) -> Iterator[None]:
    """A process beside this one that computes all the time on one core, whichever the system gives it.

    Args:
        there: whether there is one.
    """
    program = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10 ** 6))"
    process = subprocess.Popen([sys.executable, "-c", program]) if there else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()
