"""Plans of runs on disk: the rows of an epoch are made once, and all processes of a machine share them."""
from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ixc import terminal
from mindformers_ixc.data.columns import give_back, unmap
from mindformers_ixc.data.index.cleaning import FACTS, make_room
from mindformers_ixc.data.index.folders import PLANS, writing
from mindformers_ixc.data.index.holding import Held, locked
from mindformers_ixc.data.index.keys import key_of
from mindformers_ixc.data.index.seals import SEAL, is_sealed, seal
from mindformers_ixc.data.packer import Rows
from mindformers_ixc.data.sampling import RunPlan
from mindformers_ixc.errors import DataError
from mindformers_ixc.files import read_json, tidy, whole_file, write_whole

# Changes whenever other rows come of the same settings.
VERSION = 1

# What a plan says of itself at least.
KEYS = {"epoch_rows", "mean_samples", "note", "checked"}

# Rows that are looked up before what was mapped of the files is let go of.
LOOKS = 128


class SavedPlan(RunPlan):
    """A plan whose numbers and epochs are kept in a folder.

    Args:
        make: the plan itself; it is made only when something is missing.
        folder: for what it gives; of a name that follows from everything it depends on.
        batch_rows: rows of a global batch.
        samples: name of the folder of the samples.
    """

    def __init__(self, make: Callable[[int], RunPlan], folder: Path, batch_rows: int, samples: str = ""):
        self.folder, self._make_plan, self._held = folder, make, _held(folder)
        self._plan: RunPlan | None = None
        self._looks = 0
        with self._alone():
            tidy(folder)                          # what a process that was killed had begun
            facts = self._facts()
            if not facts:
                with terminal.current.doing("Planning the rows of an epoch"):
                    plan = self._made(batch_rows)
                facts = {"epoch_rows": plan.epoch_rows, "mean_samples": plan.mean_samples, "note": plan.note,
                         "checked": 0, "samples": samples}
                self._write(facts)
                make_room(folder.parent.parent)
        super().__init__(self._rows, facts["epoch_rows"], batch_rows, facts["mean_samples"], self._check,
                         facts["note"])

    def _made(self, batch_rows: int) -> RunPlan:
        if self._plan is None:
            self._plan = self._make_plan(batch_rows)
        return self._plan

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with writing(self.folder.parent.parent), locked(self.folder / "lock",
                                                        "Waiting for {who}, which plans the rows of an epoch"):
            yield

    def _facts(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, DataError):        # not there, or damaged
            facts = read_json(self.folder / FACTS)
            return facts if isinstance(facts, dict) and facts.keys() >= KEYS else {}
        return {}

    def _write(self, facts: dict[str, Any]) -> None:
        write_whole(self.folder / FACTS, json.dumps(facts), sync=True)

    def _rows(self, epoch: int) -> Rows:
        """Rows of an epoch."""
        names, note = [f"{epoch:06d}-{name}.npy" for name in ("order", "starts")], f"{epoch:06d}-{SEAL}"
        files = [self.folder / name for name in names]
        if not is_sealed(self.folder, names, note):
            with self._alone():
                if not is_sealed(self.folder, names, note):
                    with terminal.current.doing(f"Planning the rows of epoch {epoch + 1}"):
                        rows = self._made(self.batch_rows).made(epoch)
                    for file, column in zip(files, (rows.order, rows.starts)):
                        with whole_file(file, sync=True) as target, open(target, "wb") as opened:
                            np.save(opened, column)
                    seal(self.folder, names, note)
                    del rows, column
                    give_back()
                    make_room(self.folder.parent.parent)
        return Rows(*(np.load(file, mmap_mode="r") for file in files))

    def row(self, place: int) -> list[int]:
        """See `RunPlan.row`; what is mapped of the rows is kept small."""
        self._looks += 1
        if self._looks % LOOKS == 0:
            for rows in list(self._known.values()):
                unmap(rows.order, rows.starts)
        return super().row(place)

    def _check(self, epochs: int) -> None:
        """Checks that so many epochs can be made, unless that was done before."""
        with self._alone():
            facts = self._facts()
            if facts["checked"] < epochs:
                self._made(self.batch_rows).check(epochs)
                self._write({**facts, "checked": epochs})


def _held(folder: Path) -> Held:
    """A plan's folder, made if it is not there, as one that this process uses."""
    while True:
        with writing(folder.parent.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):      # it was removed just now
            return Held(folder)


def saved(make: Callable[[int], RunPlan], folder: Path, *depends: object) -> Callable[[int], RunPlan]:
    """The planner of a run whose plans are kept on disk.

    Args:
        make: the plan of a run from the rows of a global batch.
        folder: where indices lie.
        *depends: everything that the plan follows from; the first is the name of the folder of the samples.
    """
    def plan(batch_rows: int) -> RunPlan:
        return SavedPlan(make, folder / PLANS / key_of(VERSION, batch_rows, *depends), batch_rows,
                         str(depends[0]) if depends else "")

    return plan
