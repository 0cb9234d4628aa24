"""`mindformers launch`: a parallel run over the devices of a server, by MindSpore's `msrun`."""
from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from mindformers_ixc.cli.run import merged_fields
from mindformers_ixc.cli.run_config import check_fields
from mindformers_ixc.parallel.checks import check_run

# Seconds that msrun and its scheduler get to end by themselves once a rank has ended with an error.
GRACE_S = 15

_DIED = re.compile(r"Worker process (\d+) exit with exception\. Error code: (-?\d+)")


def launch(arguments: argparse.Namespace) -> int:
    """Starts one process a device, waits for all, and says why if they fail.

    Args:
        arguments: of the `launch` subcommand; `rest` are those of `mindformers run`.

    Returns:
        Exit code.

    Raises:
        ConfigError: for a YAML that cannot run on so many devices; nothing has been started then.
    """
    words = arguments.rest[1:] if arguments.rest[:1] == ["run"] else arguments.rest
    run_arguments = _run_arguments(words)
    fields = merged_fields(run_arguments)
    fields["use_parallel"] = True
    check_fields(fields, run_arguments.config)
    check_run(fields, arguments.devices)
    logs = Path(arguments.log_dir or Path(fields.get("output_dir") or "output") / "rank_logs").resolve()
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        environment = _environment(fields, Path(scratch))
        return _Job(_msrun(arguments, words, logs), environment, logs).wait()


def _run_arguments(words: list[str]) -> argparse.Namespace:
    import mindformers_ixc_cli

    parsed, rest = mindformers_ixc_cli.build_parser().parse_known_args(["run", *words])
    parsed.rest = rest
    return parsed


def _environment(fields: dict, scratch: Path) -> dict[str, str]:
    # msrun starts the first `python` of the path
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    environment.pop("LOG_MF_PATH", None)      # every rank has a folder of its own
    if (fields.get("context") or {}).get("device_target", "Ascend") == "CPU":
        from mindformers_ixc.parallel import cpu

        environment.update(cpu.preload_environment())
        environment.setdefault("CPU_PARALLEL_MAILBOX", str(_shared_memory(scratch)))
    return environment


def _shared_memory(scratch: Path) -> Path:
    """A mailbox folder in memory, where the system has such a place; removed with the job."""
    return Path("/dev/shm") / scratch.name if os.access("/dev/shm", os.W_OK) else scratch / "mailbox"


def _msrun(arguments: argparse.Namespace, words: list[str], logs: Path) -> list[str]:
    local = arguments.local_devices or arguments.devices
    port = arguments.master_port or (_free_port() if local == arguments.devices else 8118)
    command = [str(Path(sys.executable).with_name("msrun")), "--worker_num", str(arguments.devices),
               "--local_worker_num", str(local), "--master_addr", arguments.master_addr, "--master_port", str(port),
               "--log_dir", str(logs), "--join", "True"]
    if local != arguments.devices:
        command += ["--node_rank", str(arguments.node_rank)]
    return [*command, str(Path(sys.executable).with_name("mindformers")), "run", *words, "--use_parallel", "True"]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class _Job:
    """An msrun process with its ranks.

    Args:
        command: msrun's.
        environment: of it.
        logs: folder of the ranks' logs.
    """

    def __init__(self, command: list[str], environment: dict[str, str], logs: Path):
        self.logs, self.mailbox = logs, environment.get("CPU_PARALLEL_MAILBOX")
        self.ranks: dict[int, str] = {}            # by process
        self.first: tuple[int, int] | None = None  # process and exit code of the rank that failed first
        self.failed_at = 0.0
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True, start_new_session=True)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with open(self.logs / "msrun.log", "w", encoding="utf-8") as log:
            for line in self.process.stdout:
                log.write(line)
                log.flush()
                found = _DIED.search(line)
                if found and self.first is None:
                    self.first, self.failed_at = (int(found[1]), int(found[2])), time.monotonic()

    def wait(self) -> int:
        """Shows the last rank's log until all have ended; returns the exit code."""
        shown = 0
        try:
            while self.process.poll() is None:
                self._note_ranks()
                shown = self._show(shown)
                if self.first and time.monotonic() - self.failed_at > GRACE_S:
                    break
                time.sleep(0.3)
        finally:
            self._end()
        self.reader.join(timeout=5)
        self._show(shown)
        if self.first or self.process.returncode:
            print(f"error: {self._reason()}", file=sys.stderr, flush=True)
            return 1
        return 0

    def _note_ranks(self) -> None:
        for child in self._children():
            if child.pid not in self.ranks:
                try:
                    variables = child.environ()
                except (psutil.Error, OSError):
                    continue
                if variables.get("MS_ROLE") == "MS_WORKER" and "RANK_ID" in variables:
                    self.ranks[child.pid] = variables["RANK_ID"]

    def _children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.Error:
            return []

    def _show(self, start: int) -> int:
        """Prints what the rank that reports the loss has logged from an offset on; returns the new offset."""
        logs = sorted(self.logs.glob("worker_*.log"), key=lambda path: int(re.search(r"(\d+)\.log", path.name)[1]))
        if not logs:
            return start
        with open(logs[-1], errors="replace", encoding="utf-8") as file:
            file.seek(start)
            sys.stderr.write(file.read())
            sys.stderr.flush()
            return file.tell()

    def _end(self) -> None:
        children = self._children()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for child in children:
            try:
                child.kill()
            except psutil.Error:
                continue
        if self.mailbox:
            shutil.rmtree(self.mailbox, ignore_errors=True)

    def _reason(self) -> str:
        rank = self.ranks.get(self.first[0]) if self.first else None
        if rank is None:
            found = next(((log, text) for log in sorted(self.logs.glob("*.log")) if (text := _error_in(log))), None)
            if found:
                return f"{found[1]} ({found[0]})"
            return f"msrun ended with code {self.process.returncode}; its output is {self.logs}/msrun.log."
        code, log = self.first[1], self.logs / f"worker_{rank}.log"
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        text = _error_in(log) if code >= 0 else None
        return f"Rank {rank} {how}, so all ranks were ended{': ' + text if text else '.'} Its log is {log}."


def _error_in(log: Path) -> str | None:
    """The sentence a rank ended with."""
    if not log.is_file():
        return None
    lines = log.read_text(errors="replace").splitlines()
    for pattern in (r"^error: (.+)", r"^(\w*(?:Error|Exception): .+)"):
        found = [match[1] for line in lines if (match := re.match(pattern, line))]
        if found:
            return found[0]
    return None
