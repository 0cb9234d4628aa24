"""Mixed load on a running server for as long as wanted: does latency, memory or the number of open files grow?

    mindformers serve --model starter &
    python benchmarks/serving_load.py --server http://127.0.0.1:8000 --pid $! --minutes 60

Clients ask short and long questions with and without pictures, streamed and not, sampled and greedy; some go away in
the middle, some send what is refused. A greedy question that was asked before must get the answer that it got then. A
line a minute (or `--every` seconds) says how many were answered, the median and the longest latency of the short
questions, and what the server's process holds. The last line compares the first and the last third.
"""
from __future__ import annotations

import argparse
import base64
import random
import statistics
import sys
import threading
import time
from pathlib import Path

import psutil

from mindformers_ixc.errors import ConfigError, GenerationError
from mindformers_ixc.serving.client import Client

IMAGES = Path(__file__).parents[1] / "mindformers_ixc" / "demo" / "images"

# What a client does: so many times of all.
KINDS = {"short": 8, "long": 2, "picture": 4, "stream": 4, "sampled": 2, "leaves": 2, "refused": 2}


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--every", type=float, default=60.0, help="seconds of a line")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Load:
    """What the clients do, and what came of it."""

    def __init__(self, server: str, seed: int):
        self.client, self.rng = Client(server), random.Random(seed)
        self.lock = threading.Lock()
        self.answers: dict[str, str] = {}
        self.latencies: list[float] = []
        self.done, self.wrong, self.failed = 0, [], []
        self.pictures = [base64.b64encode(path.read_bytes()).decode() for path in sorted(IMAGES.glob("*.jpg"))]

    def run(self, until: float) -> None:
        """One client."""
        while time.monotonic() < until:
            with self.lock:
                kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
                number, picture = self.rng.randrange(30), self.rng.choice(self.pictures)
            try:
                self.one(kind, number, picture)
            except (ConfigError, GenerationError) as error:
                with self.lock:
                    self.failed.append(f"{kind}: {error}")
                time.sleep(0.1)

    def one(self, kind: str, number: int, picture: str) -> None:
        """One request."""
        text = f"Question {number}: " + ("what is it? " * (60 if kind == "long" else 1))
        content = [{"type": "text", "text": text}]
        if kind in ("picture", "leaves"):
            content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}})
        request = {"messages": [{"role": "user", "content": content}], "max_tokens": 200 if kind == "leaves" else 16,
                   "stream": kind in ("stream", "leaves")}
        if kind == "sampled":
            request["temperature"] = 1.0
        if kind == "refused":
            request["temperature"] = -1
        begun, pieces = time.monotonic(), []
        try:
            for event in self.client.chat(request):
                choice = event["choices"][0]
                pieces.append(choice.get("delta", choice.get("message", {})).get("content") or "")
                if kind == "leaves" and len(pieces) > 3:
                    break
        except GenerationError:
            if kind != "refused":
                raise
        self.note(kind, text if kind != "picture" else text + picture[-80:], "".join(pieces).strip(),
                  time.monotonic() - begun)

    def note(self, kind: str, text: str, answer: str, seconds: float) -> None:
        """Notes what came of a request."""
        with self.lock:
            self.done += 1
            if kind == "short":
                self.latencies.append(seconds)
            if kind in ("short", "long", "picture", "stream") and self.answers.setdefault(text, answer) != answer:
                self.wrong.append(text[:40])


def main() -> None:
    """Loads the server, prints, exits with 1 when an answer was another one."""
    arguments = parse()
    load, process = Load(arguments.server, arguments.seed), psutil.Process(arguments.pid)
    until = time.monotonic() + 60 * arguments.minutes
    threads = [threading.Thread(target=load.run, args=(until,), daemon=True) for _ in range(arguments.clients)]
    for thread in threads:
        thread.start()
    rows = []
    while time.monotonic() < until:
        time.sleep(min(arguments.every, max(0.1, until - time.monotonic())))
        with load.lock:
            latencies, load.latencies = load.latencies or [0.0], []
            memory, files = process.memory_info().rss / 2**20, process.num_fds()
            rows.append((statistics.median(latencies), memory, files))
            print(f"{load.done:7d} requests, short ones {statistics.median(latencies) * 1e3:6.0f} ms (longest "
                  f"{max(latencies) * 1e3:6.0f}), {memory:7.1f} MiB, {files} files, {process.num_threads()} threads, "
                  f"{len(load.failed)} failed, {len(load.wrong)} wrong", flush=True)
    for thread in threads:
        thread.join(60)
    third = max(1, len(rows) // 3)
    first, last = ([statistics.median(column) for column in zip(*part)] for part in (rows[:third], rows[-third:]))
    print(f"first and last third: short ones {first[0] * 1e3:.0f} and {last[0] * 1e3:.0f} ms, {first[1]:.1f} and "
          f"{last[1]:.1f} MiB, {first[2]:.0f} and {last[2]:.0f} files")
    for sentence in sorted(set(load.failed))[:5]:
        print(sentence)
    if load.wrong:
        sys.exit(f"{len(load.wrong)} answers were others than before: {load.wrong[:5]}")


if __name__ == "__main__":
    main()
