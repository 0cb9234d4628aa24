"""A server over two tensor-parallel ranks: answers of one process, clients that go, its end, and the end of a rank."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from served import IMAGES, ROOT, data_url, question

import mindformers_ixc_cli
from mindformers_ixc.cli import launch_serve
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.generation.assistant import Assistant
from mindformers_ixc.interruption import JOB
from mindformers_ixc.serving.ranks import MEETING, READY

LAUNCH = [sys.executable, "-c", "import sys; sys.argv[0] = 'mindformers'; import mindformers_ixc_cli as cli; "
          "sys.exit(cli.main())", "launch"]
TOKENS = 12
QUESTIONS = [("What is shown in the picture?", "cat.jpg"), ("Hello", None), ("Which colour is it?", "coffee.jpg"),
             ("What is shown in the picture?", "rocket.jpg"), ("Say more. " * 20, None)]


def arguments_of(*words):
    return mindformers_ixc_cli.parse(["launch", *words])


class TestBeforeAnythingIsStarted:
    def test_words_before_serve_are_the_launchers(self):
        found = arguments_of("-n", "2", "--log_dir", "logs", "serve", "--model", "starter", "--log", "requests.jsonl")
        assert (found.devices, found.log_dir) == (2, "logs")
        assert (found.run.command, found.run.log, found.run.model) == ("serve", "requests.jsonl", "starter")
        assert found.run_words == ["serve", "--model", "starter", "--log", "requests.jsonl"]

    @pytest.mark.parametrize(("words", "sentence"), [
        (["-n", "1"], "on a single device type `mindformers serve` without `launch`"),
        (["-n", "3"], "Tensor parallel 3 does not divide"),
        (["-n", "4", "--local_devices", "2", "--master_addr", "10.0.0.1"], "the ranks of `serve` must be of one"),
    ], ids=str)
    def test_devices_that_cannot_share_the_model_are_refused(self, words, sentence):
        with pytest.raises(ConfigError, match=sentence):
            launch_serve.launch_serve(arguments_of(*words, "serve", "--model", "starter", "--port", "0"))

    def test_what_serve_refuses_is_refused(self, capsys):
        assert mindformers_ixc_cli.main(["launch", "-n", "2", "serve", "--model", "starter", "--max_queue", "0"]) == 1
        assert "--max_queue is 0" in capsys.readouterr().err


def test_the_log_of_requests_comes_out_of_the_launcher(tmp_path):
    class Stream:
        lines = ""

        def write(self, text):
            self.lines += text

        def flush(self):
            """Nothing is held back."""

    stream = Stream()
    with launch_serve._passed_on(tmp_path / "requests", stream) as path:
        for number in range(3):         # a rank that is slow to begin, and one that writes until the end
            with open(path, "a", encoding="utf-8") as log:
                log.write(f"{number}\n" * 1000)
    assert stream.lines == "".join(f"{number}\n" * 1000 for number in range(3))


class Server:
    """A launched server.

    Attributes:
        url: where it answers.
        process: of the launcher.
    """

    def __init__(self, process, url):
        self.process, self.url = process, url

    def ask(self, text, picture, **more):
        pictures = [data_url(picture)] if picture else []
        with httpx.Client(base_url=self.url, timeout=300, trust_env=False) as client:
            found = client.post("/v1/chat/completions", json=question(text, *pictures, max_tokens=TOKENS, **more))
        return found.json()["choices"][0]["message"]["content"]

    def metric(self, name):
        with httpx.Client(base_url=self.url, timeout=120, trust_env=False) as client:
            lines = client.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"mindformers_ixc_{name} "))

    @property
    def ranks(self):
        """Processes of the job, by rank."""
        found = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                variables = child.environ()
                if JOB in variables and variables.get("MS_ROLE") == "MS_WORKER":
                    found.setdefault(int(variables["RANK_ID"]), child)
        return found


@contextlib.contextmanager
def launched(folder):
    """A server of the starter over two ranks."""
    words = ["-n", "2", "--log_dir", str(folder), "serve", "--model", "starter", "--port", "0",
             "--max_positions", "512", "--max_running", "4"]
    with subprocess.Popen([*LAUNCH, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                          env={**os.environ, "GLOG_v": "3"}) as process:
        try:
            said = []
            for line in process.stderr:
                said.append(line)
                if " answers at " in line:
                    break
            else:
                raise AssertionError("".join(said))
            yield Server(process, said[-1].split(" answers at ")[1].split("/v1")[0])
        finally:
            process.kill()


@pytest.fixture(scope="module")
def alone():
    """What one process answers to the questions, and by beams to the first."""
    assistant = Assistant.from_directory("starter")
    asked = [{"query": text, "images": [str(IMAGES / picture)] if picture else []} for text, picture in QUESTIONS]
    answers = [assistant.answer([one], max_new_tokens=TOKENS)[0] for one in asked]
    return answers, assistant.answer(asked[:1], max_new_tokens=TOKENS, num_beams=2)[0]


@pytest.mark.slow
def test_the_ranks_answer_as_one_process_and_end_when_told(alone, tmp_path):
    answers, beams = alone
    with launched(tmp_path) as server, ThreadPoolExecutor(12) as clients:
        asked = [clients.submit(server.ask, *one) for one in QUESTIONS * 2]
        searched = clients.submit(server.ask, *QUESTIONS[0], num_beams=2)
        several = clients.submit(server.ask, *QUESTIONS[1], n=2)
        assert [one.result().strip() for one in asked] == answers * 2
        assert searched.result().strip() == beams and several.result().strip() == answers[1]
        assert server.metric("rows") == 4

        with httpx.Client(base_url=server.url, timeout=300, trust_env=False) as client, client.stream(
                "POST", "/v1/chat/completions", json=question("Hello", max_tokens=400, stream=True, seed=1,
                                                              temperature=1.9)) as stream:
            next(line for line in stream.iter_lines() if line.startswith("data: {"))
        until = time.monotonic() + 60
        while server.metric("running") and time.monotonic() < until:
            time.sleep(0.05)
        assert server.metric("running") == 0
        assert server.ask(*QUESTIONS[0]).strip() == answers[0]         # its row serves others

        ranks = server.ranks
        assert sorted(ranks) == [0, 1]
        last = clients.submit(server.ask, *QUESTIONS[4])
        while not server.metric("reading") + server.metric("running") and not last.done():
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        assert last.result().strip() == answers[4]
        assert server.process.wait(120) == 0
        assert "The server has ended." in server.process.stderr.read()
        assert not any(rank.is_running() for rank in ranks.values())
        log = [json.loads(line) for line in server.process.stdout.read().splitlines()]
    assert [line["status"] for line in log if line["path"] == "/v1/chat/completions"].count(200) >= 14


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_server_with_a_sentence(tmp_path):
    with launched(tmp_path) as server:
        ranks = server.ranks
        ranks[1].send_signal(signal.SIGKILL)
        assert server.process.wait(120) == 1
        last = server.process.stderr.read().strip().splitlines()[-1]
        assert "Rank 1 was killed by signal 9 (SIGKILL)" in last and str(tmp_path / "worker_1.log") in last
        # whose parents were killed too wait for the system to collect them
        assert not [rank for rank in psutil.wait_procs(ranks.values(), 60)[1] if rank.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_only_a_server_that_is_ready_is_asked_to_drain(tmp_path, monkeypatch, number):
    sent, gently = [], []

    class Job:
        ranks = {0: type("Rank", (), {"process": type("Process", (), {"send_signal": staticmethod(sent.append)})})}

        def run(self):
            assert not gently[0](number) and not sent
            (tmp_path / READY).touch()
            assert gently[0](number) is (number == signal.SIGTERM)
            return 0

    @contextlib.contextmanager
    def job_of(arguments, words, ranks, logs, on_cpu, variables):
        assert variables == {MEETING: str(tmp_path)} and words[0] == "serve"
        yield Job()

    @contextlib.contextmanager
    def stopped(asked):
        gently.append(asked)
        yield

    @contextlib.contextmanager
    def scratch(dir):
        yield str(tmp_path)

    monkeypatch.setattr(launch_serve, "job_of", job_of)
    monkeypatch.setattr(launch_serve, "stopped_by_signals", stopped)
    monkeypatch.setattr(launch_serve.tempfile, "TemporaryDirectory", scratch)
    arguments = arguments_of("-n", "2", "serve", "--model", "starter", "--log", str(tmp_path / "log"))
    assert launch_serve.launch_serve(arguments) == 0
    assert sent == ([signal.SIGTERM] if number == signal.SIGTERM else [])
