"""`mindformers launch`: a parallel run over the devices of a server, by MindSpore's `msrun`.

msrun starts the ranks and ends them when one ends with an error, but it looks once a second, in the order of the ranks,
names a process and not a rank, waits for a scheduler that may never end, and leaves everything running when it is ended
itself. So `job` watches what it starts.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from mindformers_ixc import terminal
from mindformers_ixc.cli.job import Job, Stopped, signal_name, stopped_by_signals
from mindformers_ixc.cli.run_config import check_fields
from mindformers_ixc.cli.yaml_file import merged_fields
from mindformers_ixc.cpu_cluster.build import preload_environment
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.interruption import JOB, name_of
from mindformers_ixc.parallel.checks import check_run
from mindformers_ixc.parallel.degrees import degrees_of
from mindformers_ixc.training.resume import (
    CHOSEN,
    COMMAND,
    chosen_checkpoint,
    closing_of,
    is_complete,
    mark_finished,
    step_of,
)
from mindformers_ixc.training.run_folder import claimed
from mindformers_ixc.training.starting import adopt_start
from mindformers_ixc.training.stopping import ask_ranks

LOOPBACK = "127.0.0.1"

def launch(arguments: argparse.Namespace) -> int:
    """Starts one process a device, waits for all, and says why if they fail.

    Args:
        arguments: of the `launch` subcommand; `run` holds `mindformers run`'s, parsed from `run_words`.

    Returns:
        Exit code: 0, 1 when a rank failed, 128 and the signal's number when the launcher was told to end.

    Raises:
        ConfigError: for a YAML that cannot run on so many devices, or an output folder that is in use or used; nothing
            has been started then.
    """
    ranks = local_ranks(arguments)
    fields = merged_fields(arguments.run)
    fields["use_parallel"] = True
    check_fields(fields, arguments.run.config)
    adopt_start(fields, say=False)
    check_run(fields, arguments.devices)
    folder = Path(fields.setdefault("output_dir", "output")).resolve()
    if arguments.node_rank:      # server 0 answers for the folder
        return _run_ranks(arguments, fields, ranks, folder)
    with claimed(folder, fields, arguments.run.overwrite):
        if fields.get("run_mode") == "predict":
            return _run_ranks(arguments, fields, ranks, folder)
        if is_complete(fields):
            terminal.current.say(f"The run in {folder} has come to its end; nothing is done.")
            return 0
        step = None
        if fields.get("resume_training"):
            step = step_of(chosen_checkpoint(fields)[1][0])
        code = _run_ranks(arguments, fields, ranks, folder, step)
        if code == 0:
            closing = closing_of(folder)
            if closing is None:        # another model's trainer notes nothing
                mark_finished(folder, [])
            elif closing:
                terminal.current.say(closing)
        return code


def _run_ranks(arguments: argparse.Namespace, fields: dict, ranks: range, folder: Path,
               step: tuple[int, int] | None = None) -> int:
    """Starts this server's ranks and waits for them; see `launch`. `step` is the one that a resume goes on from."""
    asked: list[int] = []

    def gently(number: int) -> bool:
        if number == signal.SIGHUP or not ask_ranks(folder, number):
            return False
        asked.append(number)
        terminal.current.say(f"{name_of(number)}: all ranks finish a step and save a checkpoint; a second signal ends "
                             "them at once.")
        return True

    on_cpu = (fields.get("context") or {}).get("device_target", "Ascend") == "CPU"
    logs = Path(arguments.log_dir or folder / "rank_logs").resolve()
    # pipeline stages: the loss is known to the last one, and its first rank reports it
    reporter = 0
    if fields.get("run_mode") != "predict":
        reporter = arguments.devices - arguments.devices // degrees_of(fields).pipeline_stage
    variables = {COMMAND: shlex.join(["mindformers", *arguments.words])}
    if step is not None:
        variables[CHOSEN] = f"{step[0]}_{step[1]}"
    try:
        with stopped_by_signals(gently), job_of(arguments, _as_rank(arguments.run_words), ranks, logs, on_cpu,
                                                variables, reporter) as job:
            code = job.run()
            if asked and code == 0:
                terminal.current.say(f"{name_of(asked[0])} stopped the run in {folder}, and every rank has saved a "
                                     "checkpoint; go on with --resume_training True.")
                return 128 + asked[0]
            return code
    except Stopped as stopped:
        return say_stopped(stopped, logs)


def say_stopped(stopped: Stopped, logs: Path) -> int:
    """Says that the launcher was told to end at once; its exit code."""
    terminal.current.say(f"error: {signal_name(stopped.number)} ended this command, so all ranks were ended. Their "
                         f"logs are in {logs}.")
    return 128 + stopped.number


