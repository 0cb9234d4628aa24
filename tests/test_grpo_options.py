"""Options of GRPO, and the rules that answers are rewarded by."""
from __future__ import annotations

import pytest

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.grpo_options import RULES, grpo_options, rollout_options, valid_html


@pytest.mark.parametrize(("page", "valid"), [
    ("<p>a</p>", 1), ("<!doctype html><html><body><img src='a.png'><br/><p>a<b>b</b></p></body></html>", 1),
    ("```html\n<p>a</p>\n```", 1), ("<hr>", 1), ("a text", 0), ("", 0), ("<p>a", 0), ("<b><i>a</b></i>", 0),
    ("</p>", 0), ("<p>a</p></div>", 0),
    # cut off in a tag or a comment; what is text may end anywhere
    ("<p>a</p><di", 0), ("<p>a</p><a href='b", 0), ("<p>a</p></", 0), ("<p>a</p><!-- b", 0), ("<p>a</p> 1 < 2 &am", 1)])
def test_a_page_is_valid_when_its_elements_close_in_order(page, valid):
    assert valid_html([page], ["whatever"]) == [valid]


def test_every_rule_gives_each_answer_a_number():
    for rule in RULES.values():
        values = rule(["<p>12</p>", "12"], ["12", "12"])
        assert len(values) == 2 and all(0 <= value <= 1 for value in values)
    assert RULES["exact_match"](["a ", "b"], ["a", "a"]) == [1, 0]


def test_what_is_not_said_is_the_default():
    assert grpo_options(None) == {"task": "dpo", "beta": 0.04, "clip": 0.2}
    assert grpo_options({"beta": 0, "clip": None}) == {"task": "dpo", "beta": 0, "clip": 0.2}
    assert rollout_options({})["rewards"] == {"exact_match": 1.0}
    assert rollout_options({"rewards": {"html": 2, "anls": 0}})["rewards"] == {"html": 2}


@pytest.mark.parametrize(("section", "words"), [
    ({"rewards": {"right": 1}}, "rollout.rewards.right"), ({"rewards": {"html": "1"}}, "html is '1'"),
    ({"rewards": {"html": float("nan")}}, "html is nan"), ({"rewards": {}}, "no rule with a weight"),
    ({"rewards": {"html": 0}}, "no rule with a weight"), ({"updates": 0}, "updates is 0"),
    ({"rewards": {"reward_model": 1}}, "needs both"), ({"reward_model": "out"}, "needs both"),
    ({"rewards": {"reward_model": 1}, "reward_model": ""}, "reward_model is ''; it must be a directory"),
    ({"group": 8}, "group")])
def test_a_rollout_that_cannot_be_is_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        rollout_options(section)


@pytest.mark.parametrize("section", [{"beta": -0.1}, {"clip": 0}, {"loss": "grpo"}])
def test_options_that_there_are_not_are_refused(section):
    with pytest.raises(ConfigError, match=r"model_config\.grpo"):
        grpo_options(section)
