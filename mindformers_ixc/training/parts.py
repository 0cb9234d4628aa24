"""What trains, and at which learning rate, by the parts of the one name table."""
from __future__ import annotations

import math
import re
from collections.abc import Iterable

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.models.ixc25 import IXC25Model
from mindformers_ixc.parameters import PARTS, part_of
from mindformers_ixc.training_options import check_parts

_VISION_LAYER = re.compile(r"vit\..*\.encoder\.layers\.(\d+)\.")


def train_only(model: IXC25Model, parts: Iterable[str]) -> None:
    """Freezes everything but some parts.

    Args:
        model: `IXC25Model`.
        parts: what trains.

    Raises:
        ConfigError: for a name that is no part, or a part of which nothing can train in this model.
    """
    parts = list(parts)
    check_parts(parts)
    if not parts:
        raise ConfigError(f"train_parts is empty, so nothing would train; the parts are {', '.join(PARTS)}.")
    found = set()
    for parameter in model.get_parameters():
        part = part_of(parameter.name)
        if part in parts and parameter.requires_grad:
            found.add(part)
        parameter.requires_grad = parameter.requires_grad and part in parts
    model.chunked_losses.weight_trains = model.head.weight.requires_grad
    for part in parts:
        if part not in found:
            reason = f" (adapter_mode is '{model.config.adapter_mode}')" if part.startswith("task_lora") else ""
            raise ConfigError(f"train_parts names '{part}', of which nothing is in this model's graph{reason}.")


def stop_dropout(model: IXC25Model) -> None:
    """Turns Partial LoRA's dropout off: while those pairs are frozen it would only be noise."""
    for _, cell in model.cells_and_names():
        if hasattr(cell, "plora_dropout"):
            cell.plora_dropout.set_rate(0.0)


def part_counts(model: IXC25Model) -> dict[str, tuple[int, int]]:
    """Parameters of each part that the model has, and how many of those train; `all` is the last."""
    counts: dict[str, list[int]] = {part: [0, 0] for part in PARTS}
    for parameter in model.get_parameters():
        part = part_of(parameter.name)
        if part is None:
            continue                      # what a step puts down
        count = counts[part]
        size = math.prod(parameter.shape)
        count[0] += size
        count[1] += size if parameter.requires_grad else 0
    counts["all"] = [sum(column) for column in zip(*counts.values())]
    return {part: (total, trained) for part, (total, trained) in counts.items() if total}


def parts_table(model: IXC25Model) -> str:
    """Parts with the numbers in them, and how many of those train."""
    lines = [f"{'part':<16}{'parameters':>16}{'trained':>16}"]
    lines += [f"{part:<16}{total:>16,}{trained:>16,}" for part, (total, trained) in part_counts(model).items()]
    return "\n".join(lines)


def vision_depth(name: str, layers: int) -> int:
    """Steps of a vision parameter below the top of the tower: 1 for the last layer, layers + 1 for the embeddings."""
    match = _VISION_LAYER.match(name)
    return layers - int(match[1]) if match else layers + 1


def rate_factors(model: IXC25Model, section: dict) -> dict[float, list[str]]:
    """Trained parameters whose learning rate differs from the schedule's, by factor, largest first.

    Args:
        model: `IXC25Model`, frozen as it will train.
        section: `part_learning_rates`. `factor` multiplies a part's rate; with `layer_decay` d, a parameter of the
            vision tower k steps below its top has d ** k in addition (arXiv 2106.08254, as the recipe of IXC2.5 uses
            it).

    Returns:
        Parameter names by factor.
    """
    layers = model.config.vision_config.num_hidden_layers
    groups: dict[float, list[str]] = {}
    for parameter in model.trainable_params():
        options = section.get(part_of(parameter.name))
        if not options:
            continue
        factor = float(options.get("factor", 1.0))
        if "layer_decay" in options:
            factor *= options["layer_decay"] ** vision_depth(parameter.name, layers)
        groups.setdefault(factor, []).append(parameter.name)
    return dict(sorted(groups.items(), reverse=True))


def grouped_schedule(model: IXC25Model, schedule: dict, section: dict) -> dict:
    """MindFormers' `grouped_lr_schedule` for parts with rates of their own.

    Args:
        model: `IXC25Model`, frozen as it will train.
        schedule: the YAML's `lr_schedule`; its rates are what the factors multiply.
        section: the YAML's `part_learning_rates`.
    """
    grouped = []
    for factor, names in rate_factors(model, section).items():
        rates = {key: schedule[key] * factor for key in ("learning_rate", "lr_end", "warmup_lr_init")
                 if schedule.get(key)}
        grouped.append({**schedule, **rates, "params": names})
    return {"default": dict(schedule), "grouped": grouped}


def rates_table(model: IXC25Model, schedule: dict, section: dict) -> str:
    """Highest learning rate of every group."""
    grouped = rate_factors(model, section)
    different = {name for names in grouped.values() for name in names}
    rest = [parameter.name for parameter in model.trainable_params() if parameter.name not in different]
    rows = [(schedule["learning_rate"] * factor, names) for factor, names in grouped.items()]
    lines = [f"{'learning rate':<16}{'tensors':>9}  parts"]
    for rate, names in [(schedule["learning_rate"], rest), *rows]:
        if names:
            parts = dict.fromkeys(str(part_of(name)) for name in names)
            lines.append(f"{rate:<16.4g}{len(names):>9}  {', '.join(parts)}")
    return "\n".join(lines)
