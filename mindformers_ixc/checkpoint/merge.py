"""Folds LoRAs into weights, takes adapters out and puts them back, averages checkpoints.

Everything is computed in float32, a few rows at a time, and rounded once to the format of the weight.
"""
from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mindformers_ixc.checkpoint.adapters import Adapter, open_adapter, read_adapter
from mindformers_ixc.checkpoint.convert import select_tensors
from mindformers_ixc.checkpoint.dtypes import to_float32
from mindformers_ixc.checkpoint.family import task_ranks
from mindformers_ixc.checkpoint.model_config import config_of
from mindformers_ixc.checkpoint.quantised import refuse_quantised
from mindformers_ixc.checkpoint.sources import OpenedCheckpoint, is_state, open_source
from mindformers_ixc.checkpoint.start import check_tensor
from mindformers_ixc.checkpoint.tensors import PIECE, LazyTensor
from mindformers_ixc.checkpoint.writing import SHARD_BYTES, Options, write_checkpoint
from mindformers_ixc.config import ModelConfig, read_config
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.fields import POOLINGS, TASK_LORAS
from mindformers_ixc.parameters import LEAST_NORM, PARTS, SCORE_HEAD, UNUSED, parameter_table, part_of

logger = logging.getLogger(__name__)


class FoldedTensor(LazyTensor):
    """`W + sum of scale * B A`; with DoRA every row of it scaled to its magnitude.

    Args:
        weight: W, `(out, in)`.
        pairs: A `(rank, in)`, B `(out, rank)` and scale of each pair.
        magnitudes: `(out,)`, of DoRA.
    """

    dtype = "F32"

    def __init__(self, weight: LazyTensor, pairs: list[tuple[LazyTensor, LazyTensor, float]],
                 magnitudes: LazyTensor | None = None):
        self.weight, self.pairs, self.shape, self.magnitudes = weight, pairs, weight.shape, magnitudes
        self.first: list[np.ndarray] = []

    @property
    def stored_dtype(self) -> str:
        """The weight's own format."""
        return self.weight.stored_dtype

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`."""
        first = self.first or [to_float32(a.whole(), a.dtype) for a, _, _ in self.pairs]
        value = to_float32(self.weight.rows(begin, end), self.weight.dtype).copy()
        for a, (_, second, scale) in zip(first, self.pairs):
            value += scale * (to_float32(second.rows(begin, end), second.dtype) @ a)
        if self.magnitudes is not None:
            norms = np.linalg.norm(value.astype(np.float64), axis=1)
            wanted = to_float32(self.magnitudes.rows(begin, end), self.magnitudes.dtype)
            value *= (wanted / np.maximum(norms, LEAST_NORM)).astype(np.float32)[:, None]
        return value

    def pieces(self, limit: int = PIECE) -> Iterator[tuple[int, np.ndarray]]:
        """See `LazyTensor`; the A matrices are read once."""
        self.first = [to_float32(a.whole(), a.dtype) for a, _, _ in self.pairs]
        yield from super().pieces(limit)
        self.first = []


class AveragedTensor(LazyTensor):
    """Weighted mean of tensors of one shape.

    Args:
        tensors: of which to take the mean; the first one's format is kept.
        weights: one for each, summing to 1.
    """

    dtype = "F32"

    def __init__(self, tensors: list[LazyTensor], weights: list[float]):
        self.tensors, self.weights, self.shape = tensors, weights, tensors[0].shape

    @property
    def stored_dtype(self) -> str:
        """The first one's format."""
        return self.tensors[0].stored_dtype

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows `begin` to `end`; see `LazyTensor`."""
        # float64, so that the mean of equal numbers is that number
        total = sum(weight * to_float32(tensor.rows(begin, end), tensor.dtype).astype(np.float64)
                    for weight, tensor in zip(self.weights, self.tensors))
        return np.asarray(total, np.float32)


def merge(source: str | Path, target: str | Path, *, attach: str | Path | None = None, lora: str | Path | None = None,
          alpha: float | None = None, adapter: str | None = None, fold: Iterable[str] = (), extract: Iterable[str] = (),
          average: Iterable[str | Path] = (), ema: float | None = None, to: str | None = None,
          dtype: str | None = None, config: str | Path | None = None, shard_bytes: int = SHARD_BYTES,
          overwrite: bool = False) -> Path:
    """Changes a checkpoint's weights; the steps asked for are done in the order of the arguments below.

    Args:
        source: checkpoint in any form that `convert` reads.
        target: directory or file to be made.
        average: further checkpoints of the same model, oldest first, to take the mean with.
        ema: decay of an exponential average instead of a plain mean: the newest (the last of `average`) counts most.
        attach: checkpoint of some parts (what `extract` made) whose tensors replace the source's, or are added.
        lora: directory or file of a trained LoRA (PEFT or MindFormers) to fold in.
        alpha: its alpha, if there is no `adapter_config.json`.
        adapter: which adapter, if the LoRA's file holds several.
        fold: task LoRAs (`fields.TASK_LORAS`) to fold in; they are gone afterwards.
        extract: parts (`parameters.PARTS`) to keep, leaving out everything else.
        to: `ms` or `hf`; by default what the source is.
        dtype: format of the weights; by default each keeps its own.
        config: `config.json` or its directory, if the source has none beside it.
        shard_bytes: size of a file at most.
        overwrite: replace a target that exists.

    Returns:
        The target.

    Raises:
        CheckpointError: for what cannot be merged, and everything `convert` refuses.
    """
    opened = open_source(source)
    to = to or ("hf" if opened.kind == "public" else "ms")
    fold, extract, others = tuple(fold), tuple(extract), [open_source(other) for other in average]
    if not (attach or lora or fold or extract or others):
        raise CheckpointError("Nothing to merge was asked for; the choices are --average, --attach, --lora, --fold and "
                              "--extract.")
    options = Options(to=to, dtype=dtype, shard_bytes=shard_bytes,
                      format="ckpt" if Path(target).suffix == ".ckpt" else "safetensors")
    options.check()
    for one in (opened, *others):
        refuse_quantised(one, "merging")
    check_merge_names(fold, extract)
    model = config_of(opened, config)
    chosen = select_tensors(opened, model, options)
    tensors = {name: tensor for name, tensor in chosen.items() if part_of(name) or name in UNUSED}
    if len(tensors) < len(chosen):
        logger.info(f"{opened.path}: {len(chosen) - len(tensors)} tensors are no parameters (optimizer states, "
                    "counters) and are left out.")
    further = []
    if others:
        tensors = average_tensors(tensors, others, model, ema)
    if attach:
        further.append(open_source(attach))
        refuse_quantised(further[-1], "attaching")
        model, tensors = attach_parts(tensors, further[-1], model)
    if lora:
        further.append(open_adapter(lora))
        tensors = fold_lora(tensors, read_adapter(further[-1], tensors, alpha, adapter))
    model, tensors = fold_tasks(tensors, model, fold)
    if extract:
        tensors = {name: tensor for name, tensor in tensors.items() if part_of(name) in extract}
    used = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]
            for other in (*others, *further) for file in other.files]
    job = {"fold": fold, "extract": extract, "alpha": alpha, "adapter": adapter, "ema": ema, "used": used}
    write_checkpoint(tensors, model, opened, Path(target), options, overwrite, job)
    return Path(target)


def check_merge_names(fold: tuple[str, ...], extract: tuple[str, ...]) -> None:
    """Refuses names that are no task LoRA or no part, and Partial LoRA with the reason.

    Raises:
        CheckpointError: naming the choices.
    """
    for name in fold:
        if name.lower().replace("-", "_") in ("partial_lora", "plora"):
            raise CheckpointError("Partial LoRA cannot be folded: it acts on image positions only (y = W x on text, "
                                  "W x + s B A x on pictures), so no single matrix gives both. It stays beside the "
                                  "weight.")
        if name not in TASK_LORAS:
            *others, last = TASK_LORAS
            raise CheckpointError(f"'{name}' is no task LoRA; the choices are {', '.join(others)} and {last}.")
    for name in extract:
        if name not in PARTS:
            raise CheckpointError(f"'{name}' is no part; the choices are {', '.join(PARTS)}.")


def fold_tasks(tensors: dict[str, LazyTensor], config: ModelConfig,
               tasks: tuple[str, ...]) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Folds task LoRAs, which act on all positions with scale 1, into their linears.

    Raises:
        CheckpointError: for a pair the model does not have.
    """
    if not tasks:
        return config, tensors
    absent = [task for task in tasks if task not in config.task_lora_ranks]
    if absent:
        raise CheckpointError(f"The task LoRAs {absent} are not in this checkpoint; it has "
                              f"{sorted(config.task_lora_ranks) or 'none'}.")
    parts = {f"task_lora.{task}" for task in tasks}
    pairs: dict[str, list] = {}
    for name, first in tensors.items():
        if part_of(name) in parts and name.endswith("_A.weight"):
            linear = name.rsplit(".", 2)[0]
            pairs.setdefault(f"{linear}.weight", []).append((first, tensors[name[:-8] + "B.weight"], 1.0))
    folded = {name: FoldedTensor(tensor, pairs[name]) if name in pairs else tensor
              for name, tensor in tensors.items() if part_of(name) not in parts}
    config.task_lora_ranks = {task: rank for task, rank in config.task_lora_ranks.items() if task not in tasks}
    return config, folded


def fold_lora(tensors: dict[str, LazyTensor], adapter: Adapter) -> dict[str, LazyTensor]:
    """Folds a trained LoRA into the linears it was trained on, and takes over what was trained beside it."""
    replaced = {**tensors, **adapter.replaced}
    return {name: FoldedTensor(tensor, [adapter.pairs[linear]], adapter.magnitudes.get(linear))
            if name.endswith(".weight") and (linear := name.removesuffix(".weight")) in adapter.pairs else tensor
            for name, tensor in replaced.items()}


def attach_parts(tensors: dict[str, LazyTensor], adapter: OpenedCheckpoint,
                 config: ModelConfig) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """Puts the tensors of some parts in place of the model's, or beside them; optimizer states are left out.

    With a score head among them the whole becomes a reward model, whose `output.weight` is left out.

    A parallel run saves only what its graph uses: without the task LoRAs of other modes it is such a part of a model.

    Raises:
        CheckpointError: for names the model cannot have, half a pair, or shapes that do not fit.
    """
    parts = {name: tensor for name, tensor in adapter.tensors.items()
             if part_of(name) is not None or (not is_state(name) and len(tensor.shape) > 1)}
    config.task_lora_ranks = {**config.task_lora_ranks, **task_ranks(parts)}
    if SCORE_HEAD in parts:         # the whole becomes a reward model
        found = None if adapter.config_file is None else read_config(adapter.config_file).reward_pooling
        config.reward_pooling = found or config.reward_pooling or POOLINGS[0]
    table = parameter_table(config)
    for name, tensor in parts.items():
        if name not in table:
            raise CheckpointError(f"{adapter.path} holds {name}, which this model does not have.")
        check_tensor(adapter, name, tensor, table[name].shape)
    merged = {**tensors, **parts}
    missing = [name for name in table if name not in merged]
    if missing:
        raise CheckpointError(f"{adapter.path} leaves {len(missing)} parameters missing (first: {missing[:3]}).")
    return config, {name: merged[name] for name in (*table, *(name for name in UNUSED if name in tensors))}


def average_tensors(tensors: dict[str, LazyTensor], others: list[OpenedCheckpoint], config: ModelConfig,
                    ema: float | None) -> dict[str, LazyTensor]:
    """Mean of checkpoints of one model.

    Raises:
        CheckpointError: when one lacks a parameter or has it in another shape, or the decay is none.
    """
    if ema is not None and not 0 < ema < 1:
        raise CheckpointError(f"The decay of an exponential average lies between 0 and 1, found {ema}.")
    count = len(others) + 1
    weights = [1 / count] * count
    if ema is not None:     # avg = decay * avg + (1 - decay) * next, begun with the first
        weights = [ema ** (count - 1), *((1 - ema) * ema ** (count - 1 - i) for i in range(1, count))]
    checked = [select_tensors(other, config, Options(to="hf")) for other in others]
    return {name: AveragedTensor([tensor, *(other[name] for other in checked)], weights)
            for name, tensor in tensors.items()}
