"""Options of GRPO (arXiv 2402.03300): the loss, what is sampled, and the rules of rewards. No framework here.

A group is N answers to one prompt, sampled at temperature 1 from the whole vocabulary, because their log-probabilities
are those that the loss compares with. With r_i the reward of answer i, whose tokens t have the probabilities p under
the weights, q when they were sampled and f under the reference, which is the model without the pair that trains:

    A_i  = (r_i - mean r) / (std r + 1e-4), over the group; 0 where all its rewards are equal
    kl   = f / p - log(f / p) - 1, of a token (k3, an estimator that is never negative)
    loss = -mean_i mean_t [ min(p / q A_i, clip(p / q, 1 - c, 1 + c) A_i) - beta kl ]

A rule gives each answer a number; a reward is the sum of rules by their weights (`rollout.rewards`).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.scores import anls, check_libraries, exact_match, relaxed_accuracy
from mindformers_ixc.sections import Rule, above_0, check_section, is_number, of_type, whole

# Elements of HTML that have no end tag (HTML standard, section 13.1.2).
VOID = frozenset(("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"))


class _Tags(HTMLParser):
    """Whether every element of a page is closed where it should be."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.count, self.whole = 0, True
        self.feed(page)
        # what is left unread and begins so is a tag or comment that was cut off
        self.whole = self.whole and not self.rawdata.startswith("<")
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """Notes an element."""
        self.count += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        """Notes an element that is closed at once."""
        self.count += 1

    def handle_endtag(self, tag: str) -> None:
        """Closes the innermost element."""
        self.whole = self.whole and bool(self.open) and self.open.pop() == tag


def valid_html(answers: Sequence[str], expected: Sequence[str]) -> list[float]:
    """1 where an answer is HTML with an element at least and every element closed in its order, else 0.

    A Markdown fence around it is text, and no matter; what is expected is not looked at.
    """
    pages = [_Tags(answer) for answer in answers]
    return [float(page.whole and not page.open and page.count > 0) for page in pages]


# Rules by name: numbers of answers, given what is expected of each. A rule of one's own is one more entry.
RULES: dict[str, Callable[[Sequence[str], Sequence[str]], list[float]]] = {
    "exact_match": exact_match, "anls": anls, "relaxed_accuracy": relaxed_accuracy, "html": valid_html}

# The name of what a reward model gives, which needs its directory.
REWARD_MODEL = "reward_model"

_FROM_0 = Rule(lambda value: is_number(value) and value >= 0, "a number of at least 0")

# `model.model_config.grpo`. The paper's beta; it names no clip, so that of PPO (arXiv 1707.06347).
GRPO: dict[str, Any] = {"task": "dpo", "beta": 0.04, "clip": 0.2}
GRPO_RULES = {"task": of_type(str), "beta": _FROM_0, "clip": above_0()}

_FOLDER = Rule(lambda value: isinstance(value, str) and bool(value.strip()), "a directory of a reward model")

# `rollout`. One update of a round's answers, as in the paper's experiments.
ROLLOUT: dict[str, Any] = {"rewards": {"exact_match": 1.0}, "reward_model": None, "max_new_tokens": 64, "updates": 1}
ROLLOUT_RULES = {"rewards": of_type(dict), "reward_model": _FOLDER, "max_new_tokens": whole(1),
                 "updates": whole(1)}


def grpo_options(section: Mapping | None) -> dict[str, Any]:
    """Options of `model_config.grpo` with their defaults: `task`, `beta` and `clip`.

    Raises:
        ConfigError: for an unknown option or value.
    """
    return _with_defaults(section, GRPO_RULES, GRPO, "model_config.grpo")


def rollout_options(section: Mapping | None) -> dict[str, Any]:
    """Options of the YAML's `rollout` with their defaults.

    Raises:
        ConfigError: for an unknown option, rule or value, a rule whose library is missing, or a reward model that is
            named without a weight, or weighed and not named.
    """
    options = _with_defaults(section, ROLLOUT_RULES, ROLLOUT, "rollout")
    check_section(options["rewards"], dict.fromkeys((*RULES, REWARD_MODEL), Rule(is_number, "a number, its weight")),
                  "rollout.rewards")
    weights = {name: weight for name, weight in options["rewards"].items() if weight}
    if not weights:
        raise ConfigError("rollout.rewards has no rule with a weight, so nothing would be learnt; the rules are "
                          f"{', '.join((*RULES, REWARD_MODEL))}.")
    if (REWARD_MODEL in weights) != (options["reward_model"] is not None):
        raise ConfigError(f"rollout.reward_model is {options['reward_model']!r} and rollout.rewards.{REWARD_MODEL} "
                          f"{weights.get(REWARD_MODEL)!r}; a reward model needs both, its directory and its weight.")
    check_libraries(list(weights))
    return {**options, "rewards": weights}


def _with_defaults(section: Mapping | None, rules: Mapping[str, Rule], defaults: Mapping[str, Any],
                   where: str) -> dict[str, Any]:
    check_section(section or {}, rules, where)
    return {**defaults, **{key: value for key, value in (section or {}).items() if value is not None}}
