"""Time and memory of opening and sampling a two-hour 1080p video.

    python benchmarks/long_video.py

Makes the video with PyAV first (a minute of moving pictures at 30 frames a second, its packets repeated with later
time stamps), then samples it in a process of its own and prints that one's seconds and peak resident memory.
"""
from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import numpy as np


def make_video(path: Path, minutes: int, fps: int = 30, width: int = 1920, height: int = 1080) -> None:
    """Writes `minutes` of H.264 video."""
    import av

    minute = path.with_suffix(".minute.mp4")
    with av.open(str(minute), "w") as output:
        stream = output.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "g": str(2 * fps), "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        board = np.add.outer(np.arange(height), np.arange(2 * width))[..., None] * np.array([1, 2, 3]) // 8 % 256
        board = board.astype(np.uint8)
        for number in range(60 * fps):
            picture = board[:, number % width:number % width + width]
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        output.mux(stream.encode())
    with av.open(str(path), "w") as output:
        written = None
        for repetition in range(minutes):
            with av.open(str(minute)) as source:
                template = source.streams.video[0]
                written = written or output.add_stream_from_template(template)
                shift = int(repetition * 60 / Fraction(template.time_base))
                for packet in source.demux(template):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, written
                        output.mux(packet)
    minute.unlink()


def sample(path: str) -> None:
    """Samples a video the way a chat does and prints seconds and memory."""
    from mindformers_ixc.processing.video import load_video

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    board = load_video(path, 560)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"board of {board.width} x {board.height} pixels in {seconds:.1f} s; peak memory {peak:.0f} MiB, of which "
          f"{before:.0f} MiB were there after the imports")


def main() -> None:
    """Makes the video, samples it in another process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=int, default=120, help="length of the video")
    parser.add_argument("--sample", help="sample this video instead of making one")
    arguments = parser.parse_args()
    if arguments.sample:
        sample(arguments.sample)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.mp4"
        make_video(path, arguments.minutes)
        print(f"{arguments.minutes} minutes, {path.stat().st_size / 2**20:.0f} MiB", flush=True)
        subprocess.run([sys.executable, __file__, "--sample", str(path)], check=True)


if __name__ == "__main__":
    main()
