"""A video's frames from a process of its own: decord, which decodes, may abort, hang or take all memory over a file."""
from __future__ import annotations

import contextlib
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mindformers_ixc.errors import VideoError
from mindformers_ixc.reading import reading

DECODER = Path(__file__).with_name("video_decoder.py")

# Address space of the process, in MiB: an 8K frame is 100 MiB as RGB, and decoders keep some 16 frames for reference.
MEMORY = 1024

# Seconds of processor time a video may take in all, and seconds it may sleep without an answer: enough to start and to
# decode a few hundred frames of 4K, and for each MiB of the file one more, since it is the bytes that take the time.
# Waiting for a processor or a disk does not count, or a busy machine would make damaged videos of good ones; a limit by
# the clock, that many times as long, ends what neither works nor sleeps.
SECONDS, SECONDS_PER_MIB = 15, 1
CLOCK_FACTOR = 20

# Seconds between two looks at what the process does, and that it has to end when it has closed its output.
TICK, ENDING = 0.25, 60

# Environment variables that replace MEMORY, and the seconds whatever the file's size.
MEMORY_VARIABLE, SECONDS_VARIABLE = "MINDFORMERS_IXC_VIDEO_MEMORY", "MINDFORMERS_IXC_VIDEO_SECONDS"

# Pixels of a frame at most: 8192 x 8192.
FRAME_PIXELS = 1 << 26

# What decord's messages begin with: `[12:30:00] /its/source.cc:270: `.
_PLACE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")

# Bytes of a message at most; of a frame so many are taken at once.
MESSAGE, PIECE = 4096, 1 << 20


def _setting(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise VideoError(f"The environment variable {variable} is {text[:60]!r}; it must be a number above 0.")
    return value


def _sleeps(process: int) -> bool:
    """Whether all threads of a process wait for something else than a processor, a disk or whoever stopped them."""
    try:
        stats = [file.read_text() for file in Path(f"/proc/{process}/task").glob("*/stat")]
    except OSError:
        return True      # it ends just now
    return all(stat.rpartition(")")[2].split()[0] not in ("R", "D", "T") for stat in stats)


class VideoProcess:
    """An open video: its number of frames, frames a second, and its frames on demand.

    Use it in a `with` block, which ends the process.

    Args:
        path: of the video file.
        name: what messages call it; by default the path.

    Attributes:
        count: frames the file says it has.
        fps: frames a second.

    Raises:
        VideoError: when the file cannot be decoded within the limits.
    """

    def __init__(self, path: Path, name: str = ""):
        self.name, self.path = name or str(path), str(path.absolute())
        self.memory = _setting(MEMORY_VARIABLE, MEMORY)
        size = path.stat().st_size / 2 ** 20
        self.seconds = _setting(SECONDS_VARIABLE, SECONDS + SECONDS_PER_MIB * math.ceil(size))
        self._deadline, self._slept = time.monotonic() + CLOCK_FACTOR * self.seconds, 0.0
        self._waiting = b""
        settings = {"sys_path": [os.path.abspath(folder) for folder in sys.path], "seconds": math.ceil(self.seconds),
                    "memory": int(self.memory * 2 ** 20)}
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        # no process of `multiprocessing`: MindSpore's workers are daemons, which may have none; a session of its own,
        # so that Ctrl-C, which lets a run finish its step, does not make a damaged video of this one
        try:
            self._process = subprocess.Popen(
                [sys.executable, str(DECODER), json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True, env={**os.environ, **threads})
        except (OSError, ValueError) as error:
            raise VideoError(f"The video {self.name} is decoded in a process of its own, which cannot be started "
                             f"({error}).") from error
        try:
            self._ask(path=self.path)
            opened = self._answer()
            self.count, self.fps = int(opened["count"]), float(opened["fps"])
        except BaseException:
            self.close()
            raise

    def frames(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames by number, each decoded when it is asked for: uint8 `(height, width, 3)`."""
        for number in numbers:
            self._ask(frames=[number])
            height, width = self._answer()["size"]
            if height * width > FRAME_PIXELS or height < 1 or width < 1:
                raise VideoError(f"The video {self.name} has frames of {width} x {height} pixels; the most is "
                                 f"{FRAME_PIXELS} pixels.")
            frame = np.empty((height, width, 3), np.uint8)
            flat, place = frame.reshape(-1), 0
            while place < flat.size:
                piece = self._take(min(PIECE, flat.size - place))
                flat[place:place + len(piece)] = np.frombuffer(piece, np.uint8)
                place += len(piece)
            yield frame

    def _ask(self, **message: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass      # it has ended; why, is found when its answer is read

    def _answer(self) -> dict[str, Any]:
        while b"\n" not in self._waiting:
            if len(self._waiting) > MESSAGE:
                raise self._undecodable("the decoder's answer is no message")
            self._waiting += self._read(MESSAGE)
        line, _, self._waiting = self._waiting.partition(b"\n")
        message = json.loads(line)
        if "missing" in message:
            raise VideoError(f"The video {self.name} needs the package decord, which cannot be imported "
                             f"({message['missing']}); install it with pip (on aarch64 decord2, which has wheels "
                             "from Python 3.10 on).")
        if "error" in message:
            # in front decord has a time and a place of its source, and for the file's name its path, a temporary one
            # where the bytes came from elsewhere
            reason = _PLACE.sub("", (message["error"].splitlines() or [""])[0]).replace(self.path, self.name)
            raise self._undecodable(reason[:120])
        return message

    def _take(self, count: int) -> bytes:
        """At most `count` bytes, at least one."""
        if not self._waiting:
            return self._read(count)
        piece, self._waiting = self._waiting[:count], self._waiting[count:]
        return piece

    def _read(self, count: int) -> bytes:
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        poll = select.poll()      # select.select takes no descriptor above 1023
        poll.register(file, select.POLLIN)
        with reading(self.name):
            self._wait(poll)
        piece = os.read(file, count)
        if not piece:
            raise self._ended()
        return piece

    def _wait(self, poll: select.poll) -> None:
        """Waits for the process to answer.

        Raises:
            VideoError: when it takes longer than it may.
        """
        while not poll.poll(TICK * 1000):
            self._slept += TICK if _sleeps(self._process.pid) else 0.0
            if self._slept > self.seconds or time.monotonic() > self._deadline:
                raise self._too_slow()

    def _too_slow(self) -> VideoError:
        return VideoError(f"The video {self.name} took longer than {self.seconds:g} seconds to decode; it is damaged, "
                          f"or the environment variable {SECONDS_VARIABLE} must allow more.")

    def _ended(self) -> VideoError:
        """Why the process ended without an answer."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING)
        code = self._process.poll()
        if code == -signal.SIGXCPU:
            return self._too_slow()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return self._undecodable(f"the decoder ended with {how}; it may take {self.memory:g} MiB, "
                                 f"{MEMORY_VARIABLE} changes that")

    def _undecodable(self, reason: str) -> VideoError:
        return VideoError(f"The video {self.name} cannot be decoded; it is damaged, truncated or no video ({reason}).")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()      # type: ignore[union-attr]
        self._process.wait()

    def __enter__(self) -> VideoProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()
