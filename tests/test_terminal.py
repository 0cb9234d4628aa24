"""What users see: sentences, live lines on terminals of any width, plain lines elsewhere, nothing of the libraries."""
from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mindformers_ixc import terminal
from mindformers_ixc.tables import bar, clip, width_of
from mindformers_ixc.terminal import Terminal


def screen(written: str) -> list[str]:
    """Lines that a terminal shows of what was written to it."""
    lines, column = [""], 0
    for part in re.split(r"(\r|\n|\033\[K|\033\[[0-9;]*m)", written):
        if part == "\n":
            lines.append("")
            column = 0
        elif part == "\r":
            column = 0
        elif part == "\033[K":
            lines[-1] = lines[-1][:column]
        elif part and not part.startswith("\033"):
            lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part):]
            column += len(part)
    return lines


@pytest.fixture
def waiting(monkeypatch):
    """Lets everything that waits for its time come at once; gives a function that waits for the drawing thread."""
    monkeypatch.setattr(terminal, "PATIENCE_S", 0.0)
    monkeypatch.setattr(terminal, "SPINNER_AFTER_S", 0.0)
    monkeypatch.setattr(terminal, "SPINNER_EVERY_S", 0.01)

    def until(found) -> None:
        for _ in range(6000):
            if found():
                return
            threading.Event().wait(0.01)
        pytest.fail("nothing was drawn")

    return until


def on_terminal(columns: int = 40) -> tuple[Terminal, io.StringIO]:
    stream = io.StringIO()
    return Terminal(stream, interactive=True, columns=columns), stream


def test_a_sentence_stands_above_the_live_line_which_comes_back(monkeypatch):
    monkeypatch.setattr(terminal, "LIVE_IN_FILE_EVERY_S", 0.0)
    shown, stream = on_terminal()
    shown.live("1/9")
    shown.say("Something happened.")
    shown.live("2/9")
    assert screen(stream.getvalue()) == ["Something happened.", "2/9"]
    shown.rest()
    assert screen(stream.getvalue()) == ["Something happened.", ""]


def test_a_live_line_never_fills_a_line_of_the_terminal(monkeypatch):
    monkeypatch.setattr(terminal, "LIVE_IN_FILE_EVERY_S", 0.0)
    shown, stream = on_terminal(20)
    shown.live("读取数据读取数据读取数据")
    assert width_of(screen(stream.getvalue())[0]) == 18


def test_what_goes_on_is_a_spinner_with_the_innermost_name(waiting):
    shown, stream = on_terminal()
    with shown.doing("Training"):
        with shown.doing("Evaluating"):
            waiting(lambda: "Evaluating" in stream.getvalue())
        waiting(lambda: re.search(r"Training(, \d+ s)?\033\[K$", stream.getvalue()))
    assert screen(stream.getvalue()) == [""]


def test_elsewhere_it_is_one_line(waiting):
    stream = io.StringIO()
    shown = Terminal(stream, interactive=False)
    shown.live("no bar")
    with shown.doing("Reading the data"):
        waiting(stream.getvalue)
    assert stream.getvalue() == "Reading the data ...\n"


def test_a_count_takes_the_place_of_the_spinner(waiting):
    shown, stream = on_terminal(60)
    with shown.doing("Reading the data"):
        waiting(lambda: "Reading the data" in stream.getvalue())
        seen = []
        for item in shown.counted("abc", 3, "measuring", "sample", disable=False, mininterval=0, ncols=59):
            seen.append(item)
            shown.say(f"{item} is odd.")
            drawn = len(stream.getvalue())
            threading.Event().wait(0.05)
            assert "Reading" not in stream.getvalue()[drawn:]
    assert seen == ["a", "b", "c"]
    lines = [line.rstrip() for line in screen(stream.getvalue()) if line.strip()]
    assert lines[:3] == ["a is odd.", "b is odd.", "c is odd."]
    assert lines[3].startswith("measuring: 100%") and "3/3" in lines[3]
    assert list(shown.counted("ab", 2, "measuring", "sample")) == ["a", "b"]      # as a StringIO is no terminal for it


def test_in_a_file_a_sentence_does_not_stand_behind_the_bar():
    stream = io.StringIO()
    shown = Terminal(stream, interactive=False)
    with shown.counting(3, "SRC -> DST", "B", disable=False):
        shown.say("There is a NaN.")
    assert "There is a NaN." in stream.getvalue().split("\n")


def test_what_does_not_last_is_not_said_unless_it_is_known_to_last(monkeypatch):
    monkeypatch.setattr(terminal, "PATIENCE_S", 600.0)
    stream = io.StringIO()
    shown = Terminal(stream, interactive=False)
    with shown.doing("Reading the data"):
        pass
    assert not stream.getvalue()
    with shown.doing("Compiling", at_once=True):
        assert stream.getvalue() == "Compiling ...\n"


def test_a_narrow_terminal_breaks_sentences_between_words_but_no_commands():
    shown, stream = on_terminal(24)
    shown.fault("flags/questions.csv does not exist; name another file.")
    shown.say("Type:\n    mindformers chat --model my/model")
    assert screen(stream.getvalue()) == ["error:", "flags/questions.csv does", "not exist; name another", "file.",
                                         "Type:", "    mindformers chat --model my/model", ""]
    stream = io.StringIO()
    Terminal(stream, interactive=False, columns=24).fault("flags/questions.csv does not exist; name another file.")
    assert stream.getvalue() == "error: flags/questions.csv does not exist; name another file.\n"


