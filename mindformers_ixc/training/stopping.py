"""After which step a run stops that was asked to; all ranks of a parallel run after the same one.

Whoever is asked (a rank by a signal, or `mindformers launch`) writes the signal's number into `OUTPUT/stop_request`.
Rank 0 looks there at the end of each step, and if it finds one writes the number of the *next* step into
`OUTPUT/stop_after` before it begins that one. No rank can end a step that rank 0 has not begun, since all take part in
its messages; so each finds the number at the end of that step at the latest. Both files are there, empty, before the
first step: network file systems look at a file that they know anew whenever it is opened, but may remember for a while
that there is none.
"""
from __future__ import annotations

from pathlib import Path

from mindformers_ixc import interruption
from mindformers_ixc.device import is_parallel, rank
from mindformers_ixc.files import write_whole

REQUEST_FILE, AFTER_FILE = "stop_request", "stop_after"


class Stopping:
    """Decides it for one process of a run.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self.request, self.after = folder / REQUEST_FILE, folder / AFTER_FILE
        self.parallel = is_parallel()
        self.told = False

    def begin(self) -> None:
        """Training begins: from now on a run that is asked to stop saves first."""
        interruption.current.phase = "training"
        if self.parallel and rank() == 0:
            write_whole(self.after, "")
            write_whole(self.request, "")       # `launch` knows by this one that training has begun

    def is_due(self, step: int) -> bool:
        """Whether the run stops after the step that has just ended, counted from 1."""
        asked = interruption.current.number
        if not self.parallel:
            return asked is not None
        if asked is not None and not self.told:
            self.told = True
            write_whole(self.request, str(asked))
        after = _number_in(self.after)
        if after is None and rank() == 0 and _number_in(self.request) is not None:
            write_whole(self.after, str(step + 1))
        return after is not None and step >= after


def ask_ranks(folder: Path, number: int) -> bool:
    """Asks the ranks of a run to stop, as its launcher; returns False if they do not train yet.

    Args:
        folder: of the run.
        number: of the signal.
    """
    if not (folder / REQUEST_FILE).exists():
        return False
    write_whole(folder / REQUEST_FILE, str(number))
    return True


def _number_in(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
