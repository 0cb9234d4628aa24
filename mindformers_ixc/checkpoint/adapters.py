"""Trained LoRAs of PEFT and of MindFormers: which matrices they hold, with which scale they act, what else they change.

Every field of PEFT's `adapter_config.json` that changes what a merge gives is read or refused; the tables below say
which is which. A field that is in none of them is refused unless it is empty.
"""
from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mindformers_ixc.checkpoint.dtypes import FLOATING
from mindformers_ixc.checkpoint.sources import OpenedCheckpoint, is_state, open_source
from mindformers_ixc.checkpoint.tensors import LazyTensor
from mindformers_ixc.errors import CheckpointError
from mindformers_ixc.files import read_json

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

# How trained LoRAs are named: by PEFT (with or without the adapter's name) and by MindFormers (MindPet).
_PEFT = re.compile(r"(?P<linear>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight$")
_MINDPET = re.compile(r"(?P<linear>.+)\.(?:mindpet|tk)_delta_lora_(?P<side>[ab])(?:\.weight)?$")
# PEFT 0.9 to 0.11 saved the magnitudes without `.weight`, newer ones with it or without.
_MAGNITUDE = re.compile(r"(?P<linear>.+)\.(?:lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?(?:\.weight)?"
                        r"|mindpet_delta_lora_magnitude)$")
# Which of the two matrices a tensor is, or the magnitudes.
_SIDES = {"A", "B"}
_ROWS = "magnitude"
_SAVED = re.compile(r"(?P<module>.+?)(?:\.modules_to_save)?(?:(?<=modules_to_save)\.(?P<adapter>[^.]+))?"
                    r"\.(?P<kind>weight|bias)$")
_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer"

# What is read.
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules",
        "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias", "init_lora_weights")

