"""Plans of runs on disk: the rows of an epoch are made once, and all processes of a machine share them."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ixc import terminal
from mindformers_ixc.data.columns import give_back, unmap
from mindformers_ixc.data.index.building import key_of, locked
from mindformers_ixc.data.packer import Rows
from mindformers_ixc.data.sampling import RunPlan
from mindformers_ixc.files import read_json, whole_file, write_whole

# Changes whenever other rows come of the same settings.
VERSION = 1

FACTS = "plan.json"

# Rows that are looked up before what was mapped of the files is let go of.
LOOKS = 128


class SavedPlan(RunPlan):
    """A plan whose numbers and epochs are kept in a folder.

    Args:
        make: the plan itself; it is made only when something is missing.
        folder: for what it gives; of a name that follows from everything it depends on.
        batch_rows: rows of a global batch.
    """

    def __init__(self, make: Callable[[int], RunPlan], folder: Path, batch_rows: int):
        self.folder, self._make_plan = folder, make
        self._plan: RunPlan | None = None
        self._looks = 0
        folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            facts = self._facts()
            if not facts:
                with terminal.current.doing("Planning the rows of an epoch"):
                    plan = self._made(batch_rows)
                facts = {"epoch_rows": plan.epoch_rows, "mean_samples": plan.mean_samples, "note": plan.note,
                         "checked": 0}
                self._write(facts)
        super().__init__(self._rows, facts["epoch_rows"], batch_rows, facts["mean_samples"], self._check,
                         facts["note"])

    def _made(self, batch_rows: int) -> RunPlan:
        if self._plan is None:
            self._plan = self._make_plan(batch_rows)
        return self._plan

    def _alone(self) -> Any:
        return locked(self.folder / "lock", "Waiting for another process that plans the rows of an epoch")

    def _facts(self) -> dict[str, Any]:
        file = self.folder / FACTS
        return read_json(file) if file.exists() else {}

    def _write(self, facts: dict[str, Any]) -> None:
        write_whole(self.folder / FACTS, json.dumps(facts))

    def _rows(self, epoch: int) -> Rows:
        """Rows of an epoch."""
        files = [self.folder / f"{epoch:06d}-{name}.npy" for name in ("order", "starts")]
        if not files[1].exists():            # the second one is written last
            with self._alone():
                if not files[1].exists():
                    with terminal.current.doing(f"Planning the rows of epoch {epoch + 1}"):
                        rows = self._made(self.batch_rows).made(epoch)
                    for file, column in zip(files, (rows.order, rows.starts)):
                        with whole_file(file) as target, open(target, "wb") as opened:
                            np.save(opened, column)
                    del rows, column
                    give_back()
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


def saved(make: Callable[[int], RunPlan], folder: Path, *depends: object) -> Callable[[int], RunPlan]:
    """The planner of a run whose plans are kept on disk.

    Args:
        make: the plan of a run from the rows of a global batch.
        folder: where indices lie.
        *depends: everything that the plan follows from.
    """
    def plan(batch_rows: int) -> RunPlan:
        return SavedPlan(make, folder / "plans" / key_of(VERSION, batch_rows, *depends), batch_rows)

    return plan
