"""Lays a checkpoint out in files and writes it: whole, in shards or over ranks, with everything that goes beside it."""
from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mindformers_ixc.checkpoint.digests import DIGEST_FILE, verification, verify_folder, write_digests
from mindformers_ixc.checkpoint.dtypes import weight_format
from mindformers_ixc.checkpoint.layouts import Layout
from mindformers_ixc.checkpoint.model_config import run_tokenizer, write_config
from mindformers_ixc.checkpoint.sources import INDEX_FILES, SUFFIXES, OpenedCheckpoint
from mindformers_ixc.checkpoint.strategy_file import write_strategies
from mindformers_ixc.checkpoint.streaming import Item, Output, WorkFolder, is_file_target, write_items
from mindformers_ixc.checkpoint.tensors import LazyTensor
from mindformers_ixc.config import CONFIG_FILE, ModelConfig
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.fields import ALL_MODES
from mindformers_ixc.files import RUN_RECORD, read_json
from mindformers_ixc.parallel.slices import placement
from mindformers_ixc.parallel.stages import layer_stages
from mindformers_ixc.parameters import base_name, parameter_table, part_of
from mindformers_ixc.processing.tokenizer import Tokenizer
from mindformers_ixc.sections import check_value, one_of

# Bytes of a shard at most, unless it is one tensor; Hugging Face's default.
SHARD_BYTES = 5 * 10**9
# The step number in the rank files' names, as MindFormers' checkpoint callback writes it: nothing trained yet.
RANK_FILE = "rank_{0}/ixc25_rank_{0}-0_0"
RANK_INDEX = "checkpoint.index.json"

# Files beside the weights that are written anew, or speak of the source's files only.
OWN_FILES = (*INDEX_FILES, RANK_INDEX, CONFIG_FILE, DIGEST_FILE, RUN_RECORD)


@dataclass(frozen=True)
class Options:
    """What a conversion makes.

    Attributes:
        to: `ms` or `hf` (public layout).
        format: container of `ms`: `safetensors` or `ckpt`.
        tensor_parallel: devices of a stage; with more than one in all, rank folders are written.
        pipeline_stages: stages.
        dtype: format of the weights, `None` keeps each tensor's.
        mode: task LoRAs in the graph the layout is compiled for, see `fields.ALL_MODES`.
        drop: task LoRAs to leave out.
        shard_bytes: size of a file at most.
    """

    to: str = "ms"
    format: str = "safetensors"
    tensor_parallel: int = 1
    pipeline_stages: int = 1
    dtype: str | None = None
    mode: str = "all"
    drop: tuple[str, ...] = ()
    shard_bytes: int = SHARD_BYTES

    @property
    def ranks(self) -> int:
        """Devices of all pipeline stages together."""
        return self.tensor_parallel * self.pipeline_stages

    def check(self) -> None:
        """Refuses values that are unknown or contradict each other.

        Raises:
            CheckpointError: naming value and choices.
        """
        for name, choices in (("to", ("ms", "hf")), ("format", ("safetensors", "ckpt")), ("mode", tuple(ALL_MODES))):
            check_value(name, getattr(self, name), one_of(choices), CheckpointError)
        if self.dtype is not None:
            weight_format(self.dtype)
        if self.tensor_parallel < 1 or self.pipeline_stages < 1:
            raise CheckpointError("Tensor parallel and pipeline stages are counted from 1.")
        if self.to == "hf" and (self.ranks > 1 or self.format != "safetensors"):
            raise CheckpointError("The public layout is whole and in safetensors; --tp, --pp and --format ckpt belong "
                                  "to --to ms.")