# What changes nothing of a merge: how it was trained, with what, and how it is loaded. `fan_in_fan_out` is for weights
# kept as (in, out), which this model has none of; PEFT turns it off for such linears as well.
INERT = ("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
         "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
         "parent_library", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type")

# What makes the result another one, in a way that is not computed here.
REFUSED = {
    "lora_bias": "the model's linears have no bias that could take it up",
    "layer_replication": "it adds decoder layers",
    "trainable_token_indices": "it changes single rows of the embedding",
    "alora_invocation_tokens": "it acts behind certain tokens only",
    "megatron_config": "its linears are Megatron's",
    "use_qalora": "its A matrix acts on averaged inputs",
    "target_parameters": "it acts on parameters that are no linear's weight",
    "arrow_config": "it chooses among adapters while it runs",
}
_REMEDY = "merge it with PEFT (merge_and_unload) first"

# Beginnings after which the base is what it was; the others (pissa, olora, corda, loftq, lora_ga) change it.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass
class Adapter:
    """What a trained LoRA changes.

    Attributes:
        pairs: A `(rank, in)`, B `(out, rank)` and scale, by the name of the linear.
        magnitudes: of DoRA the norm of each row of the merged weight, `(out,)`, by the name of the linear.
        replaced: tensors that take the place of the base's, by name.
    """

    pairs: dict[str, tuple[LazyTensor, LazyTensor, float]] = field(default_factory=dict)
    magnitudes: dict[str, LazyTensor] = field(default_factory=dict)
    replaced: dict[str, LazyTensor] = field(default_factory=dict)


def open_adapter(path: str | Path) -> OpenedCheckpoint:
    """Opens a trained LoRA: a PEFT directory, MindFormers' checkpoint, or a file."""
    path = Path(path)
    for name in ADAPTER_FILES:
        if (path / name).is_file():
            return open_source(path / name)
    return open_source(path)


def read_adapter(source: OpenedCheckpoint, base: dict[str, LazyTensor], alpha: float | None = None,
                 name: str | None = None) -> Adapter:
    """Reads a trained LoRA for a base.

    Args:
        source: the opened adapter.
        base: tensors it is for, by name.
        alpha: its alpha, if there is no `adapter_config.json`.
        name: which adapter, if the file holds several.

    Raises:
        CheckpointError: for names that are no LoRA's or no linear's, half a pair, other shapes, an unknown alpha, or
            fields of `adapter_config.json` that change the result and are not read.
    """
    path = source.directory / ADAPTER_CONFIG
    settings = Settings.read(path, alpha)
    sides, others = _sort_tensors(source, base, name)
    adapter = Adapter()
    for linear, pair in sides.items():
        rows = pair.pop(_ROWS, None)
        adapter.pairs[linear] = _pair(source, base, linear, pair, settings)
        settings.check_magnitudes(source, linear, rows)
        if rows is not None:
            _check_rows(source, linear, rows, base[f"{linear}.weight"])
            adapter.magnitudes[linear] = rows
    for target, (key, tensor) in others.items():
        settings.check_replaced(source, key, target)
        if tensor.shape != base[target].shape:
            raise CheckpointError(f"{source.path} holds {key} with shape {tensor.shape}, the base has {target} with "
                                  f"shape {base[target].shape}.")
        _check_format(source, key, tensor)
        adapter.replaced[target] = tensor
    settings.check_complete(source, base, adapter)
    return adapter


def _sort_tensors(source: OpenedCheckpoint, base: dict[str, LazyTensor],
                  chosen: str | None) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, tuple[str, LazyTensor]]]:
    """The matrices by linear and side, and the other tensors by the base's name, of one adapter."""
    found: list[tuple[str | None, str, str, str, LazyTensor]] = []       # adapter, linear or target, side, key, tensor
    whole: list[tuple[str, LazyTensor]] = []
    is_mindpet = any(_MINDPET.match(key) for key in source.tensors)
    for key, tensor in source.tensors.items():
        name = key.removeprefix(_PREFIX)
        if match := _PEFT.match(name) or _MINDPET.match(name):
            found.append((match.groupdict().get("adapter"), match["linear"], match["side"].upper(), key, tensor))
        elif match := _MAGNITUDE.match(name):
            found.append((match["adapter"], match["linear"], _ROWS, key, tensor))
        elif is_mindpet and (name in base or is_state(name)):
            whole.append((name, tensor))
        elif (match := _SAVED.match(name)) and (target := _base_key(match)) in base:
            found.append((match["adapter"], target, "", key, tensor))
        elif name in base:                       # a parameter that no module holds, of this package's runs
            found.append((None, name, "", key, tensor))
        else:
            raise CheckpointError(f"{source.path} holds {key}, which is no matrix of a LoRA that can be folded in "
                                  f"(PEFT's lora_A, lora_B or MindFormers' mindpet_delta_lora_a, _b); {_REMEDY}.")
    _check_same(source, base, whole)
    names = sorted({adapter for adapter, *_ in found if adapter is not None})
    if chosen is None and len(names) > 1:
        raise CheckpointError(f"{source.path} holds the adapters {', '.join(names)}; choose one with --adapter.")
    if chosen is not None and chosen not in names:
        raise CheckpointError(f"{source.path} holds no adapter '{chosen}'; it has "
                              f"{', '.join(names) or 'one without name'}.")
    sides: dict[str, dict[str, LazyTensor]] = {}
    others: dict[str, tuple[str, LazyTensor]] = {}
    for adapter, place, side, key, tensor in found:
        if chosen is not None and adapter not in (chosen, None):
            continue
        taken = sides.setdefault(place, {}) if side else others
        if (side or place) in taken:
            raise CheckpointError(f"{source.path} holds {key} under two names; only one of them can be meant.")
        if side:
            sides[place][side] = tensor
        else:
            others[place] = key, tensor
    return sides, others


def _base_key(match: re.Match[str]) -> str:
    return f"{match['module'].removesuffix(_BASE_LAYER)}.{match['kind']}"


