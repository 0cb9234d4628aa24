"""Checks every key and value of a run's YAML before anything starts.

MindFormers is not imported for it. Where it has been, the names of registered classes (`type:`) are checked as well.
"""
from __future__ import annotations

import sys
from collections.abc import Iterable

from mindformers_ixc.checkpoint.start import OVERRIDE
from mindformers_ixc.cli.group_config import DATASET, check_groups, check_task
from mindformers_ixc.cli.templates import Template, section_templates
from mindformers_ixc.data.batch import BATCH_COLUMNS, NOISE_COLUMNS, REFERENCE_COLUMN, SCORE_COLUMN
from mindformers_ixc.data.sections import check_dataset_section
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.fields import ALIASES, FIELDS, FRAMEWORK_FIELDS, POOLINGS, VISION_FIELDS, Field
from mindformers_ixc.preference_options import needs_reference, preference_options
from mindformers_ixc.reward_options import reward_options
from mindformers_ixc.sections import (
    ANYTHING,
    Rule,
    above_0,
    check_keys,
    check_section,
    check_value,
    check_values,
    from_0,
    hint,
    is_number,
    like,
    of_type,
    one_of,
    share,
    whole,
)
from mindformers_ixc.trackers import CALLBACK, check_tracker
from mindformers_ixc.training_options import (
    BELOW_1,
    GROUP_NETWORK,
    PAIR_NETWORKS,
    PREFERENCE_NETWORK,
    REWARD_NETWORK,
    check_lora,
    check_parts,
    check_pet,
    check_rates,
    evaluation_options,
    spike_options,
)

RUN_MODES = ("train", "finetune", "predict")

# More than any device has: such a number counts operations, or 10^9 of them.
LARGEST_PEAK = 1e5

_PEAK = Rule(lambda value: is_number(value) and 0 <= value <= LARGEST_PEAK,
             "the peak of a device in 10^12 operations a second, from 0 (unknown: no MFU in the log) to 100000")

_NAMES = Rule(lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
              "a list of fields of model.model_config")

# Keys of the top level that are this package's own, or that MindFormers has without a template, and what each must be;
# the others are sections with checks of their own.
OWN_RULES = {"on_save_error": one_of(("stop", "continue")), "no_join": of_type(bool), "device_tflops": _PEAK,
             "tensorboard": of_type(bool, dict), OVERRIDE: _NAMES}
OWN_SECTIONS = ("auto_register", "register_path", "generation", "train_parts", "part_learning_rates", "evaluation",
                "rollout", "skip_spikes",
                *OWN_RULES)

# Keys of MindFormers' section, which has no template.
TENSORBOARD_RULES = {"tensorboard_dir": of_type(str, required=True), "tensorboard_queue_size": whole(1),
                     "log_loss_scale_to_tensorboard": of_type(bool), "log_timers_to_tensorboard": of_type(bool),
                     "log_expert_load_to_tensorboard": of_type(bool)}

_FROM_0 = from_0()

# Values of other sections, by section.
NUMBERS = {
    "runner_config": {"epochs": whole(1), "batch_size": whole(1), "gradient_accumulation_steps": whole(1)},
    "optimizer": {"learning_rate": _FROM_0, "weight_decay": _FROM_0, "eps": _FROM_0},
    "lr_schedule": {"learning_rate": _FROM_0, "lr_end": _FROM_0, "warmup_lr_init": _FROM_0, "warmup_ratio": share(),
                    "warmup_steps": whole(0)},
    "runner_wrapper": {"max_grad_norm": above_0()},
    "train_dataset": {"batch_size": whole(1), "num_parallel_workers": whole(1)},
    "context": {"enable_compile_cache": of_type(bool), "compile_cache_path": of_type(str)},
}


