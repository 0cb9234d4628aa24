"""Odd pictures and videos, each loaded as chat loads it, with its time and memory: nothing may end otherwise than well.

    python scripts/odd_media.py --pictures 600 --videos 200

Makes the files from a seed: every mode and format, cut, with flipped bits, headers that lie, transparent, turned,
huge, wrongly named, no files at all. Each is loaded in a process of its own. Prints how many came out right (where the
pixels are known, they must be these), were refused by the package's own error with a sentence, and which raised
anything else, ended the process, took more than 20 seconds or 1 GiB; the exit code is 1 if any did.
"""
from __future__ import annotations

import argparse
import collections
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import odd_pictures
import odd_videos

from mindformers_ixc.errors import ImageError, VideoError
from mindformers_ixc.processing.image import load_image
from mindformers_ixc.processing.processor import ImageProcessor
from mindformers_ixc.processing.video import is_video

SECONDS, MIB = 20, 1024

# A message is a sentence for a terminal, whatever was given.
LONGEST_MESSAGE = 600

GOOD, BAD = ("right", "refused"), ("wrong", "foreign error", "abort", "over 20 s", "over 1 GiB")


class Outcome(NamedTuple):
    """What became of a case."""

    kind: str
    note: str
    seconds: float
    mib: float


def load(case: odd_pictures.Case) -> tuple[str, str]:
    """Loads a case; a kind of `GOOD` or `BAD`, and the error's sentence."""
    processor = ImageProcessor(56, exif=case.exif)
    try:
        if case.expected is not None:
            found = np.asarray(load_image(case.source, "odd.json, sample 0", "white", case.exif))
            if found.shape != case.expected.shape or np.abs(found.astype(int) - case.expected).max() > 1:
                return "wrong", f"{found.shape} for {case.expected.shape}"
        tiles, grids = processor.preprocess(case.source, where="odd.json, sample 0")
        whole = len(tiles) == 1 + grids[0].tiles and np.isfinite(tiles).all()
        return ("right", "") if whole else ("wrong", f"tiles {tiles.shape} for {grids}")
    except (ImageError, VideoError) as error:
        text = str(error)
        if case.expected is not None or len(text) > LONGEST_MESSAGE or "\n" in text or "odd.json" not in text:
            return "wrong", f"message: {text}"
        return "refused", text
    except Exception as error:
        return "foreign error", f"{type(error).__name__}: {error}"


def run(case: odd_pictures.Case) -> Outcome:
    """Loads a case in a process of its own; once more where a busy machine may be what took the time."""
    outcome, processor_seconds = _run(case)
    if outcome.kind == "over 20 s" and processor_seconds < SECONDS / 2:
        outcome, _ = _run(case)
    return outcome


def _run(case: odd_pictures.Case) -> tuple[Outcome, float]:
    """A case's outcome, and its seconds of processor time."""
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        kind, note = load(case)
        peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        os.write(writing, f"{peak / 1024}\n{kind}\n{note}".encode("utf-8", "backslashreplace")[:4000])
        os._exit(0)
    os.close(writing)
    status, usage = 0, None
    while usage is None:
        done, status, found = os.wait4(child, os.WNOHANG)
        if done:
            usage = found
        elif time.monotonic() - start > 6 * SECONDS:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    seconds = time.monotonic() - start
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read().decode().split("\n", 2)
    if len(answer) < 3:
        kind = "over 20 s" if seconds > SECONDS else "abort"
        return Outcome(kind, f"status {status}", seconds, usage.ru_maxrss / 1024), usage.ru_utime + usage.ru_stime
    mib, kind = float(answer[0]), answer[1]
    if seconds > SECONDS:
        kind = "over 20 s"
    elif mib > MIB:
        kind = "over 1 GiB"
    return Outcome(kind, answer[2], seconds, mib), usage.ru_utime + usage.ru_stime


def tell(title: str, cases: list[odd_pictures.Case], verbose: bool) -> int:
    """Runs cases and prints their table.

    Returns:
        Number of cases that ended badly.
    """
    outcomes = []
    for number, case in enumerate(cases):
        outcome = run(case)
        outcomes.append(outcome)
        if verbose or outcome.kind in BAD:
            print(f"{title} {number} {case.name}: {outcome.kind} {outcome.note} ({outcome.seconds:.1f} s, "
                  f"{outcome.mib:.0f} MiB)", flush=True)
    counts = collections.Counter(outcome.kind for outcome in outcomes)
    print(f"| {title} | " + " | ".join(str(counts[kind]) for kind in GOOD + BAD) +
          f" | {max(outcome.seconds for outcome in outcomes):.1f} s | {max(outcome.mib for outcome in outcomes):.0f} "
          "MiB |", flush=True)
    return sum(counts[kind] for kind in BAD)


def main() -> None:
    """Makes the files and loads them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pictures", type=int, default=600, metavar="N", help="odd pictures")
    parser.add_argument("--videos", type=int, default=200, metavar="N", help="odd videos")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of both")
    parser.add_argument("--keep", metavar="DIR", help="make the files here and keep them")
    parser.add_argument("--verbose", action="store_true", help="a line for each case")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(arguments.keep or folder)
        pictures = odd_pictures.cases(target / "pictures", arguments.pictures, arguments.seed)
        videos = odd_videos.cases(target / "videos", arguments.videos, arguments.seed)
        assert all(is_video(case.source) for case in videos)
        print("| of " + " | ".join(("", *GOOD, *BAD, "slowest", "largest")) + " |")
        print("|" + "---|" * (len(GOOD + BAD) + 3))
        bad = sum(tell(title, cases, arguments.verbose) for title, cases in (("pictures", pictures), ("videos", videos))
                  if cases)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
