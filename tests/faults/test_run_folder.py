"""The output folder of a run: two runs at once, another run's files, leftovers of killed runs, damaged checkpoints."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mindformers_ixc.cli.yaml_file import read_yaml
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.interruption import JOB
from mindformers_ixc.training import run_folder
from mindformers_ixc.training.resume import (
    CHOSEN,
    check_same_run,
    chosen_checkpoint,
    is_complete,
    mark_finished,
    note_checkpoint,
    read_record,
    record_run,
)
from mindformers_ixc.training.run_folder import LOCK_FILE, RECORD, claimed, locked

TINY = Path(__file__).parents[2] / "yaml_configs" / "ixc25_sft_tiny.yaml"
HOLD = """
    import fcntl, os, sys, time
    handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
    fcntl.lockf(handle, fcntl.LOCK_EX, 1, int(sys.argv[2]))
    os.pwrite(handle, sys.argv[3].encode(), 0)
    print("held", flush=True)
    time.sleep(600)
    """


def fields_of(folder, **more) -> dict:
    return {**read_yaml(TINY), "output_dir": str(folder), **more}


def save(folder: Path, step: int, rank: int = 0, noted: bool = True) -> Path:
    """A checkpoint of a rank, as the run's monitor leaves it."""
    path = folder / "checkpoint" / f"rank_{rank}" / f"t_rank_{rank}-1_{step}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"output.weight": np.arange(40, dtype=np.float32) + step, "step_num": np.array(step)}, path)
    if noted:
        note_checkpoint(path, path)
    return path


@pytest.fixture
def run(tmp_path):
    """Folder and fields of a run with checkpoints of the steps 2, 4 and 6."""
    folder = tmp_path / "out"
    folder.mkdir()
    record_run(fields_of(folder))
    for step in (2, 4, 6):
        save(folder, step)
    return folder, fields_of(folder, resume_training=True)


@pytest.fixture
def holder():
    """Starts processes that hold a byte of a lock file."""
    started = []

    def hold(folder: Path, byte: int = 0, record: str = ""):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(HOLD), str(folder / LOCK_FILE), str(byte),
                                    record], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_by_who_has_the_folder_and_let_in_when_that_one_is_dead(tmp_path, holder):
    record = json.dumps({"host": "server7", "pid": 4711, "since": "2026-01-02 03:04:05"})
    process = holder(tmp_path, record=record)
    words = f"{tmp_path} is in use by another run (process 4711 on server7, since 2026-01-02 03:04:05)"
    with pytest.raises(ConfigError, match=re.escape(words)), claimed(tmp_path, fields_of(tmp_path)):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with claimed(tmp_path, fields_of(tmp_path)):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    with claimed(tmp_path, fields_of(tmp_path)):      # it was let go of
        pass


def test_a_lock_without_a_readable_record_still_refuses(tmp_path, holder):
    holder(tmp_path, record="{")
    with pytest.raises(ConfigError, match="has not told its name"), locked(tmp_path):
        pass


def test_a_run_waits_for_the_ranks_of_a_killed_launch(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(run_folder, "ORPHANS_S", 0.3)
    process = holder(tmp_path, byte=2)
    words = re.escape(f"Ranks of an earlier run still work in {tmp_path}")
    with pytest.raises(ConfigError, match=words), locked(tmp_path):
        pass
    with locked(tmp_path, rank=0):       # another rank's byte is free
        pass
    with pytest.raises(ConfigError, match="Another rank 1 already works"), locked(tmp_path, rank=1):
        pass
    monkeypatch.setattr(run_folder, "ORPHANS_S", 300)
    process.kill()
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_said_and_lets_the_run_in(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "lockf", refuse)
    with locked(tmp_path):
        pass
    assert "without locks (No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize(("variables", "fields", "expected"), [
    ({}, {}, True), ({JOB: "x", "RANK_ID": "0"}, {"use_parallel": True}, False),
    ({"RANK_ID": "0", "MS_ROLE": "MS_WORKER"}, {"use_parallel": True}, True),
    ({"RANK_ID": "1", "MS_ROLE": "MS_WORKER"}, {"use_parallel": True}, False),
    ({"RANK_ID": "0", "MS_ROLE": "MS_SCHED"}, {"use_parallel": True}, False)])
