"""An ordinary LoRA (`pet_type: lora`) in a model: its scale, and what a run leaves of it.

A run leaves the whole model with the pairs folded into its linears, since a model directory has no place for them, and
the pairs alone in PEFT's form, which `mindformers merge --lora` and PEFT read.
"""
from __future__ import annotations

import json
import math
import os
from typing import Any

from mindformers.pet.pet_config import PetConfig
from mindspore import nn

from mindformers_ixc.checkpoint.adapters import ADAPTER_CONFIG, ADAPTER_FILES
from mindformers_ixc.checkpoint.digests import write_digests
from mindformers_ixc.checkpoint.merge import FoldedTensor
from mindformers_ixc.checkpoint.model_directory import write_tensors
from mindformers_ixc.checkpoint.tensors import ConvertedTensor, LazyTensor
from mindformers_ixc.files import whole_folder
from mindformers_ixc.models.layers import PartialLoRALinear
from mindformers_ixc.parameters import part_of

# Names of a pair's parameters behind the linear's: MindFormers' here, PEFT's in its files.
FIRST, SECOND, ROWS = "mindpet_delta_lora_a.weight", "mindpet_delta_lora_b.weight", "mindpet_delta_lora_magnitude"
PEFT_NAMES = {FIRST: "lora_A.weight", SECOND: "lora_B.weight", ROWS: "lora_magnitude_vector"}
PEFT_PREFIX = "base_model.model."


def lora_scale(config: PetConfig) -> float:
    """What a pair's product is multiplied by: alpha / rank, or for rsLoRA (arXiv 2312.03732) alpha / sqrt(rank)."""
    return config.lora_alpha / (math.sqrt(config.lora_rank) if config.get("use_rslora") else config.lora_rank)


def lora_linears(model: nn.Cell) -> dict[str, PartialLoRALinear]:
    """The linears of a model that have an ordinary LoRA, by name; none without `pet_type: lora`.

    Args:
        model: `IXC25Model`, or a cell of MindFormers' PET around one; names are those of the parameters either way.
    """
    return {cell.weight.name.removesuffix(".weight"): cell for _, cell in model.cells_and_names()
            if isinstance(cell, PartialLoRALinear) and cell.has_lora}


def begin_magnitudes(model: nn.Cell) -> None:
    """DoRA begins with the weights as they are; called once they are there."""
    for linear in lora_linears(model).values():
        if linear.has_dora:
            linear.begin_magnitudes()


def adapter_config(config: PetConfig, model: nn.Cell) -> dict[str, Any]:
    """What PEFT keeps of an ordinary LoRA beside its matrices.

    Args:
        config: MindFormers' `LoraConfig`.
        model: `IXC25Model` with the pairs.
    """
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.lora_rank, "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout, "bias": "none", "use_rslora": bool(config.get("use_rslora")),
            "use_dora": bool(config.get("use_dora")), "target_modules": list(lora_linears(model)),
            "modules_to_save": sorted({_module(parameter.name) for parameter in model.trainable_params()
                                       if part_of(parameter.name) != "lora"})}


def _module(name: str) -> str:
    """What PEFT calls the holder of a parameter; one that no module holds stands for itself."""
    module, _, kind = name.rpartition(".")
    return module if kind in ("weight", "bias") else name


def folded_weights(model: nn.Cell, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A model's weights without ordinary pairs, which are folded into the linears they stand beside.

    Args:
        model: with the pairs, or without any; then nothing changes.
        tensors: its parameters by name, all of them.
    """
    linears, found = lora_linears(model), dict[str, LazyTensor]()
    for name, tensor in tensors.items():
        linear = name.removesuffix(".weight")
        if part_of(name) == "lora":
            continue
        if linear in linears and name.endswith(".weight"):
            pair = (tensors[f"{linear}.{FIRST}"], tensors[f"{linear}.{SECOND}"], linears[linear].lora_scale)
            tensor = ConvertedTensor(FoldedTensor(tensor, [pair], tensors.get(f"{linear}.{ROWS}")), tensor.dtype)
        found[name] = tensor
    return found


def write_adapter(target: str | os.PathLike, config: PetConfig, model: nn.Cell, tensors: dict[str, LazyTensor]) -> None:
    """Writes the pairs as PEFT keeps them, with what else was trained beside them, replacing what is there.

    Args:
        target: directory to write.
        config: MindFormers' `LoraConfig`.
        model: with the pairs.
        tensors: what trained, by name.
    """
    own = {f"{linear}.{name}": f"{linear}.{theirs}" for linear in lora_linears(model)
           for name, theirs in PEFT_NAMES.items()}
    named = {f"{PEFT_PREFIX}{own.get(name, name)}": tensor for name, tensor in tensors.items()}
    with whole_folder(target) as folder:
        (folder / ADAPTER_CONFIG).write_text(json.dumps(adapter_config(config, model), indent=2) + "\n",
                                             encoding="utf-8")
        write_digests(folder, known={ADAPTER_FILES[0]: write_tensors(folder / ADAPTER_FILES[0], named)})
