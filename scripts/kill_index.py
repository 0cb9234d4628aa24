"""Lets many processes build, read, change, list and remove one index at once, and kills some of them at random moments.

    python scripts/kill_index.py --seconds 60 --seed 0

Readers open the index, the samples and the rows of a small source, built if they are not there, and compare them with
those of a folder that nobody else uses; one process gives a picture another time, which makes all of it outdated;
others list it, remove everything that is not in use, and make room. A reader is killed (SIGKILL) now and then and
another one takes its place. At the end everything is removed, and nothing may be left. Exit code 1 when a process
failed, or something differed or was left.
"""
from __future__ import annotations

import argparse
import gc
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from mindformers_ixc.data.fitting import Shapes
from mindformers_ixc.data.index import building
from mindformers_ixc.data.index.cleaning import BOUND_VARIABLE, clean, entries, make_room
from mindformers_ixc.data.index.plans import saved
from mindformers_ixc.data.index.samples import SampleSet, make_samples
from mindformers_ixc.data.index.sources import measures_of, open_sources
from mindformers_ixc.data.rows import SectionOptions, make_processor, own_tokenizer
from mindformers_ixc.data.sampling import RunPlan, plan_batches
from mindformers_ixc.terminal import current

SECTION = {"tokenizer": {"vocab_file": "pkg:mindformers_ixc/demo/tokenizer.model"}, "hd_num": 4, "image_size": 56}
SAMPLES, READERS = 64, 4


def write_source(folder: Path) -> Path:
    """A source of conversations about five pictures."""
    for number in range(5):
        Image.new("RGB", (50 + 40 * number, 60)).save(folder / f"{number}.png")
    rows = [{"id": number, "image": f"{number % 5}.png", "conversations": [
        {"from": "human", "value": "what is it? " * (1 + number % 7)}, {"from": "gpt", "value": "a cat"}]}
        for number in range(SAMPLES)]
    path = folder / "data.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


class Reader:
    """A run, as far as it reads the index.

    Args:
        path: of the source.
    """

    def __init__(self, path: Path):
        self.path = path
        self.measures = measures_of(SECTION, make_processor(SectionOptions(SECTION), own_tokenizer(SECTION)))

    def open(self, root: Path) -> tuple[SampleSet, RunPlan]:
        """Samples and plan, by the index in a folder."""
        sources = open_sources({"dataset_dir": str(self.path)}, 0, self.measures, root)
        samples = make_samples(sources, Shapes(10_000, 99, 4), 0.0, root)

        def rows(size: int, epoch: int) -> np.ndarray:
            return np.arange(SAMPLES).reshape(-1, size)

        return samples, saved(lambda batch: plan_batches(rows, batch), root, samples.folder.name)(4)

    def seen(self, root: Path) -> list:
        """Everything that a run reads of it."""
        samples, plan = self.open(root)
        index = samples.sources[0].index
        columns = (index.places, index.digests, index.sizes, index.needs, samples.sample, samples.needs)
        return [column.tolist() for column in columns] + [plan.batch(step) for step in range(20)]


def works(reader: Reader, root: Path, expected: list, count: Path) -> list[Callable[[random.Random], None]]:
    """What the processes do, again and again; the first ones are readers, who leave a byte in a file each time."""
    def read(chance: random.Random) -> None:
        if reader.seen(root) != expected:
            raise AssertionError("what is read differs")
        with open(count, "ab") as file:
            file.write(b".")

    def change(chance: random.Random) -> None:
        os.utime(reader.path.with_name("1.png"), ns=(1, chance.randrange(1 << 40)))
        time.sleep(chance.random() / 3)

    def remove(chance: random.Random) -> None:
        clean(root, everything=True)
        time.sleep(chance.random() / 20)

    def look(chance: random.Random) -> None:
        entries(root)
        os.environ[BOUND_VARIABLE] = "0"
        make_room(root)
        time.sleep(chance.random() / 20)

    return [*[read] * READERS, change, remove, look]


def start(work: Callable[[random.Random], None], end: float, seed: str) -> int:
    """A process that does some work until it is time; its number."""
    child = os.fork()
    if child:
        return child
    code, chance = 1, random.Random(seed)
    try:
        while time.monotonic() < end:
            work(chance)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def contend(work: list, seconds: float, seed: int) -> tuple[int, int]:
    """Runs all processes at once; how many failed, and how many were killed."""
    chance, end = random.Random(seed), time.monotonic() + seconds
    running = {number: start(one, end, f"{seed} {number}") for number, one in enumerate(work)}
    failed = killed = 0
    while time.monotonic() < end:
        time.sleep(chance.random())
        number = chance.randrange(READERS)
        os.kill(running[number], signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(running[number], 0)[1])
        killed += code == -signal.SIGKILL
        failed += code not in (0, -signal.SIGKILL)
        running[number] = start(work[number], end, f"{seed} {number} {killed}")
    return failed + sum(os.waitpid(child, 0)[1] != 0 for child in running.values()), killed


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    building.PART, current.quiet = 10, True          # several parts, and no word about who waits for whom
    with tempfile.TemporaryDirectory() as folder:
        reader, root, count = Reader(write_source(Path(folder))), Path(folder, "index"), Path(folder, "count")
        failed, killed = contend(works(reader, root, reader.seen(Path(folder, "alone")), count), arguments.seconds,
                                 arguments.seed)
        reads = count.stat().st_size
        failed += reader.seen(root) != reader.seen(Path(folder, "alone"))
        gc.collect()
        clean(root, everything=True)
        left = [str(file.relative_to(root)) for file in root.rglob("*")]
    print(f"read {reads} times, {killed} readers killed, {failed} processes failed, left: "
          f"{', '.join(left) or 'nothing'}")
    return int(bool(failed or left))


if __name__ == "__main__":
    sys.exit(main())
