"""Runs `tiny_model` in a process of its own, so that whatever happens there becomes a finding."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from mindformers_ixc.doctor.findings import OK, PROBLEM, Finding

# Of the whole test at most. It takes 10 to 11 seconds of processor time: imports 3.4 to 3.8, compiling the training
# step 4.5, the steps 1.0, compiling the graphs of an answer and answering 1.4. A second decoder layer takes 0.7 more,
# and a tower that trains 1.2. The limit is for what hangs: beside other work on few cores it may take some minutes.
SECONDS = 600

# Steps in their order, with what is being done.
STEPS = {"import": "importing MindSpore, MindFormers and this package", "train": "training a tiny model",
         "answer": "writing and reading it, and answering a question about a picture"}
PROGRAM = ("-m", "mindformers_ixc.doctor.tiny_model")


def self_test(device_target: str, seconds: float = SECONDS, program: tuple[str, ...] = PROGRAM) -> Finding:
    """Trains a tiny model and asks it something.

    Args:
        device_target: where it computes.
        seconds: after which it is ended.
        program: arguments of Python that start the test.
    """
    with tempfile.TemporaryDirectory(prefix="mindformers_ixc_doctor_") as folder, \
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output, \
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        # MindFormers logs to standard output; the steps come by a descriptor of their own
        reading, writing = os.pipe()
        environment = {"GLOG_v": "3", **os.environ, "LOG_MF_PATH": folder}
        command = [sys.executable, "-W", "ignore", *program, "--device_target", device_target, "--output",
                   str(writing)]
        ended = ""
        try:
            code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, cwd=folder,
                                  env=_importable(environment), pass_fds=(writing,), timeout=seconds,
                                  check=False).returncode
        except subprocess.TimeoutExpired:
            code, ended = -1, f"it was not done after {seconds:g} seconds"
        finally:
            os.close(writing)
        with os.fdopen(reading, encoding="utf-8") as stream:
            done = [json.loads(line) for line in stream]
        return judge(done, code, ended or _last_words(errors))


def _importable(environment: dict[str, str]) -> dict[str, str]:
    """The environment with this process's places of modules, since the test runs in another folder."""
    places = [os.path.abspath(place) for place in sys.path if place] or [os.getcwd()]
    if "" in sys.path:
        places.append(os.getcwd())
    return {**environment, "PYTHONPATH": os.pathsep.join(dict.fromkeys(places))}


def _last_words(stream) -> str:
    """The last line that a program wrote; of a traceback that is the error."""
    stream.seek(0)
    lines = [line.strip() for line in stream.read().splitlines() if line.strip() and set(line.strip()) != {"-"}]
    return lines[-1] if lines else ""


def judge(done: list[dict], code: int, words: str) -> Finding:
    """The finding of a self test.

    Args:
        done: steps that came to an end, with the seconds since the start.
        code: of the process.
        words: the last line it wrote.
    """
    names = [step["step"] for step in done]
    if code == 0 and names == list(STEPS):
        took = {name: step["seconds"] for name, step in zip(names, done)}
        return Finding("self test", OK, "a tiny model learnt a picture and answered right, in "
                       f"{took['answer']:.0f} s (trained after {took['train']:.0f})")
    failed = next((text for name, text in STEPS.items() if name not in names), "ending the process")
    how = f"signal {-code}" if code < -1 else words or f"exit code {code}"
    advice = ("reinstall both in a fresh environment with the versions above" if "import" not in names else
              "run `mindformers run --config yaml_configs/ixc25_sft_tiny.yaml` to see the whole message")
    return Finding("self test", PROBLEM, f"failed while {failed}: {how}", advice)
