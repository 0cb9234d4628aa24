"""Files and folders that are whole or not there: writers that fail or are killed, permissions, links, older targets."""
from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindformers_ixc import files
from mindformers_ixc.data.records import open_records
from mindformers_ixc.errors import CheckpointError, DataError, PromptError
from mindformers_ixc.files import (
    parse_json,
    read_json,
    read_metrics,
    read_text,
    text_lines,
    tidy,
    whole_file,
    whole_folder,
    write_whole,
)

IN_ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
                         max_examples=30, deadline=None)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@IN_ONE_FOLDER
@given(st.text(st.characters(codec="utf-8")) | st.binary(), st.none() | st.binary())
def test_content_arrives_as_it_is_over_an_older_one(tmp_path, content, older):
    target = tmp_path / "a.txt"
    target.unlink(missing_ok=True)
    if older is not None:
        target.write_bytes(older)
    write_whole(target, content)
    assert target.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert os.listdir(tmp_path) == ["a.txt"]


@IN_ONE_FOLDER
@given(st.integers(0, 20), st.booleans(), st.booleans())
def test_a_writer_that_raises_leaves_what_was_there(tmp_path, written, there, sync):
    target = tmp_path / "a.bin"
    target.unlink(missing_ok=True)
    if there:
        target.write_bytes(b"old")
    with pytest.raises(KeyError), whole_file(target, sync) as partial:
        if written:
            partial.write_bytes(b"x" * written)
        raise KeyError
    assert os.listdir(tmp_path) == (["a.bin"] if there else [])
    assert not there or target.read_bytes() == b"old"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_an_ordinary_open(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "plain").write_text("a")
        (tmp_path / "plain_folder").mkdir()
        write_whole(tmp_path / "whole", "a")
        with whole_folder(tmp_path / "whole_folder"):
            pass
    finally:
        os.umask(before)
    assert mode(tmp_path / "whole") == mode(tmp_path / "plain")
    assert mode(tmp_path / "whole_folder") == mode(tmp_path / "plain_folder")


@pytest.mark.parametrize("permissions", [0o600, 0o664, 0o755])
def test_an_older_file_keeps_its_permissions(tmp_path, permissions):
    target = tmp_path / "a"
    target.write_text("old")
    target.chmod(permissions)
    write_whole(target, "new")
    assert (target.read_text(), mode(target)) == ("new", permissions)


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other" / "a")
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "other" / "a").read_text() == "new"
    assert os.listdir(tmp_path / "other") == ["a"]


def test_the_unfinished_file_keeps_the_suffix_and_lies_beside(tmp_path):
    with whole_file(tmp_path / "a.safetensors") as partial:
        assert partial.suffix == ".safetensors" and partial.parent.samefile(tmp_path)
        partial.write_bytes(b"")


def test_a_folder_replaces_an_older_one(tmp_path):
    target = tmp_path / "new" / "model"
    for name in ("first", "second"):
        with whole_folder(target) as folder:
            (folder / name).write_text(name)
        assert os.listdir(target) == [name]
    with pytest.raises(KeyError), whole_folder(target) as folder:
        (folder / "third").write_text("")
        raise KeyError
    assert os.listdir(target) == ["second"]
    assert os.listdir(target.parent) == ["model"]


@pytest.mark.parametrize("what", ["whole_file", "whole_folder"])
def test_a_killed_writer_leaves_the_older_target(tmp_path, what):
    target = tmp_path / "a"
    write_whole(target, "old")
    code = f"""
        import os, signal
        from mindformers_ixc.files import {what}
        with {what}({str(target)!r}) as partial:
            (partial / "x" if partial.is_dir() else partial).write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)
        """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    assert all(name.startswith(".") for name in os.listdir(tmp_path) if name != "a")
    write_whole(target, "new")
    assert target.read_text() == "new"


def read_json_list(path, item):
    """Rows of a list as every reader of one has them."""
    records = open_records(path, item)
    return [records.read(index, place).row for index, place in records]


@pytest.mark.parametrize(("text", "words"), [("{", "is not valid JSON"), ("[]", "at least one pair, found no pairs"),
                                             ("{}", "a JSON list with at least one pair, found dict")])
def test_lists_that_are_none_are_refused(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=words):
        read_json_list(tmp_path / "a.json", "pair")
    with pytest.raises(FileNotFoundError, match=r"b\.json does not exist"):
        read_json_list(tmp_path / "b.json", "pair")


def test_lists_are_read(tmp_path):
    (tmp_path / "a.json").write_text('[1, "\u00e9"]', encoding="utf-8")
    assert read_json_list(tmp_path / "a.json", "pair") == [1, "\u00e9"]


