"""The interactive chat on a terminal: line history, streaming, Ctrl-C at the prompt and inside an answer."""
from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor

from mindformers_ixc import InternLM2Tokenizer, IXC25Config, IXC25ForCausalLM
from mindformers_ixc.checkpoint.model_directory import save_model_directory
from mindformers_ixc.demo import demo_path
from mindformers_ixc.resources import resolve_model

COMMAND = str(Path(sys.executable).parent / "mindformers")


class Terminal:
    """A command that believes it has a terminal."""

    def __init__(self, command: list[str], state: Path):
        self.unread = ""
        self.process, self.descriptor = pty.fork()
        if self.process == 0:
            os.chdir(state)
            os.environ.update(XDG_STATE_HOME=str(state), XDG_CACHE_HOME=str(state))
            os.execv(command[0], command)

    def write(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def read(self, until: str, least: int = 0, seconds: float = 300) -> str:
        """What comes up to a text (after `least` characters); what came behind it in one go is for the next read."""
        seen, end = self.unread, time.monotonic() + seconds
        while until not in seen[least:]:
            assert time.monotonic() < end, f"no {until!r} in {seen!r}"
            if select.select([self.descriptor], [], [], 1)[0]:
                seen += os.read(self.descriptor, 4096).decode(errors="replace")
        stop = seen.index(until, least) + len(until)
        self.unread = seen[stop:]
        return seen[:stop]

    def leave_line(self) -> None:
        """Ctrl-C at the prompt, up to the next prompt.

        A signal that comes after Python has looked for one and before readline waits for a key is noticed with the next
        signal.
        """
        self.write("\x03")
        seen, silent = self.unread, 0
        while "> " not in seen:
            if select.select([self.descriptor], [], [], 1)[0]:
                seen += os.read(self.descriptor, 4096).decode(errors="replace")
                continue
            silent += 1
            assert silent < 100, f"no prompt in {seen!r}"
            if silent % 30 == 0:
                self.write("\x03")
        self.unread = seen.partition("> ")[2]

    def status(self) -> int:
        """Exit code; what was not read before is in `unread` afterwards."""
        with contextlib.suppress(OSError):          # how Linux says that nobody has the other end open
            while piece := os.read(self.descriptor, 4096):
                self.unread += piece.decode(errors="replace")
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


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
    terminal = Terminal([COMMAND, "chat", "--model", str(babbling_model), "--max_new_tokens", "20000"], tmp_path)
    terminal.read("> ")
    terminal.write("Tell me\n")
    terminal.read("the the the")                    # the answer has begun
    terminal.write("\x03")
    terminal.read("[stopped]")
    terminal.read("> ")
    terminal.write("half a li")
    terminal.read("half a li")
    terminal.leave_line()
    terminal.write("\x1b[A")                        # the question before comes back
    terminal.read("Tell me")
    terminal.write("\x15/quit\n")
    assert terminal.status() == 0
    history = (tmp_path / "mindformers_ixc" / "chat_history").read_text().splitlines()
    assert history == ["Tell me", "/quit"]


@pytest.fixture
def standin(tmp_path):
    """A chat on a terminal whose model is a stand-in; the file `loaded` lets it be there."""
    shutil.copytree(resolve_model("starter"), tmp_path / "model")
    program = str(Path(__file__).parents[1] / "helpers" / "standin_chat.py")

    def start(*words: str) -> Terminal:
        return Terminal([sys.executable, program, "model", *words], tmp_path)

    return start


def test_the_model_loads_while_the_question_is_typed(standin, tmp_path):
    terminal = standin()
    terminal.read("> ")
    terminal.write("half")
    terminal.read("half")
    (tmp_path / "loaded").touch()
    time.sleep(0.3)
    terminal.write(" typed\n")
    seen = terminal.read("> ", least=len(" typed"))
    assert "The weights are old.\r\n" in seen             # after the line that was typed, not in it
    assert "HALF TYPED" in seen
    assert "a note of a library" not in seen
    terminal.write("/stats\n")
    assert "9 positions in, 2 tokens out" in terminal.read("> ", least=9)
    terminal.write("Nothing\n")
    assert "hint: the answer is empty" in terminal.read("> ", least=9)
    terminal.write("one\\\n")
    terminal.read("... ")
    terminal.write("two\n")
    assert "ONE TWO" in terminal.read("> ", least=9)
    terminal.write("\x04")
    assert terminal.status() == 0


def test_ctrl_c_works_while_the_model_loads(standin, tmp_path):
    terminal = standin()
    terminal.read("> ")
    terminal.write("half a li")
    terminal.read("half a li")
    terminal.leave_line()
    terminal.write("Too early\n")
    terminal.read("The model is loading")
    terminal.write("\x03")
    terminal.read("[stopped]")
    terminal.read("> ")
    (tmp_path / "loaded").touch()
    terminal.write("Tell me\n")
    terminal.read("THE THE THE")
    terminal.write("\x03")
    terminal.read("[stopped]")
    terminal.read("> ")
    terminal.write("Hello\n")
    terminal.read("HELLO")
    terminal.write("/quit\n")
    assert terminal.status() == 0


@pytest.mark.parametrize("coloured", [True, False])
def test_the_prompt_is_in_colour_unless_it_is_not_wanted(standin, monkeypatch, coloured):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not coloured:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal = standin()
    assert terminal.read("> ").endswith("\x1b[36;1m> ") == coloured
    terminal.write("/quit\n")
    assert terminal.status() == 0


def test_a_session_can_be_left_while_the_model_loads(standin, tmp_path):
    terminal = standin()
    terminal.read("> ")
    terminal.write("/image none.png\n")
    terminal.read("none.png does not exist")
    terminal.write("/quit\n")
    assert terminal.status() == 0
    assert "/quit" in (tmp_path / "mindformers_ixc" / "chat_history").read_text()


def test_a_model_that_does_not_load_ends_the_session_at_once(standin, tmp_path):
    terminal = standin("fails")
    terminal.read("> ")
    terminal.write("half a li")
    terminal.read("half a li")
    (tmp_path / "loaded").touch()
    assert terminal.status() == 1
    assert "error:" in terminal.unread and terminal.unread.endswith(" The weights are damaged.\r\n")     # in colour
    (tmp_path / "loaded").unlink()
    terminal = standin("fails")
    terminal.read("> ")
    terminal.write("A question\n")
    terminal.read("The model is loading")
    (tmp_path / "loaded").touch()
    assert terminal.status() == 1
    assert "error:" in terminal.unread and terminal.unread.endswith(" The weights are damaged.\r\n")     # in colour
