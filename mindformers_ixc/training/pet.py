"""Partial LoRA and the task LoRAs as PET types: train those pairs, freeze everything else.

IXC2.5 carries its low-rank pairs in its own linears, so nothing is replaced: the PET type decides what trains. The
pairs of a fresh model start at zero effect; those of a checkpoint go on from where they are. `freeze_exclude` lets more
parts train beside them, as with MindFormers' own `lora`.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mindformers.models.modeling_utils import PreTrainedModel
from mindformers.pet.models.lora import LoraModel
from mindformers.pet.pet_config import PetConfig
from mindspore import nn

from mindformers_ixc.device import is_parallel
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.fields import MODE_ADAPTERS, TASK_LORA_RANKS
from mindformers_ixc.files import write_whole
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.models.layers import PartialLoRALinear
from mindformers_ixc.training.lora import adapter_config, lora_scale
from mindformers_ixc.training_options import DORA_ALONE

# Of Partial LoRA in the public model, for a plain InternLM2 whose YAML does not say.
DEFAULT_RANK, DEFAULT_DROPOUT = 256, 0.05

# The five linears of a decoder layer, which all carry the pairs (arXiv 2407.03320).
ALL_LINEARS = r".*\.(wqkv|wo|w1|w2|w3)"


class PartialLoRAPetConfig(PetConfig):
    """YAML `pet_config` of type `partial_lora`.

    Args:
        rank: rank of the pairs; must be the model's `plora_rank` (default: take that).
        alpha: their alpha; must be the model's `plora_alpha`.
        dropout: dropout on their input while training; overrides the model's `plora_dropout`.
        target_modules: regular expression over cell paths; only matching linears train.
        freeze_include: further patterns to freeze.
        freeze_exclude: further patterns to leave trainable (for stage 1: the vision tower and the projector).
        **kwargs: MindFormers' own fields.
    """

    pet_type_name = "partial_lora"

    def __init__(self, rank: int | None = None, alpha: int | None = None, dropout: float | None = None,
                 target_modules: str = ALL_LINEARS, freeze_include: list[str] | None = None,
                 freeze_exclude: list[str] | None = None, **kwargs: Any):
        kwargs.pop("pet_type", None)
        super().__init__(pet_type=self.pet_type_name, **kwargs)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.target_modules = target_modules
        self.freeze_include, self.freeze_exclude = freeze_include, freeze_exclude


class TaskLoRAPetConfig(PartialLoRAPetConfig):
    """YAML `pet_config` of type `task_lora`: `task` names the pair, the other fields are those of `partial_lora`.

    Args:
        task: a key of `fields.TASK_LORAS`.
        **kwargs: see `PartialLoRAPetConfig`.
    """

    pet_type_name = "task_lora"

    def __init__(self, task: str = "web", **kwargs: Any):
        super().__init__(**kwargs)
        self.task = task


class _LowRankModel(PreTrainedModel):
    """Shared part of both types: checks the sizes, then tells MindPet which parameters stay trainable."""

    def __init__(self, config: PartialLoRAPetConfig, base_model: PreTrainedModel):
        super().__init__(base_model.config, auto_prefix=False)
        self.config.pet_config = config
        self.network = base_model
        self._inject(config, base_model)
        self._prepare(config, base_model)
        pairs = self._pairs(config, base_model)
        if not pairs:
            raise ConfigError(f"pet_config of type '{config.pet_type_name}': target_modules {config.target_modules!r} "
                              "matches no linear that carries the pair.")
        config.freeze_exclude = [*(config.freeze_exclude or []), *pairs]

    def _inject(self, config: PetConfig, base_model: nn.Cell) -> None:
        """Gives a model that lacks the pairs fresh ones, on every linear: the public layout has them on all."""
        raise NotImplementedError

    def _prepare(self, config: PetConfig, base_model: nn.Cell) -> None:
        raise NotImplementedError

    def _pair_names(self, config: PetConfig) -> tuple[str, str]:
        raise NotImplementedError

    def _pairs(self, config: PetConfig, base_model: nn.Cell) -> list[str]:
        """Paths of the parameters of every pair that trains, as MindPet matches them."""
        first, second = self._pair_names(config)
        paths = []
        for path, cell in base_model.cells_and_names():
            if hasattr(cell, first) and re.fullmatch(config.target_modules, path):
                paths += [f"*{path}.{first}.weight", f"*{path}.{second}.weight"]
        return paths

    def save_pet_config(self, path: str) -> None:
        """Writes the PET configuration as JSON beside the adapter's weights."""
        with open(path, "w", encoding="utf-8") as file:
            json.dump(dict(self.config.pet_config), file, indent=2)

    def construct(self, *inputs, **kwargs):
        """What the wrapped model gives for the same arguments."""
        return self.network(*inputs, **kwargs)


def _must_agree(pet_type: str, key: str, wanted: Any, has: Any) -> None:
    if wanted is not None and wanted != has:
        raise ConfigError(f"pet_config of type '{pet_type}' has {key} {wanted}, the model is built with {has}; change "
                          "one of them.")


