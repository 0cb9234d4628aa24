"""How parameters are cut over devices: MindSpore's strategy files, read and written."""
from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

from mindformers_ixc.checkpoint.errors import CheckpointError

# MindFormers' name of a rank's strategy file.
STRATEGY_FILE = "ckpt_strategy_rank_{}.ckpt"


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

    def _axes(self, entry) -> list[int]:
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
        place = []                                            # of the device in the matrix
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


def read_strategy(path: Path) -> Strategy:
    """Reads a strategy file, or the folder of all ranks' files.

    Raises:
        CheckpointError: when there is none, one is damaged, or a pipeline stage is missing.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.ckpt"), key=_rank_in_name)
    if not files:
        raise CheckpointError(f"{path} holds no strategy files (*.ckpt); a run writes them to <output>/strategy.")
    layouts, stages = {}, {}
    for file in files:
        message = _parse(file)
        own = message.parallel_strategy_item[0].parallel_strategys.stage if message.parallel_strategy_item else 0
        for item in message.parallel_layout_item:
            merged = re.match(r"(\d+)-(.+)", item.param_name)       # a file of all stages names them so
            stage, name = (int(merged[1]), merged[2]) if merged else (own, item.param_name)
            layouts[name] = _layout(item.parallel_layouts)
            if stage not in stages.setdefault(name, []):
                stages[name].append(stage)
    if not layouts:
        raise CheckpointError(f"{path} holds no layout of any parameter.")
    present = sorted({stage for found in stages.values() for stage in found})
    if present != list(range(len(present))):
        raise CheckpointError(f"{path} holds the pipeline stages {present}; give the strategy files of all of them.")
    return Strategy(layouts, stages, len(present))


def names_in(path: Path) -> set[str]:
    """Parameters that a strategy file names."""
    return {item.param_name for item in _parse(path).parallel_layout_item}


def _rank_in_name(path: Path) -> int:
    match = re.search(r"rank_(\d+)", path.name)
    return int(match[1]) if match else 0


def _parse(path: Path):
    from google.protobuf.message import DecodeError
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    message = ParallelStrategyMap()
    try:
        message.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise CheckpointError(f"{path} is no MindSpore strategy file ({error}).") from error
    return message


def _layout(fields) -> Layout:
    maps = [tuple(entry.dim) for entry in fields.tensor_map]
    # several maps: one for each axis of the parameter, which may be cut along several axes of the devices
    tensor_map = tuple(maps[0]) if len(maps) == 1 else tuple(entry for entry in maps if entry)
    return Layout(tuple(fields.dev_matrix[0].dim), tensor_map, int(fields.opt_weight_shard_size))


def write_strategies(folder: Path, compiled: list[Path], whole: dict[str, tuple[int, int]],
                     like: dict[str, str]) -> Strategy:
    """Writes the strategy file of every rank from those that were compiled, one for each pipeline stage.

    MindSpore's checkpoint functions drop parameters that a strategy does not name, so those outside the graph are
    added: whole on every device, as MindSpore leaves them.

    Args:
        folder: where the files go.
        compiled: compiled strategy file of each stage, in order.
        whole: parameters outside the graph, with their number of axes and their stage.
        like: further names that are laid out like a parameter (optimizer states).

    Returns:
        What was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank = 0
    for stage, source in enumerate(compiled):
        message = _parse(source)
        known = {item.param_name: item.parallel_layouts for item in message.parallel_layout_item}
        devices = list(next(iter(known.values())).dev_matrix[0].dim)
        for name, (axes, owner) in whole.items():
            if owner == stage and name not in known:
                known[name] = _append(message, name, devices, [-1] * axes)
        for name, parameter in like.items():
            if parameter in known and name not in known:
                item = message.parallel_layout_item.add()
                item.param_name = name
                item.parallel_layouts.CopyFrom(known[parameter])
        for _ in range(math.prod(devices)):
            (folder / STRATEGY_FILE.format(rank)).write_bytes(message.SerializeToString())
            rank += 1
    return read_strategy(folder)


def _append(message, name: str, devices: list[int], tensor_map: list[int]):
    item = message.parallel_layout_item.add()
    item.param_name = name
    layouts = item.parallel_layouts
    layouts.dev_matrix.add().dim.extend(devices)
    layouts.tensor_map.add().dim.extend(tensor_map)
    layouts.param_split_shape.add()
    layouts.indices_offset.add()
    layouts.field = layouts.opt_weight_shard_step = layouts.opt_weight_shard_size = 0
    return layouts


def covers(shape: tuple[int, ...], regions: list[tuple[slice, ...]]) -> bool:
    """Whether regions that do not overlap fill a shape."""
    volume = sum(math.prod(part.stop - part.start for part in region) for region in regions)
    return volume == math.prod(shape) and all(
        any(a.stop <= b.start or b.stop <= a.start for a, b in zip(first, second))
        for first, second in itertools.combinations(regions, 2))
