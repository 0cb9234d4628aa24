"""Signals that ask a run to stop, and processes that must not outlive another; each in a process of its own."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

HEAD = "import os, signal, sys, time\nfrom mindformers_ixc import interruption\n"
RUN = """
    with interruption.listening():
        interruption.current.phase = sys.argv[1]
        print("ready", flush=True)
        for _ in range(600):
            time.sleep(0.05)
            if interruption.current.number is not None:
                break
        if sys.argv[2] == "linger":
            time.sleep(600)
        interruption.current.stopped = interruption.current.phase == "training"
    sys.exit(interruption.current.exit_code)
    """


def start(code: str, *words: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HEAD + textwrap.dedent(code), *words], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "phase", "code", "words"), [
    (signal.SIGTERM, "training", 143, "SIGTERM: the step in progress is finished and a checkpoint saved"),
    (signal.SIGINT, "training", 130, "SIGINT: the step in progress is finished and a checkpoint saved"),
    (signal.SIGTERM, "starting", 143, "SIGTERM ended the run before there was anything to save"),
    (signal.SIGTERM, "ending", 0, "SIGTERM: training is over and the results are being written")])
def test_what_the_first_signal_does_depends_on_how_far_the_run_is(number, phase, code, words):
    process = start(RUN, phase, "end")
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == code
    assert said.startswith(words)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_it_at_once(second):
    process = start(RUN, "training", "linger")
    process.send_signal(signal.SIGINT)
    assert "a second signal ends the run at once" in process.stderr.readline()
    process.send_signal(second)
    assert process.wait(timeout=120) == -second
    process.communicate()


def test_a_process_that_ends_itself_is_not_held_up():
    process = start("""
        with interruption.listening():
            interruption.current.phase = "training"
            print("ready", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)      # as MindSpore does when its data workers have died
            time.sleep(600)
        """)
    assert process.wait(timeout=120) == 143
    process.communicate()


def test_forked_children_die_of_sigterm_and_not_of_the_terminals_interrupt():
    process = start("""
        with interruption.listening():
            child = os.fork()
            if not child:
                time.sleep(600)
                os._exit(0)
            os.kill(child, signal.SIGINT)
            time.sleep(0.3)
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
            print("ready", flush=True)
        """)
    assert process.wait(timeout=120) == 0, process.communicate()[1]
    process.communicate()


def test_what_is_ignored_stays_ignored():
    process = start("""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interruption.listening():
            interruption.current.phase = "training"
            print("ready", flush=True)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
            assert interruption.current.number is None
        """)
    assert process.wait(timeout=120) == 0
    process.communicate()


def test_a_child_ends_with_its_parent():
    process = start("""
        import subprocess
        parent = os.getpid()
        child = subprocess.Popen(["sleep", "600"], preexec_fn=lambda: interruption.die_with(parent))
        print("ready", flush=True)
        print(child.pid, flush=True)
        time.sleep(600)
        """)
    child = int(process.stdout.readline())
    os.kill(child, 0)
    process.kill()
    process.communicate()
    until = time.monotonic() + 60
    while is_alive(child):
        assert time.monotonic() < until
        time.sleep(0.05)


def is_alive(number: int) -> bool:
    """Whether a process runs; what nobody has collected does not."""
    try:
        return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_rank_whose_launcher_is_gone_does_not_start():
    code = """
        os.environ[interruption.JOB] = "of-a-launch"        # which the parent does not have
        interruption.die_with_launcher()
        print("went on")
        """
    done = subprocess.run([sys.executable, "-c", HEAD + textwrap.dedent(code)], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 128 + signal.SIGKILL and "went on" not in done.stdout


LOADING = ("import time\n"
           "from mindformers_ixc import interruption\n"
           "with interruption.leaving_at_interrupt():\n"
           "    print('ready', flush=True)\n"
           "    end = time.monotonic() + 600\n"
           "    while time.monotonic() < end:\n"
           "        try:\n            time.sleep(0.01)\n"
           "        except BaseException:\n            pass      # as an import may that takes it for its own error\n")
AFTERWARDS = ("import time\n"
              "from mindformers_ixc import interruption\n"
              "with interruption.leaving_at_interrupt():\n    pass\n"
              "try:\n    print('ready', flush=True)\n    time.sleep(600)\n"
              "except KeyboardInterrupt:\n    raise SystemExit(7)\n")


@pytest.mark.parametrize(("program", "code"), [(LOADING, 130), (AFTERWARDS, 7)])
def test_an_interrupt_while_things_load_ends_the_process_whatever_they_catch(program, code):
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == code
        name = Path("/proc/self/comm").read_text(encoding="utf-8").strip()
        assert process.stderr.read() == (f"SIGINT of process {os.getpid()} ({name}) ended this command.\n"
                                         if code == 130 else "")