def inject(model: nn.Cell, add: Callable[[nn.Cell], None]) -> None:
    """Adds cells to every linear of the decoder layers of a built model.

    Args:
        model: `IXC25Model`.
        add: is called with each linear; the names of the parameters it adds are completed here.
    """
    for path, cell in model.cells_and_names():
        if not isinstance(cell, PartialLoRALinear):
            continue
        before = {id(parameter) for parameter in cell.get_parameters()}
        add(cell)
        for name, parameter in cell.parameters_and_names():
            if id(parameter) not in before:
                parameter.name = f"{path}.{name}"
        if is_parallel():
            cell.shard(model.config.parallel_config.data_parallel, model.config.parallel_config.model_parallel)


class PartialLoRAModel(_LowRankModel):
    """Trains Partial LoRA (and what `freeze_exclude` adds); a plain InternLM2 (`plora_rank: 0`) gets it first."""

    def _inject(self, config: PetConfig, base_model: nn.Cell) -> None:
        own = base_model.config
        if own.plora_rank:
            return
        rank = config.rank or DEFAULT_RANK
        own.plora_rank, own.plora_alpha = rank, config.alpha or rank
        own.plora_dropout = DEFAULT_DROPOUT if config.dropout is None else config.dropout
        inject(base_model, lambda cell: cell.add_partial_lora(rank, own.plora_scale, own.plora_dropout))

    def _prepare(self, config: PetConfig, base_model: nn.Cell) -> None:
        _must_agree(config.pet_type, "rank", config.rank, base_model.config.plora_rank)
        _must_agree(config.pet_type, "alpha", config.alpha, base_model.config.plora_alpha)
        if config.dropout is not None:
            for _, cell in base_model.cells_and_names():
                if hasattr(cell, "plora_dropout"):
                    cell.plora_dropout.set_rate(config.dropout)

    def _pair_names(self, config: PetConfig) -> tuple[str, str]:
        return "Plora_A", "Plora_B"


class TaskLoRAModel(_LowRankModel):
    """Trains one task LoRA, with the task LoRAs of its mode in use; a model without the pair gets it first."""

    def _inject(self, config: PetConfig, base_model: nn.Cell) -> None:
        ranks = base_model.config.task_lora_ranks
        if config.task in ranks or not config.rank or config.task not in TASK_LORA_RANKS:
            return
        base_model.config.task_lora_ranks = {**ranks, config.task: config.rank}
        inject(base_model, lambda cell: cell.add_task_lora(config.task, config.rank))

    def _prepare(self, config: PetConfig, base_model: nn.Cell) -> None:
        ranks = base_model.config.task_lora_ranks
        if config.task not in ranks:
            raise ConfigError(f"pet_config of type 'task_lora' has task '{config.task}'; this model has "
                              f"{', '.join(sorted(ranks)) or 'no task LoRA'}.")
        _must_agree(config.pet_type, "rank", config.rank, ranks[config.task])
        # the task LoRAs act with scale 1, that is alpha = rank, and without dropout
        _must_agree(config.pet_type, "alpha", config.alpha, ranks[config.task])
        _must_agree(config.pet_type, "dropout", config.dropout, 0.0)
        mode = next(name for name, tasks in MODE_ADAPTERS.items() if config.task in tasks)
        base_model.adapters = tuple(task for task in MODE_ADAPTERS[mode] if task in ranks)

    def _pair_names(self, config: PetConfig) -> tuple[str, str]:
        return f"lora_{config.task}_A", f"lora_{config.task}_B"


class IXC25LoraModel(LoraModel):
    """MindFormers' `lora` for this model, whose linears MindFormers does not know.

    Beside MindFormers' keys `pet_config` has PEFT's `use_rslora` (`lora_scale`) and `use_dora` (`models.magnitudes`).
    """

    def add_adapter(self, base_model: nn.Cell):
        """Adds the pairs to every linear whose path `target_modules` matches.

        Raises:
            ConfigError: when it matches none, and for DoRA in a parallel run.
        """
        config, found = self.config.pet_config, []
        scale = lora_scale(config)
        has_dora = bool(config.get("use_dora"))
        if has_dora and is_parallel():
            raise ConfigError(DORA_ALONE)
        paths = {id(cell): path for path, cell in base_model.cells_and_names()}

        def add(cell: nn.Cell) -> None:
            path = paths[id(cell)]
            # MindFormers matches the cell's own name, PEFT-like patterns the path
            if re.fullmatch(config.target_modules, path) or re.fullmatch(config.target_modules, path.split(".")[-1]):
                cell.add_lora(config.lora_rank, scale, config.lora_dropout, has_dora)
                found.append(path)

        inject(base_model, add)
        if not found:
            raise ConfigError(f"pet_config of type 'lora': target_modules {config.target_modules!r} matches no linear; "
                              "they are named wqkv, wo, w1, w2 and w3.")
        return base_model


    def save_pet_config(self, save_path: str) -> None:
        """Writes `adapter_config.json` as PEFT reads it; MindFormers' own would have patterns for names."""
        write_whole(Path(save_path), json.dumps(adapter_config(self.config.pet_config, self.network), indent=2) + "\n")


def lora_model(config: PetConfig, base_model: PreTrainedModel) -> LoraModel:
    """What MindFormers builds for `pet_type: lora`: its own class for every other model.

    Args:
        config: MindFormers' `LoraConfig`.
        base_model: the model to tune.
    """
    return (IXC25LoraModel if isinstance(base_model, IXC25Model) else LoraModel)(config, base_model)
