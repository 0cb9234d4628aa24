"""Options of `model_config.reward`: which loss a reward model learns from pairs by. No framework here.

A pair has the scores c of its chosen and r of its rejected answer; p = sigmoid(c - r).

| loss | of a pair | from |
|---|---|---|
| ranking | -log p | Bradley and Terry's model, as in arXiv 2203.02155 |
| focal | -(1 - 2 max(0, p - 1/2))^2 log p | arXiv 2403.17297 (InternLM2): pairs that are in order already count less |

To both `log_barrier` w adds w times the mean over the two scores s of -log(5 + s) - log(5 - s), which keeps scores
within (-5, 5); what lies further out counts as 0.001 inside, and is not pulled back.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindformers_ixc.sections import Rule, check_section, is_number, one_of

LOSSES = ("ranking", "focal")

# What scores stay within, and how near to it they count as the border itself.
BARRIER, EDGE = 5.0, 1e-3

DEFAULTS: dict[str, Any] = {"loss": "ranking", "log_barrier": 0.0}
RULES = {"loss": one_of(LOSSES),
         "log_barrier": Rule(lambda value: is_number(value) and 0 <= value < float("inf"), "a number of at least 0")}


def reward_options(section: Mapping | None) -> dict[str, Any]:
    """Options of `model_config.reward` with their defaults: `loss` and `log_barrier`.

    Raises:
        ConfigError: for an unknown option or value.
    """
    check_section(section or {}, RULES, "model_config.reward")
    return {**DEFAULTS, **{key: value for key, value in (section or {}).items() if value is not None}}
