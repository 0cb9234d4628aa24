"""What a model begins with: whose configuration holds, and which parameters a checkpoint must have.

One rule for everything that loads weights. What describes the weights comes from the directory they lie in; a YAML may
repeat it, not contradict it. Every parameter of the model is in the checkpoint, but for pairs that a recipe adds, which
start without effect; everything the checkpoint holds is a parameter of the model, but for pairs a recipe leaves out.
"""
from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from mindformers_ixc.checkpoint.dtypes import FLOATING
from mindformers_ixc.checkpoint.family import WRITING_HEAD, know_member, refuse_other, say_unused
from mindformers_ixc.checkpoint.quantised import refuse_quantised
from mindformers_ixc.checkpoint.sources import OpenedCheckpoint, is_state
from mindformers_ixc.checkpoint.tensors import LazyTensor
from mindformers_ixc.config import ModelConfig, read_config
from mindformers_ixc.errors import CheckpointError, ConfigError
from mindformers_ixc.fields import ALIASES, FIELDS, MODE_ADAPTERS, VISION_FIELDS
from mindformers_ixc.parameters import BUFFERS, UNUSED, part_of
from mindformers_ixc.resources import is_starter
from mindformers_ixc.rope import ROPE_FIELDS, Rope, read_rope

# The YAML's key that lists fields of the model section whose values hold against a starting directory's config.json.
OVERRIDE = "override_model_config"

# Pairs by the `type` of a YAML's pet_config, as parts of the model; `task_lora` has the task's name behind it.
PET_PARTS = {"partial_lora": "partial_lora", "task_lora": "task_lora", "lora": "lora"}

# What a run says that begins with the shipped model.
STARTER_LINE = ("The run starts from the starter, the small trained model that ships with this package: it knows the "
                "demo pictures and colours, and learns the rest from the data of the run.")

# How decoders of the Llama family name what InternLM2 names otherwise.
OTHER_NAMES = re.compile(r"(?!.*vision_model\.).*\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|"
                         r"(input|post_attention)_layernorm)\.|(.*\.)?(embed_tokens|lm_head)\.")


@dataclass
class Recipe:
    """How a recipe's model differs from the checkpoint it starts with.

    Attributes:
        new: parts of the model that may be missing, each whole; they start without effect.
        left_out: parts, or single parameters, that the checkpoint may hold and the model does not have.
        outside_graph: whether what the graph does not use may be missing: a parallel run saves nothing else, and needs
            nothing else.
        overridden: fields that hold against the directory's configuration, with both values, as text.
    """

    new: set[str] = field(default_factory=set)
    left_out: set[str] = field(default_factory=set)
    outside_graph: bool = False
    overridden: list[str] = field(default_factory=list)


def pet_parts(section: Mapping | None) -> set[str]:
    """Parts that a YAML's `pet_config` gives a model that lacks them."""
    section = section or {}
    kind = section.get("pet_type")
    if kind not in PET_PARTS:
        return set()
    return {f"task_lora.{section.get('task', 'web')}" if kind == "task_lora" else PET_PARTS[kind]}


def begin(section: MutableMapping, source: OpenedCheckpoint, override: Collection[str] = ()) -> Recipe:
    """Makes a YAML's `model_config` that of a checkpoint, in place.

    Returns:
        How the YAML's model differs from it.

    Raises:
        ConfigError: when the two contradict each other.
        CheckpointError: when the checkpoint is quantised.
    """
    recipe = Recipe()
    refuse_quantised(source, "training")
    if source.config_file is not None:
        found = know_member(read_config(source.config_file), source)
        scores = section.get("reward_pooling") is not None
        if not scores:
            refuse_other(found.reward_pooling is not None, source.path, scores)
        recipe = adopt_configuration(section, found, str(source.config_file.parent), override)
    if section.get("reward_pooling") is not None and WRITING_HEAD in source.tensors:
        recipe.new.add("reward_head")
        recipe.left_out.add(WRITING_HEAD)
    recipe.new |= pet_parts(section.get("pet_config"))
    return recipe


