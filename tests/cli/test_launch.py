"""`mindformers launch`: which rank failed first and why, nothing left running, msrun's arguments; and real runs."""
from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

import mindformers_ixc_cli
from mindformers_ixc import terminal
from mindformers_ixc.checkpoint.convert import convert
from mindformers_ixc.checkpoint.sources import open_source
from mindformers_ixc.cli import job
from mindformers_ixc.cli import launch as launching
from mindformers_ixc.demo import demo_path
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import read_metrics
from mindformers_ixc.resources import resolve_model
from mindformers_ixc.training.resume import mark_finished
from mindformers_ixc.training.run_folder import LOCK_FILE

TINY = Path(__file__).parents[2] / "yaml_configs" / "ixc25_sft_tiny.yaml"
FAKE = Path(__file__).parents[1] / "helpers" / "fake_msrun.py"
TENSOR_PARALLEL = {"run_mode": "finetune", "parallel.parallel_mode": 1, "parallel.full_batch": True,
                   "parallel.gradients_mean": False, "parallel_config.model_parallel": 2,
                   "parallel_config.vocab_emb_dp": False, "model.model_config.plora_dropout": 0.0,
                   "train_dataset.input_columns": "[input_ids, labels, pixel_values, global_views, view_index, "
                                                  "vision_index, image_mask]"}
FOLLOWS = "RuntimeError: cpu_parallel: rank 0 waited too long for rank 1"


def traceback(line: str) -> str:
    return f'Traceback (most recent call last):\n  File "x.py", line 1, in <module>\n    x()\n{line}\n'


def words_of(options: dict) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def arguments_of(*words) -> argparse.Namespace:
    words = ["launch", *map(str, words)]
    return mindformers_ixc_cli.parse(words if "--config" in words else [*words, "--config", "none.yaml"])


def processes_of(folder: Path) -> list[psutil.Process]:
    """Running processes that have a folder in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Launches two ranks that follow a plan; gives the exit code, and checks that nothing is left."""
    mailbox = tmp_path / "mailbox"

    def environment(path):
        mailbox.mkdir()
        return {"CPU_PARALLEL_MAILBOX": str(mailbox)}

    def run(plan: dict, *words, options: dict = TENSOR_PARALLEL, devices: int = 2) -> int:
        plan = {**{str(rank): [] for rank in range(devices)}, **plan}
        monkeypatch.setattr(launching, "_msrun", lambda arguments, words, logs: [
            sys.executable, "-S", str(FAKE), str(logs), json.dumps(plan)])
        code = launching.launch(arguments_of("-n", devices, *words, "--config", TINY, "--output_dir", tmp_path / "out",
                                             *words_of(options)))
        assert not processes_of(tmp_path)
        assert not mailbox.exists()
        return code

    monkeypatch.setattr(launching, "_cpu_environment", environment)
    monkeypatch.delenv("CPU_PARALLEL_MAILBOX", raising=False)
    return run


