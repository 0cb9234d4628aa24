"""Mixed load on a running server for as long as wanted: does latency, memory or the number of handles grow?

    mindformers serve --model starter --port 8000 &
    python benchmarks/serving_load.py --server http://127.0.0.1:8000 --pid $! --minutes 60 --rate 2

Clients ask short and long questions with and without pictures, in one round and in several, streamed and not, sampled
and greedy, with beams; some go away in the middle, some send what is refused. A greedy question that was asked before
must get the answer that it got then. A line a minute (or `--every` seconds) says how many were answered, the median and
the longest latency of the short questions, the median time to the first token of streams, and what the server's process
holds. The last lines compare the first and the last quarter, the processor time of a request too, which depends less on
what else the machine does. Exits with 1 when an answer was another one than before, or a request failed that should
not.
"""
from __future__ import annotations

import argparse
import base64
import itertools
import random
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

from mindformers_ixc.errors import ConfigError, GenerationError
from mindformers_ixc.serving.client import Client

IMAGES = Path(__file__).parents[1] / "mindformers_ixc" / "demo" / "images"

# What a client does: so many times of all.
KINDS = {"short": 6, "long": 2, "picture": 3, "stream": 4, "rounds": 2, "sampled": 2, "beams": 1, "leaves": 2,
         "refused": 2}

# Whose answers must be the same each time.
GREEDY = ("short", "long", "picture", "stream", "rounds", "beams")

# What no server takes.
REFUSED = ({"temperature": -1}, {"temprature": 1}, {"num_beams": 2, "stream": True}, {"model": "another"},
           {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {
               "url": "data:image/png;base64,iVBORw0KGgo="}}]}]})

COLUMNS = {"short": ("answer of a short question", "ms", 1e3), "first": ("first token of a stream", "ms", 1e3),
           "processor": ("processor time of the server per request", "ms", 1e3), "memory": ("memory", "MiB", 1),
           "files": ("open files", "", 1), "threads": ("threads", "", 1)}


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second of all clients together at most; 0: "
                        "as many as get an answer")
    parser.add_argument("--every", type=float, default=60.0, help="seconds of a line")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def request_of(kind: str, number: int, picture: str) -> dict:
    """A request.

    Args:
        kind: one of `KINDS`.
        number: of the question.
        picture: base64 of a JPEG file.
    """
    text = f"Question {number}: " + ("what is it? " * (60 if kind == "long" else 1))
    messages: list[dict] = [{"role": "user", "content": text}]
    if kind in ("picture", "rounds", "leaves"):
        messages[0]["content"] = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
            {"type": "text", "text": text}]
    if kind == "rounds":
        messages += [{"role": "assistant", "content": "A picture."}, {"role": "user", "content": "And which colour?"}]
    found = {"messages": messages, "stream": kind in ("stream", "leaves"),
             "max_tokens": 200 if kind == "leaves" else 16}
    if kind in ("sampled", "leaves"):       # at 2 an answer is seldom at its end by itself
        found["temperature"] = 2.0 if kind == "leaves" else 1.0
    if kind == "beams":
        found["num_beams"] = 3
    return found | (REFUSED[number % len(REFUSED)] if kind == "refused" else {})