def check_fields(fields: dict, source: str) -> None:
    """Checks every key and the type of every plain value of a run's fields.

    Args:
        fields: the nested mapping of the YAML file, overrides applied.
        source: name of the file, for the messages.

    Raises:
        ConfigError: one sentence naming the key, the value and the choices.
    """
    templates = section_templates()
    general = templates["general_config"]
    sections = [name for name in templates if name != "general_config"]
    check_keys(fields, top_keys(), source=source)
    check_values(fields, _template_rules(general), source=source)
    check_value("run_mode", fields.get("run_mode"), one_of(RUN_MODES), source=source)
    check_values(fields, {"seed": whole(0), **OWN_RULES}, source=source)
    if isinstance(fields.get("tensorboard"), dict):      # MindFormers has a section of that name
        check_section(fields["tensorboard"], TENSORBOARD_RULES, "tensorboard", source=source)
    for name in sections:
        template, section = templates[name], fields.get(name)
        if section is None or name == "callbacks":
            continue
        check_value(name, section, of_type(dict, list), source=source)
        if isinstance(section, dict) and template._raise_error_for_unexpected_key:   # MindFormers' own list of keys
            if "type" not in section:
                check_keys(section, template.keys(), name, source=source)
            check_values(section, _template_rules(template), name, source=source)
    _check_typed_sections(fields, source)
    _check_numbers(fields, source)
    _check_model(fields, source)
    _check_parts(fields, source)
    decay = (fields.get("runner_wrapper") or {}).get("ema_decay")
    if decay is not None:
        check_value("runner_wrapper.ema_decay", decay, BELOW_1, source=source)
    task = (fields.get("train_dataset_task") or {}).get("type")
    if task in ("IXC25SFTDataset", "IXC25PreferenceDataset", DATASET):
        check_dataset_section(fields.get("train_dataset"), task == "IXC25PreferenceDataset")
    _check_preference(fields, source)
    if fields["model"]["model_config"].get("type") == "IXC25Config":
        check_groups(fields, source)
    _check_noise(fields, source)
    if fields.get("skip_spikes") is not None:
        _check_spikes(fields, source)
    if fields.get("evaluation") is not None:
        arch = (fields["model"].get("arch") or {}).get("type")
        options = evaluation_options(fields["evaluation"], scored=arch == REWARD_NETWORK)
        if options["keep_best"] and fields.get("no_join") and fields.get("use_parallel"):
            raise ConfigError(f"{source}: evaluation.keep_best keeps a whole model, but no_join (--no_join) leaves the "
                              "ranks' parts as they are; take one of them out.")


def top_keys() -> list[str]:
    """Keys of the top level, in MindFormers' order, then this package's."""
    templates = section_templates()
    return [*templates["general_config"].keys(), *(name for name in templates if name != "general_config"),
            *OWN_SECTIONS]


def _template_rules(template: type[Template]) -> dict[str, Rule]:
    return {key: like(getattr(template, key)) for key in template.keys()}  # noqa: SIM118


def _check_typed_sections(fields: dict, source: str) -> None:
    kinds = {"trainer": "trainer", "optimizer": "optimizer", "lr_schedule": "lr", "runner_wrapper": "wrapper",
             "train_dataset_task": "dataset"}
    entries = [(name, fields.get(name), kind) for name, kind in kinds.items()]
    callbacks = fields.get("callbacks") or []
    check_value("callbacks", callbacks, of_type(list), source=source)
    entries += [(f"callbacks[{i}]", callback, "callback") for i, callback in enumerate(callbacks)]
    register = sys.modules.get("mindformers.tools.register")      # what is registered is known once it is imported
    for where, section, kind in entries:
        if section is None:
            continue
        if not isinstance(section, dict) or "type" not in section:
            raise ConfigError(f"{source}: {where} needs a 'type'.")
        if "auto_register" not in section and register is not None:
            _check_registered(section["type"], kind, register.MindFormerRegister.registry.get(kind, {}), source, where)
        if section["type"] == CALLBACK:
            check_tracker(section, where, source)


def _check_numbers(fields: dict, source: str) -> None:
    """Checks numbers that MindFormers hands on unread, so that a wrong one ends a run late or not at all."""
    for name, rules in NUMBERS.items():
        section = fields.get(name)
        plain = {key: value for key, value in section.items() if not isinstance(value, (list, dict))} \
            if isinstance(section, dict) else {}
        check_values(plain, rules, name, source=source)


