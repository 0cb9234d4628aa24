"""Mixed requests for minutes, in threads and in turns: every answer must be the one that its request gets alone.

    python scripts/soak.py --model out/model --minutes 10
    python scripts/soak.py --model out/model --threads 8 --requests 50

Text only and with one to three pictures, short and long, batches, beams, sampling with a seed, streams that are read to
the end, in turns or dropped, and requests with faults. The requests come from a fixed list, so that each can be
answered alone first; their order is drawn with a seed. Printed are requests, answers that differ, graphs that were
compiled after the first of every kind, and how fast the memory grows (a line through the second half). The exit code
is 1 when an answer differs, a thread died, something was compiled, or the memory grew by 1 MiB a minute or more.
"""
from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable

os.environ.setdefault("GLOG_v", "3")
os.environ.setdefault("LOG_MF_PATH", tempfile.mkdtemp(prefix="soak_log_"))

import mindspore as ms
import numpy as np
from mindformers import pipeline
from mindspore.common import api
from PIL import Image

import mindformers_ixc  # noqa: F401 - registers the pipeline
from mindformers_ixc.generation.assistant import Assistant

# MiB a minute that the memory may grow by.
STEEPEST = 1.0

# Seconds between two looks at the memory.
INTERVAL = 2.0

# Faults, each of which must give an error and disturb nothing.
FAULTS: list = [{"query": None}, {"messages": None}, {"query": "half \udc80"}, {"query": "x", "images": ["gone.png"]},
                {"query": "x", "images": [b"no picture"]}, {"query": "x", "colour": 1}, 7, {"query": "<ImageHere>"},
                {"query": "x", "history": [None]}, [{"role": "user", "content": None}], {"query": "word " * 5000}]


def requests() -> list[dict]:
    """Questions of several lengths with none to three pictures; the same in every run."""
    rng = np.random.default_rng(7)
    made = []
    for words in (3, 40, 150):
        for pictures in range(4):
            shapes = rng.integers(40, 300, (pictures, 2))
            images = [Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)) for shape in shapes]
            made.append({"query": "<ImageHere>" * pictures + f"What is {words}? " + "and more " * words,
                         "images": images, "hd_num": 2})
    return made


# What decoding may be; every one with every request is a kind of its own.
OPTIONS: list[dict] = [{"max_new_tokens": 24}, {"max_new_tokens": 24, "prompt_lookup": 4},
                       {"max_new_tokens": 8, "num_beams": 3},
                       {"max_new_tokens": 24, "do_sample": True, "seed": 3, "temperature": 0.8}]


