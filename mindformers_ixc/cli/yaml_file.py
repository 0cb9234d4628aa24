"""A run's YAML file with its bases, and what the command line says on top of it."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from mindformers_ixc.cli.recipe_files import find_config
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.files import read_text
from mindformers_ixc.resources import resolve_model

# Short forms that MindFormers' launcher script has, and the keys they stand for.
SHORT_FORMS = {
    "epochs": "runner_config.epochs", "batch_size": "runner_config.batch_size",
    "sink_mode": "runner_config.sink_mode",
    "gradient_accumulation_steps": "runner_config.gradient_accumulation_steps",
    "device_target": "context.device_target", "device_id": "context.device_id", "mode": "context.mode",
    "train_dataset_dir": "train_dataset.data_loader.dataset_dir", "predict_data": "input_data",
}

# Sections and lists inside one another; recipes have 5.
MOST_NESTED = 100


def parse_overrides(words: list[str]) -> dict[str, object]:
    """Turns `--a.b 3 --c=x` into `{"a.b": 3, "c": "x"}`; values are read as YAML.

    Raises:
        ConfigError: for a word that is no option or an option without a value.
    """
    overrides, words = {}, list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"'{word}' is neither an option nor the value of one; options look like "
                              "--runner_config.epochs 3.")
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"--{name} has no value; write --{name} VALUE.")
            text = words.pop(0)
        overrides[SHORT_FORMS.get(name, name)] = read_value(text)
    return overrides


def read_value(text: str) -> object:
    """A command-line value as YAML reads it, with `1e-4` (which YAML 1.1 takes for text) as a number."""
    value = load_yaml(text, f"The value {text!r:.80}")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def apply_overrides(fields: dict, overrides: dict[str, object]) -> None:
    """Sets dotted keys in a nested dict, in place; entries of lists go by their numbers, which begin at 0.

    The number behind a list's last one adds an entry, if that is a section: `callbacks.2.type`.

    Raises:
        ConfigError: when a part of a key is there but is no section and no list, or is no entry of a list.
    """
    for key, value in overrides.items():
        parts = key.split(".")
        _set(fields, key, parts, 0, value)


def _set(section: Any, key: str, parts: list[str], depth: int, value: object) -> None:
    """Sets what the parts of a key from a depth on name, in a section or list."""
    last, above = depth == len(parts) - 1, ".".join(parts[:depth])
    part: Any = parts[depth]
    if isinstance(section, list):
        part = _number(section, part, key, above, adds=not last)
    elif not isinstance(section, dict):
        raise ConfigError(f"--{key}: '{above}' is not a section of the YAML file.")
    if last:
        section[part] = value
        return
    inner = section[part] if isinstance(section, list) else section.get(part)
    if isinstance(inner, list):
        inner = list(inner)         # an alias elsewhere in the file keeps its own
    elif inner is None:
        inner = {}
    _set(inner, key, parts, depth + 1, value)
    section[part] = inner


def _number(entries: list, part: str, key: str, name: str, adds: bool) -> int:
    """The place that a part of a key names in a list, which gets an entry there if it is the next one."""
    number = int(part) if part.isdecimal() and part.isascii() else -1
    if number == len(entries) and adds and all(isinstance(entry, dict) for entry in entries):
        entries.append({})
    if not 0 <= number < len(entries):
        there = f"its entries are numbered 0 to {len(entries) - 1}" if entries else "it has no entry"
        raise ConfigError(f"--{key}: {part!r} is no entry of the list '{name}'; {there}. "
                          f"A list is replaced whole by --{name} '[...]'.")
    return number


def read_yaml(path: str | Path, seen: tuple[Path, ...] = ()) -> dict:
    """Reads a YAML file that must hold a mapping; one that names another as `base_config` changes that one.

    The rule is MindFormers'; a name that no file has may be that of a shipped one (`find_config`).

    Args:
        path: the file, or the name of a recipe.
        seen: files that led to this one.

    Raises:
        ConfigError: for a missing file, invalid YAML, another top level, or files that are each other's base.
    """
    path = find_config(path)
    if path.resolve() in seen:
        raise ConfigError(f"{path} is its own base_config (by way of {seen[-1]}); take one of the two out.")
    fields = load_yaml(read_text(path, ConfigError), str(path))
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, found {type(fields).__name__}.")
    bases = fields.pop("base_config", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base_config is {bases!r:.80}; it must be a file's name, or a list of them.")
    merged: dict = {}
    for base in bases:
        merged.update(read_yaml(find_config(base, path), (*seen, path.resolve())))
    return put_on_top(merged, fields)


def load_yaml(text: str, name: str) -> Any:
    """The value of a YAML text, without objects of Python and without values that hold themselves.

    Args:
        text: the text.
        name: what is read, for the messages.

    Raises:
        ConfigError: when it is no YAML, is nested too deeply to be read, or an alias stands inside what it names.
    """
    try:
        _check_depth(text, name)
        value = yaml.safe_load(text)
        _check_finite(value, name)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
        if isinstance(error, ConfigError):
            raise
        # the parser lets some of Python's own errors out, such as that of a date that there is not
        raise ConfigError(f"{name} is not valid YAML: {' '.join(str(error).split()):.300}") from error
    return value


def _check_depth(text: str, name: str) -> None:
    """Refuses sections and lists that are nested so deeply that the parser's recursion would take long, or fail."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.events.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.events.CollectionEndEvent):
            depth -= 1
        if depth > MOST_NESTED:
            raise ConfigError(f"{name} is not usable YAML: sections or lists are nested too deeply, more than "
                              f"{MOST_NESTED} in each other.")


def _check_finite(value: Any, name: str, above: tuple[int, ...] = (), done: set[int] | None = None) -> None:
    """Refuses a value with an alias to a section or list that it stands in; each is looked at once."""
    done = set() if done is None else done
    if id(value) in above:
        raise ConfigError(f"{name} has an alias (*) inside the section or list that it names, which has no end; write "
                          "the values out.")
    if id(value) in done:
        return
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(inner, (dict, list)):
            _check_finite(inner, name, (*above, id(value)), done)
    done.add(id(value))


def put_on_top(base: dict, changes: dict) -> dict:
    """A mapping with another one's values on top; sections of both are merged, everything else is replaced."""
    both = dict(base)
    for key, value in changes.items():
        inner = both.get(key)
        both[key] = put_on_top(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return both


def merged_fields(arguments: argparse.Namespace) -> dict:
    """The YAML file's fields with everything the command line says on top."""
    fields = read_yaml(arguments.config)
    overrides = parse_overrides(arguments.rest)
    for name in ("run_mode", "output_dir", "load_checkpoint"):
        if getattr(arguments, name) is not None:
            overrides[name] = getattr(arguments, name)
    if arguments.use_parallel is not None:
        overrides["use_parallel"] = read_value(arguments.use_parallel)
    if arguments.predict_data is not None:
        overrides["input_data"] = arguments.predict_data
    if getattr(arguments, "no_join", False):
        overrides["no_join"] = True
    apply_overrides(fields, overrides)
    if isinstance(fields.get("load_checkpoint"), str) and fields["load_checkpoint"]:
        fields["load_checkpoint"] = str(resolve_model(fields["load_checkpoint"]))
    tie_data_section(fields)
    return fields


def tie_data_section(fields: dict) -> None:
    """Lets both names of the data section mean one section, in place.

    MindFormers reads it through `train_dataset_task`; a YAML anchor no longer ties them once one is overridden.
    """
    if isinstance(fields.get("train_dataset_task"), dict) and "train_dataset" in fields:
        fields["train_dataset_task"]["dataset_config"] = fields["train_dataset"]
