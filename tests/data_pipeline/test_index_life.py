"""The life of what is kept: made by one, whole whatever happens, removed when it is outdated and nobody uses it."""
from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import io
import json
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from test_index import builds, columns, measures, write

from mindformers_ixc import terminal
from mindformers_ixc.data.conversations import ReadingOptions
from mindformers_ixc.data.fitting import Shapes
from mindformers_ixc.data.index import building, cleaning, folders, holding, telling
from mindformers_ixc.data.index.building import open_index
from mindformers_ixc.data.index.cleaning import clean, entries
from mindformers_ixc.data.index.holding import Held, is_held, remove, sweep, tried
from mindformers_ixc.data.index.plans import saved
from mindformers_ixc.data.index.samples import make_samples
from mindformers_ixc.data.index.sources import open_sources
from mindformers_ixc.data.index.store import DESCRIPTION, VERSION
from mindformers_ixc.data.sampling import plan_batches
from mindformers_ixc.errors import ConfigError

SHAPES = Shapes(10_000, 99, 4)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "index"


def run(path, root, shapes=SHAPES, **section):
    """Samples and plan of a run; those of earlier ones that nobody has any more are given back."""
    gc.collect()
    samples = make_samples(open_sources({"dataset_dir": str(path)}, 0, measures(**section), root), shapes, 0.01, root)
    count = len(samples)
    plan = saved(lambda rows: plan_batches(lambda size, epoch: np.arange(count).reshape(-1, size), rows), root,
                 samples.folder.name)(2)
    return samples, plan


def changed(path):
    """Writes a source anew, with other content."""
    rows = json.loads(path.read_text())
    rows[0]["conversations"][0]["value"] += " really?"
    path.write_text(json.dumps(rows))


def files_of(root):
    """Everything in a folder that is no index, set of samples or plan."""
    known = {"used", "index.json", "plan.json", "samples.json", "made_of.json", "seal.json"}
    return sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()
                  and file.name not in known and not file.name.endswith((".npy", "-seal.json")))


# what is held

def test_a_folder_that_is_used_is_not_removed(tmp_path):
    folder = tmp_path / ("a" * 24)
    folder.mkdir()
    first, second = Held(folder), pickle.loads(pickle.dumps(Held(folder)))
    assert is_held(folder) and not remove(folder)
    del first
    assert is_held(folder) and not remove(folder)
    del second
    assert not is_held(folder) and remove(folder)
    assert not list(tmp_path.iterdir())
    assert remove(folder)                                   # another process was faster
    with pytest.raises(FileNotFoundError):
        Held(folder)


def test_another_process_holds_until_it_ends_however_that_is(tmp_path):
    folder = tmp_path / ("a" * 24)
    folder.mkdir()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        held = Held(folder)
        os.write(writing, b"x")
        time.sleep(600)
        os._exit(bool(held))
    assert os.read(reading, 1) == b"x"
    assert not remove(folder)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert remove(folder)


def test_a_lock_whose_file_was_removed_is_taken_anew(tmp_path, monkeypatch):
    path, seen = tmp_path / ("a" * 24 + ".lock"), []
    real = holding._is_at

    def removed_once(handle, name):
        if not seen:
            os.unlink(name)                                 # as by one that had it between the two
        seen.append(real(handle, name))
        return seen[-1]

    monkeypatch.setattr(holding, "_is_at", removed_once)
    with holding.locked(path, "") as alone, tried(path) as also:
        assert (alone, also) == (True, False)
    assert seen[:2] == [False, True]
    assert not list(tmp_path.iterdir())


def test_nothing_but_what_is_kept_is_left(tmp_path, root):
    path = write(tmp_path)
    run(path, root)[1].epoch(1)
    assert files_of(root) == []


