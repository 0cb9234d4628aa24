"""Options of `model_config.preference`: which loss preference pairs have, and what belongs to it. No framework here.

| loss | of a pair | paper |
|---|---|---|
| sigmoid | -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h) | arXiv 2305.18290, s: label_smoothing |
| ipo | (h - 1 / (2 beta))^2 | arXiv 2310.12036 |
| simpo | -log sigmoid(beta (a(chosen) - a(rejected)) - gamma) | arXiv 2405.14734 |
| orpo | -a(chosen) - beta log sigmoid(odds(chosen) - odds(rejected)) | arXiv 2403.07691, where beta is lambda |

with l(y) the log-probability of an answer, a(y) the same a token, h = (l(chosen) - l(rejected)) less the reference's,
and odds = a - log(1 - exp(a)). To sigmoid and ipo `rpo_alpha` adds rpo_alpha (-a(chosen)), as in arXiv 2404.19733.
"""
from __future__ import annotations

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.sections import above_0, check_section, of_type, one_of

# Losses, and the options that each takes beside `task`, `loss` and `beta`, with their defaults.
LOSSES: dict[str, dict[str, float]] = {
    "sigmoid": {"label_smoothing": 0.0, "rpo_alpha": 0.0},
    "ipo": {"rpo_alpha": 0.0},
    "simpo": {"gamma": 1.0},      # half of beta, the ratio that the paper's code begins from
    "orpo": {},
}
REFERENCE_FREE = ("simpo", "orpo")
# The papers' or their code's: a mean a token is a hundredth of a sum, so SimPO's beta is larger.
BETA = {"sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}
TASK, LOSS = "dpo", "sigmoid"
RULES = {"task": of_type(str), "loss": one_of(LOSSES), "beta": above_0(), "label_smoothing": of_type(float),
         "rpo_alpha": of_type(float), "gamma": of_type(float)}


def preference_options(section: dict | None) -> dict:
    """Options of `model_config.preference` with their defaults: `task`, `loss`, `beta` and those of the loss.

    Raises:
        ConfigError: for an unknown option or value, or an option that the loss does not have.
    """
    check_section(section or {}, RULES, "model_config.preference")
    given = {key: value for key, value in (section or {}).items() if value is not None}
    loss = given.get("loss", LOSS)
    options = {"task": TASK, "loss": loss, "beta": BETA[loss], **LOSSES[loss]}
    for key, value in given.items():
        if key not in options and value:      # 0 is none of it, for any loss
            takers = [name for name, own in LOSSES.items() if key in own]
            raise ConfigError(f"model_config.preference.{key} is {value!r}, but the loss {loss} has no such option; it "
                              f"belongs to {' and '.join(takers)}.")
    options.update({key: value for key, value in given.items() if key in options})
    if not 0 <= options.get("label_smoothing", 0) < 0.5:
        raise ConfigError(f"model_config.preference.label_smoothing is {options['label_smoothing']!r}; it must be at "
                          "least 0 and below 0.5.")
    for key in ("rpo_alpha", "gamma"):
        if not 0 <= options.get(key, 0) < float("inf"):
            raise ConfigError(f"model_config.preference.{key} is {options[key]!r}; it must be a number of at least 0.")
    return options


def needs_reference(section: dict | None) -> bool:
    """Whether the loss compares with a reference model; `section` is `model_config.preference`."""
    return (section or {}).get("loss") not in REFERENCE_FREE
