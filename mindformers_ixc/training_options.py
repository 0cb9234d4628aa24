"""Options of training that stand in a YAML: which parts train, at which rates, and what is measured meanwhile."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.fields import MODE_ADAPTERS, TASK_LORAS
from mindformers_ixc.parameters import PARTS
from mindformers_ixc.scores import SCORES
from mindformers_ixc.sections import (
    Rule,
    above_0,
    check_keys,
    check_names,
    check_section,
    check_value,
    from_0,
    is_number,
    is_pattern,
    of_type,
    one_of,
    whole,
)

# A share that leaves something.
BELOW_1 = Rule(lambda value: is_number(value) and 0 <= value < 1, "a number of at least 0 and below 1")

# Networks that learn from pairs of answers, by the YAML's `model.arch.type`.
PAIR_NETWORKS = ("IXC25ForPreference", "IXC25ForReward")
PREFERENCE_NETWORK, REWARD_NETWORK = PAIR_NETWORKS
# The network that learns from rewards of sampled answers.
GROUP_NETWORK = "IXC25ForGRPO"

# The YAML's `part_learning_rates`, and what stands in it for a part.
PART_RULES = {"factor": above_0(), "layer_decay": above_0()}
RATE_RULES = dict.fromkeys(PARTS, Rule(lambda options: isinstance(options, dict) and bool(options),
                                       f"a section with {' and '.join(PART_RULES)}"))

# Metrics of the loss (with every sample's own images, and with another's); the others need answers.
LOSSES = ("loss", "shuffled_loss")

# Metrics of held-out pairs by a reward model; what begins so is measured with another pair's images.
SHUFFLED = "shuffled_"
PAIR_METRICS = (*LOSSES, "reward_accuracy", f"{SHUFFLED}reward_accuracy", "reward_margin", "reward_chosen",
                "reward_rejected")
# Of these those of which neither more nor less is better: a score is compared with that of the other answer only, and a
# model that looks at pictures is worse with another's by as much as that matters.
UNDIRECTED = tuple(name for name in PAIR_METRICS if name.startswith(SHUFFLED)
                   or name in ("reward_chosen", "reward_rejected"))
# Options of answers, which a reward model gives none of.
ANSWER_OPTIONS = ("max_new_tokens", "mode")

# The YAML's `evaluation`.
EVALUATION = {"dataset_dir": None, "image_folder": None, "every": 0, "metrics": ["loss"], "batch_size": 4,
              "max_new_tokens": 64, "max_samples": None, "mode": "base", "keep_best": None, "early_stopping": None}
EVALUATION_RULES = {
    "dataset_dir": of_type(str, list), "image_folder": of_type(str), "every": whole(0, " (0: at the end only)"),
    "metrics": of_type(list), "batch_size": whole(1), "max_new_tokens": whole(1), "max_samples": whole(1),
    "mode": one_of(MODE_ADAPTERS), "keep_best": of_type(str), "early_stopping": of_type(dict)}

# The YAML's `evaluation.early_stopping`.
EARLY_STOPPING = {"metric": None, "patience": 3, "min_delta": 0.0}
EARLY_STOPPING_RULES = {"metric": of_type(str, required=True), "patience": whole(1), "min_delta": from_0()}

# The YAML's `skip_spikes`, and the values of a step that may be one, in the order in which the step has their limits.
SPIKES: dict[str, Any] = {"loss": None, "grad_norm": None, "loss_times": None, "grad_norm_times": None, "window": 50,
                          "most_in_a_row": 10}
SPIKE_VALUES = ("loss", "grad_norm")
_ABOVE_1 = Rule(lambda value: is_number(value) and value > 1, "a number above 1")
SPIKE_RULES = {"loss": above_0(), "grad_norm": above_0(), "loss_times": _ABOVE_1, "grad_norm_times": _ABOVE_1,
               "window": whole(2), "most_in_a_row": whole(1)}


def spike_options(section: dict) -> dict:
    """Options of the YAML's `skip_spikes` with their defaults.

    Raises:
        ConfigError: for an unknown key or a wrong value, and for no limit at all.
    """
    check_section(section, SPIKE_RULES, "skip_spikes")
    options = {**SPIKES, **{key: value for key, value in section.items() if value is not None}}
    limits = [key for key in SPIKES if key.removesuffix("_times") in SPIKE_VALUES]
    if all(options[key] is None for key in limits):
        raise ConfigError(f"skip_spikes has no limit above which a step is skipped; give one of {', '.join(limits)}.")
    return options


# Switches of `pet_config` that only an ordinary LoRA has, and why DoRA is for one process: its magnitudes are the norms
# of the rows of weights that are whole and loaded when the network is built.
LORA_RULES = {"use_rslora": of_type(bool), "use_dora": of_type(bool)}
DORA_ALONE = ("model.model_config.pet_config.use_dora is for runs of one process: it measures whole rows of the "
              "weights that a run begins with. Set use_parallel to False, or leave DoRA out.")


# The YAML's `pet_config` by its `pet_type`. Of MindFormers' keys of `lora` those that are not here do nothing to this
# model's linears, whose pairs are always kept, computed and begun with like its other low-rank pairs.
_SHARED = {"target_modules": Rule(is_pattern, "a regular expression"), "freeze_include": of_type(list),
           "freeze_exclude": of_type(list)}
_PAIRS = {"rank": whole(1), "alpha": above_0(), "dropout": BELOW_1, **_SHARED}
PET_RULES: dict[str, dict[str, Rule]] = {
    "lora": {"lora_rank": whole(1), "lora_alpha": above_0(), "lora_dropout": BELOW_1, **_SHARED, **LORA_RULES},
    "partial_lora": _PAIRS, "task_lora": {"task": one_of(TASK_LORAS), **_PAIRS}}


def check_pet(section: dict, parallel: bool) -> None:
    """Checks a `pet_config` of this model.

    Raises:
        ConfigError: for a type that there is not, and the keys and values of each.
    """
    where = "model.model_config.pet_config"
    check_lora(section, parallel)
    given = {key: value for key, value in section.items() if value is not None}
    if not given:
        return
    kind = given.pop("pet_type", None)
    if kind not in PET_RULES:
        raise ConfigError(f"{where}.pet_type is {kind!r:.80}; the choices are {', '.join(PET_RULES)}, without which "
                          "everything would train.")
    check_section(given, PET_RULES[kind], where)
    if kind == "lora" and "target_modules" not in given:
        raise ConfigError(f"{where}.target_modules is missing; for pet_type lora it says by a regular expression which "
                          "linears get pairs, such as '.*(wqkv|wo|w1|w2|w3)'.")


def check_lora(section: dict, parallel: bool) -> None:
    """Checks the switches of a `pet_config` of which an ordinary LoRA has some.

    Raises:
        ConfigError: for a wrong value, a switch of another PET type, and DoRA in a parallel run.
    """
    where = "model.model_config.pet_config"
    for key, rule in LORA_RULES.items():
        value = section.get(key)
        if value is None:
            continue
        check_value(f"{where}.{key}", value, rule)
        if section.get("pet_type") != "lora":
            raise ConfigError(f"{where}.{key} is for pet_type lora, and this is {section.get('pet_type')!r}, whose "
                              "pairs act as the model's configuration says; take it out.")
    if section.get("use_dora") and parallel:
        raise ConfigError(DORA_ALONE)


def check_parts(parts: Iterable[str]) -> None:
    """Refuses names that are no part.

    Raises:
        ConfigError: naming the choices.
    """
    check_names("train_parts", parts, PARTS)


def check_rates(section: dict) -> None:
    """Refuses a `part_learning_rates` section with other parts, options or values.

    Raises:
        ConfigError: naming key, value and choices.
    """
    check_section(section, RATE_RULES, "part_learning_rates")
    for part, options in section.items():
        where = f"part_learning_rates.{part}"
        check_value(where, options, RATE_RULES[part])          # null has no meaning here
        check_keys(options, PART_RULES, where)
        for name, value in options.items():
            check_value(f"{where}.{name}", value, PART_RULES[name])
        if "layer_decay" in options and part != "vision":
            raise ConfigError(f"part_learning_rates.{part}.layer_decay: only the vision tower's rate decays by layer.")


def evaluation_options(section: dict, scored: bool = False) -> dict:
    """Options of the YAML's `evaluation` with their defaults.

    Args:
        section: of the YAML.
        scored: whether a reward model is trained, which scores held-out pairs and answers nothing.

    Raises:
        ConfigError: for an unknown key or metric, a wrong value, or a metric to go by that is not measured.
    """
    check_section(section, EVALUATION_RULES, "evaluation")
    options = {**EVALUATION, **{key: value for key, value in section.items() if value is not None}}
    check_names("evaluation.metrics", options["metrics"], PAIR_METRICS if scored else (*LOSSES, *SCORES))
    foreign = [key for key in ANSWER_OPTIONS if scored and section.get(key) is not None]
    if foreign:
        raise ConfigError(f"evaluation.{foreign[0]} is of answers, and a reward model writes none; take it out.")
    if options["keep_best"] is not None:
        _check_guide("evaluation.keep_best", options["keep_best"], options["metrics"])
    if not options["dataset_dir"]:
        raise ConfigError("evaluation.dataset_dir is empty; name the held-out samples.")
    if options["early_stopping"] is not None:
        options["early_stopping"] = _early_stopping(options)
    return options


def _early_stopping(evaluation: dict) -> dict:
    """Options of `evaluation.early_stopping` with their defaults."""
    where, section = "evaluation.early_stopping", evaluation["early_stopping"]
    check_section(section, EARLY_STOPPING_RULES, where)
    options = {**EARLY_STOPPING, **{key: value for key, value in section.items() if value is not None}}
    _check_guide(f"{where}.metric", options["metric"], evaluation["metrics"])
    if not evaluation["every"]:
        raise ConfigError(f"{where} needs evaluation.every, the steps between two measurements; it is 0, so there is "
                          "only one, at the end.")
    return options


def _check_guide(key: str, metric: str, metrics: list) -> None:
    """Refuses a metric to go by that is not measured, or of which neither more nor less is better."""
    if metric not in metrics:
        raise ConfigError(f"{key} is {metric!r}, which evaluation.metrics does not name.")
    if metric in UNDIRECTED:
        raise ConfigError(f"{key} is {metric!r}, of which neither more nor less is better; name another one.")


def sign_of(metric: str) -> int:
    """What a metric is multiplied by so that more is better: -1 of losses, 1 of scores."""
    return -1 if metric in LOSSES else 1