def test_a_file_system_without_locks_serves_too(tmp_path, root, monkeypatch, caplog):
    def none(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(holding, "_told", [])
    path = write(tmp_path)
    monkeypatch.setattr(fcntl, "flock", none)
    with caplog.at_level(logging.WARNING):
        samples, plan = run(path, root)
    assert len(samples) == 40 and plan.epoch_rows == 40
    assert [record.message for record in caplog.records if "has no locks" in record.message] == [caplog.messages[0]]
    samples, plan = run(path, root)
    assert clean(root, everything=True)[0] == []            # whether somebody uses it cannot be known
    assert run(path, root)[1].epoch_rows == 40
    assert files_of(root) == []


# what is outdated

def test_what_belongs_to_a_source_as_it_was_goes_when_it_is_measured_anew(tmp_path, root):
    path, other = write(tmp_path), write(tmp_path, 12, "other.json")
    for source in (path, other):
        run(source, root)
    run(path, root, hd_num=2)
    assert len(entries(root)) == 9
    changed(path)
    assert sorted(entry.outdated for entry in entries(root) if entry.outdated) == [
        "no current index"] * 2 + ["no current samples"] * 2 + ["source has changed"] * 2
    run(path, root)
    left = entries(root)
    assert sorted((entry.kind, Path(entry.source).name, entry.samples) for entry in left) == sorted(
        (kind, name, count) for kind in ("index", "samples", "rows") for name, count in (("data.json", 40),
                                                                                        ("other.json", 12)))
    assert not any(entry.outdated for entry in left)


def test_what_a_running_process_uses_stays_until_it_ends(tmp_path, root):
    path = write(tmp_path)
    samples, plan = run(path, root)
    changed(path)
    again, _ = run(path, root)
    assert samples.folder.exists() and plan.folder.exists() and samples.sources[0].index.folder.exists()
    assert plan.batch(12)                                   # rows of another epoch are still written
    folder = samples.folder
    del samples, plan
    gc.collect()
    removed, kept = clean(root)
    assert sorted(entry.kind for entry in removed) == ["index", "rows", "samples"] and not kept
    assert not folder.exists() and again.folder.exists()


def test_an_index_in_use_may_be_built_anew_beside(tmp_path, root):
    """A picture was replaced: the new index has the name of the old one."""
    path = write(tmp_path)
    old = open_index(path, ReadingOptions(), measures(), root)
    os.utime(tmp_path / "1.png", ns=(1, 1))
    new = open_index(path, ReadingOptions(), measures(), root)
    assert old.folder == new.folder
    aside, = new.folder.parent.glob(".*.removed.*")
    sweep(new.folder.parent)
    assert aside.exists()
    assert old.needs.tolist() == new.needs.tolist()
    del old
    sweep(new.folder.parent)
    assert not aside.exists() and new.folder.exists()


def interrupted(path, root, monkeypatch, **section):
    """Leaves an index of which one part is measured."""
    with monkeypatch.context() as patch:
        patch.setattr(building, "PART", 10)
        save, measured = building.save_part, []

        def stops(place, part):
            if measured:
                raise KeyboardInterrupt
            measured.append(place)
            save(place, part)

        patch.setattr(building, "save_part", stops)
        with pytest.raises(KeyboardInterrupt):
            open_index(path, ReadingOptions(), measures(**section), root)


def test_what_was_wrong_is_measured_again_when_an_interrupted_build_goes_on(tmp_path, root, monkeypatch):
    path = write(tmp_path)
    picture = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").unlink()
    interrupted(path, root, monkeypatch)
    (tmp_path / "1.png").write_bytes(picture)
    assert not open_index(path, ReadingOptions(), measures(), root, bad_share=1.0).description.errors


def test_an_unfinished_index_of_a_source_as_it_was_goes(tmp_path, root, monkeypatch):
    path = write(tmp_path)
    interrupted(path, root, monkeypatch)
    changed(path)
    interrupted(path, root, monkeypatch, hd_num=2)
    assert sorted(entry.outdated for entry in entries(root)) == ["", "source has changed"]
    open_index(path, ReadingOptions(), measures(), root)
    assert sorted((entry.kind, entry.outdated) for entry in entries(root)) == [("index", ""), ("unfinished", "")]
    assert not clean(root)[0]                               # it may be gone on with
    assert len(clean(root, everything=True)[0]) == 2
    assert not list(root.rglob("*.json"))


def test_an_index_that_lists_wrong_samples_is_kept(tmp_path, root):
    path = write(tmp_path)
    (tmp_path / "1.png").unlink()
    assert open_index(path, ReadingOptions(), measures(), root, bad_share=1.0).description.errors
    assert [entry.outdated for entry in entries(root)] == [""]
    assert not clean(root)[0]


def test_foreign_folders_are_left_alone(tmp_path, root):
    """The folder of indices may be one of data."""
    path = write(tmp_path)
    run(path, root)
    gc.collect()
    for name in ("samples/mine", "plans/mine", "pictures", f"pictures-{'a' * 24}/mine"):
        (root / name).mkdir(parents=True)
        (root / name / "file.npy").touch()
    clean(root, everything=True)
    assert len(list(root.rglob("file.npy"))) == 4
    assert not list(root.rglob("*.json"))


def test_a_damaged_index_is_outdated_and_one_of_another_version(tmp_path, root):
    path = write(tmp_path)
    folder = open_index(path, ReadingOptions(), measures(), root).folder
    whole = (folder / DESCRIPTION).read_text()
    other = whole.replace(f'"version": {VERSION}', '"version": 1')
    for content, outdated in ((other, "of another version"), ("{", "damaged")):
        (folder / DESCRIPTION).write_text(content)
        assert [entry.outdated for entry in entries(root)] == [outdated]
    assert len(clean(root)[0]) == 1
    assert not folder.exists()
    path.unlink()
    assert entries(root) == []


# what is too much

def test_what_was_not_used_for_the_longest_time_makes_room(tmp_path, root, monkeypatch):
    path = write(tmp_path)
    ages = {}
    for age, length in ((300, 900), (200, 800), (100, 700)):
        samples, plan = run(path, root, Shapes(length, 99, 4))
        ages[length] = samples.folder, plan.folder
        del samples, plan
        gc.collect()
        for folder in ages[length]:
            os.utime(folder / holding.USED, (time.time() - age,) * 2)
    held, _ = run(path, root, Shapes(900, 99, 4))           # the oldest one is used again
    sizes = sum(entry.size for entry in entries(root) if entry.kind in ("samples", "rows"))
    one = sum(cleaning._size(folder) for folder in ages[800])
    monkeypatch.setenv(cleaning.BOUND_VARIABLE, str((sizes - one) / 1e9))
    cleaning.make_room(root)
    assert [folder.exists() for folder in ages[800]] == [False, False]
    assert all(folder.exists() for length in (900, 700) for folder in ages[length])
    monkeypatch.setenv(cleaning.BOUND_VARIABLE, "0")
    run(path, root, Shapes(600, 99, 4))
    assert held.folder.exists() and not any(folder.exists() for folder in ages[700])
    assert len(held) == 40


@pytest.mark.parametrize("given", ["much", "-1", "nan"])
def test_a_bound_is_a_number(monkeypatch, given):
    monkeypatch.setenv(cleaning.BOUND_VARIABLE, given)
    with pytest.raises(ConfigError, match=r"MINDFORMERS_IXC_INDEX_GB is .*; it must be a number of gigabytes"):
        cleaning.bound()


# whatever happens while it is built

# Of `os`: what changes the file system, besides what is written into open files.
STEPS = ("replace", "rename", "unlink", "rmdir", "mkdir", "ftruncate")


def counted(function, left):
    def call(*words, **options):
        if not left[0]:
            os._exit(77)
        left[0] -= 1
        return function(*words, **options)

    return call


def dies_at(number, work):
    """Runs something in a process that is gone, as by SIGKILL, before its `number`-th change of the file system."""
    child = os.fork()
    if not child:
        left = [number]
        for name in STEPS:
            setattr(os, name, counted(getattr(os, name), left))
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_process_that_is_killed_at_any_step_leaves_nothing_half(tmp_path, monkeypatch):
    path = write(tmp_path, 20)
    monkeypatch.setattr(building, "PART", 10)
    monkeypatch.setattr(os, "fsync", lambda handle: None)       # no power cut is tried, and it takes its time
    whole = columns(open_index(path, ReadingOptions(), measures(), tmp_path / "whole"))
    samples, plan = run(path, tmp_path / "whole")
    fitting, rows = np.array(samples.needs), [plan.batch(step) for step in range(3)]
    how, steps = measures(), 0
    monkeypatch.setattr(sys.modules[__name__], "measures", lambda **section: how)
    while True:
        root = tmp_path / f"index{steps}"
        code = dies_at(steps, lambda: run(path, root))      # noqa: B023 - it is called at once
        if not code:
            break
        assert code == 77
        samples, plan = run(path, root)
        for name, column in columns(samples.sources[0].index).items():
            np.testing.assert_array_equal(column, whole[name])
        np.testing.assert_array_equal(samples.needs, fitting)
        assert [plan.batch(step) for step in range(3)] == rows
        assert {entry.kind: entry.outdated for entry in entries(root)} == {"index": "", "samples": "", "rows": ""}
        clean(root)                                         # of a lock that nobody holds
        assert files_of(root) == []
        steps += 1
    assert steps > 25


def runs(process: psutil.Process) -> bool:
    """Whether a process works still; who ended it may not have collected it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


PROGRAM = """
import sys, time
sys.path[:0] = [{tests!r}]
import test_index as t
from mindformers_ixc.data.index import building
building.FEW, building.PART = 0, 5
t.open_index(sys.argv[1], t.ReadingOptions(), t.measures(), sys.argv[2])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_build_by_several_processes_ends_with_the_one_that_began_it(tmp_path, root, monkeypatch, number):
    path = write(tmp_path, 60)
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(
        "import time\nif 'mindformers_ixc.data.index.worker' in open('/proc/self/cmdline').read():\n"
        "    import mindformers_ixc.data.index.building as b\n    save = b.save_part\n    b.PART = 5\n"
        "    saved = []\n    def slow(*words):\n        time.sleep(600 * len(saved))\n"     # each saves one part
        "        saved.append(save(*words))\n    b.save_part = slow\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "slow"), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM.format(tests=os.path.dirname(__file__)), str(path),
                                str(root)], env=environment, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while not list(root.rglob("*.npz")) and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, number)
    said = process.communicate()[1]
    assert process.returncode != 0, said
    assert ("what was measured is kept" in said) == (number == signal.SIGINT)
    while any(map(runs, workers)):                                      # they end with it
        assert time.monotonic() < limit
        time.sleep(0.02)
    measured = {file.name for file in root.rglob("*.npz")}
    assert 0 < len(measured) < 12
    monkeypatch.setattr(building, "PART", 5)
    again, save = [], building.save_part
    monkeypatch.setattr(building, "save_part", lambda place, part: (again.append(place.name), save(place, part)))
    found = columns(open_index(path, ReadingOptions(), measures(), root))
    assert not measured.intersection(again)
    for name, column in columns(open_index(path, ReadingOptions(), measures(), tmp_path / "whole")).items():
        np.testing.assert_array_equal(column, found[name])
    assert files_of(root) == []