def _check_registered(name: object, kind: str, registered: dict, source: str, where: str) -> None:
    if name not in registered:
        raise ConfigError(f"{source}: {where}.type is {name!r}, which is no registered {kind}; "
                          f"{hint(name, registered)}")


def _check_model(fields: dict, source: str) -> None:
    model = fields.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("model_config"), dict):
        raise ConfigError(f"{source}: the section model.model_config is missing.")
    config = model["model_config"]
    if config.get("type") != "IXC25Config":
        return   # another model of MindFormers: its own business
    check_section(config, _signature_rules(FIELDS), "model.model_config", source=source)
    if isinstance(config.get("vision_config"), dict):
        config["vision_config"].setdefault("type", "IXC25VisionConfig")
        check_section(config["vision_config"], _signature_rules(VISION_FIELDS), "model.model_config.vision_config",
                      source=source)


def _check_preference(fields: dict, source: str) -> None:
    """Checks the options of preference pairs and their columns, and that network and data set are for pairs or not."""
    model = fields["model"]
    section = model["model_config"]
    if section.get("type") != "IXC25Config":
        return
    arch = (model.get("arch") or {}).get("type")
    _check_reward(fields, section, arch == REWARD_NETWORK, source)
    learns = arch == PREFERENCE_NETWORK
    kind = (fields.get("train_dataset_task") or {}).get("type")
    columns = (fields.get("train_dataset") or {}).get("input_columns") or ()
    has_reference = isinstance(columns, (list, tuple)) and REFERENCE_COLUMN in columns
    if kind in ("IXC25SFTDataset", "IXC25PreferenceDataset") and (arch in PAIR_NETWORKS) != (
            kind == "IXC25PreferenceDataset"):
        raise ConfigError(f"{source}: model.arch.type is {arch!r}, but train_dataset_task.type is {kind!r}; "
                          f"IXC25PreferenceDataset belongs to {' and '.join(PAIR_NETWORKS)}, and they to it.")
    if not learns:
        if has_reference:
            raise ConfigError(f"{source}: train_dataset.input_columns has {REFERENCE_COLUMN}, which only preference "
                              "pairs have (model.arch.type IXC25ForPreference).")
        return
    options = preference_options(section.get("preference"))
    check_task(section, options["task"], "preference", source)
    if has_reference and not needs_reference(options):
        raise ConfigError(f"{source}: train_dataset.input_columns has {REFERENCE_COLUMN}, but the loss "
                          f"{options['loss']} compares with no reference; take the column out.")
    _check_pair_columns(columns, REFERENCE_COLUMN, source)


def _check_pair_columns(columns: Iterable, own: str, source: str) -> None:
    """Refuses columns that rows of pairs do not have; `own` is the one that these have beside a batch's."""
    known = (*BATCH_COLUMNS, own)
    foreign = [name for name in columns if name not in known]
    if foreign:
        raise ConfigError(f"{source}: train_dataset.input_columns has {', '.join(map(str, foreign))}, which preference "
                          f"pairs do not have; they have {', '.join(known)}.")


def _check_reward(fields: dict, section: dict, learns: bool, source: str) -> None:
    """Checks the options of a reward model and its column, and that there are none for another network."""
    columns = (fields.get("train_dataset") or {}).get("input_columns") or ()
    has_column = isinstance(columns, (list, tuple)) and SCORE_COLUMN in columns
    pooling = section.get("reward_pooling")
    if not learns:
        named = [name for name, given in (("model.model_config.reward_pooling", pooling is not None),
                                          ("model.model_config.reward", section.get("reward")),
                                          (f"train_dataset.input_columns {SCORE_COLUMN}", has_column)) if given]
        if named:
            raise ConfigError(f"{source}: {named[0]} is for reward models, which are trained by model.arch.type "
                              "IXC25ForReward; take it out, or name that network.")
        return
    reward_options(section.get("reward"))
    check_value("model.model_config.reward_pooling", pooling, one_of(POOLINGS), source=source)
    if not has_column:
        raise ConfigError(f"{source}: train_dataset.input_columns lacks {SCORE_COLUMN}, by which IXC25ForReward finds "
                          "where a score is read; add it.")
    _check_pair_columns(columns, SCORE_COLUMN, source)


