"""Parameters that a parallel run's graph does not use, and that its ranks therefore do not save.

Those are the vision tower's last norm and the task LoRAs of other modes. They are as they were when the run began: in
the weights it began with, or in a file that a run which began with none leaves beside its checkpoints.
"""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mindformers_ixc.checkpoint.sources import OpenedCheckpoint, open_source
from mindformers_ixc.checkpoint.tensors import LazyTensor

# What a run leaves that began with no weights and did not join its ranks.
UNUSED_FILE = "unused.safetensors"


def unused_parameters(run: Path, start: object, names: Iterable[str]) -> dict[str, LazyTensor]:
    """What is to be had of a run's parameters that are in no rank's file.

    Args:
        run: folder of the run.
        start: the weights it began with, as its record names them.
        names: of the parameters.
    """
    wanted = set(names)
    place = Path(str(start)) if start else run / UNUSED_FILE
    if not wanted or not place.exists():
        return {}
    tensors = open_source(place).tensors
    return {name: tensors[name] for name in tensors if name in wanted}


def of_ranks(source: OpenedCheckpoint, record: dict, names: Iterable[str]) -> dict[str, LazyTensor]:
    """`unused_parameters` of an opened checkpoint; nothing if it is not that of a run's ranks.

    Args:
        source: the checkpoint.
        record: what its run has put down (`run_config.json`).
        names: of the parameters that it lacks.
    """
    if source.kind != "ranks" or source.run_folder is None or not record:
        return {}
    return unused_parameters(source.run_folder, record.get("start"), names)
