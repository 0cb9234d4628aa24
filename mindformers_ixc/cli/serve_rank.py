"""A rank of a server over several devices: how `mindformers launch ... serve` lets its processes come together."""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
from mindspore.communication import get_group_size, get_rank, init

from mindformers_ixc.cpu_cluster.groups import install
from mindformers_ixc.device import rank, share_results
from mindformers_ixc.parallel.degrees import Degrees, inference_layout
from mindformers_ixc.serving.ranks import READY, Following, Leading, accept, connect, end_server
from mindformers_ixc.serving.scheduling import RowDecoder


class ServingRank:
    """This process's part in a server of several ranks.

    Args:
        folder: where the ranks meet.

    Attributes:
        leads: whether it is rank 0, which has the port.
    """

    def __init__(self, folder: Path):
        self.folder, self.leads = folder, rank() == 0

    def join(self, device: str) -> dict:
        """Joins the ranks; the layout as fields of the model: tensor parallel over all of them.

        Args:
            device: name of the device, which is set already.
        """
        init()
        if device == "CPU":
            install()
        ms.set_auto_parallel_context(parallel_mode="semi_auto_parallel", full_batch=True, device_num=get_group_size(),
                                     global_rank=get_rank())
        share_results()
        if self.leads:
            self._others = accept(self.folder, get_group_size())
        return {"parallel_config": inference_layout(Degrees(model_parallel=get_group_size()))}

    def lead(self, decoder: RowDecoder) -> Leading:
        """Rank 0's decoder, once the others have theirs."""
        return Leading(decoder, self._others(), end_server)

    def follow(self, decoder: RowDecoder) -> None:
        """Does what rank 0 says, until that says it is over."""
        Following(decoder, connect(self.folder, get_rank())).run()

    def ready(self) -> None:
        """Says that the port is open."""
        (self.folder / READY).touch()
