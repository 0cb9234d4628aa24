"""How a run's parameters are cut over its devices, as MindSpore describes it: a device matrix and a tensor map."""
from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

# Devices of a stage that nobody has yet; a number above it is damage.
MAX_DEVICES = 2**20


@dataclass(frozen=True)
class Layout:
    """Cut of one parameter over the devices of a pipeline stage.

    Attributes:
        device_matrix: arrangement of the stage's devices, outermost axis first.
        tensor_map: for each axis of the parameter the axis of the device matrix it is cut along, counted from the
            last, or -1; several axes as a tuple.
        optimizer_shards: how often the slice is cut once more along its first axis (optimizer parallel), 0 for not; -1
            for as often as there are copies.
    """

    device_matrix: tuple[int, ...]
    tensor_map: tuple
    optimizer_shards: int = 0

    @property
    def devices(self) -> int:
        """Devices of the stage."""
        return math.prod(self.device_matrix)

    def check(self) -> None:
        """Refuses what is no cut.

        Raises:
            ValueError: for a device matrix that is none, or an axis it does not have or that is used twice.
        """
        if not self.device_matrix or min(self.device_matrix) < 1 or self.devices > MAX_DEVICES:
            raise ValueError(f"{self.device_matrix} is no arrangement of devices")
        flat = [axis for entry in self.tensor_map for axis in (entry if isinstance(entry, (tuple, list)) else [entry])]
        used = [axis for axis in flat if axis != -1]
        if any(not 0 <= axis < len(self.device_matrix) for axis in used) or len(set(used)) < len(used):
            raise ValueError(f"the cut {self.tensor_map} does not belong to the devices {self.device_matrix}")
        if not -1 <= self.optimizer_shards <= self.devices:
            raise ValueError(f"{self.optimizer_shards} optimizer shards on {self.devices} devices")

    def _axes(self, entry: int | tuple[int, ...] | list[int]) -> list[int]:
        """Axes of the device matrix that one axis of the tensor is cut along."""
        entries = entry if isinstance(entry, (tuple, list)) else (entry,)
        return [len(self.device_matrix) - 1 - index for index in entries if index != -1]

    def _optimizer_axes(self) -> list[tuple[int, int]]:
        """Axes of copies that optimizer parallel uses, innermost first, with how much of each."""
        used = {axis for entry in self.tensor_map for axis in self._axes(entry)}
        copies = [axis for axis, size in enumerate(self.device_matrix) if axis not in used and size > 1]
        left = self.optimizer_shards
        if left == -1:
            left = math.prod(self.device_matrix[axis] for axis in copies)
        taken = []
        for axis in reversed(copies):
            if left <= 1:
                break
            size = min(left, self.device_matrix[axis])
            taken.append((axis, size))
            left //= size
        return taken

    def counts(self) -> tuple[int, ...]:
        """Into how many slices each axis of the parameter is cut."""
        counts = [math.prod(self.device_matrix[axis] for axis in self._axes(entry)) for entry in self.tensor_map]
        if counts and self.optimizer_shards:
            counts[0] *= math.prod(size for _, size in self._optimizer_axes())
        return tuple(counts)

    def slices(self, shape: tuple[int, ...], device: int) -> tuple[slice, ...]:
        """What a device of the stage holds of a parameter of `shape`."""
        place: list[int] = []                                 # of the device in the matrix
        for size in reversed(self.device_matrix):
            device, index = divmod(device, size)
            place.insert(0, index)
        positions = []
        for entry in self.tensor_map:
            position = 0
            for axis in self._axes(entry):
                position = position * self.device_matrix[axis] + place[axis]
            positions.append(position)
        if positions and self.optimizer_shards:
            inner, stride = 0, 1
            for axis, size in self._optimizer_axes():
                inner += place[axis] % size * stride
                stride *= size
            positions[0] = positions[0] * stride + inner
        sizes = [length // count for length, count in zip(shape, self.counts())]
        return tuple(slice(position * size, (position + 1) * size) for position, size in zip(positions, sizes))


@dataclass
class Strategy:
    """Layouts of every parameter of a run.

    Attributes:
        layouts: by parameter name.
        stages: pipeline stages that have the parameter.
        stage_count: pipeline stages of the run.
    """

    layouts: dict[str, Layout]
    stages: dict[str, list[int]]
    stage_count: int

    @property
    def devices(self) -> int:
        """Devices of a stage."""
        return next(iter(self.layouts.values())).devices

    @property
    def ranks(self) -> int:
        """Devices of the run."""
        return self.devices * self.stage_count


def covers(shape: tuple[int, ...], regions: list[tuple[slice, ...]]) -> bool:
    """Whether regions that do not overlap fill a shape."""
    volume = sum(math.prod(part.stop - part.start for part in region) for region in regions)
    return volume == math.prod(shape) and all(
        any(a.stop <= b.start or b.stop <= a.start for a, b in zip(first, second))
        for first, second in itertools.combinations(regions, 2))
