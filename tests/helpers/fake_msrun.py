"""Stands in for msrun in tests of `mindformers launch`: starts ranks that do what a test says.

    fake_msrun.py LOG_DIR PLAN

PLAN is JSON: for every rank (by its number), for `scheduler` and for `msrun` a list of steps:
["log", text], ["show", text] (to the launcher's terminal), ["sleep", seconds], ["kill", signal], ["exit", code],
["empty", file to make], ["await", file that is to get content], ["noticed", "1 failed"] or the like, which waits until
the launcher has noticed that rank 1 has failed, or that it is there ("1 known"): the test has it write so into LOG_DIR.
Needs nothing but the standard library.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

# Seconds that a process waits for a file: it comes at once unless the machine is busy.
WAIT = 120


def wait_for(file: Path) -> None:
    """Waits until a file has content."""
    end = time.monotonic() + WAIT
    while not (file.exists() and file.read_text(encoding="utf-8")):
        if time.monotonic() > end:
            raise TimeoutError(f"{file} has not come within {WAIT} s.")
        time.sleep(0.05)


def follow(steps: list, logs: Path) -> None:
    """Does the steps of one process."""
    for name, value in steps:
        if name == "log":
            os.write(1, value.encode("latin-1"))
        elif name == "show":
            shown, _, _, path = os.environ["MINDFORMERS_IXC_SHOWN"].split(":", 3)
            if shown == os.environ["RANK_ID"]:
                with open(path, "ab", buffering=0) as file:
                    file.write(value.encode("latin-1"))
        elif name == "sleep":
            time.sleep(value)
        elif name == "kill":
            os.kill(os.getpid(), value)
        elif name == "empty":
            Path(value).write_text("", encoding="utf-8")
        elif name == "await":
            wait_for(Path(value))
        elif name == "noticed":
            wait_for(logs / value)
        elif name == "exit":
            sys.exit(value)


def start(logs: Path, steps: list, log: str, **variables: str) -> subprocess.Popen:
    """Starts a process in a session of its own, as msrun does."""
    with open(logs / log, "w", encoding="utf-8") as output:
        return subprocess.Popen([sys.executable, "-S", __file__, str(logs), json.dumps({"follow": steps})],
                                env={**os.environ, **variables}, stdout=output, stderr=subprocess.STDOUT,
                                start_new_session=True)


def main() -> None:
    """Starts the ranks and waits for them, in their order and once in a while."""
    logs, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    if "follow" in plan:
        follow(plan["follow"], logs)
        return
    scheduler = start(logs, plan.pop("scheduler", []), "scheduler.log", MS_ROLE="MS_SCHED", RANK_ID="0")
    own = plan.pop("msrun", [])
    workers = [start(logs, steps, f"worker_{number}.log", MS_ROLE="MS_WORKER", RANK_ID=number)
               for number, steps in sorted(plan.items())]
    follow(own, logs)
    while any(worker.poll() is None for worker in workers):
        time.sleep(0.5)
        failed = next((worker for worker in workers if worker.poll()), None)
        if failed:
            print(f"[ERROR] Worker process {failed.pid} exit with exception. Error code: {failed.returncode}.",
                  flush=True)
            for worker in workers:
                worker.kill()
            break
    else:
        failed = next((worker for worker in workers if worker.returncode), None)
    scheduler.wait()
    if failed:
        raise RuntimeError("Distributed job exited with exception.")


if __name__ == "__main__":
    main()
