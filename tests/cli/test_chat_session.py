"""The interactive chat on a terminal: line history, streaming, Ctrl-C at the prompt and inside an answer."""
from __future__ import annotations

import os
import pty
import select
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor

from mindformers_ixc import InternLM2Tokenizer, IXC25Config, IXC25ForCausalLM
from mindformers_ixc.checkpoint.model_directory import save_model_directory
from mindformers_ixc.demo import demo_path

COMMAND = str(Path(sys.executable).parent / "mindformers")


class Terminal:
    """A `mindformers chat` that believes it has a terminal."""

    def __init__(self, model: Path, state: Path):
        self.unread = ""
        self.process, self.descriptor = pty.fork()
        if self.process == 0:
            os.environ.update(XDG_STATE_HOME=str(state), XDG_CACHE_HOME=str(state))
            os.execv(COMMAND, [COMMAND, "chat", "--model", str(model), "--max_new_tokens", "20000"])

    def write(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def read(self, until: str, least: int = 0, seconds: float = 90) -> str:
        """What comes up to a text (after `least` characters); what came behind it in one go is for the next read."""
        seen, end = self.unread, time.monotonic() + seconds
        while until not in seen[least:]:
            assert time.monotonic() < end, f"no {until!r} in {seen!r}"
            if select.select([self.descriptor], [], [], 1)[0]:
                seen += os.read(self.descriptor, 4096).decode(errors="replace")
        stop = seen.index(until, least) + len(until)
        self.unread = seen[stop:]
        return seen[:stop]

    def status(self) -> int:
        return os.waitpid(self.process, 0)[1]


@pytest.fixture(scope="module")
def babbling_model(tmp_path_factory):
    """A model that says one word without end: every layer adds nothing, and only one logit is not 0."""
    config = IXC25Config(vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, plora_rank=2, task_lora_ranks={},
                         vision_config={"image_size": 56, "hidden_size": 16, "num_hidden_layers": 1,
                                        "num_attention_heads": 1, "intermediate_size": 16})
    folder = tmp_path_factory.mktemp("babbling") / "model"
    vocabulary = str(demo_path("tokenizer.model"))
    model = IXC25ForCausalLM(config)
    word = InternLM2Tokenizer(vocabulary).convert_tokens_to_ids("▁the")
    layer, head = model.model.layers[0], np.zeros((1024, 32), np.float32)
    head[word] = 1
    for parameter, value in ((layer.attention.wo.weight, 0), (layer.feed_forward.w2.weight, 0),
                             (model.model.tok_embeddings.weight, 1), (model.output.weight, head)):
        parameter.set_data(Tensor(np.broadcast_to(np.float32(value), parameter.shape).copy()))
    save_model_directory(model, str(folder), tokenizer_file=vocabulary)
    return folder


def test_a_session_on_a_terminal(babbling_model, tmp_path):
    terminal = Terminal(babbling_model, tmp_path)
    terminal.read("> ")
    terminal.write("Tell me\n")
    terminal.read("the the the")                    # the answer has begun
    terminal.write("\x03")
    terminal.read("[stopped]")
    terminal.read("> ")
    terminal.write("half a li")
    terminal.read("half a li")
    time.sleep(0.5)                                 # a signal between prompt and select() waits for the next key
    terminal.write("\x03")                          # at the prompt it leaves the line
    terminal.read("> ")
    terminal.write("\x1b[A")                        # the question before comes back
    terminal.read("Tell me")
    terminal.write("\x15/quit\n")
    assert terminal.status() == 0
    history = (tmp_path / "mindformers_ixc" / "chat_history").read_text().splitlines()
    assert history == ["Tell me", "/quit"]
