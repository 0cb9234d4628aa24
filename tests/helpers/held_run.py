"""`mindformers WORDS...` whose run waits after a step until a signal asks it to end: held_run.py STEP OUTPUT WORDS...

However late a test looks at OUTPUT/metrics.jsonl, the run is then at that step and not over.
"""
from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

# what lies beside this program is no library of the run's
del sys.path[0]

import mindformers_ixc_cli  # noqa: E402
from mindformers_ixc import interruption  # noqa: E402
from mindformers_ixc.files import METRICS_FILE, read_metrics  # noqa: E402

STEP, METRICS = int(sys.argv[1]), Path(sys.argv[2]) / METRICS_FILE


class Held(interruption.Interruption):
    """The run's thread, which asks at the end of each step, gets no answer after STEP until there is a signal."""

    @property
    def number(self) -> int | None:
        """See `Interruption`."""
        if threading.current_thread() is threading.main_thread():
            while self._number is None and len(read_metrics(METRICS)) >= STEP:
                time.sleep(0.05)
        return self._number

    @number.setter
    def number(self, value: int | None) -> None:
        self._number = value


interruption.Interruption = Held
sys.argv[:] = [str(Path(sys.executable).parent / "mindformers"), *sys.argv[3:]]      # MindSpore reads that file
sys.exit(mindformers_ixc_cli.main())
