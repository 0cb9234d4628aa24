"""A program: computes a small graph whose compiled form is kept. Arguments: folder, slope, offset, weight."""
from __future__ import annotations

import logging
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from mindformers_ixc.training import kept_graphs


class Line(nn.Cell):
    """A graph with a parameter, a constant tensor and a constant number."""

    def __init__(self, slope: float = 2.0, offset: float = 1.0, weight: float = 1.0):
        super().__init__()
        self.slope, self.offset = slope, Tensor(np.full(3, offset, np.float32))
        self.weight = Parameter(Tensor(np.full(3, weight, np.float32)), name="weight")

    def compile(self, *args, **kwargs):
        """Compiles, or takes what is kept."""
        kept_graphs.compile_kept(self, args, lambda: super(Line, self).compile(*args, **kwargs))

    def construct(self, x):
        """The line."""
        return x * self.slope * self.weight + self.offset


if __name__ == "__main__":
    kept_graphs.folder = Path(sys.argv[1])
    kept_graphs.logger.addHandler(logging.StreamHandler(sys.stdout))
    kept_graphs.logger.setLevel(logging.INFO)
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_device("CPU")
    line = Line(*map(float, sys.argv[2:]))
    for _ in range(2):
        print(line(Tensor(np.arange(3, dtype=np.float32))).asnumpy().tolist())
    assert Line(5.0)(Tensor(np.ones(3, np.float32))).asnumpy().tolist() == [6.0, 6.0, 6.0], "a later graph"
