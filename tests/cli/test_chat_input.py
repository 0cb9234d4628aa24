"""Messages of several lines, completion, and what two threads write while one of them types."""
from __future__ import annotations

import contextlib
import io
import sys
import threading

import pytest

from mindformers_ixc import terminal
from mindformers_ixc.cli.chat_input import completions, read_message
from mindformers_ixc.cli.loading import Idle, Loading


def message_of(*lines: str) -> tuple[str, list[str], list[str]]:
    """The message, the prompts that were shown, and the lines that were left."""
    left, prompts = list(lines), []

    def read(prompt):
        prompts.append(prompt)
        if not left:
            raise EOFError
        return left.pop(0)

    return read_message(read), prompts, left


@pytest.mark.parametrize(("lines", "message"), [
    (["  hello "], "hello"), (["one \\", "two"], "one \ntwo"), (["one\\", "two\\", "three"], "one\ntwo\nthree"),
    (["```", "a", "", "/b", "```"], "a\n\n/b"), (["```", "C:\\", "x", "```"], "C:\\\nx"),
    (["See: \\", "```python", "x = 1", "```"], "See: \n```python\nx = 1\n```"),
    (["```python", "x", "```\\", "why?"], "```python\nx\n```\nwhy?"), (["```x``` means?"], "```x``` means?"),
    (["hello\r"], "hello"), ([""], "")])
def test_a_message_has_one_line_or_several(lines, message):
    found, prompts, left = message_of(*lines, "next")
    assert found == message
    assert prompts == ["> "] + ["... "] * (len(lines) - 1)
    assert left == ["next"]


def test_the_end_of_input_ends_a_message_that_was_begun():
    assert message_of("```", "a")[0] == "```\na"
    with pytest.raises(EOFError):
        message_of()


def test_tab_completes_commands_and_paths(tmp_path, monkeypatch):
    for name in ("cat.jpg", "cart.png", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "cats").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert completions("", "/i", ["/image", "/undo"]) == ["/image "]
    assert completions("", "ca", ["/image"]) == []
    assert completions("/image ", "ca", []) == ["cart.png ", "cat.jpg ", "cats/"]
    assert completions("/image ", "~/cat", []) == ["~/cat.jpg ", "~/cats/"]
    assert completions("/image ", "none/x", []) == []


@contextlib.contextmanager
def streams():
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        yield out, err


def test_what_the_loading_thread_writes_waits_for_its_result():
    go, written = threading.Event(), threading.Event()

    def load():
        print("a note of a library")
        print("a sentence for the user", file=sys.stderr)
        if sys.stderr.isatty():
            print("a bar", file=sys.stderr)
        written.set()
        go.wait(60)
        return 7

    with streams() as (out, err):
        err.isatty = lambda: True
        loading = Loading(load)
        loading.start()
        assert written.wait(60)
        print("> ", file=sys.stderr)
        assert (out.getvalue(), err.getvalue()) == ("", "> \n")
        assert sys.stderr.isatty()
        go.set()
        assert loading.result() == loading.result() == 7
        assert (out.getvalue(), err.getvalue()) == ("", "> \na sentence for the user\n")
        print("afterwards")
        assert out.getvalue() == "afterwards\n"


def test_what_loading_raises_is_raised_by_its_result_and_reported_at_once():
    failed = threading.Event()

    def load():
        print("why", file=sys.stderr)
        raise ValueError("the weights are damaged")

    with streams() as (_, err):
        loading = Loading(load, failed.set)
        loading.start()
        assert failed.wait(60)
        for _ in range(2):
            with pytest.raises(ValueError, match="damaged"):
                loading.result()
        assert err.getvalue() == "why\n"


def test_idle_work_is_done_one_at_a_time_and_keeps_its_faults():
    idle, begun, go_on, done = Idle(), threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        go_on.wait(60)
        done.append(1)
        raise ValueError("nobody asked")

    assert not idle.busy
    idle.start(work)
    assert begun.wait(60)
    assert idle.busy
    idle.start(lambda: done.append(2))          # left out
    go_on.set()
    idle._thread.join(60)
    assert (idle.busy, done) == (False, [1])
    idle.start(lambda: done.append(3))
    idle._thread.join(60)
    assert done == [1, 3]


def test_waiting_is_said_on_a_terminal_only_and_ends_when_it_is_told_to(monkeypatch):
    stream, file = io.StringIO(), io.StringIO()
    monkeypatch.setattr(terminal, "SPINNER_AFTER_S", 0.0)
    monkeypatch.setattr(terminal, "PATIENCE_S", 0.0)
    monkeypatch.setattr(terminal, "current", terminal.Terminal(stream, interactive=True, columns=40))
    with terminal.current.waiting("Reading") as shown:
        while "Reading" not in stream.getvalue():
            threading.Event().wait(0.01)
        shown.close()
        drawn = stream.getvalue()
        assert drawn.endswith("\r\033[K")
        threading.Event().wait(3 * terminal.SPINNER_EVERY_S)
    assert stream.getvalue() == drawn
    monkeypatch.setattr(terminal, "current", terminal.Terminal(file, interactive=False))
    with terminal.current.waiting("Reading"):
        threading.Event().wait(3 * terminal.SPINNER_EVERY_S)
    assert file.getvalue() == ""
