"""MindSpore's strategy files: how a rank's parameters are cut, read from a run's and written from the table of cuts.

The format is MindSpore's node_strategy.proto, read and written here, so that a checkpoint can be opened or cut without
importing MindSpore.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mindformers_ixc.checkpoint.layouts import Layout, Strategy
from mindformers_ixc.checkpoint.protobuf import decode_fields, encode_field, numbers
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.parallel.cuts import ROWS, cut_axis, product_strategy
from mindformers_ixc.parallel.slices import EMBEDDING

# MindFormers' name of a rank's strategy file.
STRATEGY_FILE = "ckpt_strategy_rank_{}.ckpt"

# What MindSpore's compiler writes as `current_stage`, whatever the stage (which stands in every operator's strategy).
CURRENT_STAGE = 2

# Field numbers of MindSpore's node_strategy.proto, by message.
_STAGE, _ITEMS, _LAYOUTS = 1, 2, 3                 # ParallelStrategyMap
_NAME, _CONTENT = 1, 2                             # ParallelStrategyItem, ParallelLayoutItem
_OWN_STAGE, _INPUT = 1, 2                          # ParallelStrategys
_DIM = 1                                           # of whatever has dimensions
_MATRIX, _MAP, _SPLIT, _OFFSET, _FIELD, _STEP, _SHARDS = range(1, 8)     # ParallelLayouts

# Operators that read a parameter first in the model's graphs, beside the products: names of parameters, operator, and
# the axes of its inputs, which are all whole.
_WHOLE_OPERATORS = (
    (r"\.class_embedding$", "Mul", (3, 1)),
    (r"\.patch_embedding\.weight$", "Mul", (5, 4)),
    (r"\.position_embedding\.weight$", "ExpandDims", (2,)),
    (r"\.(layer_norm\d|pre_layrnorm)\.weight$", "LayerNorm", (2, 1, 1)),
    (r"^plora_glb_GN$", "Tile", (3,)),
    (r"^plora_sub_GN$", "Reshape", (4,)),
    (r"(_norm|^model\.norm)\.weight$", "Mul", (2, 1)),
)


def read_strategy(path: Path) -> Strategy:
    """Reads a strategy file, or the folder of all ranks' files.

    Raises:
        CheckpointError: when there is none, one is damaged, or a pipeline stage is missing.
    """
    files = strategy_files(path)
    if not files:
        raise CheckpointError(f"{path} holds no strategy files (*.ckpt); a run writes them to <output>/strategy.")
    layouts: dict[str, Layout] = {}
    stages: dict[str, list[int]] = {}
    for file in files:
        own, found = read_layouts(file)
        for words, layout in found.items():
            merged = re.match(r"(\d+)-(.+)", words)       # a file of all stages names them so
            stage, name = (int(merged[1]), merged[2]) if merged else (own, words)
            if layouts.setdefault(name, layout) != layout:
                raise CheckpointError(f"{path} gives two layouts of {name}: {layouts[name]} and, in {file.name}, "
                                      f"{layout}; these are strategy files of different runs, or damaged.")
            if stage not in stages.setdefault(name, []):
                stages[name].append(stage)
    if not layouts:
        raise CheckpointError(f"{path} holds no layout of any parameter.")
    present = sorted({stage for found in stages.values() for stage in found})
    if present != list(range(len(present))):
        raise CheckpointError(f"{path} holds the pipeline stages {present}; give the strategy files of all of them.")
    devices = {layout.devices for layout in layouts.values()}
    if len(devices) > 1:
        raise CheckpointError(f"{path} speaks of stages of {' and of '.join(map(str, sorted(devices)))} devices; these "
                              "are strategy files of different runs, or damaged.")
    return Strategy(layouts, stages, len(present))


def strategy_files(path: Path) -> list[Path]:
    """The strategy file, or those of a folder by rank."""
    return [path] if path.is_file() else sorted(path.glob("*.ckpt"), key=_rank_in_name)


def _rank_in_name(path: Path) -> int:
    match = re.search(r"rank_(\d+)", path.name)
    return int(match[1]) if match else 0


def read_layouts(path: Path) -> tuple[int, dict[str, Layout]]:
    """Pipeline stage and layouts of one strategy file.

    Raises:
        CheckpointError: when it is none.
    """
    try:
        fields = _grouped(path.read_bytes())
        items = [_grouped(item) for item in fields.get(_LAYOUTS, [])]
        layouts = {}
        for item in items:
            name = item[_NAME][0].decode()
            if name in layouts:
                raise ValueError(f"{name} is there twice")
            layouts[name] = _layout(_grouped(item[_CONTENT][0]))
            layouts[name].check()
        first = fields.get(_ITEMS)
        stage = _grouped(_grouped(first[0])[_CONTENT][0])[_OWN_STAGE][0] if first else 0
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is no MindSpore strategy file ({error}).") from error
    return int(stage), layouts


def _grouped(message: bytes) -> dict[int, list]:
    """Values of a message's fields by their number."""
    found: dict[int, list] = {}
    for number, value in decode_fields(message):
        found.setdefault(number, []).append(value)
    return found