def test_one_process_answers_for_the_folder(monkeypatch, variables, fields, expected):
    for name in (JOB, "RANK_ID", "MS_ROLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run_folder.answers(fields) is expected


@pytest.mark.parametrize("name", ["model", "best", "trained_parts", "model_ema", "metrics.jsonl", "checkpoint"])
def test_a_used_folder_is_refused_for_a_run_that_starts_anew(tmp_path, name):
    if name == "checkpoint":
        save(tmp_path, 3, noted=False)
    else:
        (tmp_path / name).mkdir()
    words = rf"already has {name} of an earlier run.*--resume_training True.*--overwrite"
    with pytest.raises(ConfigError, match=words), claimed(tmp_path, fields_of(tmp_path)):
        pass
    with claimed(tmp_path, fields_of(tmp_path, run_mode="predict")):
        pass


def test_a_run_that_ended_before_its_first_step_has_not_used_the_folder(tmp_path):
    (tmp_path / "log").mkdir()
    record_run(fields_of(tmp_path))
    with claimed(tmp_path, fields_of(tmp_path)):
        pass


def test_overwrite_moves_the_earlier_run_aside_and_says_where(run, capsys):
    folder, _ = run
    (folder / "log").mkdir()
    (folder / "notes.txt").write_text("mine")
    for number in (1, 2):
        with claimed(folder, fields_of(folder), overwrite=True):
            assert sorted(path.name for path in folder.iterdir()) == [
                "log", "notes.txt", *(f"old-{before}" for before in range(1, number + 1)), LOCK_FILE]
        assert f"moved to {folder / f'old-{number}'}" in capsys.readouterr().err
        assert (folder / f"old-{number}" / "checkpoint" / "rank_0" / "t_rank_0-1_6.safetensors").is_file()
        save(folder, 6)
    assert (folder / "old-1" / RECORD).is_file()


@pytest.mark.parametrize("start", ["model", "checkpoint/rank_0/t_rank_0-1_6.safetensors"])
def test_overwrite_does_not_move_what_the_run_starts_from(run, start):
    folder, _ = run
    (folder / "model").mkdir()
    with pytest.raises(ConfigError, match="aside, which this run starts from"), \
            claimed(folder, fields_of(folder, load_checkpoint=str(folder / start)), overwrite=True):
        pass
    assert (folder / start).exists()


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(run, capsys):
    folder, fields = run
    ranks = folder / "checkpoint" / "rank_0"
    kept = {path.relative_to(folder) for path in folder.rglob("*")}
    (folder / ".0123456789ab.model").mkdir()
    (folder / ".0123456789ab.model" / "model.safetensors").write_text("half")
    (folder / ".0123456789ab.evaluations.jsonl").write_text("half")
    for name in ("unfinished_t_rank_0-1_8.safetensors", "unfinished_t_rank_0-1_8.tmp", "tmpab12_x9z"):
        (ranks / name).write_text("half")
    for name in ("tmpnotes.txt", "mine.safetensors"):
        (ranks / name).write_text("x")
        kept.add((ranks / name).relative_to(folder))
    with claimed(folder, fields):
        assert {path.relative_to(folder) for path in folder.rglob("*")} == {*kept, Path(LOCK_FILE)}
    assert "5 unfinished files or folders" in capsys.readouterr().err


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path):
    path.write_bytes(b"")


def flip_header(path):
    content = bytearray(path.read_bytes())
    content[12] ^= 0xFF
    path.write_bytes(content)


def flip_weight(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, empty, flip_header, flip_weight])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_taken(run, capsys, harm):
    folder, fields = run
    newest = folder / "checkpoint" / "rank_0" / "t_rank_0-1_6.safetensors"
    harm(newest)
    source, files = chosen_checkpoint(fields)
    assert (source, [path.name for path in files]) == (folder, ["t_rank_0-1_4.safetensors"])
    said = capsys.readouterr().err
    assert "left out, since it is damaged" in said and str(newest) in said
    assert newest.exists()
    harm(folder / "checkpoint" / "rank_0" / "t_rank_0-1_4.safetensors")
    assert chosen_checkpoint(fields)[1][0].name == "t_rank_0-1_2.safetensors"
    harm(folder / "checkpoint" / "rank_0" / "t_rank_0-1_2.safetensors")
    with pytest.raises(ConfigError, match=r"every checkpoint in .* is damaged"):
        chosen_checkpoint(fields)


def test_damaged_digests_are_said_and_do_not_lose_the_checkpoints(run, capsys):
    folder, fields = run
    digests = folder / "checkpoint" / "rank_0" / "digests.json"
    truncate(digests)
    assert chosen_checkpoint(fields)[1][0].name == "t_rank_0-1_6.safetensors"
    assert str(digests) in capsys.readouterr().err
    save(folder, 8)
    assert chosen_checkpoint(fields)[1][0].name == "t_rank_0-1_8.safetensors"
    assert not capsys.readouterr().err.count("taken as they are")


def test_a_checkpoint_that_is_named_is_the_one_that_is_taken(run):
    folder, fields = run
    path = folder / "checkpoint" / "rank_0" / "t_rank_0-1_4.safetensors"
    fields["load_checkpoint"] = str(path)
    assert chosen_checkpoint(fields)[1] == [path]
    flip_weight(path)
    with pytest.raises(ConfigError, match="is damaged"):
        chosen_checkpoint(fields)


def parallel(folder: Path) -> dict:
    return fields_of(folder, use_parallel=True, parallel_config={"model_parallel": 2}, resume_training=True)