def _check_same(source: OpenedCheckpoint, base: dict[str, LazyTensor], whole: list[tuple[str, LazyTensor]]) -> None:
    """Refuses a whole checkpoint of MindFormers' LoRA whose other weights are not the base's."""
    for name, tensor in whole:
        if is_state(name):
            continue
        other = base[name]
        if (tensor.shape, tensor.dtype) != (other.shape, other.dtype) or not all(
                np.array_equal(np.atleast_1d(one).view(np.uint8), np.atleast_1d(two).view(np.uint8))
                for (_, one), (_, two) in zip(tensor.pieces(), other.pieces())):
            raise CheckpointError(f"{source.path} holds {name} with other values than the base has, so its LoRA "
                                  "belongs to another base.")


def _pair(source: OpenedCheckpoint, base: dict[str, LazyTensor], linear: str, pair: dict[str, LazyTensor],
          settings: Settings) -> tuple[LazyTensor, LazyTensor, float]:
    weight = base.get(f"{linear}.weight")
    if weight is None or set(pair) != _SIDES:
        problem = "which this model does not have" if weight is None else f"but only side {sorted(pair)}"
        raise CheckpointError(f"{source.path} holds a LoRA for {linear}, {problem}.")
    first, second = pair["A"], pair["B"]
    _check_format(source, linear, first, second)
    shapes = first.shape, second.shape, weight.shape
    if any(len(shape) != 2 for shape in shapes) or (second.shape[0], first.shape[1]) != weight.shape \
            or first.shape[0] != second.shape[1] or not first.shape[0]:
        raise CheckpointError(f"{source.path}: the LoRA of {linear} has shapes {first.shape} and {second.shape}, "
                              f"the weight {weight.shape}.")
    return first, second, settings.scale(source, linear, first.shape[0])


def _check_rows(source: OpenedCheckpoint, linear: str, rows: LazyTensor, weight: LazyTensor) -> None:
    _check_format(source, linear, rows)
    if rows.shape != weight.shape[:1]:
        raise CheckpointError(f"{source.path}: the magnitudes of {linear} have the shape {rows.shape}, the weight "
                              f"{weight.shape}; there is one for each of its rows.")


def _check_format(source: OpenedCheckpoint, name: str, *tensors: LazyTensor) -> None:
    for tensor in tensors:
        if tensor.dtype not in FLOATING:
            raise CheckpointError(f"{source.path} holds {name} in the format {tensor.dtype}; weights are one of "
                                  f"{', '.join(FLOATING)}.")


