"""`mindformers launch -n N serve ...`: one server over several devices, each with its part of the model.

Every rank runs `mindformers serve` with the same words; rank 0 opens the port (`mindformers_ixc.serving.ranks`). This
process looks after them: what rank 0 says and its log of requests come out here, SIGTERM goes to rank 0, which lets
running answers end, and a rank that dies ends the server.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import psutil

from mindformers_ixc.cli.job import Job, Stopped, stopped_by_signals
from mindformers_ixc.cli.launch import job_of, local_ranks, say_stopped
from mindformers_ixc.config import read_config
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.parallel.checks import check_possible
from mindformers_ixc.parallel.degrees import Degrees, inference_layout
from mindformers_ixc.resources import usable_log_folder
from mindformers_ixc.serving.ranks import MEETING, READY, SOCKET

# The pipe to which rank 0 writes its log of requests.
REQUESTS = "requests"

# Seconds that the last lines of the log have to come out when all ranks have ended: nobody may read them any more.
LAST_LINES = 15

# Characters of a socket's path at most, of unix(7).
LONGEST_PATH = 107


def launch_serve(arguments: argparse.Namespace) -> int:
    """Starts the ranks of a server and waits for their end.

    Args:
        arguments: of the `launch` subcommand; `run` holds those of `serve`, parsed from `run_words`.

    Returns:
        Exit code: 0 when the server was told to end and has drained, 1 when a rank failed, 128 and the signal's number
        when all was ended at once.

    Raises:
        ConfigError: for devices that cannot share the model; nothing has been started then.
    """
    ranks, served = local_ranks(arguments), arguments.run
    check_devices(arguments, ranks)
    logs = Path(arguments.log_dir or usable_log_folder()[0] / f"serve_{served.port or os.getpid()}").resolve()
    jobs: list[Job] = []
    with tempfile.TemporaryDirectory(dir=_short_folder()) as scratch:
        meeting, words = Path(scratch), list(arguments.run_words)

        def gently(number: int) -> bool:
            return number != signal.SIGHUP and (meeting / READY).exists() and _ask(jobs)

        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(stopped_by_signals(gently))
                if not served.log:
                    words += ["--log", stack.enter_context(_passed_on(meeting / REQUESTS, arguments.answers))]
                jobs.append(stack.enter_context(job_of(
                    arguments, words, ranks, logs, served.device_target == "CPU", {MEETING: scratch})))
                return jobs[0].run()
        except Stopped as stopped:
            return say_stopped(stopped, logs)


def check_devices(arguments: argparse.Namespace, ranks: range) -> None:
    """Refuses a number of devices that a server cannot have.

    Args:
        arguments: of the `launch` subcommand.
        ranks: numbers of those that run on this machine.

    Raises:
        ConfigError: with what to do.
    """
    devices = arguments.devices
    if len(ranks) < devices:
        raise ConfigError(f"{devices} devices are of several servers, but the ranks of `serve` must be of one machine; "
                          "start one `launch ... serve` on each, and put a balancer in front (docs/serving.md).")
    if devices == 1:
        raise ConfigError("-n is 1; on a single device type `mindformers serve` without `launch`.")
    layout = Degrees(model_parallel=devices)
    config = read_config(arguments.run.model, parallel_config=inference_layout(layout))
    check_possible(config, layout, devices, replicas=False)


def _short_folder() -> str | None:
    """Where temporary files go, unless a socket there would have too long a path."""
    usual = tempfile.gettempdir()
    return usual if len(usual) + len(SOCKET) + 20 < LONGEST_PATH else "/tmp"


def _ask(jobs: list[Job]) -> bool:
    """Asks rank 0 to let running answers end and then to end; whether it is there."""
    leader = jobs[0].ranks[0].process if jobs else None
    if leader is None:
        return False
    try:
        leader.send_signal(signal.SIGTERM)
    except psutil.Error:
        return False
    return True


@contextlib.contextmanager
def _passed_on(pipe: Path, stream: TextIO) -> Iterator[str]:
    """A named pipe; what is written to it comes out of a stream while the block runs."""
    os.mkfifo(pipe, 0o600)
    handle = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)       # so that it has a reader and a writer all the time
    with os.fdopen(handle, "rb", 0) as source:
        ended = threading.Event()

        def pass_on() -> None:
            while select.select([source], [], [], 0 if ended.is_set() else 0.2)[0] or not ended.is_set():
                text = source.read(1 << 16) if select.select([source], [], [], 0)[0] else None
                if text:
                    with contextlib.suppress(OSError, ValueError):      # nobody reads it any more; the server goes on
                        stream.write(text.decode("utf-8", "replace"))
                        stream.flush()

        thread = threading.Thread(target=pass_on, name="requests", daemon=True)
        thread.start()
        try:
            yield str(pipe)
        finally:
            ended.set()
            thread.join(LAST_LINES)