@pytest.mark.parametrize("place", ["save_part", "write_index", "put_in_place"])
def test_a_full_disk_is_a_sentence_and_what_was_measured_is_kept(tmp_path, root, monkeypatch, place):
    path, seen = write(tmp_path), builds(monkeypatch)
    with monkeypatch.context() as patch:
        def full(*words):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(building, place, full)
        with pytest.raises(OSError, match=r"cannot be written in .*index \(No space left.*--clean.*index_dir"):
            open_index(path, ReadingOptions(), measures(), root)
    index = open_index(path, ReadingOptions(), measures(), root)
    assert len(index) == 40 and len(seen) == 2
    assert files_of(root) == []


def test_a_full_disk_of_another_process_is_the_same_sentence(tmp_path, root, monkeypatch):
    path = write(tmp_path, 20)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "sitecustomize.py").write_text(
        "if 'mindformers_ixc.data.index.worker' in open('/proc/self/cmdline').read():\n"
        "    import resource\n    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n")
    monkeypatch.syspath_prepend(str(tmp_path / "full"))
    monkeypatch.setattr(building, "FEW", 0)
    with pytest.raises(OSError, match=r"cannot be written in .*index \(File too large.*was measured is kept"):
        open_index(path, ReadingOptions(), measures(), root)


def test_parts_of_another_time_are_measured_anew(tmp_path, root, monkeypatch):
    path = write(tmp_path)
    interrupted(path, root, monkeypatch)
    part, = root.rglob("*.npz")
    whole = part.read_bytes()
    monkeypatch.setattr(building, "PART", 10)
    for content in (whole, whole[:-50], b""):               # a picture was replaced; a power cut
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.utime(tmp_path / "1.png", ns=(1, len(content)))
        index = open_index(path, ReadingOptions(), measures(), root)
        assert [str(tmp_path / "1.png"), (tmp_path / "1.png").stat().st_size, len(content)] in index.description.files