def adopt_configuration(section: MutableMapping, found: ModelConfig, directory: str,
                        override: Collection[str] = ()) -> Recipe:
    """Puts what describes a directory's weights into a YAML's `model_config`, in place.

    Args:
        section: the YAML's; its fields of a run (lengths, dtypes, layout, dropout) stay.
        found: the directory's configuration.
        directory: its name, for the messages.
        override: fields whose YAML values hold all the same, `vision_config.NAME` for the tower's.

    Returns:
        The task LoRAs that the YAML adds and leaves out.

    Raises:
        ConfigError: for a field that contradicts the directory's, with both values; for a field to override that the
            YAML does not have.
    """
    left, recipe = set(override), Recipe()
    for own, theirs in [(name, ALIASES[name]) for name in ALIASES if name in section]:
        section[theirs] = section.pop(own)
    public = found.to_public_dict()
    recipe.overridden = list(_overridden(section, public, left))
    contradictions = list(_rotary(section, found, left))
    names = [name for name, entry in FIELDS.items() if entry.describes and name not in ROPE_FIELDS]
    contradictions += _adopt(section, public, names, "", left)
    vision = section.get("vision_config")
    if vision is None:
        vision = section["vision_config"] = {"type": "IXC25VisionConfig"}
    if not isinstance(vision, MutableMapping):
        raise ConfigError(f"model.model_config.vision_config is {vision!r:.80}; it must be a section.")
    contradictions += _adopt(vision, public["vision_config"], VISION_FIELDS, "vision_config.", left)
    contradictions += _task_loras(section, found.task_lora_ranks, recipe, left)
    if left:
        raise ConfigError(f"{OVERRIDE} names {', '.join(sorted(left))}, which the YAML's model_config does not have or "
                          "which no directory decides; take it out.")
    if contradictions:
        shown = "; ".join(f"{name} is {ours!r} in the YAML and {theirs!r} there" for name, ours, theirs in
                          contradictions[:5])
        more = f" (and {len(contradictions) - 5} more)" if len(contradictions) > 5 else ""
        raise ConfigError(f"model.model_config contradicts config.json of {directory}: {shown}{more}. The weights were "
                          f"made for what is there: take the key out of the YAML, or, to change the model on purpose, "
                          f"say --{OVERRIDE} \"[{', '.join(name for name, *_ in contradictions)}]\".")
    return recipe


def _overridden(section: Mapping, public: Mapping, override: Iterable[str]) -> Iterable[str]:
    """What is said of fields that a YAML changes on purpose."""
    for name in sorted(override):
        inner, _, key = name.rpartition(".")
        ours, theirs = ((found.get(inner) or {}) if inner else found for found in (section, public))
        if ours.get(key) is not None:
            yield f"{name} {ours[key]!r:.80} instead of {theirs.get(key)!r:.80}"


Contradictions = Iterable[tuple[str, Any, Any]]


def _adopt(section: MutableMapping, found: Mapping, names: Iterable[str], prefix: str, override: set[str]) \
        -> list[tuple[str, Any, Any]]:
    """Fills in fields that a section does not have; the contradictions of those it has."""
    contradictions = []
    for name in names:
        if section.get(name) is None:
            if name in found:
                section[name] = found[name]
        elif prefix + name in override:
            override.discard(prefix + name)
        elif name in found and section[name] != found[name]:
            contradictions.append((prefix + name, section[name], found[name]))
    return contradictions


def said_rotary(section: Mapping, trained: Any) -> tuple[Rope, bool]:
    """The rotary settings that a section has in any spelling, and whether the scaling is among them."""
    given = {name: section[name] for name in ROPE_FIELDS if section.get(name) is not None}
    return read_rope(given, trained), any(set(given.get(name) or {}) - {"rope_theta"} for name in ROPE_FIELDS[1:])


def _rotary(section: MutableMapping, found: ModelConfig, override: set[str]) -> Contradictions:
    """The same of the rotary settings, which have several spellings."""
    rope, scaled = said_rotary(section, found.max_position_embeddings)
    section.pop("rope_parameters", None)
    for name, ours, theirs, said in (("rope_theta", rope.theta, found.rope_theta, rope.theta is not None),
                                     ("rope_scaling", rope.scaling, found.rope_scaling, scaled)):
        section[name] = theirs
        if said and name in override:
            override.discard(name)
            section[name] = ours
        elif said and ours != theirs:
            yield name, ours, theirs


def _task_loras(section: MutableMapping, found: Mapping[str, int], recipe: Recipe, override: set[str]) \
        -> Contradictions:
    """Which task LoRAs a YAML adds and leaves out, noted in the recipe; ranks that differ."""
    wanted = section.get("task_lora_ranks")
    if wanted is None:
        section["task_lora_ranks"] = dict(found)
        return []
    override.discard("task_lora_ranks")
    recipe.new |= {f"task_lora.{task}" for task in wanted if task not in found}
    recipe.left_out |= {f"task_lora.{task}" for task in found if task not in wanted}
    return [(f"task_lora_ranks.{task}", rank, found[task]) for task, rank in wanted.items()
            if task in found and rank != found[task]]


