"""Files that do not answer: what is waited for is said once, and after a limit a sentence ends the process."""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from mindformers_ixc import reading as module
from mindformers_ixc.data.conversations import ReadingOptions
from mindformers_ixc.data.index import building
from mindformers_ixc.data.index.building import open_index
from mindformers_ixc.data.index.sources import measures_of
from mindformers_ixc.data.rows import SectionOptions, make_processor, own_tokenizer
from mindformers_ixc.errors import DataError, ImageError
from mindformers_ixc.processing import pictures
from mindformers_ixc.processing.pictures import load_image
from mindformers_ixc.reading import LIMIT, Watch, read_on, reading, watch_reads

SECTION = {"tokenizer": {"type": "InternLM2Tokenizer", "vocab_file": "pkg:mindformers_ixc/demo/tokenizer.model"},
           "hd_num": 4, "image_size": 56}

# Read by Python at its start: what is a FIFO passes for a regular file, as a file of a file system that is gone does.
PRETENCE = """
import os, pathlib
pathlib.Path.is_file = lambda self: self.exists() and not self.is_dir()
os.path.isfile = lambda name: os.path.exists(name) and not os.path.isdir(name)
"""


@pytest.fixture()
def said(monkeypatch):
    """What a watch with a limit of 100 s says and ends with; no thread looks."""
    sentences: dict[str, list[str]] = {"said": [], "ended": []}
    monkeypatch.setattr(module, "current", Watch(100, sentences["said"].append, sentences["ended"].append))
    monkeypatch.setattr(module.current, "start", lambda: None)
    return sentences


def test_what_is_waited_for_is_said_once_and_ends_at_the_limit(said):
    with reading(Path("slow.jpg")):
        module.current.look(9)
        assert not said["said"]
        module.current.look(2)
        module.current.look(2)
        module.current.look(80)
        assert said["said"] == ["Waiting for slow.jpg, which has not been read for 11 s; after 100 s "
                                "(train_dataset.data_loader.read_timeout) that ends this process."]
        assert not said["ended"]
        module.current.look(7)
    [sentence] = said["ended"]
    assert sentence.startswith("slow.jpg has not been read within 100 s, the limit train_dataset.data_loader.read_")
    assert "mount it anew or raise the limit, and start again" in sentence
    module.current.look(1000)
    assert len(said["ended"]) == 1


def test_long_limits_are_told_of_after_a_minute(said):
    module.current.limit = 6000
    with reading("a"):
        module.current.look(59)
        assert not said["said"]
        module.current.look(1)
        assert said["said"]


def test_reads_that_come_back_have_all_the_time_again(said):
    with reading("source"):
        for _ in range(5):
            module.current.look(90)
            with reading("picture"):
                module.current.look(90)
        assert not said["ended"]
        module.current.look(100)
    assert [sentence.split()[0] for sentence in said["ended"]] == ["source"]
    assert said["said"][:2] == [sentence for sentence in said["said"] if "source" in sentence][:1] + \
        [sentence for sentence in said["said"] if "picture" in sentence][:1]
    for _ in read_on("lines", range(5)):
        module.current.look(1000)           # what is done between two reads is no read
    assert len(said["ended"]) == 1 and not module.current.running