def _check_spikes(fields: dict, source: str) -> None:
    """Checks the limits of a step that is skipped, and that the run has what compares with them."""
    options = spike_options(fields["skip_spikes"])
    if fields.get("use_parallel"):
        raise ConfigError(f"{source}: skip_spikes is for runs of one process; where a graph is cut the steps are "
                          "MindFormers' own, which compare nothing. Take it out, or set use_parallel to False.")
    by_norm = [key for key in ("grad_norm", "grad_norm_times") if options[key] is not None]
    if by_norm and not (fields.get("runner_wrapper") or {}).get("use_clip_grad"):
        raise ConfigError(f"{source}: skip_spikes.{by_norm[0]} needs runner_wrapper.use_clip_grad True, since only "
                          "steps that clip gradients know their norm.")
    updates = (fields.get("rollout") or {}).get("updates") or 1
    if updates != 1:
        raise ConfigError(f"{source}: skip_spikes needs to know every step, but rollout.updates {updates!r} makes that "
                          "many of each round; set it to 1, or take skip_spikes out.")
    runner = fields.get("runner_config") or {}
    if runner.get("sink_mode") and runner.get("sink_size") != 1:
        raise ConfigError(f"{source}: skip_spikes needs to know every step, but with runner_config.sink_mode a device "
                          f"takes several by itself (sink_size {runner.get('sink_size')!r}); set sink_size to 1, or "
                          "sink_mode to False.")


def _check_noise(fields: dict, source: str) -> None:
    """Checks that noise on the embeddings has the columns it is made of, and that nothing else asks for them."""
    model = fields["model"]
    alpha = model["model_config"].get("neftune_alpha")
    if not alpha or fields.get("run_mode") == "predict":
        return
    arch = (model.get("arch") or {}).get("type")
    if arch in (*PAIR_NETWORKS, GROUP_NETWORK):
        raise ConfigError(f"{source}: model.model_config.neftune_alpha is {alpha!r}, but {arch} compares answers, each "
                          "of which would get noise of its own; take it out.")
    columns = (fields.get("train_dataset") or {}).get("input_columns") or BATCH_COLUMNS
    missing = [name for name in NOISE_COLUMNS if name not in columns]
    if missing:
        raise ConfigError(f"{source}: model.model_config.neftune_alpha is {alpha!r}, but train_dataset.input_columns "
                          f"lacks {' and '.join(missing)}, which the noise is made of; add what is missing.")


def _check_parts(fields: dict, source: str) -> None:
    """Checks what trains and at which rate; what of it the model has is known when it is built."""
    parts, rates = fields.get("train_parts"), fields.get("part_learning_rates")
    if parts is not None:
        check_value("train_parts", parts, Rule(lambda value: isinstance(value, list), "a list of parts"), source=source)
        check_parts(parts)
        if (((fields.get("model") or {}).get("model_config") or {}).get("pet_config") or {}).get("pet_type"):
            raise ConfigError(f"{source}: train_parts and model.model_config.pet_config both say what trains; give one "
                              "of them.")
    pet = ((fields.get("model") or {}).get("model_config") or {}).get("pet_config")
    if isinstance(pet, dict):
        is_own = fields["model"]["model_config"].get("type") == "IXC25Config"
        (check_pet if is_own else check_lora)(pet, bool(fields.get("use_parallel")))
    if rates is not None:
        check_rates(rates)
        if fields.get("grouped_lr_schedule"):
            raise ConfigError(f"{source}: part_learning_rates and grouped_lr_schedule both group parameters; give one "
                              "of them.")
        if not fields.get("lr_schedule"):
            raise ConfigError(f"{source}: part_learning_rates needs an lr_schedule, whose rate its factors multiply.")


def _signature_rules(table: dict[str, Field]) -> dict[str, Rule]:
    """What a section may hold whose fields are those of a table."""
    free = dict.fromkeys((*FRAMEWORK_FIELDS, "architectures", "auto_register"), ANYTHING)
    own = {name: like(field.default) for name, field in table.items()}
    return {**free, **{alias: own.get(name, ANYTHING) for alias, name in ALIASES.items()}, **own}
