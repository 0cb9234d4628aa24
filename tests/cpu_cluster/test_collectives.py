"""The CPU's collectives against numpy, and what becomes of ranks, messages and jobs that do not behave."""
from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import collectives_rank as worker
import numpy as np
import pytest
from collectives_rank import DAMAGES, DTYPES, GROUPS, KINDS, OPERATIONS, has, name_of, operations, values

from mindformers_ixc.cpu_cluster import mailbox as mailboxes
from mindformers_ixc.cpu_cluster.build import build, preload_environment
from mindformers_ixc.cpu_cluster.groups import install

WORKER = Path(worker.__file__)
NOTICED_S = 12.0       # MindSpore itself takes 3 until it raises, and the machine may be busy; the timeout is 60
WORLD = "mccl_world_group"
JOB_FOLDERS = "mindspore_cpu_parallel_*"
REDUCTIONS = {"sum": np.add, "max": np.maximum, "min": np.minimum, "prod": np.multiply}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment(mailbox: Path) -> dict[str, str]:
    # msrun starts the first `python` of the path
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, **preload_environment(), "CPU_PARALLEL_MAILBOX": str(mailbox),
            "CPU_PARALLEL_TIMEOUT_S": "60", "PATH": path}


def start(count: int, folder: Path, mailbox: Path, jobs: int) -> subprocess.Popen:
    """Starts a job that runs every case, under msrun."""
    folder.mkdir()
    command = [str(Path(sys.executable).with_name("msrun")), "--worker_num", str(count), "--local_worker_num",
               str(count), "--master_port", str(free_port()), "--log_dir", str(folder / "log"), "--join", "True",
               str(WORKER), "exchange", str(folder), str(jobs)]
    with open(folder / "msrun.log", "w") as log:
        return subprocess.Popen(command, env=environment(mailbox), stdout=log, stderr=log, cwd=folder)


