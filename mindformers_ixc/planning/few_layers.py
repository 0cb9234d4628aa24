"""Layers that are alike are compiled as three of them, and the plan is completed from those.

The compiler's time grows faster than the number of parameters: the 7B model with all its layers takes several minutes a
stage and up to 8 GB, with three layers of each kind half a minute. All decoder layers of a stage are the same graph
with other weights, and so are all layers of the vision tower; only the first and the last may differ from those
between, by what comes before and after them.
"""
from __future__ import annotations

import copy
import re
from dataclasses import dataclass

from mindformers_ixc.config import ModelConfig
from mindformers_ixc.parallel.stages import stages_of_layers

# Layers of a kind that a stage is compiled with: the first, one between others, the last.
COMPILED = 3

# Number of a layer in the name of a parameter, or in the scope of an operator.
_DECODER = re.compile(r"(?<=model\.layers\.)(\d+)(?=\.)|(?<=layers-CellList/)(\d+)(?=-DecoderLayer)")
_VISION = re.compile(r"(?<=\.encoder\.layers\.)(\d+)(?=\.)|(?<=layers-CellList/)(\d+)(?=-VisionLayer)")


@dataclass(frozen=True)
class Shortened:
    """What stands for what in a shortened model.

    Attributes:
        decoder: numbers of the real decoder layers of the stage that each compiled layer stands for, by its number.
        vision: the same of the tower's layers.
    """

    decoder: dict[int, list[int]]
    vision: dict[int, list[int]]

    def parameters(self, rows: list[dict]) -> list[dict]:
        """Parameters of the real model from those of the shortened one."""
        return self._expanded(rows, "name")

    def operators(self, rows: list[dict]) -> list[dict]:
        """Communication operators of the real model from those of the shortened one."""
        return self._expanded(rows, "scope")

    def _expanded(self, rows: list[dict], key: str) -> list[dict]:
        found = []
        for row in rows:
            for pattern, layers in ((_VISION, self.vision), (_DECODER, self.decoder)):
                match = pattern.search(row[key])
                if match:
                    found += [{**row, key: pattern.sub(str(layer), row[key])} for layer in layers[int(match[0])]]
                    break
            else:
                found.append(row)
        return found


def can_shorten(fields: dict) -> bool:
    """Whether all layers of a run are alike: a number of recomputed layers makes two kinds of them."""
    section = fields.get("recompute_config") or {}
    return all(isinstance(section.get(key) or False, bool) for key in ("recompute", "select_recompute"))


def shorten(fields: dict, config: ModelConfig, stage: int) -> tuple[dict, Shortened]:
    """A YAML's fields with `COMPILED` layers of each kind at most, and what they stand for.

    Args:
        fields: of the YAML.
        config: of the whole model.
        stage: pipeline stage that is to be compiled.
    """
    stages = fields["parallel_config"].get("pipeline_stage") or 1
    owners = stages_of_layers(config, stages)
    counts = [owners.count(number) for number in range(stages)]
    kept = [min(COMPILED, count) for count in counts]
    vision = config.vision_config.num_hidden_layers
    fields = copy.deepcopy(fields)
    section = fields["model"]["model_config"]
    for alias in ("num_layers", "num_hidden_layers"):
        section.pop(alias, None)
    section.update(num_hidden_layers=sum(kept), offset=[count - sum(kept) // stages for count in kept])
    section["vision_config"] = {**(section.get("vision_config") or {}), "num_hidden_layers": min(COMPILED, vision)}
    return fields, Shortened(_stands_for(sum(kept[:stage]), kept[stage], owners.index(stage), counts[stage]),
                             _stands_for(0, min(COMPILED, vision), 0, vision))


def _stands_for(compiled: int, kept: int, first: int, count: int) -> dict[int, list[int]]:
    """Compiled layers from number `compiled` on, `kept` of them, for `count` real ones from number `first` on."""
    found = {compiled + place: [first + place] for place in range(kept)}
    if count > kept:
        found[compiled + kept - 1] = [first + count - 1]
        found[compiled + kept - 2] = list(range(first + kept - 2, first + count - 1))
    return found
