"""The rotary settings of a configuration in the spellings that are in use, read as one.

The public `config.json` has `rope_theta` and `rope_scaling: {"type": "dynamic", "factor": 2.0}`. Later versions of
transformers write `rope_type` for `type`, and `rope_parameters`, with the base inside, for both fields. Every rotary
setting is read, or refused by name: a setting passed over would change the model's output without a word.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.sections import Rule, above_0, check_keys, check_value, is_number

# The fields of a configuration that this module reads.
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")

# The kinds of scaling: those of the public model's code, and transformers' name for none at all.
DYNAMIC, NO_SCALING = "dynamic", "default"

SECTION_KEYS = ("type", "rope_type", "factor", "rope_theta", "partial_rotary_factor",
                "original_max_position_embeddings")

# Settings of rotary embeddings in other models' configurations. MindFormers' Llama calls the base `theta` and the
# scaling `extend_method` and `scaling_factor`.
OTHER_SETTINGS = re.compile(r".*(rope|rotary).*|theta|extend_method|scaling_factor")

FACTOR = Rule(lambda value: is_number(value) and value >= 1, "a number of at least 1")


class Rope(NamedTuple):
    """Rotary settings under their public names.

    Attributes:
        theta: base of the rotary embedding; `None` where no field says it.
        scaling: `{"type": "dynamic", "factor": f}`, f a float, or `None`.
    """

    theta: float | None
    scaling: dict[str, Any] | None


def read_rope(fields: Mapping[str, Any], trained: Any) -> Rope:
    """The rotary settings among the fields of a configuration.

    Args:
        fields: `ROPE_FIELDS`, and whatever the configuration has beside the fields that this package knows; names
            that are no rotary setting are ignored, and so is `None`.
        trained: `max_position_embeddings` of the model.

    Raises:
        ConfigError: for a kind of scaling that the model does not have, a value of another type, two fields that
            contradict each other, or a rotary setting of another model; names the field and its value.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    for name, value in given.items():
        if name not in ROPE_FIELDS and OTHER_SETTINGS.fullmatch(name):
            raise ConfigError(f"{name} is {value!r}, a rotary setting that this model does not have; it reads "
                              "rope_theta and rope_scaling, or rope_parameters with both in it.")
    bases = {"rope_theta": given["rope_theta"]} if "rope_theta" in given else {}
    scalings = {}
    for name in ROPE_FIELDS[1:]:
        if name in given:
            section = _section(name, given[name])
            if "rope_theta" in section:
                bases[f"{name}.rope_theta"] = section["rope_theta"]
            if section.keys() - {"rope_theta"}:
                scalings[name] = _scaling(name, section, trained)
    for name, value in bases.items():
        check_value(name, value, above_0())
    theta = _agreed(bases)
    return Rope(None if theta is None else float(theta), _agreed(scalings))


def _section(name: str, value: Any) -> dict[str, Any]:
    """A section of rotary settings without those that are `None`."""
    check_value(name, value, Rule(lambda value: isinstance(value, Mapping), "a section, or none"))
    check_keys(value, SECTION_KEYS, name)
    return {key: item for key, item in value.items() if item is not None}


def _scaling(name: str, section: dict[str, Any], trained: Any) -> dict[str, Any] | None:
    """The scaling that a section asks for, under its public names."""
    kind = _agreed({f"{name}.{key}": section[key] for key in ("type", "rope_type") if key in section})
    if kind is None and "factor" in section:
        raise ConfigError(f"{name} has factor {section['factor']!r} and no type; say type: {DYNAMIC}.")
    kind = NO_SCALING if kind is None else kind
    check_value(f"{name}.{'type' if 'type' in section else 'rope_type'}", kind,
                Rule(lambda value: value in (DYNAMIC, NO_SCALING),
                     f"'{DYNAMIC}' and '{NO_SCALING}' (no scaling)", verb="the choices are"))
    for key, neutral in (("partial_rotary_factor", 1), ("original_max_position_embeddings", trained)):
        if section.get(key, neutral) != neutral:
            raise ConfigError(f"{name}.{key} is {section[key]!r}; this model takes {neutral} only.")
    if kind == NO_SCALING:
        if section.get("factor", 1) != 1:
            raise ConfigError(f"{name} has factor {section['factor']!r}, but its type '{NO_SCALING}' does not scale; "
                              f"leave factor out or say type: {DYNAMIC}.")
        return None
    if "factor" not in section:
        raise ConfigError(f"{name} has type '{DYNAMIC}' and no factor; say which (the public model has 2.0).")
    check_value(f"{name}.factor", section["factor"], FACTOR)
    return {"type": DYNAMIC, "factor": float(section["factor"])}


def _agreed(found: dict[str, Any]) -> Any:
    """The one value that all names have; `None` without any.

    Raises:
        ConfigError: naming two that differ.
    """
    items = list(found.items())
    for name, value in items[1:]:
        if value != items[0][1]:
            raise ConfigError(f"{items[0][0]} says {items[0][1]!r} and {name} says {value!r}; they are two spellings "
                              "of one setting, so give one of them or the same value.")
    return items[0][1] if items else None