@dataclass
class Settings:
    """What `adapter_config.json` says, or nothing.

    Attributes:
        path: the file.
        fields: its content.
        alpha: said on the command line.
    """

    path: Path
    fields: dict[str, Any]
    alpha: float | None = None

    @classmethod
    def read(cls, path: Path, alpha: float | None) -> Settings:
        """Reads and checks the file, if it is there."""
        fields = read_json(path, CheckpointError) if path.is_file() else {}
        if not isinstance(fields, dict):
            raise CheckpointError(f"{path} must hold a map of fields, found {type(fields).__name__}.")
        settings = cls(path, fields, alpha)
        settings._check_names()
        settings._check_values()
        return settings

    def _check_names(self) -> None:
        for name, value in self.fields.items():
            if name in REFUSED and not _is_empty(value):
                raise CheckpointError(f"{self.path} has {name} {_short(value)}: {REFUSED[name]}, which cannot be "
                                      f"folded into a weight here; {_REMEDY}.")
            if name not in (*READ, *INERT, *REFUSED) and not _is_empty(value):
                raise CheckpointError(f"{self.path} has {name} {_short(value)}, and what it does to the result is not "
                                      f"known here; {_REMEDY}, or take it out if it changes nothing.")
        kind = self.fields.get("peft_type", "LORA")
        if kind != "LORA":
            raise CheckpointError(f"{self.path} has peft_type {_short(kind)}; only LORA can be folded in.")
        start = self.fields.get("init_lora_weights")
        start = start.lower() if isinstance(start, str) else start
        if not any(start is plain or (isinstance(start, str) and start == plain) for plain in _PLAIN_BEGINNINGS):
            raise CheckpointError(f"{self.path} has init_lora_weights {_short(start)}: such a LoRA was trained on a "
                                  "base that its beginning had changed, so it does not belong on the unchanged one. "
                                  "Save it as a plain LoRA with PEFT (save_pretrained with "
                                  "path_initial_model_for_weight_conversion), or merge it with PEFT "
                                  "(merge_and_unload).")

    def _check_values(self) -> None:
        rank, alpha, fields = self.fields.get("r"), self.fields.get("lora_alpha"), self.fields
        if rank is not None and not _is_count(rank):
            raise CheckpointError(f"{self.path} has r {_short(rank)}; it is a whole number from 1 on.")
        if alpha is not None and not _is_number(alpha):
            raise CheckpointError(f"{self.path} has lora_alpha {_short(alpha)}; it is a number.")
        if self.alpha is not None and alpha is not None and float(alpha) != self.alpha:
            raise CheckpointError(f"--alpha {self.alpha} was given, {self.path} has lora_alpha {alpha}; leave --alpha "
                                  "out or change the file.")
        for name, test, wanted in (("rank_pattern", _is_count, "whole numbers"),
                                   ("alpha_pattern", _is_number, "numbers")):
            patterns = fields.get(name) or {}
            if not isinstance(patterns, dict) or not all(map(test, patterns.values())):
                raise CheckpointError(f"{self.path} has {name} {_short(patterns)}; it maps modules to {wanted}.")
        for name in ("use_rslora", "use_dora"):
            if not isinstance(fields.get(name, False), (bool, type(None))):
                raise CheckpointError(f"{self.path} has {name} {_short(fields[name])}; it is true or false.")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            if not _is_names(fields.get(name)):
                raise CheckpointError(f"{self.path} has {name} {_short(fields[name])}; it is a text or a list of "
                                      "texts.")
        if fields.get("bias", "none") not in ("none", "all", "lora_only"):
            raise CheckpointError(f"{self.path} has bias {_short(fields['bias'])}; it is none, all or lora_only.")
        layers = fields.get("layers_to_transform")
        listed = layers if isinstance(layers, list) else [layers]
        if layers is not None and not all(_is_count(layer, 0) for layer in listed):
            raise CheckpointError(f"{self.path} has layers_to_transform {_short(layers)}; it is layers' numbers.")

    def scale(self, source: OpenedCheckpoint, linear: str, rank: int) -> float:
        """Alpha over rank, or over its root where `use_rslora` says so (arXiv 2312.03732).

        Raises:
            CheckpointError: when alpha is unknown, or the file says that the linear has no LoRA or one of another rank.
        """
        wanted = self._of_pattern("rank_pattern", linear, self.fields.get("r"))
        if wanted is not None and wanted != rank:
            raise CheckpointError(f"{source.path} holds a LoRA of rank {rank} for {linear}, {self.path} says {wanted}; "
                                  "they do not belong together.")
        if not self._is_target(linear):
            raise CheckpointError(f"{source.path} holds a LoRA for {linear}, which is none of the modules that "
                                  f"{self.path} names (target_modules, exclude_modules, layers_to_transform); PEFT "
                                  "would leave it out.")
        alpha = self.alpha if self.alpha is not None else self.fields.get("lora_alpha")
        alpha = self._of_pattern("alpha_pattern", linear, alpha)
        if alpha is None:
            raise CheckpointError(f"{source.directory} has no {ADAPTER_CONFIG} with the LoRA's alpha; give it with "
                                  "--alpha.")
        return float(alpha) / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def check_magnitudes(self, source: OpenedCheckpoint, linear: str, rows: LazyTensor | None) -> None:
        """Refuses DoRA without its magnitudes, and magnitudes of what the file says is no DoRA.

        Raises:
            CheckpointError: naming the linear.
        """
        if self.fields and bool(self.fields.get("use_dora")) != (rows is not None):
            has = "no magnitudes" if rows is None else "magnitudes"
            raise CheckpointError(f"{source.path} holds {has} of {linear}, but {self.path} has use_dora "
                                  f"{bool(self.fields.get('use_dora'))}; they do not belong together.")

    def _of_pattern(self, name: str, linear: str, default: Any) -> Any:
        """The value of the first pattern that matches a module's path to its end, as PEFT matches them."""
        for pattern, value in (self.fields.get(name) or {}).items():
            if self._matches(name, rf"(.*\.)?({pattern})", linear):
                return value
        return default

    def _matches(self, name: str, pattern: str, text: str) -> bool:
        try:
            return re.fullmatch(pattern, text) is not None
        except re.error as error:
            raise CheckpointError(f"{self.path} has a {name} that is no regular expression ({error}).") from error

    def _is_target(self, linear: str) -> bool:
        targets, excluded = self.fields.get("target_modules"), self.fields.get("exclude_modules")
        if excluded and self._is_named("exclude_modules", excluded, linear):
            return False
        if targets is None or targets == "all-linear":
            return True
        if not self._is_named("target_modules", targets, linear):
            return False
        layers = self.fields.get("layers_to_transform")
        if layers is None or isinstance(targets, str):
            return True
        patterns = self.fields.get("layers_pattern") or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if match := re.match(rf".*\.{pattern}\.(\d+)\.", linear):
                return int(match[1]) in (layers if isinstance(layers, list) else [layers])
        return False

    def _is_named(self, name: str, names: str | list[str], module: str) -> bool:
        """Whether a module is meant: a text is a regular expression for the path, a list has ends of paths."""
        if isinstance(names, str):
            return self._matches(name, names, module)
        return any(module == end or module.endswith(f".{end}") for end in names)

    def check_replaced(self, source: OpenedCheckpoint, key: str, target: str) -> None:
        """Refuses a tensor beside the matrices unless the file says that it was trained."""
        module, _, kind = target.rpartition(".")
        saved = self.fields.get("modules_to_save") or []
        saved = [saved] if isinstance(saved, str) else saved
        if any(end in (module, target) or module.endswith(f".{end}") for end in saved):
            return
        if kind == "bias" and self.fields.get("bias", "none") != "none":
            return
        raise CheckpointError(f"{source.path} holds {key}, which is no matrix of a LoRA, and {self.path} does not name "
                              "it in modules_to_save (or bias); it is not known whether it was trained.")

    def check_complete(self, source: OpenedCheckpoint, base: Iterable[str], adapter: Adapter) -> None:
        """Refuses an adapter without matrices or a saved module's weights; says which targets it leaves as they are."""
        names = self.fields.get("modules_to_save") or []
        for end in [names] if isinstance(names, str) else names:
            if end not in adapter.replaced and not any(f".{target}".rpartition(".")[0].endswith(f".{end}")
                                                       for target in adapter.replaced):
                raise CheckpointError(f"{self.path} names {end} in modules_to_save, but {source.path} does not hold "
                                      "its weights; copy the adapter again.")
        if not adapter.pairs and not adapter.replaced:
            raise CheckpointError(f"{source.path} holds no matrix of a LoRA.")
        if self.fields.get("target_modules") in (None, "all-linear"):
            return
        linears = [name.removesuffix(".weight") for name in base if name.endswith(".weight")]
        left = [linear for linear in linears if self._is_target(linear) and linear not in adapter.pairs]
        if left:
            logger.info(f"{source.path} holds no matrices for {len(left)} of the modules that {self.path} names "
                        f"(first: {left[0]}); they stay as they are.")


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _is_count(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_names(value: Any) -> bool:
    return value is None or isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(name, str) for name in value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