def write_checkpoint(tensors: dict[str, LazyTensor], config: ModelConfig, source: OpenedCheckpoint, target: Path,
                     options: Options, overwrite: bool = False, job: dict | None = None,
                     sections: dict | None = None) -> None:
    """Writes tensors as a checkpoint, with configuration, tokenizer, index and, for ranks, strategies.

    Args:
        tensors: by name.
        config: goes into `config.json`.
        source: whose other files (tokenizer, code) are copied.
        target: directory or file to be made.
        options: what to make.
        overwrite: replace a target that exists.
        job: what makes the tensors, beside source and options.
        sections: further ones of the target's `config.json`.

    Raises:
        CheckpointError: when the target is not allowed or cannot be written.
    """
    check_target(source, target, options)
    job = {"options": asdict(options), "config": config.to_public_dict(), "further": job,
           "source": [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in source.files]}
    work = WorkFolder(target, job)
    if target.exists() and (target.is_file() or any(target.iterdir())):
        if not overwrite and _made_by(target, work.digest):
            work.clear()
            if verification():
                verify_folder(target)
            return
        if not overwrite:
            raise CheckpointError(f"{target} exists; choose another target or say --overwrite.")
    with work.open():
        items = _items(tensors, options)
        title = f"{source.path.name} -> {target.name}"
        if options.ranks > 1:
            sums = _write_ranks(work, items, config, options, title)
        else:
            _place_whole(items, target, options)
            sums = write_items(work, items, title)
        if not is_file_target(target):
            _write_side_files(work, items, sums, config, source, options, sections)
        work.publish()


def check_target(source: OpenedCheckpoint, target: Path, options: Options) -> None:
    """Refuses a target that is the source or inside it, or a file where a directory is needed.

    Raises:
        CheckpointError: naming both.
    """
    here, there = source.path.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise CheckpointError(f"Source {source.path} and target {target} are the same or one inside the other; choose "
                              "another target.")
    if is_file_target(target) and options.ranks > 1:
        raise CheckpointError(f"{target} is one file, but {options.ranks} ranks need a directory.")
    if not is_file_target(target) and target.suffix in SUFFIXES:
        raise CheckpointError(f"{target}: {target.suffix} files are not written; the choices are .safetensors, .ckpt "
                              "or a directory.")
    parent = target.parent
    if not parent.is_dir():
        raise CheckpointError(f"{parent}, in which {target.name} is to be made, is no directory.")


def _made_by(target: Path, digest: str) -> bool:
    """Whether a directory is the whole result of this very job."""
    for name in (*INDEX_FILES, RANK_INDEX):
        if target.is_dir() and (target / name).is_file():
            fields = read_json(target / name, CheckpointError)
            metadata = fields.get("metadata") if isinstance(fields, dict) else None
            return isinstance(metadata, dict) and metadata.get("job") == digest
    return False


def _items(tensors: dict[str, LazyTensor], options: Options) -> list[Item]:
    items = []
    for name, tensor in tensors.items():
        dtype = tensor.stored_dtype
        if options.dtype is not None and base_name(name) == name and part_of(name) is not None:
            dtype = weight_format(options.dtype)
        items.append(Item(name, tensor, dtype))
    return items


def _whole(tensor: LazyTensor) -> tuple[slice, ...]:
    return tuple(slice(0, length) for length in tensor.shape)


def _place_whole(items: list[Item], target: Path, options: Options) -> None:
    """Gives every tensor its file: one, or shards of limited size, in the order of the source."""
    if is_file_target(target):
        for item in items:
            item.outputs = [Output(target.name, _whole(item.tensor))]
        return
    if options.format == "ckpt":       # MindFormers loads one .ckpt, never several
        for item in items:
            item.outputs = [Output("model.ckpt", _whole(item.tensor))]
        return
    shards: list[list[Item]] = [[]]
    used = 0
    for item in items:
        item.outputs = [Output("", _whole(item.tensor))]
        if shards[-1] and used + item.nbytes > options.shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(item)
        used += item.nbytes
    for index, shard in enumerate(shards):
        # the names each side's loaders look for: Hugging Face's, and those of MindSpore's unified_safetensors
        name = (f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" if options.to == "hf"
                else f"part{index}.safetensors")
        for item in shard:
            item.outputs = [replace(item.outputs[0], file=name)]