@pytest.mark.parametrize(("content", "words"), [
    (b"ab\n\xca\xb2\xc3", r"byte 0xC3 at place 5 \(counted from 0\), in line 2"),
    (b"\xef\xbb\xbfab\xff", "byte 0xFF at place 5"),
    ("[1]".encode("utf-16"), "UTF-16 text"), ("[1]".encode("utf-32"), "UTF-32 text")])
def test_other_encodings_are_refused_with_their_place(tmp_path, content, words):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(PromptError, match=rf"a\.txt is .*{words}.*as UTF-8"):
        read_text(tmp_path / "a.txt", PromptError)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "a.json").write_bytes('\ufeff["\u00e9"]\r\n'.encode())
    assert read_text(tmp_path / "a.json") == '["\u00e9"]\r\n'
    assert read_json(tmp_path / "a.json") == ["\u00e9"]


@pytest.mark.parametrize(("text", "words"), [
    ("[" * 100_000, "nested too deeply"), ('{"a":' * 100_000, "nested too deeply"), ("9" * 5000, "not valid JSON"),
    ('["x", {"\\ud83d": 1}]', r"\\ud83d, half of a surrogate pair"), (b'"\xff"', "byte 0xFF at place 1"),
    ('[1,,2]', "line 1 column 4")])
def test_json_that_cannot_be_used_is_one_sentence(text, words):
    with pytest.raises(CheckpointError, match=rf"^x\.json .*{words}"):
        parse_json(text, "x.json", CheckpointError)


def test_a_whole_surrogate_pair_is_a_character():
    assert parse_json('"\\ud83d\\ude00"', "x.json") == "\U0001F600"


def test_lines_end_at_newlines_only():
    assert text_lines('{"a": "x\u2028y\x85"}\r\n\n \n2') == [(1, '{"a": "x\u2028y\x85"}\r'), (4, "2")]


def test_a_bad_line_of_metrics_loses_that_line(tmp_path):
    lines = [b'{"step": 1}', b'{"st', b"[3]", b"\xff", b'{"step": 5, "note": "\xe2\x80\xa8"}', b'{"step']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 5]


REPLACING = """
    import ctypes, os, signal, sys
    from mindformers_ixc import files
    at, swap = int(sys.argv[1]), sys.argv[2] == "True"
    calls = iter(range(1, 100))

    def dying(function):
        def call(*arguments, **options):
            if next(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call

    for name in ("mkdir", "rename", "replace", "rmdir", "unlink", "fsync"):
        setattr(os, name, dying(getattr(os, name)))
    files.exchange = dying(files.exchange) if swap else (lambda one, other: False)
    with files.whole_folder(sys.argv[3]) as folder:
        (folder / "a").write_text("new")
    """


@pytest.mark.parametrize("swap", [True, False])
def test_a_folder_is_there_wherever_its_replacing_is_killed(tmp_path, swap):
    target, states = tmp_path / "best", []
    for at in range(1, 30):
        with whole_folder(target) as folder:
            (folder / "a").write_text("old")
        result = subprocess.run([sys.executable, "-c", textwrap.dedent(REPLACING), str(at), str(swap), str(target)],
                                check=False)
        if not swap:        # without the exchange there is a moment in which only the aside is there
            tidy(tmp_path)
        states.append((target / "a").read_text())
        tidy(tmp_path)
        assert os.listdir(tmp_path) == ["best"] and os.listdir(target) == ["a"]
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL
    assert states == sorted(states, reverse=True)          # old, then new: never back, never neither
    assert states[0] == "old" and states[-1] == "new" and 6 < len(states) < 29


def test_what_is_asked_to_last_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace

    def noted(handle):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *names: (order.append("replace"), replace(*names)))
    write_whole(tmp_path / "a", "x", sync=True)
    assert order[0].endswith(".a") and order[1:] == ["replace", tmp_path.name]
    order.clear()
    with whole_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("x")
    assert order[0] == "weights" and order[1].endswith(".model") and order[2:] == ["replace", tmp_path.name]


def test_only_leftovers_of_this_naming_are_removed(tmp_path):
    kept = [".git", ".abc.model", ".0123456789ab", "model", ".0123456789AB.model", "x.0123456789ab.model"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".0123456789ab.metrics.jsonl").write_text("x")
    (tmp_path / ".0123456789ab.model").mkdir()
    (tmp_path / ".0123456789ab.before.model").mkdir()
    (tmp_path / ".0123456789ac.before.best").mkdir()
    (tmp_path / ".0123456789ac.before.best" / "a").write_text("only one left")
    assert len(tidy(tmp_path)) == 4
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "best"])
    assert (tmp_path / "best" / "a").read_text() == "only one left"


def test_an_exchange_that_fails_for_another_reason_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileNotFoundError):
        files.exchange(tmp_path / "a", tmp_path / "missing")
