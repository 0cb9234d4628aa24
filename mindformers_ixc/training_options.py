"""Options of training that stand in a YAML: which parts train, at which rates, and what is measured meanwhile."""
from __future__ import annotations

from collections.abc import Iterable

from mindformers_ixc.config import MODE_ADAPTERS
from mindformers_ixc.errors import ConfigError
from mindformers_ixc.parameters import PARTS
from mindformers_ixc.scores import SCORES
from mindformers_ixc.sections import (
    Rule,
    above_0,
    check_keys,
    check_names,
    check_section,
    check_value,
    of_type,
    one_of,
    whole,
)

# Networks that learn from pairs of answers, by the YAML's `model.arch.type`.
PAIR_NETWORKS = ("IXC25ForPreference", "IXC25ForReward")
PREFERENCE_NETWORK, REWARD_NETWORK = PAIR_NETWORKS

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
# Options of answers, which a reward model gives none of.
ANSWER_OPTIONS = ("max_new_tokens", "mode")

# The YAML's `evaluation`.
EVALUATION = {"dataset_dir": None, "image_folder": None, "every": 0, "metrics": ["loss"], "batch_size": 4,
              "max_new_tokens": 64, "max_samples": None, "mode": "base", "keep_best": None}
EVALUATION_RULES = {
    "dataset_dir": of_type(str, list), "image_folder": of_type(str), "every": whole(0, " (0: at the end only)"),
    "metrics": of_type(list), "batch_size": whole(1), "max_new_tokens": whole(1), "max_samples": whole(1),
    "mode": one_of(MODE_ADAPTERS), "keep_best": of_type(str)}


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
        ConfigError: for an unknown key or metric, a wrong value, or a best metric that is not measured.
    """
    check_section(section, EVALUATION_RULES, "evaluation")
    options = {**EVALUATION, **{key: value for key, value in section.items() if value is not None}}
    check_names("evaluation.metrics", options["metrics"], PAIR_METRICS if scored else (*LOSSES, *SCORES))
    foreign = [key for key in ANSWER_OPTIONS if scored and section.get(key) is not None]
    if foreign:
        raise ConfigError(f"evaluation.{foreign[0]} is of answers, and a reward model writes none; take it out.")
    if options["keep_best"] is not None and options["keep_best"] not in options["metrics"]:
        raise ConfigError(f"evaluation.keep_best is {options['keep_best']!r}, which evaluation.metrics does not name.")
    if not options["dataset_dir"]:
        raise ConfigError("evaluation.dataset_dir is empty; name the held-out samples.")
    return options
