"""From the samples of several sources to the plan of a run."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mindformers_ixc.data.columns import count_values, places_where
from mindformers_ixc.data.packed_plan import Packing, draw_everything, plan_packed
from mindformers_ixc.data.sampling import (
    MixtureSource,
    RunPlan,
    draw_samples,
    plan_batches,
    plan_epoch,
    plan_mixture,
)
from mindformers_ixc.errors import DataError
from mindformers_ixc.sections import above_0, check_section, is_number, of_type, whole

# Keys of the section `mixture` of a data_loader.
MIXTURE_RULES = {"weights": of_type(list, dict), "temperature": above_0(),
                 "samples_per_epoch": whole(0, " (0: as many as there are)")}

# What makes the plan of a run from the rows of a global batch.
Planner = Callable[[int], RunPlan]


def mixture_weights(sizes: dict[str, int], section: dict) -> dict[str, float]:
    """Weight of each source.

    Args:
        sizes: samples of each source, by name.
        section: `mixture` of the YAML: `weights`, a list in the order of the sources or a mapping from their names, or
            `temperature` T, which weighs a source of n samples by n ** (1 / T): 1 is by size, more is flatter.

    Raises:
        DataError: for unknown keys, weights that fit no source, are missing or are not above 0, or an empty source.
    """
    check_section(section, MIXTURE_RULES, "train_dataset.data_loader.mixture", DataError)
    given: Any = section.get("weights")
    temperature = section.get("temperature")
    if (given is None) == (temperature is None):
        raise DataError("train_dataset.data_loader.mixture needs either weights or a temperature; without a mixture "
                        "every sample is seen once an epoch.")
    if temperature is not None:
        weights = {name: size ** (1 / temperature) for name, size in sizes.items()}
    elif isinstance(given, dict):
        if set(given) != set(sizes):
            odd = sorted(set(given) ^ set(sizes))
            raise DataError(f"train_dataset.data_loader.mixture.weights must name every source and no other; "
                            f"{odd[0]!r} is not in both. The sources are {', '.join(sizes)}.")
        weights = {name: given[name] for name in sizes}
    elif len(given) != len(sizes):
        raise DataError(f"train_dataset.data_loader.mixture.weights has {len(given)} weights for {len(sizes)} "
                        f"sources ({', '.join(sizes)}); give one for each.")
    else:
        weights = dict(zip(sizes, given))
    for name, size in sizes.items():
        if size == 0:
            raise DataError(f"The source {name} has no samples left; raise seq_length or max_tiles, or take it out of "
                            "the mixture.")
        if not is_number(weights[name]) or not weights[name] > 0:
            raise DataError(f"The weight of the source {name} is {weights[name]!r}, so none of its samples would ever "
                            "be seen; give it a weight above 0 or leave the source out.")
    return weights


def check_shares(weights: dict[str, float], samples: int) -> None:
    """Checks that every source has a sample in every epoch.

    Args:
        weights: of each source.
        samples: of an epoch.

    Raises:
        DataError: naming a source that has none.
    """
    total = sum(weights.values())
    for name, weight in weights.items():
        if weight / total * samples < 1:
            raise DataError(f"The weight {weight:g} of the source {name} is {weight / total:.2g} of all weights, less "
                            f"than one of the {samples} samples of an epoch, so epochs would leave it out; raise the "
                            "weight or samples_per_epoch, or leave the source out.")


def make_planner(sources: np.ndarray, multimodal: np.ndarray, names: Sequence[str], section: dict | None,
                 seed: int, shuffle: bool, drop_remainder: bool, packing: Packing | None = None) -> Planner:
    """What makes the plan of a run.

    Args:
        sources: number of each sample's source.
        multimodal: whether each sample has images.
        names: of all sources, in the YAML's order.
        section: `mixture` of the YAML; `None` means epochs in which every sample is seen once.
        seed: of the run.
        shuffle: whether epochs are shuffled (a mixture always is).
        drop_remainder: see `plan_epoch`.
        packing: how samples share rows, which then mix sources and kinds; `None`: rows of a sample each, batches of a
            kind each.

    Raises:
        DataError: see `mixture_weights` and `check_shares`.
    """
    if section is None:
        if packing is not None:
            return partial(plan_packed, draw_everything, packing, seed, True, shuffle)
        return partial(plan_batches, partial(_epoch, multimodal, seed, shuffle, drop_remainder))
    sizes = count_values(sources, least=len(names)).tolist()
    weights = mixture_weights(dict(zip(names, sizes)), section)
    samples = section.get("samples_per_epoch") or len(sources)
    check_shares(weights, samples)
    shares = list(weights.values())
    if packing is not None:
        return partial(plan_packed, partial(_drawn, sources, shares, seed, samples), packing, seed, False, True)
    return partial(plan_batches, partial(_mixture, sources, multimodal, shares, seed, samples))


# Which samples are of which kind and source is found anew for every epoch: that takes a moment, and a run that has the
# rows of its epochs on disk holds nothing of it.

def _drawn(sources: np.ndarray, weights: Sequence[float], seed: int, samples: int, epoch: int) -> np.ndarray:
    members = [places_where(sources, number) for number in range(len(weights))]
    return draw_samples(members, weights, seed, epoch, samples)


def _epoch(multimodal: np.ndarray, seed: int, shuffle: bool, drop_remainder: bool, batch_size: int,
           epoch: int) -> np.ndarray:
    kinds = [places_where(multimodal, True), places_where(multimodal, False)]
    return plan_epoch(kinds, batch_size, seed, epoch, shuffle, drop_remainder)


def _mixture(sources: np.ndarray, multimodal: np.ndarray, weights: Sequence[float], seed: int, samples: int,
             batch_size: int, epoch: int) -> np.ndarray:
    parts = []
    for number, weight in enumerate(weights):
        indices = places_where(sources, number)
        of_kind = multimodal[indices]
        for kind, wanted in enumerate((True, False)):
            chosen = indices[of_kind == wanted]
            if len(chosen):   # a source of both kinds shares its weight between them by number
                parts.append(MixtureSource(kind, weight * len(chosen) / len(indices), chosen))
    return plan_mixture(parts, batch_size, seed, epoch, max(1, samples // batch_size))