def last_line(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_good_run_shows_what_the_rank_shows_that_reports_the_loss(fake, tmp_path, capsys):
    assert fake({"0": [["log", "[INFO] of the framework\n"], ["show", "half a "], ["sleep", 0.5], ["show", "line\n"]],
                 "1": [["show", "of the other\n"], ["log", "of the other\n"]]}) == 0
    shown = capsys.readouterr().err
    assert "half a line\n" in shown and "of the other" not in shown and "error" not in shown
    assert "[INFO]" not in shown
    assert str(tmp_path / "out" / "rank_logs") in shown
    assert (tmp_path / "out" / "rank_logs" / "worker_1.log").read_text() == "of the other\n"


def test_verbose_shows_the_whole_log_of_that_rank(fake, capsys, monkeypatch):
    monkeypatch.setattr(terminal.current, "verbose", True)
    assert fake({"0": [["log", "[INFO] of the framework\n"]], "1": [["log", "of the other\n"]]}) == 0
    shown = capsys.readouterr().err
    assert "[INFO] of the framework\n" in shown and "of the other" not in shown


def test_the_last_lines_are_what_the_run_has_noted_of_its_end(fake, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").mkdir()
    record = tmp_path / "out" / "run_config.json"
    record.write_text(json.dumps({"layout": [1, 2, 1]}))

    def ended(fields):        # rank 0 notes it while the launcher waits
        mark_finished(tmp_path / "out", ["model"], "The trained model is here.\n    ask it")
        return False

    monkeypatch.setattr(launching, "is_complete", ended)
    assert fake({"0": [["log", "[INFO] of the framework\n"]]}) == 0
    assert capsys.readouterr().err.endswith("The trained model is here.\n    ask it\n")
    assert json.loads(record.read_text())["finished"] == ["model"]


def test_with_pipeline_stages_that_is_the_first_of_the_last_stage(fake, capsys):
    options = {**TENSOR_PARALLEL, "parallel_config.pipeline_stage": 2, "parallel_config.micro_batch_num": 2}
    assert fake({str(rank): [["show", f"I am {rank}\n"]] for rank in range(4)}, options=options, devices=4) == 0
    shown = capsys.readouterr().err
    assert [rank for rank in range(4) if f"I am {rank}" in shown] == [2]


def test_it_is_shown_while_the_rank_runs(fake, monkeypatch):
    seen = []

    class Screen:
        def write(self, text):
            seen.append((time.monotonic(), text))

        def flush(self):
            """Nothing is held back."""

    monkeypatch.setattr(sys, "stderr", Screen())
    assert fake({"0": [["show", "early\n"], ["sleep", 1.5], ["show", "late\n"]]}) == 0
    times = {text.strip(): moment for moment, text in seen}
    assert times["late"] - times["early"] > 1


def test_the_rank_that_told_its_error_first_is_named_though_another_ends_first(fake, capsys, tmp_path):
    assert fake({"0": [["sleep", 1], ["log", traceback(FOLLOWS)], ["exit", 1]],
                 "1": [["log", "error: train.json, sample 3: no picture.\n"], ["sleep", 30]]}) == 1
    assert last_line(capsys) == ("error: Rank 1 failed first: train.json, sample 3: no picture. All ranks were ended. "
                                 f"Its log is {tmp_path / 'out' / 'rank_logs' / 'worker_1.log'}.")


def test_the_same_for_an_error_that_nobody_handled(fake, capsys):
    assert fake({"0": [["sleep", 1], ["log", traceback(FOLLOWS)], ["exit", 1]],
                 "1": [["log", traceback("RuntimeError: out of memory")], ["sleep", 30]]}) == 1
    assert last_line(capsys).startswith("error: Rank 1 failed first: RuntimeError: out of memory. All ranks")


def test_an_error_that_was_dealt_with_is_no_reason(fake, capsys):
    log = traceback("ValueError: dealt with") + "2026-01-01 10:00:00,000 - INFO - going on\n"
    assert fake({"1": [["log", log], ["sleep", 30]], "0": [["sleep", 0.5], ["log", "error: This one.\n"],
                                                          ["exit", 1]]}) == 1
    assert last_line(capsys).startswith("error: Rank 0 failed first: This one. ")


def test_an_old_error_is_no_reason(fake, capsys, monkeypatch):
    monkeypatch.setattr(job, "LINGER_S", 0.3)
    assert fake({"1": [["log", traceback("ValueError: old")], ["sleep", 30]], "0": [["sleep", 1], ["exit", 3]]}) == 1
    assert last_line(capsys).startswith("error: Rank 0 ended with code 3 without telling an error, so all ranks")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "signal 9 (SIGKILL), as the system does when memory"),
                                              (signal.SIGSEGV, "signal 11 (SIGSEGV), so all ranks")])
def test_a_killed_rank_is_named_with_its_signal(fake, capsys, number, name):
    began = time.monotonic()
    assert fake({"0": [["sleep", 60]], "1": [["sleep", 0.5], ["kill", int(number)]]}) == 1
    assert time.monotonic() - began < 20
    line = last_line(capsys)
    assert line.startswith(f"error: Rank 1 was killed by {name}")
    assert line.endswith("worker_1.log.")