def test_a_log_says_how_far_it_is(tmp_path, root, monkeypatch, capfd):
    path = write(tmp_path)
    interrupted(path, root, monkeypatch)
    for name, value in (("FEW", 40), ("PART", 10)):
        monkeypatch.setattr(building, name, value)
    monkeypatch.setattr(telling, "LINE_EVERY_S", 0)
    capfd.readouterr()
    open_index(path, ReadingOptions(), measures(), root)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == "Indexing data.json, 40 samples, of which 10 are measured already ..."
    told = [line.split(" of 40 samples")[0] for line in lines[1:3]]
    assert told == [f"Indexing data.json: {done}" for done in (20, 30)]
    assert lines[1].endswith(" left") and re.match(r"Indexed data\.json: 40 samples, in \d+ s, ", lines[3])
    open_index(path, ReadingOptions(), measures(), root)
    assert not capfd.readouterr().err


# where it lies

def test_a_folder_that_cannot_be_used_is_one_sentence(tmp_path, monkeypatch):
    path = write(tmp_path)
    with pytest.raises(OSError, match=r"^train_dataset\.data_loader\.index_dir .* cannot be used: .* is no folder"):
        open_index(path, ReadingOptions(), measures(), path)
    monkeypatch.setenv("MINDFORMERS_IXC_INDEX", str(path / "inside"))
    with pytest.raises(OSError, match=r"^MINDFORMERS_IXC_INDEX .*inside cannot be used: .*data\.json is no folder"):
        open_index(path, ReadingOptions(), measures())


