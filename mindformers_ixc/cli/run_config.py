"""Checks every key and value of a run's YAML before anything starts."""
from __future__ import annotations

import difflib

from mindformers.tools.register import MindFormerRegister
from mindformers.tools.register.template import CONFIG_NAME_TO_CLASS

from mindformers_ixc.config import ALIASES, FIELDS, FRAMEWORK_FIELDS, VISION_FIELDS, Field
from mindformers_ixc.data.sections import check_dataset_section
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.training.evaluation import evaluation_options
from mindformers_ixc.training.parts import check_parts, check_rates

RUN_MODES = ("train", "finetune", "predict")

# Top-level keys of this package beside MindFormers' own.
OWN_SECTIONS = ("auto_register", "register_path", "generation", "train_parts", "part_learning_rates", "evaluation")

def check_fields(fields: dict, source: str) -> None:
    """Checks every key and the type of every plain value of a run's fields.

    Args:
        fields: the nested mapping of the YAML file, overrides applied.
        source: name of the file, for the messages.

    Raises:
        ConfigError: one sentence naming the key, the value and the choices.
    """
    general = CONFIG_NAME_TO_CLASS["general_config"]
    sections = [name for name in CONFIG_NAME_TO_CLASS if name != "general_config"]
    _check_keys(fields, [*general.keys(), *sections, *OWN_SECTIONS], source, "")
    _check_types(fields, {key: getattr(general, key) for key in general.keys()}, source, "")  # noqa: SIM118
    if fields.get("run_mode") not in RUN_MODES:
        raise ConfigError(f"{source}: run_mode is {fields.get('run_mode')!r}; the choices are {', '.join(RUN_MODES)}.")
    for name in sections:
        template, section = CONFIG_NAME_TO_CLASS[name], fields.get(name)
        if section is None or name == "callbacks":
            continue
        if not isinstance(section, (dict, list)):
            raise ConfigError(f"{source}: {name} must be a section, found {section!r}.")
        if isinstance(section, dict) and template._raise_error_for_unexpected_key:   # MindFormers' own list of keys
            if "type" not in section:
                _check_keys(section, template.keys(), source, f"{name}.")
            _check_types(section, {key: getattr(template, key) for key in template.keys()},  # noqa: SIM118
                         source, f"{name}.")
    _check_typed_sections(fields, source)
    _check_model(fields, source)
    _check_parts(fields, source)
    if (fields.get("train_dataset_task") or {}).get("type") in ("IXC25SFTDataset", "IXC25PreferenceDataset"):
        check_dataset_section(fields["train_dataset"])
    if fields.get("evaluation") is not None:
        if not isinstance(fields["evaluation"], dict):
            raise ConfigError(f"{source}: evaluation must be a section, found {fields['evaluation']!r}.")
        evaluation_options(fields["evaluation"])


def _check_typed_sections(fields: dict, source: str) -> None:
    kinds = {"trainer": "trainer", "optimizer": "optimizer", "lr_schedule": "lr", "runner_wrapper": "wrapper",
             "train_dataset_task": "dataset"}
    entries = [(name, fields.get(name), kind) for name, kind in kinds.items()]
    callbacks = fields.get("callbacks") or []
    if not isinstance(callbacks, list):
        raise ConfigError(f"{source}: callbacks must be a list, found {callbacks!r}.")
    entries += [(f"callbacks[{i}]", callback, "callback") for i, callback in enumerate(callbacks)]
    for where, section, kind in entries:
        if section is None:
            continue
        if not isinstance(section, dict) or "type" not in section:
            raise ConfigError(f"{source}: {where} needs a 'type'.")
        if "auto_register" not in section:
            _check_registered(section["type"], kind, MindFormerRegister.registry.get(kind, {}), source, where)


def _check_registered(name, kind: str, registered: dict, source: str, where: str) -> None:
    if name in registered:
        return
    close = difflib.get_close_matches(str(name), list(registered), n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the choices are {', '.join(sorted(registered))}."
    raise ConfigError(f"{source}: {where}.type is {name!r}, which is no registered {kind}; {hint}")


def _check_model(fields: dict, source: str) -> None:
    model = fields.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("model_config"), dict):
        raise ConfigError(f"{source}: the section model.model_config is missing.")
    config = model["model_config"]
    if config.get("type") != "IXC25Config":
        return   # another model of MindFormers: its own business
    _check_signature(config, FIELDS, source, "model.model_config.")
    if isinstance(config.get("vision_config"), dict):
        config["vision_config"].setdefault("type", "IXC25VisionConfig")
        _check_signature(config["vision_config"], VISION_FIELDS, source, "model.model_config.vision_config.")


def _check_parts(fields: dict, source: str) -> None:
    """Checks what trains and at which rate; what of it the model has is known when it is built."""
    parts, rates = fields.get("train_parts"), fields.get("part_learning_rates")
    if parts is not None:
        if not isinstance(parts, list):
            raise ConfigError(f"{source}: train_parts is {parts!r}, expected a list of parts.")
        check_parts(parts)
        if (((fields.get("model") or {}).get("model_config") or {}).get("pet_config") or {}).get("pet_type"):
            raise ConfigError(f"{source}: train_parts and model.model_config.pet_config both say what trains; give one "
                              "of them.")
    if rates is not None:
        if not isinstance(rates, dict):
            raise ConfigError(f"{source}: part_learning_rates must be a section, found {rates!r}.")
        check_rates(rates)
        if fields.get("grouped_lr_schedule"):
            raise ConfigError(f"{source}: part_learning_rates and grouped_lr_schedule both group parameters; give one "
                              "of them.")
        if not fields.get("lr_schedule"):
            raise ConfigError(f"{source}: part_learning_rates needs an lr_schedule, whose rate its factors multiply.")


def _check_signature(section: dict, table: dict[str, Field], source: str, prefix: str) -> None:
    known = [*table, *ALIASES, *FRAMEWORK_FIELDS, "architectures", "auto_register"]
    _check_keys(section, known, source, prefix)
    _check_types(section, {name: field.default for name, field in table.items()}, source, prefix)


def _check_keys(section: dict, known, source: str, prefix: str) -> None:
    known = list(known)
    for key, value in section.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"the choices are {', '.join(sorted(known))}."
            raise ConfigError(f"{source}: unknown key {prefix}{key} (value {value!r}); {hint}")


def _check_types(section: dict, defaults: dict, source: str, prefix: str) -> None:
    """A value must be of its default's type; whole numbers pass as floats, and `null` passes everywhere."""
    for key, default in defaults.items():
        value = section.get(key)
        if value is None or not isinstance(default, (bool, int, float)):
            continue
        wanted = bool if isinstance(default, bool) else (int if isinstance(default, int) else (int, float))
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, wanted):
            name = {bool: "true or false", int: "a whole number"}.get(wanted, "a number")
            raise ConfigError(f"{source}: {prefix}{key} is {value!r}, expected {name}.")
