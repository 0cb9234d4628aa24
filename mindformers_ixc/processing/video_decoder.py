"""The program that decodes a video: a process of its own, which a damaged file may end in any way.

    python video_decoder.py SETTINGS

It is started by `video_process.py` and imports nothing of this package, only NumPy and decord, so that it is there in
a fraction of a second. SETTINGS is JSON: `sys_path`, `memory` in bytes, `seconds`. Each message is a line of JSON:

    -> {"path": ...}
    <- {"count": frames, "fps": frames a second}
    -> {"frames": [numbers]}
    <- {"size": [height, width]} and height * width * 3 bytes, for each number
    -> ... more numbers, until the input ends

Instead of any answer, and then as the last one, `{"error": sentence}` or `{"missing": sentence}` (of decord).
"""
import contextlib
import ctypes
import json
import os
import resource
import signal
import sys

# prctl's name for "send me this signal when my parent ends" (linux/prctl.h).
PR_SET_PDEATHSIG = 1


def limit(settings):
    """Bounds what a damaged file can make this process take, and ends it with its parent."""
    wanted = {resource.RLIMIT_AS: settings["memory"], resource.RLIMIT_CPU: settings["seconds"],
              resource.RLIMIT_CORE: 0}
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (bound, hard))
    with contextlib.suppress(OSError, AttributeError):   # not on every system
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def rgb(frame):
    """uint8 `(height, width, 3)` of a decoded frame `(height, width, channels)`."""
    height, width = frame.shape[:2]
    # of narrow videos decord2 3.4 (aarch64) shows the padding at the end of each row of bytes as a fourth channel, and
    # its get_batch fails on them
    return frame.reshape(height, -1)[:, :3 * width].copy().reshape(height, width, 3)


def serve(questions, answers):
    """Answers the questions about one video, see the module."""

    def answer(**message):
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    try:
        import decord  # noqa: PLC0415 - the limits come first, and that it is missing is an answer
    except Exception as error:
        return answer(missing=str(error)[:500])
    try:
        path = json.loads(questions.readline())["path"]
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        answer(count=len(reader), fps=float(reader.get_avg_fps()))
        for line in questions:
            for number in json.loads(line)["frames"]:
                frame = rgb(reader[number].asnumpy())
                answer(size=frame.shape[:2])
                answers.write(frame.data)
            answers.flush()
    except BrokenPipeError:      # nobody listens any more
        pass
    except Exception as error:   # decord raises its own untyped errors
        answer(error=str(error)[:500] or type(error).__name__)


def main():
    """Serves standard input and output; what libraries print goes to standard error."""
    settings = json.loads(sys.argv[1])
    sys.path[:] = settings["sys_path"]    # without this folder, whose modules have common names
    limit(settings)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)
    with contextlib.suppress(BrokenPipeError):
        answers.close()
    os._exit(0)                           # decord's own end may hang or abort over a damaged file


if __name__ == "__main__":
    main()