class Load:
    """What the clients do, and what came of it.

    Attributes:
        times: seconds of what `COLUMNS` names, since somebody looked.
        done: requests of each kind.
        wrong: questions that were answered otherwise than before.
        failed: sentences.
    """

    def __init__(self, server: str, seed: int, rate: float):
        self.client, self.rng, self.lock = Client(server), random.Random(seed), threading.Lock()
        self.gap, self.next = (1 / rate if rate else 0.0), time.monotonic()
        self.times: dict[str, list[float]] = {"short": [], "first": []}
        self.answers: dict[tuple, str] = {}
        self.done: Counter[str] = Counter()
        self.wrong: list[tuple] = []
        self.failed: list[str] = []
        self.pictures = [base64.b64encode(path.read_bytes()).decode() for path in sorted(IMAGES.glob("*.jpg"))]

    def run(self, until: float) -> None:
        """One client."""
        while time.monotonic() < until:
            with self.lock:
                kind = self.rng.choices(list(KINDS), list(KINDS.values()))[0]
                number, picture = self.rng.randrange(30), self.rng.randrange(len(self.pictures))
                begin = self.next = max(self.next + self.gap, time.monotonic())
            time.sleep(max(0.0, begin - time.monotonic()))
            try:
                self.one(kind, number, picture)
            except (ConfigError, GenerationError) as error:
                with self.lock:
                    self.failed.append(f"{kind}: {error}")
                time.sleep(0.1)

    def one(self, kind: str, number: int, picture: int) -> None:
        """One request."""
        pieces: list[str] = []
        begun, first = time.monotonic(), 0.0
        try:
            for event in self.client.chat(request_of(kind, number, self.pictures[picture])):
                choice = event["choices"][0]
                pieces.append(choice.get("delta", choice.get("message", {})).get("content") or "")
                first = first or time.monotonic() - begun
                if kind == "leaves" and len(pieces) > 3:
                    break
        except GenerationError:
            if kind != "refused":
                raise
        else:
            if kind == "refused":
                raise GenerationError(f"{REFUSED[number % len(REFUSED)]} was not refused.")
        with self.lock:
            self.done[kind] += 1
            if kind == "short":
                self.times["short"].append(time.monotonic() - begun)
            if kind == "stream":
                self.times["first"].append(first)
            key, answer = (kind.replace("stream", "short"), number, picture), "".join(pieces).strip()
            if kind in GREEDY and self.answers.setdefault(key, answer) != answer:
                self.wrong.append(key)

    def taken(self) -> tuple[dict[str, float], float]:
        """Medians since this was asked last, and the longest time of a short question."""
        with self.lock:
            times, self.times = self.times, {name: [] for name in self.times}
        medians = {name: statistics.median(found) for name, found in times.items() if found}
        return medians, max(times["short"], default=0.0)


def held_by(process: psutil.Process) -> dict[str, float]:
    """What a process holds: MiB, open files, threads."""
    return {"memory": process.memory_info().rss / 2**20, "files": process.num_fds(), "threads": process.num_threads()}


def compare(rows: list[dict[str, float]]) -> list[str]:
    """Lines of the medians of the first and the last quarter."""
    quarter, lines = max(1, len(rows) // 4), []
    for name, (what, unit, scale) in COLUMNS.items():
        first, last = ([row[name] * scale for row in part if name in row] for part in (rows[:quarter], rows[-quarter:]))
        if first and last:
            unit = f" {unit}" if unit else ""
            lines.append(f"{what}: {statistics.median(first):.0f}{unit} in the first quarter, "
                         f"{statistics.median(last):.0f}{unit} in the last")
    return lines


def main() -> None:
    """Loads the server, prints, exits with 1 when an answer was another one or a request failed."""
    arguments = parse()
    load, process = Load(arguments.server, arguments.seed, arguments.rate), psutil.Process(arguments.pid)
    begun, used = time.monotonic(), sum(process.cpu_times()[:2])
    before = used, 0
    until = begun + 60 * arguments.minutes
    threads = [threading.Thread(target=load.run, args=(until,), daemon=True) for _ in range(arguments.clients)]
    for thread in threads:
        thread.start()
    rows: list[dict[str, float]] = []
    for number in itertools.count(1):
        if time.monotonic() >= until:
            break
        time.sleep(max(0.0, min(begun + number * arguments.every, until) - time.monotonic()))
        medians, longest = load.taken()
        taken, done = sum(process.cpu_times()[:2]), sum(load.done.values())
        medians["processor"] = (taken - before[0]) / max(1, done - before[1])
        before = taken, done
        rows.append({**medians, **held_by(process)})
        now = rows[-1]
        print(f"{done:7d} requests, short ones {now.get('short', 0) * 1e3:6.0f} ms (longest "
              f"{longest * 1e3:6.0f}), first token {now.get('first', 0) * 1e3:6.0f} ms, {now['memory']:7.1f} MiB, "
              f"{now['files']} files, {now['threads']} threads, {len(load.failed)} failed, {len(load.wrong)} wrong",
              flush=True)
    for thread in threads:
        thread.join(60)
    share = (sum(process.cpu_times()[:2]) - used) / (time.monotonic() - begun)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(load.done.items()))
    print(f"{kinds}; the server took {share:.0%} of a core")
    print("\n".join(compare(rows)))
    for sentence in sorted(set(load.failed))[:5]:
        print(sentence)
    if load.wrong or load.failed:
        sys.exit(f"{len(load.failed)} requests failed, {len(load.wrong)} answers were others than before: "
                 f"{load.wrong[:5]}")


if __name__ == "__main__":
    main()