def _layout(fields: dict[int, list]) -> Layout:
    maps = [tuple(numbers(_grouped(entry).get(_DIM, []))) for entry in fields[_MAP]]
    # several maps: one for each axis of the parameter, which may be cut along several axes of the devices
    tensor_map = maps[0] if len(maps) == 1 else tuple(entry for entry in maps if entry)
    matrix = tuple(numbers(_grouped(fields[_MATRIX][0]).get(_DIM, [])))
    return Layout(matrix, tensor_map, numbers(fields.get(_SHARDS, [0]))[0])


def write_strategies(folder: Path, layouts: dict[str, tuple[Layout, int]], in_graph: set[str], stages: int,
                     like: dict[str, str]) -> None:
    """Writes the strategy file of every rank, as MindSpore's compiler would write it.

    MindSpore's checkpoint functions drop parameters that a strategy does not name, so those outside the graph are there
    too: whole on every device, as MindSpore leaves them.

    Args:
        folder: where the files go.
        layouts: layout and stage of every parameter.
        in_graph: parameters that the graphs use.
        stages: pipeline stages.
        like: further names that are laid out like a parameter (optimizer states).
    """
    folder.mkdir(parents=True, exist_ok=True)
    devices = next(iter(layouts.values()))[0].devices
    for stage in range(stages):
        own = {name: layout for name, (layout, owner) in layouts.items() if owner == stage}
        content = encode_field(_STAGE, CURRENT_STAGE)
        content += b"".join(encode_field(_ITEMS, item) for name, layout in own.items() if name in in_graph
                            for item in _strategy_items(name, layout.devices, stage, stages))
        own.update({name: own[parameter] for name, parameter in like.items() if parameter in own})
        content += b"".join(encode_field(_LAYOUTS, _layout_item(name, layout)) for name, layout in own.items())
        for rank in range(stage * devices, (stage + 1) * devices):
            (folder / STRATEGY_FILE.format(rank)).write_bytes(content)


def _dims(values: Iterable[int]) -> bytes:
    return b"".join(encode_field(_DIM, value) for value in values)


def _layout_item(name: str, layout: Layout) -> bytes:
    content = encode_field(_MATRIX, _dims(layout.device_matrix)) + encode_field(_MAP, _dims(layout.tensor_map))
    content += encode_field(_SPLIT, b"") + encode_field(_OFFSET, b"")
    content += b"".join(encode_field(number, 0) for number in (_FIELD, _STEP, _SHARDS))
    return encode_field(_NAME, name.encode()) + encode_field(_CONTENT, content)


def _strategy_items(name: str, degree: int, stage: int, stages: int) -> Iterator[bytes]:
    for operator, inputs in _operators(name, degree, stages):
        content = encode_field(_OWN_STAGE, stage)
        content += b"".join(encode_field(_INPUT, _dims(cut)) for cut in inputs)
        yield encode_field(_NAME, f"{operator}_{name}".encode()) + encode_field(_CONTENT, content)


def _operators(name: str, degree: int, stages: int) -> Iterator[tuple[str, tuple[tuple[int, ...], ...]]]:
    """The operator of the graph that reads a parameter first, with its strategy; a LayerNorm's bias has none."""
    if name == "plora_glb_GN" and stages == 1:       # of one sample nothing is repeated: it goes into Concat as it is
        yield "MakeTuple", ((1, 1, 1),) * 3
        return
    for pattern, operator, axes in _WHOLE_OPERATORS:
        if re.search(pattern, name):
            yield operator, tuple((1,) * count for count in axes)
            return
    axis = cut_axis(name)
    if name == EMBEDDING:
        yield "Gather", ((degree, 1), (1, 1))
    elif name.endswith(".weight"):
        yield "MatMul", product_strategy(axis, 1, degree)
    elif not re.search(r"(norm\d|layrnorm)\.bias$", name):
        features = degree if axis == ROWS else 1
        yield "BiasAdd", ((1, features), (features,))