@contextlib.contextmanager
def job_of(arguments: argparse.Namespace, words: list[str], ranks: range, logs: Path, on_cpu: bool,
           variables: dict[str, str], shown: int = 0) -> Iterator[Job]:
    """A job of this server's ranks, to be run in the block; what its ranks exchanged is removed after it.

    Args:
        arguments: of the `launch` subcommand.
        words: of the `mindformers` command that every rank runs.
        ranks: numbers of those that run on this server.
        logs: folder of the logs.
        on_cpu: whether the ranks compute on the CPU.
        variables: that the ranks get beside those of every launch.
        shown: the rank that shows how far it is, if it is of this server; else the first one here.
    """
    given = _given_mailbox(len(ranks) < arguments.devices) if on_cpu else None
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**_environment(), **variables}
        if on_cpu:
            environment.update(_cpu_environment(given or _shared_memory(Path(scratch))))
        try:
            yield Job(_msrun(arguments, words, logs), environment, logs, ranks, shown if shown in ranks else ranks[0],
                      None if terminal.current.verbose else logs / "shown.txt")
        finally:
            if on_cpu and given is None:
                shutil.rmtree(environment["CPU_PARALLEL_MAILBOX"], ignore_errors=True)


def local_ranks(arguments: argparse.Namespace) -> range:
    """The ranks that run on this server.

    Args:
        arguments: of the `launch` subcommand.

    Raises:
        ConfigError: for numbers of devices and servers that contradict each other.
    """
    devices, node = arguments.devices, arguments.node_rank
    local = devices if arguments.local_devices is None else arguments.local_devices
    if devices < 1:
        raise ConfigError(f"-n is {devices}; it must be at least 1, one process a device.")
    if local < 1 or devices % local:
        allowed = ", ".join(str(number) for number in range(1, devices + 1) if devices % number == 0)
        raise ConfigError(f"--local_devices is {local}, but every server must have the same part of the {devices} "
                          f"devices; choose one of {allowed}.")
    servers = devices // local
    if servers == 1 and node:
        raise ConfigError(f"--node_rank is {node}, but all {devices} devices are of this server; give "
                          "--local_devices, the number of them that it has.")
    if not 0 <= node < servers:
        raise ConfigError(f"--node_rank is {node}, but {devices} devices, {local} a server, are {servers} servers; "
                          f"choose 0 to {servers - 1}.")
    if servers > 1 and arguments.master_addr == LOOPBACK:
        raise ConfigError(f"There are {servers} servers, so --master_addr must be the address at which the others "
                          "reach server 0.")
    if arguments.master_port is not None and not 1 <= arguments.master_port <= 65535:
        raise ConfigError(f"--master_port is {arguments.master_port}; choose 1024 to 65535.")
    return range(node * local, (node + 1) * local)


def _environment() -> dict[str, str]:
    # msrun starts the first `python` of the path
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", JOB: uuid.uuid4().hex}
    environment.pop("LOG_MF_PATH", None)      # every rank has a folder of its own
    return environment


def _cpu_environment(mailbox: Path) -> dict[str, str]:
    return {**preload_environment(), "CPU_PARALLEL_MAILBOX": str(mailbox)}


def _given_mailbox(several_servers: bool) -> Path | None:
    """The folder that the user wants CPU processes to exchange messages in; it stays the user's own.

    Raises:
        ConfigError: when several servers need one.
    """
    given = os.environ.get("CPU_PARALLEL_MAILBOX")
    if several_servers and not given:
        raise ConfigError("context.device_target is CPU: its processes exchange files, so on several servers the "
                          "variable CPU_PARALLEL_MAILBOX must name a folder that all of them share.")
    return Path(given) if given else None


def _shared_memory(scratch: Path) -> Path:
    """A mailbox folder in memory, where the system has such a place; removed with the job."""
    return Path("/dev/shm") / scratch.name if os.access("/dev/shm", os.W_OK) else scratch / "mailbox"


def _as_rank(words: list[str]) -> list[str]:
    """The words of a rank of a run, from those of `run`."""
    return ["run", *words, "--use_parallel", "True"]


def _msrun(arguments: argparse.Namespace, words: list[str], logs: Path) -> list[str]:
    """The command that starts this server's ranks, each of which runs `mindformers` with some words."""
    local = arguments.local_devices or arguments.devices
    port = arguments.master_port or (_free_port() if local == arguments.devices else 8118)
    command = [str(Path(sys.executable).with_name("msrun")), "--worker_num", str(arguments.devices),
               "--local_worker_num", str(local), "--master_addr", arguments.master_addr, "--master_port", str(port),
               "--log_dir", str(logs), "--join", "True", "--tail_worker_log=-2"]      # of no rank: shown from here
    if local != arguments.devices:
        command += ["--node_rank", str(arguments.node_rank)]
    return [*command, str(Path(sys.executable).with_name("mindformers")), *words]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind((LOOPBACK, 0))
        return server.getsockname()[1]
