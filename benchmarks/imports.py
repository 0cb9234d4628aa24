"""What this package adds to the import of MindFormers, and how long each command's --help takes.

    python benchmarks/imports.py [--pairs 5] [--helps 3]

Processes with and without the package alternate, so that a machine whose speed drifts slows both. Counted is processor
time, user and system, of a whole process; of --help it is the time on the clock, the installed command's where it is.
"""
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Without the package, and with it: importing both registers everything with MindFormers. The package pauses garbage
# collection meanwhile, which saves more than it adds; so it is compared with an import that does the same, too.
PLAIN, WITH = "import mindformers", "import mindformers_ixc, mindformers"
PAUSED = "import gc; gc.disable(); import mindformers; gc.freeze(); gc.enable()"
NAMES = {PLAIN: "import mindformers", PAUSED: "the same, garbage collection paused",
         WITH: "import mindformers_ixc, mindformers"}


def measure(command: list[str], folder: str) -> tuple[float, float]:
    """Seconds of processor time and on the clock that a process takes; it must end well."""
    environment = {**os.environ, "GLOG_v": "3", "LOG_MF_PATH": folder}
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}.")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - start


def compare_imports(rounds: int, folder: str) -> None:
    """Measures imports in rounds, the order turned round each time; one more goes before, to have files in memory."""
    rows = []
    for number in range(rounds + 1):
        order = list(NAMES)[::-1 if number % 2 else 1]
        rows.append({program: measure([sys.executable, "-c", program], folder)[0] for program in order})
    del rows[0]
    for program, name in NAMES.items():
        seconds = [row[program] for row in rows]
        print(f"{name:<38} {statistics.median(seconds):6.3f} s of processor time ({min(seconds):.3f} to "
              f"{max(seconds):.3f})")
    for program, which in ((PLAIN, "more than plain"), (PAUSED, "more than with collection paused")):
        more = [row[WITH] - row[program] for row in rows]
        print(f"{which:<38} {statistics.median(more):+6.3f} s "
              f"({min(more):+.3f} to {max(more):+.3f}), {rounds} pairs")


def time_helps(times: int, folder: str) -> None:
    """Prints how long the help of every command takes."""
    from mindformers_ixc_cli import COMMANDS
    script = Path(sys.executable).parent / "mindformers"
    start = [str(script)] if script.is_file() else [sys.executable, "-m", "mindformers_ixc"]
    for words in ([], *([name] for name in COMMANDS)):
        command = [*start, *words, "--help"]
        seconds = [measure(command, folder)[1] for _ in range(times)]
        print(f"{' '.join(['mindformers', *words, '--help']):<38} {statistics.median(seconds):6.3f} s")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="of imports")
    parser.add_argument("--helps", type=int, default=3, help="runs of each --help")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare_imports(arguments.pairs, folder)
        time_helps(arguments.helps, folder)


if __name__ == "__main__":
    main()