class Soak:
    """Requests, what each gets alone, and what was found.

    Args:
        model: a model directory.
    """

    def __init__(self, model: str):
        self.pipe = pipeline("multimodal_chat", model=model)
        self.assistant: Assistant = self.pipe.assistant
        self.requests = requests()
        self.compiled: list[str] = []
        self.wrong: list[str] = []
        self.done = 0
        self._count = threading.Lock()
        self._watch_compiler()
        self.alone = {(i, k): self.assistant.answer([request], **options)[0]
                      for i, request in enumerate(self.requests) for k, options in enumerate(OPTIONS)}
        self.streamed = [list(self.assistant.stream(request, **OPTIONS[0])) for request in self.requests]
        for group in self._groups():
            self.assistant.answer([self.requests[i] for i in group], **OPTIONS[0])
        print(f"{len(self.alone)} kinds of requests, {len(self.compiled)} graphs", flush=True)
        self.compiled.clear()

    def _groups(self) -> list[list[int]]:
        """Batches: three requests of one length, and three of all lengths."""
        return [[0, 1, 2], [4, 5, 6], [8, 9, 10], [0, 5, 10], [3, 7, 11]]

    def _watch_compiler(self) -> None:
        real = api._cell_graph_executor.compile

        def compile_(cell, *args, **kwargs):
            result = real(cell, *args, **kwargs)
            if result[1]:
                self.compiled.append(type(cell).__name__)
            return result

        api._cell_graph_executor.compile = compile_

    def check(self, what: str, found: object, expected: object) -> None:
        """Counts one request, and what it should not have been."""
        with self._count:
            self.done += 1
            if found != expected:
                self.wrong.append(f"{what}: {found!r:.200} instead of {expected!r:.200}")

    def one(self, dice: random.Random) -> None:
        """One request, or a few at once, of a kind that is drawn."""
        dice.choices([self._single, self._batch, self._stream, self._streams_in_turns, self._list_with_faults],
                     [6, 2, 3, 1, 2])[0](dice)

    def _single(self, dice: random.Random) -> None:
        i, k = dice.choice(list(self.alone))
        found = self.pipe(self.requests[i], **OPTIONS[k])[0]["text_generation_text"]
        self.check(f"request {i}, options {k}", found, self.alone[i, k])

    def _batch(self, dice: random.Random) -> None:
        group = dice.choice(self._groups())
        found = self.assistant.answer([self.requests[i] for i in group], **OPTIONS[0])
        self.check(f"batch {group}", found, [self.alone[i, 0] for i in group])

    def _stream(self, dice: random.Random) -> None:
        i = dice.randrange(len(self.requests))
        pieces, length = [], dice.choice([1, 2, 10**6])              # most are dropped on the way
        for piece in self.assistant.stream(self.requests[i], **OPTIONS[0]):
            pieces.append(piece)
            if len(pieces) == length:
                break
        self.check(f"stream {i}", pieces, self.streamed[i][:length])

    def _streams_in_turns(self, dice: random.Random) -> None:
        chosen = [dice.randrange(len(self.requests)) for _ in range(dice.choice([2, 5, 20]))]
        streams = [self.assistant.stream(self.requests[i], **OPTIONS[0]) for i in chosen]
        pieces: list[list[str]] = [[] for _ in chosen]
        going = list(range(len(chosen)))
        while going:
            place = dice.choice(going)
            piece = next(streams[place], None)
            if piece is None:
                self.check(f"stream {chosen[place]} among others", pieces[place], self.streamed[chosen[place]])
                going.remove(place)
            elif dice.random() < 0.02:                              # forgotten, though still there
                going.remove(place)
            else:
                pieces[place].append(piece)

    def _list_with_faults(self, dice: random.Random) -> None:
        i = dice.randrange(len(self.requests))
        items = [*dice.sample(FAULTS, 3), self.requests[i]]
        found = self.pipe(items, **OPTIONS[0])
        kinds = ["error" if "error" in one else one["text_generation_text"] for one in found]
        self.check(f"request {i} after faults", kinds, ["error"] * 3 + [self.alone[i, 0]])


def resident_mib() -> float:
    """This process's memory in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def in_threads(soak: Soak, threads: int, seed: int, more: Callable[[int], bool]) -> None:
    """Asks from several threads as long as `more(number of requests of this thread)`; a thread that dies is noted."""
    def work(number: int) -> None:
        dice, asked = random.Random(seed * 1000 + number), 0
        try:
            while more(asked):
                soak.one(dice)
                asked += 1
        except BaseException as error:
            soak.wrong.append(f"thread {number} died: {error!r:.300}")
            raise

    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main() -> int:
    """Runs until the time is over or every thread has asked; 1 when something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="a small model directory")
    parser.add_argument("--minutes", type=float, metavar="M", help="how long (default: until all have asked)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads that ask (default: 2)")
    parser.add_argument("--requests", type=int, default=50, metavar="N", help="of each thread, without --minutes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order")
    arguments = parser.parse_args()
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    soak = Soak(arguments.model)
    start, memory = time.monotonic(), []
    watching = threading.Event()

    def watch() -> None:
        while not watching.wait(INTERVAL):
            memory.append(((time.monotonic() - start) / 60, resident_mib()))

    threading.Thread(target=watch, daemon=True).start()
    if arguments.minutes:
        in_threads(soak, arguments.threads, arguments.seed, lambda _: time.monotonic() - start < arguments.minutes * 60)
    else:
        in_threads(soak, arguments.threads, arguments.seed, lambda asked: asked < arguments.requests)
    watching.set()
    half = memory[len(memory) // 2:]
    slope = float(np.polyfit(*np.array(half).T, 1)[0]) if len(half) > 1 else 0.0
    for line in soak.wrong[:20]:
        print(line)
    print(f"{soak.done} requests in {(time.monotonic() - start) / 60:.1f} minutes from {arguments.threads} threads: "
          f"{len(soak.wrong)} wrong, {len(soak.compiled)} compilations, memory {memory[0][1] if memory else 0:.0f} to "
          f"{resident_mib():.0f} MiB, {slope:+.2f} MiB a minute in the second half")
    steep = bool(arguments.minutes) and slope >= STEEPEST
    return int(bool(soak.wrong or soak.compiled or steep))


if __name__ == "__main__":
    sys.exit(main())