def test_the_rank_that_died_first_is_named_though_msrun_names_another(fake, capsys):
    # both have died when msrun looks, and it looks in the order of the ranks
    assert fake({"0": [["sleep", 1.5], ["exit", 7]], "1": [["sleep", 0.6], ["exit", 5]],
                 "msrun": [["sleep", 2.5]]}) == 1
    assert last_line(capsys).startswith("error: Rank 1 ended with code 5 ")


def test_a_scheduler_that_does_not_end_is_ended(fake, capsys, monkeypatch):
    monkeypatch.setattr(job, "GRACE_S", 0.5)
    began = time.monotonic()
    assert fake({"0": [["sleep", 0.5], ["log", "error: Too bad\n"], ["exit", 1]], "scheduler": [["sleep", 60]]}) == 1
    assert time.monotonic() - began < 10
    assert last_line(capsys).startswith("error: Rank 0 failed first: Too bad. All ranks were ended.")


@pytest.mark.parametrize("other", [["sleep", 60], ["exit", 4]])
def test_a_rank_that_ends_before_it_is_known_ends_the_run(fake, capsys, monkeypatch, other):
    monkeypatch.setattr(job, "GRACE_S", 0.5)
    began = time.monotonic()
    assert fake({"0": [other], "1": [["exit", 4]], "scheduler": [["sleep", 15]]}) == 1
    assert time.monotonic() - began < 10
    assert " ended with code 4 " in last_line(capsys)


def test_a_scheduler_that_dies_ends_the_ranks(fake, capsys, monkeypatch):
    monkeypatch.setattr(job, "GRACE_S", 0.5)
    assert fake({"0": [["sleep", 60]], "1": [["sleep", 60]],
                 "scheduler": [["sleep", 0.5], ["log", traceback("RuntimeError: the port is taken")],
                               ["exit", 1]]}) == 1
    assert last_line(capsys).startswith("error: The scheduler failed first: RuntimeError: the port is taken. All ")


def test_an_error_of_all_processes_is_that_of_a_rank(fake, capsys):
    steps = [["log", "error: The checkpoint is broken.\n"], ["exit", 1]]
    assert fake({"0": [["sleep", 0.5], *steps], "1": [["sleep", 0.5], *steps], "scheduler": steps}) == 1
    assert last_line(capsys).startswith("error: Rank ")


def test_a_rank_that_told_its_error_and_does_not_end_is_ended(fake, capsys, monkeypatch):
    monkeypatch.setattr(job, "STUCK_S", 0.5)
    assert fake({"0": [["sleep", 60]], "1": [["log", "error: Stuck.\n"], ["sleep", 60]]}) == 1
    assert last_line(capsys).startswith("error: Rank 1 failed first: Stuck. ")


def test_a_killed_msrun_leaves_no_rank_behind(fake, capsys):
    assert fake({"0": [["sleep", 60]], "1": [["sleep", 60]], "msrun": [["sleep", 0.5], ["kill", 9]]}) == 1
    assert last_line(capsys).startswith("error: msrun was killed by signal 9 (SIGKILL), so all ranks were ended. ")


def test_an_msrun_that_cannot_start_is_shown(fake, capsys):
    assert fake({"msrun": [["log", "ValueError: no such address\n"], ["exit", 1]]}) == 1
    assert "error: msrun ended with code 1, so all ranks were ended: ValueError: no such address" in last_line(capsys)


def test_bytes_that_are_no_text_are_passed_over(fake, capsys):
    assert fake({"0": [["show", "\xff\xfe caf\xc3"], ["sleep", 0.5], ["show", "\xa9\n"]]}) == 0
    assert "caf\u00e9\n" in capsys.readouterr().err


def signal_when(*ready: Callable[[], object], number: int = signal.SIGTERM) -> None:
    """Sends this process a signal whenever the next of some things is so, which is when the launcher listens."""
    def send() -> None:
        for one in ready:
            until = time.monotonic() + 60
            while not one():
                if time.monotonic() > until:
                    return
                time.sleep(0.02)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_launcher_ends_all_ranks(fake, tmp_path, capsys, number):
    # the tests themselves may run where one of them is ignored (nohup)
    before = signal.signal(number, signal.default_int_handler)
    started = tmp_path / "started"
    signal_when(started.exists, number=number)
    try:
        assert fake({"0": [["empty", str(started)], ["sleep", 90]], "1": [["sleep", 90]]}) == 128 + number
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert last_line(capsys).startswith(f"error: signal {int(number)} ({number.name}) ended this command, so all ranks")


