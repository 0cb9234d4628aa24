"""Numbers of a run as TensorBoard reads them: `tensorboard: True` writes `OUTPUT/tensorboard`.

tensorboardX, which MindFormers brings along, writes in a thread of its own that ends with the first error and leaves
its caller waiting; so its file format is used, without the thread.
"""
from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

TENSORBOARD_FOLDER = "tensorboard"


class ScalarFile:
    """One event file.

    Args:
        folder: for the file; made if it is not there.
        first_step: whatever an earlier file has of this step or later ones is not shown any more.

    Raises:
        OSError: when the file cannot be made.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        self._writer.write_event(Event(wall_time=time.time(), step=first_step,
                                       session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Iterable[tuple[str, float]]) -> None:
        """Adds the numbers of a step.

        Raises:
            OSError: when they cannot be written.
        """
        for name, value in values:
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()