def match_tensors(source: OpenedCheckpoint, shapes: Mapping[str, tuple[int, ...]], recipe: Recipe | None = None,
                  mode: str = "base") -> tuple[dict[str, LazyTensor], list[str]]:
    """The tensors of a model's parameters in a checkpoint, all of them checked.

    Optimizer states, counters, averages, buffers and what no graph here uses (`parameters.UNUSED`) are passed over.

    Args:
        source: the checkpoint.
        shapes: of the model's parameters, by name.
        recipe: how the model differs from the checkpoint; by default not at all.
        mode: of the run, for what its graph does not use.

    Returns:
        Tensors by name, and the names of the parameters that are new.

    Raises:
        CheckpointError: for missing or surplus parameters, another shape, or a format no weight has.
    """
    recipe = recipe or Recipe()
    found = {name: tensor for name, tensor in source.tensors.items()
             if name in shapes or not (is_state(name) or BUFFERS.match(name) or name in UNUSED)}
    surplus = [name for name in found if name not in shapes and not {name, part_of(name)} & recipe.left_out]
    # what a parallel run's network keeps of its steps (`train_report`) is no model's, so no checkpoint has it
    missing = [name for name in shapes if name not in found and not is_state(name)]
    present = {part_of(name) for name in found}
    new = [name for name in missing if part_of(name) in recipe.new - present]
    excused = {*new, *(name for name in missing if recipe.outside_graph and _is_outside(name, mode))}
    lacking = [name for name in missing if name not in excused]
    if lacking or surplus:
        raise CheckpointError(mismatch(source.path, lacking, surplus))
    say_unused(source)
    tensors = {name: tensor for name, tensor in found.items() if name in shapes}
    for name, tensor in tensors.items():
        check_tensor(source, name, tensor, shapes[name])
    return tensors, new


def check_tensor(source: OpenedCheckpoint, name: str, tensor: LazyTensor, shape: tuple[int, ...]) -> None:
    """Refuses a tensor of another shape or one that is not of floating point.

    Raises:
        CheckpointError: showing both shapes, or the format.
    """
    if tensor.shape != shape:
        raise CheckpointError(f"{source.path} holds {name} with shape {tensor.shape}, the configuration asks for "
                              f"{shape}.")
    if tensor.dtype not in FLOATING:
        raise CheckpointError(f"{source.path} holds {name} in the format {tensor.dtype}; weights are one of "
                              f"{', '.join(FLOATING)}; whole numbers are read as `mindformers quantize` and AWQ write "
                              "them.")


def mismatch(path: object, missing: list[str], surplus: list[str]) -> str:
    """The sentence about names that do not match, with what they look like."""
    return (f"{path} does not match its configuration: {len(missing)} parameters are missing{_first(missing)}, "
            f"{len(surplus)} are surplus{_first(surplus)}.{_advice(missing, surplus)}")


def _is_outside(name: str, mode: str) -> bool:
    part = part_of(name) or ""
    used = {f"task_lora.{task}" for task in MODE_ADAPTERS[mode]}
    return ".post_layernorm." in name or (part.startswith("task_lora.") and part not in used)


def _first(names: list[str]) -> str:
    return f" (first: {', '.join(sorted(names)[:3])})" if names else ""


def _advice(missing: list[str], surplus: list[str]) -> str:
    """What the names that do not match look like."""
    if any(OTHER_NAMES.match(name) for name in surplus):
        return (" Its names are those of a Llama-style decoder, with queries, keys and values apart; this model's are "
                "the public InternLM2's, with one `wqkv`. Take the checkpoint in its published form.")
    if missing and all((part_of(name) or "").startswith("task_lora") or ".post_layernorm." in name for name in missing):
        return (" A parallel run saves only what its graph uses; put that on the checkpoint it began with: mindformers "
                "merge BASE DST --attach THIS. Pairs that a recipe adds are named in its YAML and missing as a whole.")
    if missing and all((part_of(name) or "").startswith(("task_lora", "partial_lora")) for name in missing):
        return " Pairs that a recipe adds are named in its YAML's pet_config and missing as a whole."
    return " The directory is incomplete, or its config.json is another model's." if missing else ""


def describe_start(path: str | os.PathLike, recipe: Recipe, new: list[str]) -> list[str]:
    """What there is to say about a start: the shipped model, pairs that are new, and pairs that are left out."""
    lines = [STARTER_LINE] if is_starter(path) else []
    if recipe.overridden:
        lines.append(f"As {OVERRIDE} says, the model of {path} is changed: {', '.join(recipe.overridden)}.")
    if "reward_head" in recipe.new and new:
        lines.append(f"{path} writes answers: {WRITING_HEAD} is left out, and the score head starts at zero.")
    new, left_out = [name for name in new if part_of(name) != "reward_head"], recipe.left_out - {WRITING_HEAD}
    if new:
        parts = ", ".join(sorted({str(part_of(name)) for name in new}))
        lines.append(f"{len(new)} parameters ({parts}) are not in {path}: the recipe adds them, and they start without "
                     "effect.")
    if left_out:
        lines.append(f"{', '.join(sorted(left_out))} of {path} are left out: the YAML's task_lora_ranks does "
                     "not name them.")
    return lines