def start_without_msrun(count: int, folder: Path, mailbox: Path) -> list[subprocess.Popen]:
    """Starts the scheduler and the ranks that die: msrun would kill the others at once."""
    folder.mkdir()
    common = {**environment(mailbox), "MS_WORKER_NUM": str(count), "MS_SCHED_HOST": "127.0.0.1",
              "MS_SCHED_PORT": str(free_port()), "RANK_SIZE": str(count)}
    roles = [{"MS_ROLE": "MS_SCHED"}, *({"MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(rank), "RANK_ID": str(rank)}
                                        for rank in range(count))]
    processes = []
    for i, role in enumerate(roles):
        with open(folder / f"process_{i}.log", "w") as log:
            processes.append(subprocess.Popen([sys.executable, str(WORKER), "die", str(folder), "1"],
                                              env={**common, **role}, stdout=log, stderr=log, cwd=folder))
    return processes


def logs(folder: Path) -> str:
    return "\n".join(log.read_text(errors="replace")[-2000:] for log in sorted(folder.rglob("*.log")))


@pytest.fixture(scope="module")
def mailbox(tmp_path_factory) -> Path:
    """The mailbox that all jobs of these tests share."""
    return tmp_path_factory.mktemp("jobs") / "mailbox"


@pytest.fixture(scope="module")
def dead_job(mailbox) -> dict:
    """Reports of three ranks, two of which died; all are dead, and their folder with its messages is still there."""
    folder = mailbox.with_name("dead")
    processes = start_without_msrun(3, folder, mailbox)
    try:
        end = time.monotonic() + 150
        files = [folder / f"rank_{rank}.json" for rank in range(3)]
        while time.monotonic() < end:
            reports = [json.loads(file.read_text()) for file in files if file.exists()]
            if len(reports) == 3 and "left" in reports[0]:
                break
            time.sleep(0.2)
        else:
            pytest.fail(logs(folder))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    left, = mailbox.glob(JOB_FOLDERS)
    # what a collective of the next job would first look for
    stale = [file.name for file in left.iterdir() if file.name.startswith(f"allreduce.{WORLD}.")]
    return {"reports": reports, "folder": left, "stale": stale, "processes": [process.pid for process in processes[1:]]}


@pytest.fixture(scope="module")
def finished_jobs(mailbox, dead_job) -> dict[int, Path]:
    """Folders of results, by number of ranks, of two jobs that ran at once, where a killed one had left messages."""
    foreign = mailbox / f"allreduce.{WORLD}.1-0.0"      # an earlier version's message
    foreign.write_bytes(b"old")
    folders = {count: mailbox.with_name(f"of_{count}") for count in GROUPS}
    jobs = {count: start(count, folder, mailbox, len(folders)) for count, folder in folders.items()}
    try:
        for count, job in jobs.items():
            assert job.wait(timeout=200) == 0, logs(folders[count])
    finally:
        for job in jobs.values():
            job.kill()
    foreign.unlink()
    return folders


@functools.cache
def results_of(folder: Path, rank: int) -> dict[str, np.ndarray]:
    return dict(np.load(folder / f"rank_{rank}.npz"))


def sentences_of(folder: Path, rank: int) -> dict[str, str]:
    return json.loads((folder / f"rank_{rank}.json").read_text())


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 as the type has it; bfloat16's in float32, rounded to even."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    even = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(array), np.nan, even.view(np.float32)).astype(np.float32)


def reduced(parts: list[np.ndarray], operation: str, dtype: str) -> np.ndarray:
    """The reduction as numpy does it, 16-bit floats in 32 bits."""
    wide = [part.astype(np.float32) if dtype in ("float16", "bfloat16") else part for part in parts]
    with np.errstate(over="ignore", invalid="ignore"):
        return rounded(functools.reduce(REDUCTIONS[operation], wide), dtype)


def assert_same(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    assert found.dtype == wanted.dtype, what
    if found.dtype.kind == "c":     # a product's parts may be added in another order
        np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max(), rtol=0, err_msg=what)
    else:
        np.testing.assert_array_equal(found, wanted, err_msg=what)


def expected(kind: str, operation: str, members: list[int], rank: int, dtype: str) -> np.ndarray:
    count, place = len(members), members.index(rank)
    parts = [rounded(values(member, dtype, count), dtype) for member in members]
    if kind == "allgather":
        return np.concatenate(parts)
    if kind == "sendreceive":
        return parts[place - 1]
    total = reduced(parts, operation, dtype)
    return total if kind == "allreduce" else np.split(total, count)[place]


@pytest.mark.slow
@pytest.mark.parametrize("count", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_collectives_equal_numpy(finished_jobs, count, kind, dtype):
    """Where MindSpore's primitive takes the type; otherwise it must have said so."""
    report = sentences_of(finished_jobs[count], 0)
    if dtype not in report["taken"][kind]:
        assert dtype not in ("float16", "bfloat16", "float32", "int8", "int32"), "what all primitives are said to take"
        found = sentences_of(finished_jobs[2], 0)[name_of(kind, dtype)]
        assert re.match(r"For primitive\[\w+\], the input argument\[\w+\] must be a type of", found), found
        assert f"but got Tensor[{dtype}]".lower() in found.lower(), found
        return
    for group, members in GROUPS[count].items():
        for rank in members:
            results = results_of(finished_jobs[count], rank)
            for operation in operations(kind):
                if has(operation, dtype):
                    name = name_of(kind, operation, group, dtype)
                    wanted = expected(kind, operation, members, rank, dtype)
                    assert_same(results[name], wanted, f"{name} on rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_reduction_that_a_type_has_not_is_refused(finished_jobs, rank):
    found = sentences_of(finished_jobs[2], rank)["maximum"]
    assert found.startswith("ReduceScatter on the CPU has no such reduction of Complex64"), found


@pytest.mark.slow
@pytest.mark.parametrize("count", GROUPS)
def test_nobody_leaves_a_barrier_before_all_have_come(finished_jobs, count):
    came, left = np.array([results_of(finished_jobs[count], rank)["barrier"] for rank in range(count)]).T
    assert came.max() - came.min() > worker.SLOWEST_S / 2      # otherwise it would show nothing
    assert left.min() >= came.max()


@pytest.mark.slow
@pytest.mark.parametrize("count", GROUPS)
def test_independent_sums_of_one_graph_do_not_mix(finished_jobs, count):
    for rank in range(count):
        sums = results_of(finished_jobs[count], rank)["order"]
        np.testing.assert_array_equal(sums[:, 0, 0], 10.0 ** np.arange(worker.TIMES) * count * (count + 1) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("how, sentence", {
    "cut": "is damaged, .*: it has 111 bytes, where 112 were expected",
    "empty": "is damaged, .*: it has 0 bytes, where 112 were expected",
    "flipped": "is damaged, .*: its checksum is not that of its content",
    "strange": "is damaged, .*: it does not begin as this message",
    "shape": rf"^Rank 0 sent 64 bytes of Float32 on channel p2p104\.{WORLD}, where rank 2 expects 80 bytes of Float32",
    "type": rf"^Rank 0 sent 64 bytes of Float32 on channel p2p105\.{WORLD}, where rank 3 expects 64 bytes of Int32",
}.items())
def test_a_message_that_is_not_as_expected(finished_jobs, how, sentence):
    reader = 1 + DAMAGES.index(how) % 3
    found = sentences_of(finished_jobs[4], reader)[how].split("\n")[0]
    assert re.search(sentence, found), found
    if "damaged" in sentence:
        assert re.match(rf"The message .*/mindspore_cpu_parallel_\w+/p2p\S+ from rank 0 to rank {reader} ", found)


@pytest.mark.slow
def test_a_rank_that_has_ended_sends_what_it_began_and_is_not_waited_for(finished_jobs):
    np.testing.assert_array_equal(results_of(finished_jobs[2], 0)["last"], np.eye(600))
    found = sentences_of(finished_jobs[2], 0)["ended"]
    assert re.match(rf"Rank 0 waited for message 0 of rank 1 on channel p2p99\.{WORLD}, but rank 1 \(process \d+\) has "
                    "ended without sending it", found), found


@pytest.mark.slow
def test_ranks_notice_a_killed_one(dead_job):
    killed = dead_job["reports"][2]
    assert killed["process"] == dead_job["processes"][2]
    for rank, report in enumerate(dead_job["reports"][:2]):
        when, sentence = report["killed"]
        assert 0 <= when - killed["died"][0] < NOTICED_S
        who = rf"rank 2 \(process {killed['process']}\) died"
        assert re.match(rf"Rank {rank} .* on channel allreduce\.{WORLD}.* {who}", sentence), sentence


@pytest.mark.slow
def test_a_rank_does_not_wait_for_a_living_one_when_another_is_dead(dead_job):
    waiting, _, killed = dead_job["reports"]
    when, sentence = waiting["stuck"]
    assert when - waiting["killed"][0] < NOTICED_S
    assert re.match(rf"Rank 0 waited for message 0 of rank 1 on channel p2p1\.{WORLD}, but rank 2 \(process "
                    rf"{killed['process']}\) died, and the job cannot go on without it", sentence), sentence


@pytest.mark.slow
def test_a_rank_notices_one_that_leaves_and_who_died_before(dead_job):
    waiting, leaving, killed = dead_job["reports"]
    when, sentence = waiting["left"]
    assert 0 <= when - leaving["died"][0] < NOTICED_S
    assert f"on channel p2p2.{WORLD}, but rank 1 (process {leaving['process']}) died without sending it" in sentence
    assert f"Dead as well: rank 2 (process {killed['process']})." in sentence


@pytest.mark.slow
def test_a_killed_jobs_messages_are_neither_taken_nor_kept(dead_job, finished_jobs):
    assert dead_job["stale"]        # there were some, on a channel that both later jobs used from its first message
    assert not dead_job["folder"].exists()


@pytest.mark.slow
def test_jobs_leave_nothing_behind(mailbox, finished_jobs):
    assert list(mailbox.iterdir()) == []


# Below here no rank is started.


@functools.cache
def library() -> ctypes.CDLL:
    import mindspore  # noqa: F401 - its libraries must be loaded before ours

    return ctypes.CDLL(str(build("collectives")))


def holds_lock(path: Path) -> int:
    return library().cpu_rank_holds_lock(os.fsencode(path))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_reduced(operation, dtype):
    from mindspore._c_expression import typing

    parts = [rounded(values(rank, dtype, 4), dtype) for rank in range(3)]
    # a bfloat16 is the upper half of a float32
    raw = [np.ascontiguousarray(part.view(np.uint32) >> 16, np.uint16) if dtype == "bfloat16" else part
           for part in parts]
    out = np.zeros_like(raw[0])
    pointers = (ctypes.c_void_p * len(raw))(*(part.ctypes.data for part in raw))
    number = typing.type_to_type_id(getattr(__import__("mindspore"), f"{dtype}_" if dtype == "bool" else dtype))
    library().reduce_cpu_buffers.restype = ctypes.c_bool
    done = library().reduce_cpu_buffers(int(number), operation.encode(), pointers, len(raw),
                                        ctypes.c_void_p(out.ctypes.data), ctypes.c_size_t(out.nbytes))
    assert done == has(operation, dtype)
    if done:
        found = (out.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else out
        assert_same(found, reduced(parts, operation, dtype), dtype)


class Ranks:
    """Threads, named by number, that join a mailbox as ranks would."""

    def __init__(self, count: int):
        self.barrier, self.parts, self.count = threading.Barrier(count), {}, count

    def total(self, rank: int, array: np.ndarray) -> np.ndarray:
        self.parts[rank] = array
        self.barrier.wait(timeout=30)
        result = sum(self.parts.values())
        self.barrier.wait(timeout=30)
        return result

    def join(self) -> list:
        """Each rank's mailbox, or what it raised."""
        found: list = [None] * self.count

        def work(rank: int) -> None:
            try:
                found[rank] = mailboxes.Mailbox(rank, self.count, functools.partial(self.total, rank), holds_lock,
                                                lambda: None)
            except OSError as error:
                found[rank] = error

        threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def test_a_mailbox_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CPU_PARALLEL_MAILBOX", str(tmp_path / "file" / "mailbox"))
    first, second = Ranks(2).join()
    assert f"mailbox {tmp_path}/file/mailbox cannot be written: Not a directory" in str(first)
    assert "CPU_PARALLEL_MAILBOX must name a folder" in str(first)
    assert "Rank 0 cannot write the mailbox" in str(second)


def test_a_mailbox_that_one_rank_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr(mailboxes, "_parent", lambda: tmp_path / {"0": "", "1": "elsewhere"}[
        threading.current_thread().name])
    first, second = Ranks(2).join()
    assert "Ranks [1] cannot write this job's mailbox" in str(first)
    assert "elsewhere" in str(second) and "cannot be written: No such file or directory" in str(second)
    assert not list(tmp_path.iterdir())


def test_an_unset_mailbox_is_in_memory(monkeypatch):
    monkeypatch.delenv("CPU_PARALLEL_MAILBOX", raising=False)
    first, second = Ranks(2).join()
    try:
        assert first.folder == second.folder
        assert first.folder.parent in (Path("/dev/shm"), Path(mailboxes.tempfile.gettempdir()))
        assert first.folder.stat().st_mode & 0o777 == 0o700
    finally:
        second.leave()
        first.leave()
    assert not first.folder.exists()


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_timeout_that_is_none(text, monkeypatch):
    monkeypatch.setenv("CPU_PARALLEL_TIMEOUT_S", text)
    with pytest.raises(ValueError, match=f"CPU_PARALLEL_TIMEOUT_S is '{text}'; it must be a positive number"):
        mailboxes.timeout_s()


def test_only_deserted_folders_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("CPU_PARALLEL_MAILBOX", str(tmp_path))
    living, dead, young, foreign = (tmp_path / name for name in (
        "mindspore_cpu_parallel_" + "a" * 16, "mindspore_cpu_parallel_" + "b" * 16,
        "mindspore_cpu_parallel_" + "c" * 16, "photographs"))
    for folder in (living, dead, young, foreign):
        folder.mkdir()
    for file in (living / "rank.0", living / "rank.1", dead / "rank.0", dead / "message", foreign / "rank.0"):
        file.touch()
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script, str(living / "rank.1")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        mailbox, = Ranks(1).join()
        assert not dead.exists() and living.exists() and young.exists() and foreign.exists()
        mailbox.leave()
        holder.send_signal(signal.SIGKILL)
    # not even waited for, a killed process holds nothing
    mailbox, = Ranks(1).join()
    mailbox.leave()
    assert not living.exists()


def test_a_rank_says_that_it_ends_when_all_is_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("CPU_PARALLEL_MAILBOX", str(tmp_path))
    first, second = Ranks(2).join()
    seen = []

    def finish() -> None:
        seen.append((first.folder / "rank.0").read_text())
        raise RuntimeError("an operator failed")

    first.finish = finish
    first.leave()
    assert seen == [f"{os.getpid()}\n"]
    second.leave()
    assert not list(tmp_path.iterdir())


def test_a_process_that_was_not_prepared_is_refused(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "")
    with pytest.raises(RuntimeError, match="not started with the variables of preload_environment"):
        install()
