"""Steps that are not taken because their loss or gradient norm is a spike: above which limits, and how many were.

The step's cell compares and leaves weights and optimizer as they are (`training.wrapper`); the limits come from here,
before every step, and follow from the rows of `metrics.jsonl` alone. So a resumed run has those it would have had.
"""
from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from mindformers_ixc.training_options import SPIKE_VALUES, SPIKES


class SpikeWatch:
    """What a run knows of its steps' losses and gradient norms.

    Args:
        loss: limit of the loss; `None` for none, as all limits.
        grad_norm: limit of the gradient norm (before it is clipped).
        loss_times: the limit of the loss is so many times the median of the last steps.
        grad_norm_times: the same of the gradient norm.
        window: so many last steps that were taken; before there are as many no median is a limit.
        most_in_a_row: steps that may be skipped one after another.
    """

    def __init__(self, loss: float | None = None, grad_norm: float | None = None, loss_times: float | None = None,
                 grad_norm_times: float | None = None, window: int = SPIKES["window"],
                 most_in_a_row: int = SPIKES["most_in_a_row"]):
        self.fixed = {"loss": loss, "grad_norm": grad_norm}
        self.times = {"loss": loss_times, "grad_norm": grad_norm_times}
        self.window, self.most_in_a_row = window, most_in_a_row
        self.taken: dict[str, deque[float]] = {name: deque(maxlen=window) for name in SPIKE_VALUES}
        self.in_a_row = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes the row of a step: a skipped one sets no measure for those after it."""
        if row.get("skipped"):
            self.in_a_row += 1
            return
        self.in_a_row = 0
        for name, values in self.taken.items():
            value = row.get(name)
            if not row.get("overflow") and isinstance(value, (int, float)):
                values.append(value)

    def limit(self, name: str) -> float:
        """Above which a value of the next step is a spike; infinite where nothing is."""
        fixed, times, values = self.fixed[name], self.times[name], self.taken[name]
        limits = [] if fixed is None else [fixed]
        if times is not None and len(values) == self.window and (median := statistics.median(values)) > 0:
            limits.append(times * median)
        return float(np.float32(min(limits, default=float("inf"))))

    def is_too_wide(self, steps: int) -> bool:
        """Whether no median is ever a limit of a run of so many steps, although some should be."""
        return self.window >= steps and any(times is not None for times in self.times.values())

    def set_limits(self, cell: nn.Cell) -> None:
        """Tells a step's cell the limits of its next step."""
        cell.spike_limits.set_data(Tensor(np.array([self.limit(name) for name in SPIKE_VALUES], np.float32)))

    def why(self, row: Mapping[str, Any]) -> str:
        """Which value of a step that was skipped is above which limit; asked before its row is taken."""
        found = [f"its {name} {row[name]:.4g} is above {self.limit(name):.4g}" for name in SPIKE_VALUES
                 if isinstance(row.get(name), (int, float)) and row[name] > self.limit(name)]
        return " and ".join(found)