def test_every_thread_has_its_own_read(said):
    begun, done = threading.Barrier(3), threading.Event()

    def read(name):
        with reading(name):
            begun.wait()
            done.wait()

    threads = [threading.Thread(target=read, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    begun.wait()
    module.current.look(100)
    done.set()
    for thread in threads:
        thread.join()
    assert sorted(sentence.split()[0] for sentence in said["ended"]) == ["one", "two"]


def test_nothing_is_watched_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(module, "current", Watch())
    with reading("a"):
        assert not module.current.running and module.current.thread is None
    monkeypatch.setattr(module.Watch, "start", lambda self: None)
    watch_reads(None)
    assert module.current.limit == LIMIT
    watch_reads(2.5)
    assert module.current.limit == 2.5


def test_a_forked_process_begins_anew():
    with reading("a"):
        current, before = module.current, module.current.limit
        current.limit = 1000
        try:
            with reading("b"):
                child = os.fork()
                if not child:
                    os._exit(int(bool(current.running) or current.thread is not None))
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
                assert current.running and current.thread.is_alive()
        finally:
            current.limit = before


# A worker waits for a file, and the process that forked it for the worker.
WAITING = """
import ctypes, os, time
from mindformers_ixc import reading
from mindformers_ixc.reading import watch_reads
reading.GRACE = {grace}
watch_reads(0.4)
if not os.fork():
    with reading.reading("dead.png"):
        time.sleep(600)
{waiting}
"""


@pytest.mark.parametrize(("waiting", "grace", "code"), [
    ("time.sleep(600)", 60, 1), ("ctypes.PyDLL(None).sleep(600)", 1, -signal.SIGKILL)],
    ids=["without the lock", "with it"])
def test_with_a_worker_ends_who_waits_for_it(waiting, grace, code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run([sys.executable, "-c", WAITING.format(waiting=waiting, grace=grace)], env=environment,
                           text=True, stderr=subprocess.PIPE, timeout=120, check=False)
    assert ended.returncode == code
    assert ended.stderr.count("error: dead.png has not been read within 0.4 s") == 1


def test_a_picture_that_never_comes_is_named_by_the_thread_that_looks(tmp_path, monkeypatch):
    fifo = tmp_path / "a.png"
    os.mkfifo(fifo)
    sentences, ended = [], threading.Event()

    def end(sentence):
        sentences.append(sentence)
        ended.set()

    def read():
        with pytest.raises(ImageError):       # of the empty file that comes in the end
            load_image(fifo)

    monkeypatch.setattr(module, "current", Watch(0.2, sentences.append, end))
    monkeypatch.setattr(os.path, "isfile", lambda path: True)
    monkeypatch.setattr(pictures.Image, "open", lambda file, formats: Path(file).read_bytes())
    reader = threading.Thread(target=read)
    reader.start()
    assert ended.wait(60)
    fifo.open("wb").close()          # lets the reader go
    reader.join()
    module.current.limit = 0
    assert [sentence.split(",")[0] for sentence in sentences[:2]] == [
        f"Waiting for {fifo}", f"{fifo} has not been read within 0.2 s"]


@pytest.fixture()
def dead(tmp_path, monkeypatch):
    """Conversations with a picture that never comes, and a folder whose Python takes it for a regular file."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(PRETENCE)
    os.mkfifo(tmp_path / "dead.png")
    Image.new("RGB", (50, 40)).save(tmp_path / "good.png")
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a square"}]
    rows = [{"id": number, "image": "dead.png" if number == 5 else "good.png", "conversations": turns}
            for number in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    monkeypatch.setenv("MINDFORMERS_IXC_INDEX", str(tmp_path / "index"))
    return tmp_path


@pytest.mark.parametrize("kind", ["index", "check"])
def test_the_command_ends_with_the_sentence(dead, kind):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(dead / "site"), *filter(None, sys.path)])}
    ended = subprocess.run([sys.executable, "-m", "mindformers_ixc", "data", kind, "data.json",
                            "--train_dataset.data_loader.read_timeout", "1"], cwd=dead, env=environment, text=True,
                           capture_output=True, timeout=300)
    lines = ended.stderr.strip().splitlines()
    assert ended.returncode == 1
    assert lines[-1].startswith("error: dead.png has not been read within 1 s")
    assert sum("Waiting for dead.png" in line for line in lines) == 1


def test_workers_of_the_index_say_it_and_what_was_measured_is_kept(dead, monkeypatch, capfd):
    processor = make_processor(SectionOptions(SECTION), own_tokenizer(SECTION))
    monkeypatch.setattr(building, "FEW", 0)
    monkeypatch.setattr(building.reads, "limit", 0.5)
    monkeypatch.syspath_prepend(str(dead / "site"))
    with pytest.raises(DataError, match=r"dead\.png has not been read within 0\.5 s.* What was measured is kept\."):
        open_index(dead / "data.json", ReadingOptions(), measures_of(SECTION, processor))
    assert f"Waiting for {dead / 'dead.png'}" in capfd.readouterr().err