def test_a_signal_that_is_ignored_stays_ignored(fake, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    started = tmp_path / "started"
    signal_when(started.exists, number=signal.SIGHUP)
    try:
        assert fake({"0": [["empty", str(started)], ["sleep", 2]]}) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ranks_that_train_are_asked_to_save_and_waited_for(fake, tmp_path, capsys):
    request = tmp_path / "out" / "stop_request"
    steps = [["await", str(request)], ["sleep", 1], ["show", "saved\n"]]
    signal_when(request.exists)
    assert fake({"0": [["empty", str(request)], *steps], "1": [["sleep", 0.5], *steps]}) == 143
    said = capsys.readouterr().err
    assert "SIGTERM: all ranks finish a step and save a checkpoint; a second signal ends them at once." in said
    assert "saved\n" in said
    assert said.splitlines()[-1].startswith(f"SIGTERM stopped the run in {tmp_path / 'out'}, and every rank has saved")
    assert request.read_text() == "15"


def test_a_second_signal_ends_them_at_once(fake, tmp_path, capsys):
    request = tmp_path / "out" / "stop_request"
    signal_when(request.exists, lambda: request.read_text())
    began = time.monotonic()
    assert fake({"0": [["empty", str(request)], ["sleep", 300]], "1": [["sleep", 300]]}) == 143
    assert time.monotonic() - began < 200
    assert last_line(capsys).startswith("error: signal 15 (SIGTERM) ended this command, so all ranks were ended.")


def test_a_folder_in_use_or_used_is_refused_before_anything_starts(fake, tmp_path, capsys):
    (tmp_path / "out" / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="already has model of an earlier run"):
        fake({})
    assert fake({"0": [["show", "began\n"]]}, "--overwrite") == 0
    assert "began\n" in capsys.readouterr().err
    assert (tmp_path / "out" / "old-1" / "model").is_dir()
    held = json.loads((tmp_path / "out" / LOCK_FILE).read_text())
    assert held["pid"] == os.getpid()          # the launch held it, and no rank


def test_a_killed_launcher_takes_msrun_with_it(tmp_path):
    plan = json.dumps({"0": [["sleep", 4]], "msrun": [["sleep", 30]]})
    code = ("import os, sys\nfrom pathlib import Path\nfrom mindformers_ixc.cli.job import Job\n"
            f"Job([sys.executable, '-S', {str(FAKE)!r}, {str(tmp_path)!r}, {plan!r}], "
            f"{{**os.environ, 'MINDFORMERS_IXC_JOB': 'x'}}, Path({str(tmp_path)!r}), range(1), 0).run()")
    launcher = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while not (tmp_path / "worker_0.log").exists() and time.monotonic() < until:
        time.sleep(0.05)
    msrun = psutil.Process(launcher.pid).children()
    assert len(msrun) == 1
    launcher.kill()
    launcher.wait()
    gone, left = psutil.wait_procs(msrun, timeout=10)
    assert gone and not left
    psutil.wait_procs(processes_of(tmp_path), timeout=10)


def test_only_logs_of_the_ranks_are_replaced(fake, tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    for name in ("worker_0.log", "worker_7.log", "notes.txt"):
        (folder / name).write_text("error: of long ago\n")
    assert fake({"0": [["log", "new\n"]]}, "--log_dir", folder) == 0
    assert (folder / "worker_0.log").read_text() == "new\n"
    assert (folder / "worker_7.log").exists() and (folder / "notes.txt").exists()


@pytest.mark.parametrize(("words", "ranks"), [
    (("-n", 8), range(8)), (("-n", 8, "--local_devices", 8), range(8)),
    (("-n", 8, "--local_devices", 4, "--master_addr", "10.0.0.1"), range(4)),
    (("-n", 8, "--local_devices", 2, "--node_rank", 3, "--master_addr", "10.0.0.1"), range(6, 8))])
def test_which_ranks_are_of_this_server(words, ranks):
    assert launching.local_ranks(arguments_of(*words)) == ranks


@pytest.mark.parametrize(("words", "message"), [
    (("-n", 0), "-n is 0; it must be at least 1"),
    (("-n", 8, "--local_devices", 3), "--local_devices is 3, .* choose one of 1, 2, 4, 8"),
    (("-n", 8, "--local_devices", 0), "--local_devices is 0"),
    (("-n", 8, "--local_devices", 16), "--local_devices is 16"),
    (("-n", 8, "--node_rank", 1), "--node_rank is 1, but all 8 devices are of this server; give --local_devices"),
    (("-n", 8, "--local_devices", 4, "--node_rank", 2, "--master_addr", "a"), "are 2 servers; choose 0 to 1"),
    (("-n", 8, "--local_devices", 4, "--node_rank", -1, "--master_addr", "a"), "--node_rank is -1"),
    (("-n", 8, "--local_devices", 4), "2 servers, so --master_addr must be"),
    (("-n", 8, "--master_port", 70000), "--master_port is 70000")])
def test_servers_that_contradict_the_devices_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        launching.local_ranks(arguments_of(*words))


def test_the_command_of_a_server_among_several(tmp_path):
    arguments = arguments_of("-n", 16, "--local_devices", 8, "--node_rank", 1, "--master_addr", "10.0.0.1",
                             "--config", "x.yaml", "--use_parallel", "False")
    command = launching._msrun(arguments, launching._as_rank(arguments.rest), tmp_path)
    options = dict(zip(command[1:], command[2:]))
    assert Path(command[0]).name == "msrun"
    assert {name: options[f"--{name}"] for name in ("worker_num", "local_worker_num", "node_rank", "master_addr",
                                                    "master_port", "log_dir", "join")} == {
        "worker_num": "16", "local_worker_num": "8", "node_rank": "1", "master_addr": "10.0.0.1",
        "master_port": "8118", "log_dir": str(tmp_path), "join": "True"}
    script = command.index("run") - 1
    assert Path(command[script]).name == "mindformers"
    assert command[script + 1:] == ["run", "--config", "x.yaml", "--use_parallel", "False", "--use_parallel", "True"]


def test_the_command_of_a_single_server_has_a_free_port(tmp_path):
    arguments = arguments_of("-n", 4, "--config", "x.yaml")
    first, second = (launching._msrun(arguments, launching._as_rank(arguments.rest), tmp_path) for _ in range(2))
    assert "--node_rank" not in first
    assert first[first.index("--master_port") + 1] != second[second.index("--master_port") + 1]
    given = launching._msrun(arguments_of("-n", 4, "--master_port", 9000), [], tmp_path)
    assert given[given.index("--master_port") + 1] == "9000"


def test_msrun_knows_every_option_it_is_given(monkeypatch, tmp_path):
    from mindspore.parallel.cluster import run as msrun

    arguments = arguments_of("-n", 16, "--local_devices", 8, "--node_rank", 1, "--master_addr", "10.0.0.1",
                             "--config", "x.yaml")
    monkeypatch.setattr(sys, "argv", launching._msrun(arguments, launching._as_rank(arguments.rest), tmp_path))
    parsed = msrun.get_args()
    assert (parsed.worker_num, parsed.local_worker_num, parsed.node_rank, parsed.join) == (16, 8, 1, True)
    assert parsed.task_script_args == ["run", "--config", "x.yaml", "--use_parallel", "True"]
    assert parsed.tail_worker_log == "-2"


def test_a_mailbox_of_the_user_stays(fake, tmp_path, monkeypatch):
    given = []
    monkeypatch.setenv("CPU_PARALLEL_MAILBOX", str(tmp_path / "mine"))
    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(launching, "_cpu_environment",
                        lambda path: given.append(path) or {"CPU_PARALLEL_MAILBOX": str(path)})
    assert fake({}) == 0
    assert given == [tmp_path / "mine"]
    assert (tmp_path / "mine").is_dir()


def test_processes_of_several_servers_without_devices_need_a_shared_mailbox(fake):
    with pytest.raises(ConfigError, match="CPU_PARALLEL_MAILBOX must name a folder that all of them share"):
        fake({}, "--local_devices", 1, "--master_addr", "10.0.0.1")


def start(out: Path, epochs: int) -> subprocess.Popen:
    """A real run in tensor parallel over two processes."""
    options = {**TENSOR_PARALLEL, "runner_config.epochs": epochs, "output_dir": out}
    command = [str(Path(sys.executable).with_name("mindformers")), "launch", "-n", "2", "--config", str(TINY)]
    return subprocess.Popen([*command, *words_of(options)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def process_of_rank(out: Path, number: int) -> psutil.Process:
    """The process that msrun has started for a rank."""
    return next(process for process in processes_of(out)
                if "msrun" in " ".join(process.parent().cmdline()[:2])
                and process.environ().get("MS_ROLE") == "MS_WORKER" and process.environ()["RANK_ID"] == str(number))


@pytest.mark.slow
def test_a_rank_killed_in_the_middle_of_training_ends_the_run(tmp_path):
    out = tmp_path / "out"
    launcher = start(out, epochs=100)
    shown = []
    reader = threading.Thread(target=lambda: shown.extend(launcher.stdout), daemon=True)
    reader.start()
    while launcher.poll() is None and len(read_metrics(out / "metrics.jsonl")) < 3:
        time.sleep(0.2)
    assert launcher.poll() is None, "".join(shown)[-3000:]
    victim = process_of_rank(out, 1)
    mailbox = Path(victim.environ()["CPU_PARALLEL_MAILBOX"])
    assert mailbox.is_dir()
    victim.kill()
    began = time.monotonic()
    code = launcher.wait(timeout=60)
    print(f"from the kill to the end: {time.monotonic() - began:.1f} s")
    reader.join(timeout=10)
    assert code == 1
    assert shown[-1].startswith("error: Rank 1 was killed by signal 9 (SIGKILL)")
    assert shown[-1].endswith(f"{out / 'rank_logs' / 'worker_1.log'}.\n")
    assert not processes_of(out)
    assert not mailbox.exists()


COMMAND = str(Path(sys.executable).with_name("mindformers"))
SHOWN = {"tp2": "dp 1 x tp 2 x pp 1", "dp2_sharded": "dp 2 x tp 1 x pp 1", "pp2": "dp 1 x tp 1 x pp 2"}
# eps is far above the last digits of the starter's small gradients, of which Adam would make whole steps.
SHORT = {"run_mode": "finetune", "load_checkpoint": resolve_model("starter"), "auto_trans_ckpt": True,
         "runner_config.epochs": 1, "lr_schedule.learning_rate": 1e-5, "optimizer.eps": 1e-5,
         "model.model_config.plora_dropout": 0.0, "train_dataset.input_columns": TENSOR_PARALLEL[
             "train_dataset.input_columns"],
         "evaluation.dataset_dir": "pkg:mindformers_ixc/demo/train.json", "evaluation.every": 7,
         "evaluation.metrics": "[loss, shuffled_loss, exact_match, cider]", "evaluation.max_new_tokens": 12,
         "evaluation.max_samples": 5, "evaluation.batch_size": 3, "evaluation.keep_best": "loss"}
WHOLE = {"parallel.parallel_mode": 1, "parallel.full_batch": True, "parallel.gradients_mean": False}
HALF = {"runner_config.batch_size": 2, "train_dataset.batch_size": 2}
LAYOUTS = {
    "tp2": {**WHOLE, "parallel_config.model_parallel": 2},
    "dp2_sharded": {**WHOLE, **HALF, "parallel_config.data_parallel": 2, "parallel.full_batch": False,
                    "parallel.enable_parallel_optimizer": True,
                    "parallel.parallel_optimizer_config": "{parallel_optimizer_threshold: 0}"},
    "pp2": {**WHOLE, **HALF, "parallel_config.pipeline_stage": 2, "parallel_config.micro_batch_num": 2}}


def finished(words: list, out: Path, options: dict) -> list[str]:
    """Runs a command to its end; its output's lines."""
    command = [COMMAND, *map(str, words), "--config", str(TINY), "--output_dir", str(out), *words_of(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout.splitlines()


def answer_of(model: Path) -> bytes:
    """What a model answers about a picture."""
    question = ["--image", str(demo_path("images/astronaut.jpg")), "What is shown in the picture?"]
    return subprocess.run([COMMAND, "chat", "--model", str(model), *question], capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, list[str], bytes]:
    """A short run of one process from the starter, what it said, and its model's answer."""
    out = tmp_path_factory.mktemp("alone") / "out"
    lines = finished(["run"], out, SHORT)
    return out, lines, answer_of(out / "model")


def went_well(out: Path, lines: list[str], layout: str) -> None:
    """Checks what a launch has shown, its logs, its steps, and that nothing is left running."""
    logs = {log.name: log.read_text(errors="replace") for log in (out / "rank_logs").iterdir()}
    assert {"worker_0.log", "worker_1.log", "scheduler.log", "msrun.log", "shown.txt"} == set(logs)
    assert all("Training Over" in logs[f"worker_{rank}.log"] for rank in (0, 1))
    shown = "\n".join(lines)
    assert "Training Over" not in shown and f"2 x CPU: {layout}" in shown and len(lines) < 60
    assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(1, 15))
    assert not processes_of(out)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_parallel_run_evaluates_and_ends_as_a_single_one(alone, tmp_path, layout):
    single, said, answer = alone
    out = tmp_path / "out"
    lines = finished(["launch", "-n", 2], out, {**SHORT, **LAYOUTS[layout]})
    assert lines[-2:] == [line.replace(str(single), str(out)) for line in said[-2:]]
    went_well(out, lines, SHOWN[layout])
    expected, rows = read_metrics(single / "evaluations.jsonl"), read_metrics(out / "evaluations.jsonl")
    assert [row["step"] for row in rows] == [7, 14]
    for row, other in zip(rows, expected, strict=True):
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=0 if name == "exact_match" else 1e-5), name
    convert(out / "checkpoint", tmp_path / "by_hand", to="hf", config=out / "model")
    by_hand = open_source(tmp_path / "by_hand").tensors
    for name in ("model", "best"):       # the last measurement is the best one
        joined, whole = (open_source(folder / name).tensors for folder in (out, single))
        assert set(joined) == set(whole) == set(by_hand)
        for key, tensor in joined.items():
            np.testing.assert_array_equal(tensor.whole(), by_hand[key].whole(), err_msg=key)
            np.testing.assert_allclose(tensor.whole(), whole[key].whole(), atol=1e-5, err_msg=key)
    for file in ("config.json", "tokenizer.model"):
        assert (out / "model" / file).read_bytes() == (single / "model" / file).read_bytes()
    assert answer_of(out / "model") == answer != b""


@pytest.mark.slow
def test_parts_are_left_and_joined_by_a_resume(tmp_path):
    out = tmp_path / "out"
    options = {**TENSOR_PARALLEL, "run_mode": "train", "runner_config.epochs": 1, "train_parts": "[projector]"}
    lines = finished(["launch", "-n", 2, "--no_join"], out, options)
    assert lines[-2:] == [f"Every rank's part of the trained model is in {out}/checkpoint. Join the parts with",
                          f"    mindformers convert {out} {out}/model --to hf"]
    assert not (out / "model").exists()
    convert(out, tmp_path / "by_hand", to="hf")
    assert "has come to its end" in finished(["launch", "-n", 2, "--no_join"], out, {
        **options, "resume_training": True})[-1]
    lines = finished(["launch", "-n", 2], out, {**options, "resume_training": True})
    assert lines[-1].startswith(f"    mindformers chat --model {out}/model --image ")
    joined, by_hand = (open_source(folder).tensors for folder in (out / "model", tmp_path / "by_hand"))
    assert set(joined) == set(by_hand)
    for name, tensor in joined.items():
        np.testing.assert_array_equal(tensor.whole(), by_hand[name].whole(), err_msg=name)
    parts = open_source(out / "trained_parts").tensors
    assert parts and all(name.startswith("vision_proj") for name in parts)