def test_the_log_may_have_more_than_is_shown():
    stream, log = io.StringIO(), io.StringIO()
    shown = Terminal(stream, log, interactive=False)
    shown.note("step 1", "step 1, and how")
    shown.quiet = True
    shown.note("step 2", "step 2, and how")
    assert (stream.getvalue(), log.getvalue()) == ("step 1\n", "step 1, and how\nstep 2, and how\n")


def test_quiet_leaves_sentences():
    stream, log = io.StringIO(), io.StringIO()
    shown = Terminal(stream, log, interactive=False)
    shown.quiet = True
    shown.note("step 1")
    with shown.doing("Compiling", at_once=True):
        shown.say("The model is there.")
    assert stream.getvalue() == "The model is there.\n"
    assert log.getvalue() == "step 1\nThe model is there.\n"


def test_colours_are_for_terminals_without_no_color_and_not_for_logs(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream, log = io.StringIO(), io.StringIO()
    shown = Terminal(stream, log, interactive=True, columns=80)
    shown.say(shown.paint("error:", "red", "bold") + " no.")
    assert "\033[31;1m" in stream.getvalue() and log.getvalue() == "error: no.\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown.paint("error:", "red") == "error:"
    monkeypatch.delenv("NO_COLOR")
    assert Terminal(io.StringIO()).paint("error:", "red") == "error:"


@pytest.mark.parametrize(("variables", "knows"), [
    ({"LANG": "C"}, False), ({"LANG": "zh_CN.UTF-8"}, True), ({"LANG": "en_GB.utf8", "LC_ALL": "C"}, False),
    ({}, False)])
def test_only_a_locale_that_says_so_gets_signs_beyond_ascii(monkeypatch, variables, knows):
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Terminal().knows_unicode is knows
    assert bar(0.5, 4, False) == "##--"


def test_a_stream_that_takes_ascii_only_gets_the_rest_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Terminal(stream, interactive=False).say("猫.jpg is gone.")
    stream.seek(0)
    assert stream.read() == "\\u732b.jpg is gone.\n"


def test_a_closed_stream_ends_nothing():
    stream = io.StringIO()
    shown = Terminal(stream)
    stream.close()
    shown.say("nobody reads this")
    shown.live("nor this")


def test_clipping_counts_wide_signs_twice():
    assert clip("一二三", 5) == "一二"
    assert clip("abc\ndef", 10) == "abc def"


LIBRARIES = """
import os, sys, subprocess
from pathlib import Path
from mindformers_ixc import terminal
try:
    with terminal.current.libraries_to(Path(sys.argv[1])):
        print("python")
        os.write(2, b"a C++ library\\n")
        subprocess.run(["echo", "a child"])
        terminal.current.say("for the user")
        if len(sys.argv) > 2:
            raise RuntimeError("broken")
finally:
    terminal.current.say("afterwards")
"""


@pytest.mark.parametrize("broken", [False, True])
def test_whatever_libraries_print_is_in_the_log_alone(tmp_path, broken):
    log = tmp_path / "run.log"
    log.write_text("an earlier run\n")
    done = subprocess.run([sys.executable, "-c", LIBRARIES, str(log), *["yes"] * broken], capture_output=True,
                          text=True, check=False)
    assert done.stdout == ""
    assert done.stderr.splitlines()[:2] == ["for the user", "afterwards"]
    assert ("RuntimeError: broken" in done.stderr) == broken
    logged = log.read_text().splitlines()
    assert logged[0] == "an earlier run"
    assert {"python", "a C++ library", "a child", "for the user"} <= set(logged)
    assert (logged[-1] == "RuntimeError: broken") == broken


def test_a_rank_writes_for_the_launchers_terminal_and_into_its_own_log(tmp_path, monkeypatch, capsys):
    path = tmp_path / "shown.txt"
    monkeypatch.setattr(terminal, "current", Terminal(io.StringIO(), interactive=True, columns=50))
    for name, value in terminal.tell_ranks(path, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK_ID", "0")
    terminal.configure()
    terminal.current.say("of rank 0")
    monkeypatch.setenv("RANK_ID", "1")
    terminal.configure()
    assert terminal.current.interactive and terminal.current.columns == 50
    terminal.current.say("of rank 1")
    terminal.current.live("1/9")
    assert capsys.readouterr().err == "of rank 0\nof rank 1\n"
    assert screen(path.read_bytes().decode()) == ["of rank 1", "1/9"]
    launcher, stream = on_terminal()
    launcher.pass_on(path.read_bytes().decode())
    launcher.say("All ranks were ended.")
    assert screen(stream.getvalue()) == ["of rank 1", "All ranks were ended.", ""]


def test_a_line_that_a_rank_has_not_finished_is_ended_where_there_is_no_terminal():
    stream = io.StringIO()
    launcher = Terminal(stream, interactive=False)
    launcher.pass_on("step 1/9: lo")
    launcher.say("All ranks were ended.")
    assert stream.getvalue() == "step 1/9: lo\nAll ranks were ended.\n"


def test_a_child_process_does_not_wait_for_a_lock_that_a_thread_of_its_parent_holds():
    read, write = os.pipe()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with terminal.current._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        with terminal.current._lock:
            os.write(write, b"free")
        os._exit(0)
    done.set()
    thread.join()
    os.close(write)
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"free"
    os.close(read)


def test_a_log_that_a_run_appends_to_is_named_while_it_does(tmp_path):
    code = ("import sys; from pathlib import Path; from mindformers_ixc import terminal\n"
            "with terminal.current.libraries_to(Path(sys.argv[1])):\n    named = terminal.current.log_path\n"
            "print(named, terminal.current.log_path)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.log")], capture_output=True, text=True,
                          check=True)
    assert done.stdout.split() == [str(Path(tmp_path / "x.log")), "None"]