def test_an_index_that_can_only_be_read_serves(tmp_path, root, monkeypatch):
    path = write(tmp_path)
    open_index(path, ReadingOptions(), measures(), root)
    before = sorted(root.rglob("*"))
    check = folders.check_folder

    def read_only(folder, name):
        if folder == root:
            raise OSError(f"{name} {folder} cannot be used: nothing can be written")
        check(folder, name)

    monkeypatch.setattr(folders, "check_folder", read_only)
    monkeypatch.delenv("MINDFORMERS_IXC_INDEX")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    samples = make_samples(open_sources({"dataset_dir": str(path)}, 0, measures(), root), SHAPES, 0.01, root)
    assert len(samples) == 40 and samples.folder.is_relative_to(tmp_path / "cache")
    assert sorted(root.rglob("*")) == before
    with pytest.raises(OSError, match=r"index_dir .*index cannot be used"):
        open_index(path, ReadingOptions(), measures(hd_num=2), root)


def test_a_home_that_cannot_be_written_is_told_once(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("MINDFORMERS_IXC_INDEX")
    (tmp_path / "home").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        places = {folders.index_folder() for _ in range(3)}
    assert places == {tmp_path / f"mindformers_ixc_{os.getuid()}" / "index"}
    assert len(caplog.messages) == 1 and "Nothing can be written in the user's cache" in caplog.messages[0]


def test_the_process_that_is_waited_for_is_named(tmp_path, monkeypatch):
    path, said = tmp_path / ("a" * 24 + ".lock"), io.StringIO()
    monkeypatch.setattr(terminal, "PATIENCE_S", 0)
    reading, writing = os.pipe()
    held, go = os.pipe()
    child = os.fork()
    if not child:
        os.close(go)
        with holding.locked(path, ""):
            os.write(writing, b"x")
            os.read(held, 1)
        os._exit(0)
    os.read(reading, 1)
    monkeypatch.setattr(terminal, "current", terminal.Terminal(said, interactive=False))

    def let_go():
        limit = time.monotonic() + 60
        while "waiting" not in said.getvalue() and time.monotonic() < limit:
            time.sleep(0.01)
        os.close(go)

    thread = threading.Thread(target=let_go)
    thread.start()
    with holding.locked(path, "waiting for the index of {0}.json, which {who} builds"):
        assert os.waitpid(child, 0)[1] == 0
    thread.join()
    assert f"waiting for the index of {{0}}.json, which process {child} on " in said.getvalue()