def expected_layouts(config: ModelConfig, tensor_parallel: int, pipeline_stages: int,
                     mode: str = "all") -> dict[str, tuple[Layout, int]]:
    """Layout and stage of every parameter, by the one rule of `parallel.slices`.

    Args:
        config: sizes of the model.
        tensor_parallel: devices of a stage.
        pipeline_stages: stages.
        mode: task LoRAs in the graph, a key of `fields.ALL_MODES`.
    """
    stages, layouts = layer_stages(config.num_hidden_layers, pipeline_stages), {}
    for name, entry in parameter_table(config).items():
        place = placement(name, config, stages, ALL_MODES[mode])
        cut = place.axis if tensor_parallel > 1 else None
        tensor_map = tuple(0 if axis == cut else -1 for axis in range(len(entry.shape)))
        layouts[name] = Layout((tensor_parallel,), tensor_map), place.stage
    return layouts


def _write_ranks(work: WorkFolder, items: list[Item], config: ModelConfig, options: Options,
                 title: str) -> dict[str, dict[str, str]]:
    """Cuts the tensors over ranks and writes the strategies that say so."""
    expected = expected_layouts(config, options.tensor_parallel, options.pipeline_stages, options.mode)
    for item in items:
        item.outputs = _rank_outputs(item, expected.get(base_name(item.name)), options)
    sums = write_items(work, items, title)
    stages = layer_stages(config.num_hidden_layers, options.pipeline_stages)
    in_graph = {name for name in expected if placement(name, config, stages, ALL_MODES[options.mode]).in_graph}
    states = {item.name: base_name(item.name) for item in items if base_name(item.name) != item.name}
    write_strategies(work.output / "strategy", expected, in_graph, options.pipeline_stages, states)
    return sums


def _rank_outputs(item: Item, expected: tuple[Layout, int] | None, options: Options) -> list[Output]:
    """The slice of a tensor in each rank's file; what has no layout (counters) is whole in every rank."""
    outputs = []
    for rank in range(options.ranks):
        stage, device = divmod(rank, options.tensor_parallel)
        if expected is not None and expected[1] != stage:
            continue
        region = expected[0].slices(item.tensor.shape, device) if expected else _whole(item.tensor)
        outputs.append(Output(f"checkpoint/{RANK_FILE.format(rank)}.{options.format}", region))
    return outputs


def _write_side_files(work: WorkFolder, items: list[Item], sums: dict[str, dict[str, str]], config: ModelConfig,
                      source: OpenedCheckpoint, options: Options, sections: dict | None) -> None:
    """Configuration, tokenizer and the like, the index and the digests."""
    for file in sorted(source.side_folder.iterdir()):
        if file.is_file() and file.suffix in source.side_suffixes and file.name not in OWN_FILES:
            shutil.copyfile(file, work.output / file.name)
    tokenizer = run_tokenizer(source) if source.config_file is None else None      # of a run that wrote no model
    if tokenizer is not None and not (work.output / "tokenizer.model").exists():
        Tokenizer(str(tokenizer)).save_pretrained(str(work.output))
    write_config(config, source.config_file, work.output / CONFIG_FILE, {item.dtype for item in items},
                 sections)
    metadata = {"total_size": sum(item.nbytes for item in items), "job": work.digest}
    if options.ranks > 1:
        fields = {"metadata": metadata, "tensor_parallel": options.tensor_parallel,
                  "pipeline_stages": options.pipeline_stages, "mode": options.mode}
        name = RANK_INDEX
    else:
        fields = {"metadata": metadata,
                  "weight_map": {tensor: file for file, digests in sums.items() for tensor in digests}}
        name = INDEX_FILES[0] if options.to == "hf" else INDEX_FILES[2]
    (work.output / name).write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    further = [*work.output.glob("*.model"), *work.output.glob("strategy/*"), work.output / CONFIG_FILE]
    write_digests(work.output, [*sums, *(file.relative_to(work.output).as_posix() for file in further)], known=sums)
