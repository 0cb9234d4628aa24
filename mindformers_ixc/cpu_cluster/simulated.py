"""Starts a program of this package as one rank of a cluster that is not there.

MindSpore's compiler needs a process of its own for it: it must be started with a preloaded library, and what it sets
stays set. Such a program reads its job as JSON from standard input and writes its answer to the job's `target`.
"""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from mindformers_ixc.cpu_cluster.build import preload_environment
from mindformers_ixc.errors import LayoutError

# Lines of a failed compiler that are shown.
LAST_LINES = 15

# What MindSpore puts in front of an error in its log.
_LOGGED_ERROR = re.compile(r"\[(ERROR|CRITICAL)\].*?\.cc:\d+\] \w+\] ")


def run_rank(module: str, job: dict, folder: Path, what: str) -> None:
    """Runs a program as a rank and waits for its end.

    Args:
        module: name of the program's module, which is run with `python -m`.
        job: its job, JSON-serialisable; `target` is the file it must write.
        folder: where it runs, and where its logs go.
        what: is compiled, for the message (`The step of stage 0 did not compile for ...`).

    Raises:
        BuildError: when the simulation of a cluster cannot be built here.
        LayoutError: when the program fails or writes nothing; with what the compiler said last.
    """
    environment = {**os.environ, **preload_environment(simulated=True), "GLOG_v": "3",
                   "LOG_MF_PATH": str(folder / "log")}
    result = subprocess.run([sys.executable, "-m", module], input=json.dumps(job), env=environment, cwd=folder,
                            capture_output=True, text=True, check=False)
    if result.returncode or not Path(job["target"]).exists():
        raise LayoutError(f"{what}:\n" + "\n".join(last_lines(result.stderr) or last_lines(result.stdout)))


def last_lines(text: str) -> list[str]:
    """What a failed compiler said last: its errors, then the exception, without call stacks."""
    lines = [line for line in text.splitlines() if line.strip() and not set(line) <= set("-= ")]
    marks = [(line, _LOGGED_ERROR.match(line)) for line in lines]
    errors = [line[mark.end():] for line, mark in marks if mark]
    reason = next((number for number, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), None)
    last = lines[-LAST_LINES:] if reason is None else lines[reason:]
    stack = next((number for number, line in enumerate(last) if line.startswith("- C++ Call Stack")), len(last))
    return (errors[-3:] + (last[:stack] or last))[:LAST_LINES]
