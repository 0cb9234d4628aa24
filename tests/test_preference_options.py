"""Options of preference losses: defaults, and what cannot be meant."""
from __future__ import annotations

import pytest

from mindformers_ixc.errors import ConfigError
from mindformers_ixc.preference_options import LOSSES, needs_reference, preference_options


@pytest.mark.parametrize(("section", "expected"), [
    (None, {"task": "dpo", "loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "rpo_alpha": 0.0}),
    ({"beta": 0.3, "loss": "ipo", "task": "web"}, {"task": "web", "loss": "ipo", "beta": 0.3, "rpo_alpha": 0.0}),
    ({"loss": "simpo"}, {"task": "dpo", "loss": "simpo", "beta": 2.0, "gamma": 1.0}),
    ({"loss": "orpo", "beta": None}, {"task": "dpo", "loss": "orpo", "beta": 0.1}),
    ({"loss": "orpo", "label_smoothing": 0.0, "rpo_alpha": 0}, {"task": "dpo", "loss": "orpo", "beta": 0.1})])
def test_options_have_defaults(section, expected):
    assert preference_options(section) == expected


def test_two_losses_need_no_reference():
    assert [loss for loss in LOSSES if not needs_reference({"loss": loss})] == ["simpo", "orpo"]
    assert needs_reference(None) and needs_reference({"beta": 0.2})


@pytest.mark.parametrize(("section", "words"), [
    ({"bta": 0.1}, r"Unknown key .*preference\.bta \(value 0\.1\); the choices are task, loss, beta, label_smoothing"),
    ({"loss": "hinge"}, r"preference\.loss is 'hinge'; the choices are sigmoid, ipo, simpo, orpo"),
    ({"beta": 0}, r"preference\.beta is 0; it must be a number above 0"),
    ({"beta": -0.1}, r"preference\.beta is -0\.1"),
    ({"beta": float("nan")}, r"preference\.beta is nan"),
    ({"label_smoothing": 0.5}, r"label_smoothing is 0\.5; it must be at least 0 and below 0\.5"),
    ({"label_smoothing": -0.1}, r"label_smoothing is -0\.1"),
    ({"loss": "ipo", "label_smoothing": 0.1}, r"label_smoothing is 0\.1, but the loss ipo .* belongs to sigmoid"),
    ({"loss": "orpo", "label_smoothing": 0.1}, r"label_smoothing is 0\.1, but the loss orpo"),
    ({"loss": "simpo", "rpo_alpha": 1.0}, r"rpo_alpha is 1\.0, but the loss simpo .* belongs to sigmoid and ipo"),
    ({"loss": "orpo", "rpo_alpha": 1.0}, r"rpo_alpha is 1\.0, but the loss orpo"),
    ({"rpo_alpha": -1.0}, r"rpo_alpha is -1\.0; it must be a number of at least 0"),
    ({"rpo_alpha": float("inf")}, r"rpo_alpha is inf"),
    ({"gamma": 0.5}, r"gamma is 0\.5, but the loss sigmoid has no such option; it belongs to simpo"),
    ({"loss": "simpo", "gamma": float("nan")}, r"gamma is nan; it must be a number"),
    ({"loss": "simpo", "gamma": "much"}, r"preference\.gamma is 'much'; it must be a number")])
def test_options_that_cannot_be_meant_are_refused(section, words):
    with pytest.raises(ConfigError, match=words):
        preference_options(section)
