"""The command itself: what it refuses before it loads anything, and a server of the starter from start to end."""
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from served import ROOT, data_url, question

from mindformers_ixc.checkpoint.weights_mark import weights_mark

COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'mindformers'; import mindformers_ixc_cli as cli; "
           "sys.exit(cli.main())", "serve"]


def refused(*words: str, **environment: str) -> str:
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=300, cwd=ROOT, check=False,
                          env={**os.environ, **environment})
    assert done.returncode == 1 and done.stdout == ""
    return done.stderr


class TestRefusals:
    @pytest.mark.parametrize(("words", "sentence"), [
        (["--model", "starter", "--max_queue", "0"], "--max_queue is 0; it must be a whole number of at least 1."),
        (["--model", "starter", "--max_seconds", "-1"], "--max_seconds is -1.0; it must be a number above 0."),
        (["--model", "starter", "--api_key", "short"], "The API key has 5 characters"),
        (["--model", "starter", "--image_root", "/nowhere"], "--image_root /nowhere is no folder"),
        (["--model", "starter", "--allow_origin", "*"], "--allow_origin * is no origin"),
        (["--model", "starter", "--fetch_images", "http://a/b"], "--fetch_images http://a/b is no host"),
        (["--model", "starter", "--port", "99999"], "--port is 99999; ports are numbered 0 to 65535"),
        (["--model", "starter", "--host", "203.0.113.1"], "--host 203.0.113.1 --port 8000 cannot be listened on"),
        (["--model", "starter", "--log", "/nowhere/requests.log"], "--log /nowhere/requests.log cannot be written"),
        (["--model", "starter", "--allow_host", "a.example:80"], "--allow_host a.example:80 is no name of a host"),
        (["--model", "/nowhere"], "/nowhere"),
    ], ids=str)
    def test_what_cannot_be_is_said_before_anything_is_loaded(self, words, sentence):
        # a server that another test starts may have the usual port just now
        found = refused(*words, *([] if {"--host", "--port"} & {*words} else ["--port", "0"]))
        assert sentence in found and found.startswith("error: ")

    def test_a_taken_port_says_which_is_free(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            found = refused("--model", "starter", "--port", str(port))
        assert f"Port {port} of 127.0.0.1 is taken" in found
        free = int(found.split("--port ")[1].split(",")[0])
        assert free != port


@pytest.mark.slow
def test_the_command_serves_and_ends(tmp_path):
    log = tmp_path / "requests.log"
    with subprocess.Popen([*COMMAND, "--model", "starter", "--port", "0", "--log", str(log), "--max_positions", "512"],
                          stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as server:
        try:
            address = ""
            for line in server.stderr:
                if " answers at " in line:
                    address = line.split(" answers at ")[1].split("/v1")[0]
                    break
            assert address, "it was not ready"
            with httpx.Client(base_url=address, timeout=120, trust_env=False) as client:
                asked = question("What is shown in the picture?", data_url("cat.jpg"), max_tokens=20)
                answer = client.post("/v1/chat/completions", json=asked).json()["choices"][0]
                assert "cat" in answer["message"]["content"].lower() and answer["finish_reason"] == "stop"
                with client.stream("POST", "/v1/chat/completions", json={**asked, "stream": True}) as stream:
                    events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
                text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
                assert text.strip() == answer["message"]["content"]
                model = client.get("/v1/models").json()["data"][0]
                assert model["id"] == "starter" and model["control_tokens"] is False
                assert model["weights"] == weights_mark("starter")
            server.send_signal(signal.SIGTERM)
            assert server.wait(120) == 0
            assert "The server has ended." in server.stderr.read()
        finally:
            server.kill()
    assert [json.loads(line)["status"] for line in log.read_text().splitlines()] == [200, 200, 200]