def test_of_a_parallel_run_the_newest_step_is_taken_that_every_rank_has_undamaged(tmp_path, capsys, monkeypatch):
    fields = parallel(tmp_path)
    record_run({**fields, "resume_training": False})
    for rank, steps in ((0, (2, 4, 6, 8)), (1, (2, 4, 6))):
        for step in steps:
            save(tmp_path, step, rank)
    assert [path.name for path in chosen_checkpoint(fields)[1]] == ["t_rank_0-1_6.safetensors",
                                                                    "t_rank_1-1_6.safetensors"]
    assert not capsys.readouterr().err
    flip_weight(tmp_path / "checkpoint" / "rank_1" / "t_rank_1-1_6.safetensors")
    names = ["t_rank_0-1_4.safetensors", "t_rank_1-1_4.safetensors"]
    assert [path.name for path in chosen_checkpoint(fields)[1]] == names
    assert "t_rank_1-1_6" in capsys.readouterr().err
    # what the launcher has found its ranks take, without reading all of it again
    monkeypatch.setenv(CHOSEN, "1_2")
    assert [path.name for path in chosen_checkpoint(fields)[1]] == ["t_rank_0-1_2.safetensors",
                                                                    "t_rank_1-1_2.safetensors"]


def test_a_run_that_became_parallel_in_its_folder_goes_on_from_the_one_file_it_has(run):
    folder, _ = run
    record_run(parallel(folder))
    assert [path.name for path in chosen_checkpoint(parallel(folder))[1]] == ["t_rank_0-1_6.safetensors"]
    for rank in (0, 1):
        save(folder, 8, rank)
    assert len(chosen_checkpoint(parallel(folder))[1]) == 2


def test_ranks_without_a_common_step_are_said(tmp_path):
    fields = parallel(tmp_path)
    record_run({**fields, "resume_training": False})
    save(tmp_path, 2, 0)
    with pytest.raises(ConfigError, match="no step in common"):
        chosen_checkpoint(fields)


def test_a_run_keeps_its_name_when_it_is_resumed_also_elsewhere(run, tmp_path):
    folder, fields = run
    name = read_record(folder / RECORD)["run"]
    record_run(fields)
    assert read_record(folder / RECORD)["run"] == name
    elsewhere = fields_of(tmp_path / "other", resume_training=True, load_checkpoint=str(folder))
    (tmp_path / "other").mkdir()
    record_run(elsewhere)
    assert read_record(tmp_path / "other" / RECORD)["run"] == name
    save(tmp_path / "other", 8)                       # the same command again goes on from there
    assert chosen_checkpoint(elsewhere)[0] == tmp_path / "other"
    record_run(fields_of(folder))
    assert read_record(folder / RECORD)["run"] != name


def test_every_start_of_a_run_is_written_down_with_its_command(run):
    folder, fields = run
    before = read_record(folder / RECORD)["starts"]
    record_run(fields, "mindformers run --config 'my file.yaml' --resume_training True")
    starts = read_record(folder / RECORD)["starts"]
    assert starts[:-1] == before and len(before) == 1
    assert starts[-1]["command"] == "mindformers run --config 'my file.yaml' --resume_training True"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", starts[-1]["time"])
    mark_finished(folder, ["model"])
    check_same_run(fields, folder / RECORD)      # none of this is configuration
    assert read_record(folder / RECORD)["ended"] >= starts[-1]["time"]


def test_checkpoints_of_another_run_are_refused(run, tmp_path):
    folder, fields = run
    record = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**record, "run": "feed"}))
    with pytest.raises(ConfigError, match=f"is of run {record['run']}, but {RECORD} speaks of run feed"):
        chosen_checkpoint(fields)
    other = tmp_path / "other"
    other.mkdir()
    record_run(fields_of(other))
    save(other, 2)
    with pytest.raises(ConfigError, match="already has checkpoints of another run"):
        chosen_checkpoint({**fields, "output_dir": str(other), "load_checkpoint": str(folder)})


@pytest.mark.parametrize(("content", "words"), [
    (b"", "is not valid JSON"), (b'{"layout": [1', "is not valid JSON"), (b"[1]", "is not what a run writes down"),
    (b"{}", "is not what a run writes down"), (b'{"layout": [1, "2"]}', "is not what a run"),
    (b"\xff{}", "is not UTF-8"), (b"[" * 100_000, "nested too deeply")])
def test_a_damaged_record_is_named(run, content, words):
    folder, fields = run
    (folder / RECORD).write_bytes(content)
    for read in (chosen_checkpoint, record_run, is_complete):
        with pytest.raises(ConfigError) as error:
            read(fields)
        assert str(folder / RECORD) in str(error.value)
        assert words in str(error.value) and "restore it from a copy" in str(error.value)


def test_a_run_is_complete_when_all_it_left_is_there(run):
    folder, fields = run
    assert not is_complete(fields)
    for name in ("model", "best"):
        (folder / name).mkdir()
    mark_finished(folder, ["model", "best"])
    assert is_complete(fields)
    assert not is_complete(fields_of(folder))
    (folder / "best").rmdir()
    assert not is_complete(fields)
